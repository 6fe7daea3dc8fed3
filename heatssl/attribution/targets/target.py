"""What every target is, and the embedding that most of them look at."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from heatssl.backbones import pooled_features
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe


@runtime_checkable
class Target(Protocol):
    """Scores points that stem from the images of one batch."""

    uses_classifier: bool  # whether the score comes out of the model's own head

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:
        """Normalised images (N, 3, H, W), the batch index of each point's image (N,) -> scores (N,).

        ``local``: see :mod:`heatssl.attribution.targets.similarity`.
        """


TargetMaker = Callable[[nn.Module, Tensor, LinearProbe | None], Target]  # of a model, a batch (B, 3, H, W), a probe


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
