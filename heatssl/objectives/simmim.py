"""SimMIM: a simple framework for masked image modeling (Xie et al., arXiv 2111.09886).

Large squares of the image are hidden. The backbone sees the whole grid, with a mask token in the place of each
hidden patch's embedding, and one linear layer turns its features into pixels.

Stated by the paper: the mask token inside the encoder; squares of 32 pixels (for images of 192 and 224), of
which 60 % are hidden; a linear head; the L1 loss on hidden pixels. Its authors' code (github.com/microsoft/SimMIM):
the number of hidden squares is rounded up; the mask token starts with deviation 0.02.

Ours: the square's default is a seventh of the image, 32 pixels at 224, in whole positions of the feature map;
where squares do not divide the map, those at its far edges are cut.
"""

import math

import torch
from torch import Tensor, nn

from heatssl.backbones import embedding_width, encode_masked, geometry
from heatssl.objectives.objective import Objective, Outputs
from heatssl.objectives.targets import patchify, to_pixels, unpatchify


class SimMIM(Objective):
    """Image with mask tokens -> backbone -> linear head -> pixels of the hidden squares.

    Args:
        backbone: a timm model with a patch embedding, Swin included.
        image_size: pixels of the square images.
        mask_ratio: share of the squares that is hidden.
        mask_unit: side of a square in pixels, a multiple of the feature stride; null: a seventh of the image.

    Raises:
        UserError: when the backbone has no patch embedding.
        ValueError: when nothing would be hidden or nothing visible, or a square is no whole number of patches.
    """

    def __init__(
        self,
        backbone: nn.Module,
        image_size: int,
        *,
        mask_ratio: float = 0.6,
        mask_unit: int | None = None,
    ) -> None:
        super().__init__()
        grid = geometry(backbone, image_size)
        self.patch = grid.stride
        if mask_unit is None:
            mask_unit = grid.stride * max(1, round(image_size / 7 / grid.stride))
        self.unit = mask_unit // grid.stride
        if self.unit < 1 or mask_unit % grid.stride:
            raise ValueError(f"mask_unit={mask_unit} is no multiple of the feature stride, {grid.stride} pixels")
        self.grid = (grid.rows, grid.columns)
        self.units = (math.ceil(grid.rows / self.unit), math.ceil(grid.columns / self.unit))
        self.hidden = math.ceil(self.units[0] * self.units[1] * mask_ratio)
        if not 0 < self.hidden < self.units[0] * self.units[1]:
            raise ValueError(f"mask_ratio={mask_ratio} hides {self.hidden} of {math.prod(self.units)} squares")
        self.mask_token = nn.Parameter(torch.empty(embedding_width(backbone)).normal_(std=0.02))
        self.backbone = backbone
        self.head = nn.Conv2d(grid.channels, 3 * self.patch**2, kernel_size=1)

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images (B, 3, S, S) -> loss over hidden pixels, no logs, the feature map (B, C, h, w)."""
        hidden = self.draw_mask(images)
        field = encode_masked(self.backbone, images, hidden, self.mask_token)
        error = (self.head(field) - patchify(images, self.patch)).abs().mean(dim=1)
        return Outputs((error * hidden).sum() / hidden.sum(), {}, field.detach())

    def draw_mask(self, images: Tensor) -> Tensor:
        """Which positions are hidden, new for each image: (B, h, w) bool, in squares."""
        noise = torch.rand(len(images), math.prod(self.units), device=images.device)
        squares = (noise.argsort(dim=1).argsort(dim=1) < self.hidden).unflatten(1, self.units)
        return to_pixels(squares, self.unit)[:, : self.grid[0], : self.grid[1]]

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Objective.maps`; visible pixels are shown as they are in the reconstruction, too."""
        hidden = self.draw_mask(images)
        painted = unpatchify(self.head(encode_masked(self.backbone, images, hidden, self.mask_token)), self.patch)
        visible = to_pixels(~hidden, self.patch)
        return {
            "visible": images * visible[:, None],
            "visible_mask": visible,
            "reconstruction": torch.where(visible[:, None], images, painted),
        }
