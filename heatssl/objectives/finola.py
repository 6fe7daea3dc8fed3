"""Masked FINOLA: a visible quarter grows over the image by norm + linear steps (Chen et al., arXiv 2305.16319).

QB-Heat with another law: z_x = A norm(z), z_y = B norm(z), where norm takes mean and deviation over the channels of
one position away. One quarter of the image is encoded, the law fills in the other three, a decoder paints them.

Stated by the sources (the equations in arXiv 2410.08498, section 2.2; the two forms in the reviews of the paper): A
and B full, shared by all positions and images; ``block``: each visible position predicts the three that lie half a
map away, half a map's steps each; ``element``: the field grows from the quarter's edge, one position at a time.

Ours: the block lies in a corner; steps to the left and up are the same with a minus sign; a diagonal is the mean of
both orders; all of :mod:`heatssl.objectives.quarter`.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from heatssl.errors import check_choice
from heatssl.heat import NormLinear
from heatssl.objectives.quarter import Quarter
from heatssl.objectives.targets import Target
from heatssl.ops import by_corner

Growth = Literal["block", "element"]


class Finola(Quarter):
    """Visible quarter -> encoder -> norm + linear steps -> decoder -> pixels.

    Args:
        backbone: a timm model.
        image_size: pixels of the square images; the backbone's grid must have even sides.
        growth: ``block``, each quarter is the visible one after half a map's steps; or ``element``, each position
            is one step from its neighbour, starting at the visible quarter's edge.
        channels, projector_depth, decoder_width, decoder_depth, target, visible_weight: see
            :class:`heatssl.objectives.quarter.Quarter`.

    Raises:
        UserError: when the patch grid cannot be quartered.
        ValueError: on an unknown growth or target, or a field of one channel.
    """

    law: NormLinear

    def __init__(
        self,
        backbone: nn.Module,
        image_size: int,
        *,
        growth: Growth = "block",
        channels: int | None = None,
        projector_depth: int = 1,
        decoder_width: int = 128,
        decoder_depth: int = 1,
        target: Target = "normalised",
        visible_weight: float = 0.0,
    ) -> None:
        check_choice("growth", growth, get_args(Growth))
        super().__init__(
            backbone,
            image_size,
            lambda channels, *_: NormLinear(channels),
            channels=channels,
            projector_depth=projector_depth,
            decoder_width=decoder_width,
            decoder_depth=decoder_depth,
            target=target,
            visible_weight=visible_weight,
        )
        self.growth = growth

    def extrapolate(self, quarter: Tensor, corner: Tensor) -> Tensor:
        """See :meth:`Quarter.extrapolate`."""
        if self.growth == "block":
            return self.law.fill_quarters(quarter, corner)
        grown = [self.grow(group, row, column) for group, row, column in by_corner(quarter, corner)]
        return torch.cat(grown)

    def grow(self, quarter: Tensor, row: int, column: int) -> Tensor:
        """Away from the corner (row, column) where the quarter lies: (B, C, h/2, w/2) -> (B, C, h, w)."""
        return self.law.extend(
            quarter,
            left=column * self.width,
            right=(1 - column) * self.width,
            up=row * self.height,
            down=(1 - row) * self.height,
        )
