"""Targets of a classifier: the model's own, or a probe on the pooled embedding."""

import torch
from torch import Tensor, nn

from heatssl.attribution.targets.target import Target, TargetMaker, embed
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe


class ClassLogit:
    """One logit per image, of the class ``label`` (B,)."""

    def __init__(self, model: nn.Module, label: Tensor, probe: LinearProbe | None) -> None:
        self.model = model
        self.label = label
        self.probe = probe
        self.uses_classifier = probe is None

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:  # noqa: ARG002
        return logits_of(self.model, points, self.probe).gather(1, self.label[owner, None])[:, 0]


class Margin:
    """The logit of the class ``label`` (B,) minus the largest of the others: over 0 where that class wins."""

    def __init__(self, model: nn.Module, label: Tensor, probe: LinearProbe | None) -> None:
        self.model = model
        self.label = label
        self.probe = probe
        self.uses_classifier = probe is None

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:  # noqa: ARG002
        logits, label = logits_of(self.model, points, self.probe), self.label[owner, None]
        others = logits.scatter(1, label, -torch.inf).amax(dim=1)
        return logits.gather(1, label)[:, 0] - others


class Entropy:
    """How unsure the classifier is: - sum of p log p in nats, from 0 to the logarithm of the number of classes."""

    def __init__(self, model: nn.Module, probe: LinearProbe | None) -> None:
        self.model = model
        self.probe = probe
        self.uses_classifier = probe is None

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:  # noqa: ARG002
        return torch.special.entr(logits_of(self.model, points, self.probe).softmax(dim=1)).sum(dim=1)


def margin(label: int | Tensor | None = None) -> TargetMaker:
    """:class:`Margin` of a class, of one per image (B,), or of the class that the classifier gives each image."""

    def make(model: nn.Module, images: Tensor, probe: LinearProbe | None) -> Target:
        if class_count(model, images, probe) < 2:
            raise UserError("a margin needs two classes or more: use another target")
        if label is None:
            with torch.no_grad():
                return Margin(model, logits_of(model, images, probe).argmax(dim=1), probe)
        return Margin(model, labels_of(model, images, label, probe), probe)

    return make


def entropy() -> TargetMaker:
    """:class:`Entropy` of the classifier."""

    def make(model: nn.Module, images: Tensor, probe: LinearProbe | None) -> Target:
        class_count(model, images, probe)
        return Entropy(model, probe)

    return make


def logits_of(model: nn.Module, points: Tensor, probe: LinearProbe | None) -> Tensor:
    """Images (N, 3, H, W) -> logits (N, K) float32."""
    return (model(points) if probe is None else probe.logits(embed(model, points))).float()


def labels_of(model: nn.Module, images: Tensor, label: int | Tensor, probe: LinearProbe | None) -> Tensor:
    """A class, or one per image, as (B,) on the device of the images.

    Raises:
        UserError: when there is no classifier, or it has no such class.
    """
    labels = torch.as_tensor(label, device=images.device).long()
    if labels.shape not in ((), (len(images),)):
        raise UserError(f"a target is one class or {len(images)}, one for each image, not {tuple(labels.shape)}")
    labels = labels.expand(len(images))
    classes = class_count(model, images, probe)
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"there are {classes} classes: choose a target from 0 to {classes - 1}, not {labels.tolist()}")
    return labels


def class_count(model: nn.Module, images: Tensor, probe: LinearProbe | None) -> int:
    """How many classes there are.

    Raises:
        UserError: when there is no classifier.
    """
    if probe is not None:
        return len(probe.bias)
    if getattr(model, "num_classes", None) == 0:
        raise UserError("this backbone has no classifier: pass probe=..., or target='self'")
    with torch.no_grad():
        output = model(images[:1])
    if output.ndim != 2:
        raise UserError(
            f"{type(model).__name__} returns {tuple(output.shape)}, not logits: pass probe=..., or target='self'"
        )
    return output.shape[1]
