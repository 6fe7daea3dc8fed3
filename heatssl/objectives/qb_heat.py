"""QB-Heat: self-supervised learning based on the heat equation (Chen et al., arXiv 2211.13228).

One quarter block of the image is encoded; the law z_x = A z, z_y = B z extrapolates its features over the
other three quarters; a small decoder turns the whole field into pixels.

Stated by the paper: one visible block of a quarter of the image; the encoder never sees the rest, so any
backbone fits, with no mask token; linear extrapolation of the features by matrices shared over positions and
images; a small decoder; pixel reconstruction; A and B act as 1x1 convolutions.

Ours, since the paper's text could not be read that far, or because it works better here: the block lies in
one of the four corners; each visible position predicts the three positions half a map away, the moves of
(I + A)^w and (I + B)^h; steps to the left and up are inverse steps; the commuting, stable parametrisation by
default; the decoder's shape; the loss on hidden patches only, normalised per patch as in MAE (2111.06377) or
plain; the optional penalty on the commutator of full matrices; and the controls that can stand in for the law.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.backbones import encode_block, geometry
from heatssl.heat import Copy, FirstOrder, FreeLinear, MultilayerPerceptron, Propagator, commutator, spectral_radius
from heatssl.objectives.objective import Objective, Outputs
from heatssl.objectives.targets import patch_statistics, patchify, unpatchify

LawName = Literal["commuting", "full", "copy", "free", "mlp"]

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (row, column) of the visible quarter


class QBHeat(Objective):
    """Visible quarter -> encoder -> law -> decoder -> pixels.

    Args:
        backbone: a timm model.
        image_size: pixels of the square images; the backbone's grid must have even sides.
        law: ``commuting`` or ``full`` matrices of the first-order law, see :class:`heatssl.heat.FirstOrder`; or a
            control in its place: ``copy`` the quarter, one ``free`` linear map for each of the eight moves, or an
            ``mlp`` of features and move (:mod:`heatssl.heat.controls`).
        channels: width of the field that obeys the law; null: that of the backbone.
        projector_depth: number of 1x1 convolutions between the backbone and the field.
        decoder_width, decoder_depth: the decoder's channels and number of residual 3x3 blocks.
        target: ``normalised`` patches or ``plain`` pixels.
        visible_weight: weight of the visible quarter's reconstruction beside the hidden ones' (0: hidden only).
        commutator_weight: weight of ||AB - BA|| / (||A|| ||B||) in the loss; only acts on full matrices.

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
        target: Literal["normalised", "plain"] = "normalised",
        visible_weight: float = 0.0,
        commutator_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if target not in ("normalised", "plain"):
            raise ValueError(f"target must be 'normalised' or 'plain', not {target!r}")
        grid = geometry(backbone, image_size)
        self.block = self.height, self.width = grid.quarter()
        self.patch = grid.stride
        self.target = target
        self.visible_weight = visible_weight
        self.commutator_weight = commutator_weight
        self.backbone = backbone
        channels = channels or grid.channels
        self.to_field = projector(grid.channels, channels, projector_depth)
        self.law = create_law(law, channels, self.height, self.width)
        self.decoder = Decoder(channels, decoder_width, decoder_depth, outputs=3 * self.patch**2)

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images (B, 3, S, S) -> loss over hidden patches, logs, the extrapolated field (B, C, h, w)."""
        corner = corners_of_batch(images)
        quarter = self.encode(images, corner)
        field = self.extrapolate(quarter, corner)
        loss, logs = self.pixel_loss(self.decoder(field), images, corner)
        return Outputs(loss, logs, field.detach())

    def encode(self, images: Tensor, corner: Tensor) -> Tensor:
        """Encode the visible quarter alone: (B, 3, S, S), (B,) -> (B, C, h/2, w/2)."""
        rows, columns = (corner // 2) * self.height, (corner % 2) * self.width
        return self.to_field(encode_block(self.backbone, images, rows, columns, self.height, self.width))

    def extrapolate(self, quarter: Tensor, corner: Tensor) -> Tensor:
        """Fill the other three quarters by the law: (B, C, h/2, w/2), (B,) sorted -> (B, C, h, w)."""
        basis = self.law.basis()
        groups = self.law.enter(quarter, basis).split(torch.bincount(corner, minlength=len(CORNERS)).tolist())
        around = [self._around(group, *place) for group, place in zip(groups, CORNERS, strict=True)]
        return self.law.leave(torch.cat(around), basis)

    def _around(self, quarter: Tensor, row: int, column: int) -> Tensor:
        """The whole field around a quarter at one corner: each block is the quarter, moved by half a map."""

        def block(i: int, j: int) -> Tensor:
            return self.law.move(quarter, dx=(j - column) * self.width, dy=(i - row) * self.height)

        return torch.cat([torch.cat([block(i, 0), block(i, 1)], dim=3) for i in (0, 1)], dim=2)

    def pixel_loss(self, prediction: Tensor, images: Tensor, corner: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error per patch, averaged over hidden patches (and weighted visible ones)."""
        target = patchify(images, self.patch)
        if self.target == "normalised":
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        error = (prediction - target).square().mean(dim=1)
        visible = self.visible_mask(corner)
        hidden_loss, visible_loss = error[~visible].mean(), error[visible].mean()
        logs = {"loss/hidden": hidden_loss.detach(), "loss/visible": visible_loss.detach()}
        loss = hidden_loss
        if self.visible_weight:
            loss = loss + self.visible_weight * visible_loss
        if self.commutator_weight and isinstance(self.law, FirstOrder) and not self.law.commuting:
            loss = loss + self.commutator_weight * commutator(self.law.A, self.law.B)
        return loss, logs

    def visible_mask(self, corner: Tensor) -> Tensor:
        """Which positions are visible: (B,) -> (B, h, w) bool."""
        row = torch.arange(2 * self.height, device=corner.device) // self.height
        column = torch.arange(2 * self.width, device=corner.device) // self.width
        return (row[:, None] == corner[:, None, None] // 2) & (column == corner[:, None, None] % 2)

    @torch.no_grad()
    def health(self, outputs: Outputs) -> dict[str, float]:
        """Collapse figures, the law's residual on the whole field and, of a first-order law, how A and B behave."""
        field = outputs.field.float()
        relative = self.law.residual(field).mean() / field.square().mean().clamp_min(1e-12)
        figures = super().health(outputs) | {"health/law_residual": relative.item()}
        if isinstance(self.law, FirstOrder):
            a, b = self.law.A.float(), self.law.B.float()
            identity = torch.eye(self.law.channels, device=a.device)
            figures["health/commutator"] = commutator(a, b).item()
            figures["health/spectral_radius"] = max(spectral_radius(identity + m).item() for m in (a, b))
        return figures

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Objective.maps`; the residual of the extrapolated field shows the seams between quarters.

        With a normalised target the decoder does not know a patch's mean and contrast; the true ones are put
        back for viewing, as MAE's own figures do.
        """
        corner = corners_of_batch(images)
        field = self.extrapolate(self.encode(images, corner), corner)
        patches = self.decoder(field)
        if self.target == "normalised":
            mean, std = patch_statistics(patchify(images, self.patch))
            patches = patches * std + mean
        mask = self.visible_mask(corner)
        pixels = mask.repeat_interleave(self.patch, dim=1).repeat_interleave(self.patch, dim=2)
        return {
            "visible": images * pixels[:, None],
            "visible_mask": pixels,
            "reconstruction": unpatchify(patches, self.patch),
            "law_residual": self.law.residual(field),
        }


def create_law(name: LawName, channels: int, height: int, width: int) -> Propagator:
    """The law, or the control in its place, for moves by a quarter of (height, width) patches.

    Raises:
        ValueError: on an unknown name.
    """
    match name:
        case "commuting" | "full":
            return FirstOrder(channels, commuting=name == "commuting")
        case "copy":
            return Copy(channels)
        case "free":
            return FreeLinear(channels, [(dx, dy) for dx in (-width, 0, width) for dy in (-height, 0, height)])
        case "mlp":
            return MultilayerPerceptron(channels, reach=max(height, width))
        case _:
            raise ValueError(f"unknown law {name!r}: choose one of {', '.join(get_args(LawName))}")


def projector(inputs: int, channels: int, depth: int) -> nn.Sequential:
    """Features to field, (B, inputs, h, w) -> (B, channels, h, w): ``depth`` 1x1 convolutions, GELU between.

    With a depth above 1 the features that users keep need not be as linear in the pixels as the field must be.
    """
    layers: list[nn.Module] = [nn.Conv2d(inputs, channels, kernel_size=1)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Conv2d(channels, channels, kernel_size=1)]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """Field (B, C, h, w) -> patches (B, outputs, h, w): 1x1, ``depth`` residual 3x3 blocks, 1x1."""

    def __init__(self, channels: int, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, kernel_size=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, kernel_size=3, padding=1) for _ in range(depth))
        self.leave = nn.Conv2d(width, outputs, kernel_size=1)

    def forward(self, field: Tensor) -> Tensor:
        hidden = self.enter(field)
        for block in self.blocks:
            hidden = hidden + block(F.gelu(hidden))
        return self.leave(F.gelu(hidden))


def corners_of_batch(images: Tensor) -> Tensor:
    """Corner of the visible quarter of each image (B,): the first fourth of the batch shows the top left, and so on.

    Batches are shuffled, so each image meets every corner; sorted corners keep each propagation one product.
    """
    batch = images.shape[0]
    return torch.arange(batch, device=images.device) * len(CORNERS) // batch
