"""From what a caller writes to a target."""

import re

import torch
from torch import Tensor, nn

from heatssl.attribution.targets.channel import channel
from heatssl.attribution.targets.logits import ClassLogit, entropy, labels_of, margin
from heatssl.attribution.targets.similarity import Similarity
from heatssl.attribution.targets.target import Target, TargetMaker, embed
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe

TargetLike = str | int | Tensor | TargetMaker | Target


def make_target(model: nn.Module, images: Tensor, target: TargetLike, probe: LinearProbe | None = None) -> Target:
    """The target that :func:`heatssl.attribution.attribute` names.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: ``self``, ``margin``, ``entropy`` or ``channel:N``; a class for all images; integer classes (B,), one
            per image; embeddings (C,) or (B, C); what :func:`margin`, :func:`channel`, :func:`region` or
            :func:`neighbours` returned; or a target of these very images, which is returned as it is.
        probe: gives the class logits in place of the model's own classifier.

    Raises:
        UserError: on a class or channel that is not there, an embedding of another width, or another word.
    """
    if isinstance(target, Target):
        return target
    if callable(target):
        return target(model, images, probe)
    if isinstance(target, str):
        if target == "self":
            with torch.no_grad():
                return Similarity(model, embed(model, images))
        return by_name(target)(model, images, probe)
    target = torch.as_tensor(target)
    if not target.is_floating_point():
        return ClassLogit(model, labels_of(model, images, target, probe), probe)
    return Similarity(model, _references(model, images, target))


def by_name(word: str) -> TargetMaker:
    """The target that a word stands for on its own, ``self`` aside.

    Raises:
        UserError: when there is none.
    """
    if word in ("margin", "entropy"):
        return margin() if word == "margin" else entropy()
    if re.fullmatch(r"channel:\d+", word):
        return channel(int(word.removeprefix("channel:")))
    raise UserError(
        f"target {word!r} is unknown: use 'self', 'margin', 'entropy', 'channel:N', a class index, "
        "or the embedding to compare with"
    )


def _references(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """An embedding for all images, or one for each, as (B, C)."""
    with torch.no_grad():
        channels = embed(model, images[:1]).shape[1]
    reference = target.detach().to(images.device)
    if reference.shape not in ((channels,), (len(images), channels)):
        raise UserError(
            f"a target embedding must be ({channels},) or ({len(images)}, {channels}) like the model's, "
            f"not {tuple(target.shape)}"
        )
    return reference.expand(len(images), channels)
