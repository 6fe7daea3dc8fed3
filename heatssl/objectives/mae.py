"""MAE: masked autoencoders are scalable vision learners (He et al., arXiv 2111.06377).

Three quarters of the patches are hidden at random. The encoder sees the others alone, at their true positions;
a decoder of transformer blocks gets its features and a mask token for each hidden patch, and paints these.

Stated by the paper: the random mask and its ratio; the encoder without mask tokens; one learned mask token;
fixed sine and cosine positions in the decoder; a decoder of 8 blocks, 512 wide, with 16 heads; mean squared
error on hidden patches only, each normalised by its own mean and standard deviation. Its authors' code
(github.com/facebookresearch/mae): weights drawn by Xavier's rule, the mask token with deviation 0.02.

Ours: any backbone that encodes single patches, with its own positions and its own start; the decoder gets no
class token; it takes patches in any order, so that nothing is put back in place before the loss.
"""

from typing import get_args

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from heatssl.backbones import check_encodes_patches, encode_visible, geometry
from heatssl.errors import check_choice
from heatssl.objectives.masks import random_parts
from heatssl.objectives.objective import Objective, Outputs
from heatssl.objectives.targets import Target, as_images, as_target, from_rows, rows, to_pixels


class MAE(Objective):
    """Random visible patches -> encoder -> decoder with mask tokens -> pixels of the hidden ones.

    Args:
        backbone: a timm transformer that encodes single patches.
        image_size: pixels of the square images.
        mask_ratio: share of the patches that is hidden.
        decoder_width, decoder_depth, decoder_heads: channels, blocks and attention heads of the decoder.
        target: ``normalised`` patches or ``plain`` pixels.

    Raises:
        UserError: when the backbone cannot encode single patches.
        ValueError: when nothing would be hidden or nothing visible, or on a decoder that cannot be built.
    """

    def __init__(
        self,
        backbone: nn.Module,
        image_size: int,
        *,
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        target: Target = "normalised",
    ) -> None:
        super().__init__()
        check_encodes_patches(backbone, "mae")
        check_choice("target", target, get_args(Target))
        if decoder_width % 4 or decoder_width % decoder_heads or decoder_depth < 1:
            raise ValueError("decoder_width must be a multiple of 4 and of decoder_heads, decoder_depth at least 1")
        grid = geometry(backbone, image_size)
        self.grid = (grid.rows, grid.columns)
        self.patch = grid.stride
        self.visible = int(grid.rows * grid.columns * (1 - mask_ratio))
        if not 0 < self.visible < grid.rows * grid.columns:
            raise ValueError(f"mask_ratio={mask_ratio} leaves {self.visible} of {grid.rows * grid.columns} patches")
        self.target: Target = target
        self.backbone = backbone
        self.enter = nn.Linear(grid.channels, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width).normal_(std=0.02))
        self.positions: Tensor
        self.register_buffer("positions", build_sincos2d_pos_embed(list(self.grid), decoder_width), persistent=False)
        blocks = [Block(decoder_width, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(decoder_width))
        self.leave = nn.Linear(decoder_width, 3 * self.patch**2)
        for part in (self.enter, self.blocks, self.leave):
            part.apply(xavier)

    def no_weight_decay(self) -> set[str]:
        """A vector, whatever its shape."""
        return {"mask_token"}

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images (B, 3, S, S) -> loss over hidden patches, no logs, visible features (B, C, n, 1)."""
        visible, hidden = self.split(images)
        features = encode_visible(self.backbone, images, visible)
        prediction = self.decode(features, visible, hidden)
        target = rows(as_target(images, self.patch, self.target)).take_along_dim(hidden[..., None], dim=1)
        loss = (prediction - target).square().mean()
        return Outputs(loss, {}, features.detach().transpose(1, 2)[..., None])

    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Random row-major indices of the visible (B, n) and the hidden patches (B, h w - n), new for each image."""
        return random_parts(len(images), self.grid[0] * self.grid[1], self.visible, 1, images.device)

    def decode(self, features: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Paint the hidden patches: features (B, n, C) and both kinds of indices -> (B, h w - n, 3 p p)."""
        known = self.enter(features) + self.positions[visible]
        asked = self.mask_token + self.positions[hidden]
        return self.leave(self.blocks(torch.cat([known, asked], dim=1))[:, visible.shape[1] :])

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Objective.maps`; visible patches are shown as they are in the reconstruction, too."""
        visible, hidden = self.split(images)
        painted = self.decode(encode_visible(self.backbone, images, visible), visible, hidden)
        known = rows(as_target(images, self.patch, self.target))
        whole = known.scatter(1, hidden[..., None].expand_as(painted), painted)
        mask = torch.ones(whole.shape[:2], dtype=torch.bool, device=images.device).scatter(1, hidden, False)
        pixels = to_pixels(mask.unflatten(1, self.grid), self.patch)
        return {
            "visible": images * pixels[:, None],
            "visible_mask": pixels,
            "reconstruction": as_images(from_rows(whole, self.grid), images, self.patch, self.target),
        }


def xavier(module: nn.Module) -> None:
    """Xavier's uniform rule for the weights of a linear layer, and no bias; other layers stay as they are."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
