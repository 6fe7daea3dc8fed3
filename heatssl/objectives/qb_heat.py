"""QB-Heat: self-supervised learning based on the heat equation (Chen et al., arXiv 2211.13228).

One quarter block of the image is encoded; the law z_x = A z, z_y = B z extrapolates its features over the
other three quarters; a small decoder turns the whole field into pixels.

Stated by the paper: one visible block of a quarter of the image; the encoder never sees the rest, so any
backbone fits, with no mask token; linear extrapolation of the features by matrices shared over positions and
images; a small decoder; pixel reconstruction; A and B act as 1x1 convolutions.

Ours, since the paper's text could not be read that far, or because it works better here: the block lies in
one of the four corners; each visible position predicts the three positions half a map away, the moves of
(I + A)^w and (I + B)^h; steps to the left and up are inverse steps; the commuting, stable parametrisation by
default; the decoder's shape; the loss on hidden patches only; the optional penalty on the commutator of full
matrices; and the controls that can stand in for the law.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from heatssl.errors import check_choice
from heatssl.heat import Copy, FirstOrder, FreeLinear, MultilayerPerceptron, Propagator, commutator, spectral_radius
from heatssl.objectives.objective import Outputs
from heatssl.objectives.quarter import Quarter
from heatssl.objectives.targets import Target

LawName = Literal["commuting", "full", "copy", "free", "mlp"]


class QBHeat(Quarter):
    """Visible quarter -> encoder -> law, block by block -> decoder -> pixels.

    Args:
        backbone: a timm model.
        image_size: pixels of the square images; the backbone's grid must have even sides.
        law: ``commuting`` or ``full`` matrices of the first-order law, see :class:`heatssl.heat.FirstOrder`; or a
            control in its place: ``copy`` the quarter, one ``free`` linear map for each of the eight moves, or an
            ``mlp`` of features and move (:mod:`heatssl.heat.controls`).
        commutator_weight: weight of ||AB - BA|| / (||A|| ||B||) in the loss; only acts on full matrices.
        channels, projector_depth, decoder_width, decoder_depth, target, visible_weight: see
            :class:`heatssl.objectives.quarter.Quarter`.

    Raises:
        UserError: when the patch grid cannot be quartered.
        ValueError: on an unknown law or target.
    """

    def __init__(
        self,
        backbone: nn.Module,
        image_size: int,
        *,
        law: LawName = "commuting",
        channels: int | None = None,
        projector_depth: int = 1,
        decoder_width: int = 128,
        decoder_depth: int = 1,
        target: Target = "normalised",
        visible_weight: float = 0.0,
        commutator_weight: float = 0.0,
    ) -> None:
        super().__init__(
            backbone,
            image_size,
            lambda channels, height, width: create_law(law, channels, height, width),
            channels=channels,
            projector_depth=projector_depth,
            decoder_width=decoder_width,
            decoder_depth=decoder_depth,
            target=target,
            visible_weight=visible_weight,
        )
        self.commutator_weight = commutator_weight

    def extrapolate(self, quarter: Tensor, corner: Tensor) -> Tensor:
        """See :meth:`Quarter.extrapolate`: each block is the quarter, moved by half a map."""
        return self.law.fill_quarters(quarter, corner)

    def pixel_loss(self, prediction: Tensor, images: Tensor, corner: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Quarter.pixel_loss`; with the penalty on matrices that do not commute."""
        loss, logs = super().pixel_loss(prediction, images, corner)
        if self.commutator_weight and isinstance(self.law, FirstOrder) and not self.law.commuting:
            loss = loss + self.commutator_weight * commutator(self.law.A, self.law.B)
        return loss, logs

    @torch.no_grad()
    def health(self, outputs: Outputs) -> dict[str, float]:
        """See :meth:`Quarter.health`; and, of a first-order law, how A and B behave."""
        figures = super().health(outputs)
        if isinstance(self.law, FirstOrder):
            a, b = self.law.A.float(), self.law.B.float()
            identity = torch.eye(self.law.channels, device=a.device)
            figures["health/commutator"] = commutator(a, b).item()
            figures["health/spectral_radius"] = max(spectral_radius(identity + m).item() for m in (a, b))
        return figures


def create_law(name: LawName, channels: int, height: int, width: int) -> Propagator:
    """The law, or the control in its place, for moves by a quarter of (height, width) patches.

    Raises:
        ValueError: on an unknown name.
    """
    check_choice("law", name, get_args(LawName))
    match name:
        case "commuting" | "full":
            return FirstOrder(channels, commuting=name == "commuting")
        case "copy":
            return Copy(channels)
        case "free":
            return FreeLinear(channels, [(dx, dy) for dx in (-width, 0, width) for dy in (-height, 0, height)])
        case "mlp":
            return MultilayerPerceptron(channels, reach=max(height, width))
