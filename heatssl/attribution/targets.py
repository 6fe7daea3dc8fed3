"""What an attribution explains: one number per image, made from the model's output.

A trap lies in "cosine to the image's own embedding". At the image itself that cosine is 1, its maximum, so
its gradient vanishes and every method that takes the gradient there (Grad-CAM, saliency) returns zero or
rounding noise. The zero comes from the norm in the denominator alone. A local method therefore asks for the
cosine with that norm held fixed (``local=True``): the value is the same, and the gradient is that of the
inner product with the embedding, which says how much each position adds to it. Path methods (integrated
gradients) meet the image only in the limit, and use the cosine proper.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.backbones import pooled_features
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe

TargetLike = str | int | Tensor


class Target(Protocol):
    """Scores points that stem from the images of one batch."""

    uses_classifier: bool  # whether the score comes out of the model's own head

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:
        """Normalised images (N, 3, H, W), the batch index of each point's image (N,) -> scores (N,)."""


class Similarity:
    """Cosine of the pooled embedding to a reference (B, C), one per image of the batch."""

    uses_classifier = False

    def __init__(self, model: nn.Module, reference: Tensor) -> None:
        self.model = model
        self.reference = F.normalize(reference.float(), dim=1)

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:
        embedding = embed(self.model, points).float()
        norm = embedding.norm(dim=1).clamp_min(1e-12)
        if local:
            norm = norm.detach()
        return (embedding * self.reference[owner]).sum(dim=1) / norm


class ClassLogit:
    """One logit per image: of the model's own classifier, or of a probe on the pooled embedding."""

    def __init__(self, model: nn.Module, label: Tensor, probe: LinearProbe | None) -> None:
        self.model = model
        self.label = label
        self.probe = probe
        self.uses_classifier = probe is None

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:  # noqa: ARG002
        logits = self.model(points) if self.probe is None else self.probe.logits(embed(self.model, points))
        return logits.float().gather(1, self.label[owner, None])[:, 0]


def make_target(model: nn.Module, images: Tensor, target: TargetLike, probe: LinearProbe | None = None) -> Target:
    """The target that :func:`heatssl.attribution.attribute` names.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: ``self``; a class for all images; integer classes (B,), one per image; or embeddings (C,) or
            (B, C).
        probe: gives the class logits in place of the model's own classifier.

    Raises:
        UserError: on a class that is not there, an embedding of another width, or another word than ``self``.
    """
    batch = len(images)
    if isinstance(target, str):
        if target != "self":
            raise UserError(
                f"target {target!r} is unknown: use 'self', a class index, or the embedding to compare with"
            )
        with torch.no_grad():
            return Similarity(model, embed(model, images))
    if isinstance(target, int) or not target.is_floating_point():
        label = torch.as_tensor(target, device=images.device).long().expand(batch)
        _check_classes(model, images, label, probe)
        return ClassLogit(model, label, probe)
    with torch.no_grad():
        channels = embed(model, images[:1]).shape[1]
    reference = target.detach().to(images.device)
    if reference.shape not in ((channels,), (batch, channels)):
        raise UserError(
            f"a target embedding must be ({channels},) or ({batch}, {channels}) like the model's, "
            f"not {tuple(target.shape)}"
        )
    return Similarity(model, reference.expand(batch, channels))


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Pooled embedding (B, C): of a timm model, or the output (B, C) of any other module.

    Raises:
        UserError: when another module's output is of another shape.
    """
    if hasattr(model, "forward_features"):
        return pooled_features(model, images)
    output = model(images)
    if output.ndim != 2:
        raise UserError(
            f"{type(model).__name__} returns {tuple(output.shape)}, not one embedding per image: use a timm model"
        )
    return output


def _check_classes(model: nn.Module, images: Tensor, label: Tensor, probe: LinearProbe | None) -> None:
    if probe is not None:
        classes = len(probe.bias)
    elif getattr(model, "num_classes", None) == 0:
        raise UserError("this backbone has no classifier: pass probe=..., or target='self'")
    else:
        with torch.no_grad():
            output = model(images[:1])
        if output.ndim != 2:
            raise UserError(
                f"{type(model).__name__} returns {tuple(output.shape)}, not logits: pass probe=..., or target='self'"
            )
        classes = output.shape[1]
    if label.min() < 0 or label.max() >= classes:
        raise UserError(f"there are {classes} classes: choose a target from 0 to {classes - 1}, not {label.tolist()}")
