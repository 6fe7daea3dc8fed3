"""Where an image looks like one region of another."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.attribution.targets.target import Target, TargetMaker
from heatssl.backbones import feature_map
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe

Box = tuple[float, float, float, float]  # left, top, right, bottom in fractions of the image


class Correspondence:
    """Mean over positions of the cosine of each position's feature to a reference (C,).

    The gradient of a position's own feature, times that feature, is that position's cosine (with its norm held
    fixed, ``local=True``): methods that weigh position by position return the map of cosines.
    """

    uses_classifier = False

    def __init__(self, model: nn.Module, reference: Tensor) -> None:
        self.model = model
        self.reference = F.normalize(reference.float(), dim=0)

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:  # noqa: ARG002
        field = feature_map(self.model, points).float()
        norm = field.norm(dim=1).clamp_min(1e-12)
        if local:
            norm = norm.detach()
        return (torch.einsum("bchw,c->bhw", field, self.reference) / norm).mean(dim=(1, 2))


def region(image: Tensor, box: Box) -> TargetMaker:
    """:class:`Correspondence` to the mean feature of one region of an image.

    Args:
        image: normalised (3, H, W), of any image that the model takes.
        box: left, top, right, bottom in fractions of the image; the positions whose centres lie inside count,
            or the one nearest to the middle of the box where none does.

    Raises:
        UserError: when the box is not inside the image, or the model has no feature map.
    """
    left, top, right, bottom = box
    if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
        raise UserError(f"the region {box} is not inside the image: give left <= right and top <= bottom in [0, 1]")

    def make(model: nn.Module, images: Tensor, probe: LinearProbe | None) -> Target:  # noqa: ARG001
        if not hasattr(model, "forward_features"):
            raise UserError(f"{type(model).__name__} is no timm model and has no feature map: use another target")
        with torch.no_grad():
            field = feature_map(model, image[None].to(images))[0]
        rows, columns = (_inside(*side) for side in ((field.shape[1], top, bottom), (field.shape[2], left, right)))
        return Correspondence(model, field[:, rows][:, :, columns].mean(dim=(1, 2)))

    return make


def _inside(count: int, start: float, end: float) -> list[int]:
    """The positions of one side whose centres lie in [start, end], or the nearest to its middle."""
    centres = [(i + 0.5) / count for i in range(count)]
    found = [i for i, centre in enumerate(centres) if start <= centre <= end]
    return found or [min(range(count), key=lambda i: abs(centres[i] - (start + end) / 2))]
