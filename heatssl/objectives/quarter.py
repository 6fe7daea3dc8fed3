"""What QB-Heat and masked FINOLA share: one visible quarter is encoded, a law fills in the rest, a decoder paints it.

    images -> backbone sees one quarter alone -> field -> law: all four quarters -> decoder -> pixels

The block lies in one of the four corners. The loss is a mean squared error on hidden patches, normalised per patch
as in MAE (2111.06377) or plain; the papers' texts could not be read that far.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.backbones import encode_block, feature_map, geometry, is_token_model
from heatssl.errors import UserError, check_choice
from heatssl.heat import Propagator, relative_residual
from heatssl.objectives.extrapolation import Extrapolation
from heatssl.objectives.objective import Objective, Outputs, Story
from heatssl.objectives.targets import Target, as_images, as_target, to_pixels

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (row, column) of the visible quarter


class Quarter(Objective, ABC):
    """Visible quarter -> encoder -> law -> decoder -> pixels.

    Args:
        backbone: a timm model.
        image_size: pixels of the square images; the backbone's grid must have even sides.
        law: from the field's channels and the quarter's rows and columns, in patches, to the law.
        channels: width of the field that obeys the law; null: that of the backbone.
        projector_depth: number of 1x1 convolutions between the backbone and the field.
        decoder_width, decoder_depth: the decoder's channels and number of residual 3x3 blocks.
        target: ``normalised`` patches or ``plain`` pixels.
        visible_weight: weight of the visible quarter's reconstruction beside the hidden ones' (0: hidden only).

    Attributes:
        corner: where the quarters of the latest batch lie (B,), for :meth:`health`; None before the first.

    Raises:
        UserError: when the patch grid cannot be quartered.
        ValueError: on an unknown target, or a field without channels.
    """

    corner: Tensor | None = None

    story = Story(
        "What the law fills in",
        "The encoder saw only the visible quarter. The law moved its features over the rest of the image, "
        "and a small decoder turned them into pixels.",
        {"visible": "visible quarter", "reconstruction": "filled in by the law"},
    )

    def __init__(
        self,
        backbone: nn.Module,
        image_size: int,
        law: Callable[[int, int, int], Propagator],
        *,
        channels: int | None,
        projector_depth: int,
        decoder_width: int,
        decoder_depth: int,
        target: Target,
        visible_weight: float,
    ) -> None:
        super().__init__()
        check_choice("target", target, get_args(Target))
        grid = geometry(backbone, image_size)
        check_stride(backbone, grid.stride, image_size)
        self.block = self.height, self.width = grid.quarter()
        self.patch = grid.stride
        self.target: Target = target
        self.visible_weight = visible_weight
        self.backbone = backbone
        channels = grid.channels if channels is None else channels
        self.to_field = projector(grid.channels, channels, projector_depth)
        self.law = law(channels, self.height, self.width)
        self.decoder = Decoder(channels, decoder_width, decoder_depth, outputs=3 * self.patch**2)

    @abstractmethod
    def extrapolate(self, quarter: Tensor, corner: Tensor) -> Tensor:
        """Fill the other three quarters by the law: (B, C, h/2, w/2), (B,) sorted -> (B, C, h, w)."""

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images (B, 3, S, S) -> loss over hidden patches, logs, the quarter's field (B, C, h/2, w/2)."""
        self.corner = corner = random_corners(images)
        quarter = self.encode(images, corner)
        field = self.extrapolate(quarter, corner)
        loss, logs = self.pixel_loss(self.decoder(field), images, corner)
        return Outputs(loss, logs, quarter.detach())

    def encode(self, images: Tensor, corner: Tensor) -> Tensor:
        """Encode the visible quarter alone: (B, 3, S, S), (B,) -> (B, C, h/2, w/2)."""
        rows, columns = (corner // 2) * self.height, (corner % 2) * self.width
        return self.to_field(encode_block(self.backbone, images, rows, columns, self.height, self.width))

    def pixel_loss(self, prediction: Tensor, images: Tensor, corner: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error per patch, averaged over hidden patches (and weighted visible ones)."""
        error = (prediction - as_target(images, self.patch, self.target)).square().mean(dim=1)
        visible = self.visible_mask(corner)
        hidden_loss, visible_loss = error[~visible].mean(), error[visible].mean()
        logs = {"loss/hidden": hidden_loss.detach(), "loss/visible": visible_loss.detach()}
        loss = hidden_loss
        if self.visible_weight:
            loss = loss + self.visible_weight * visible_loss
        return loss, logs

    def visible_mask(self, corner: Tensor) -> Tensor:
        """Which positions are visible: (B,) -> (B, h, w) bool."""
        row = torch.arange(2 * self.height, device=corner.device) // self.height
        column = torch.arange(2 * self.width, device=corner.device) // self.width
        return (row[:, None] == corner[:, None, None] // 2) & (column == corner[:, None, None] % 2)

    @torch.no_grad()
    def health(self, outputs: Outputs) -> dict[str, float]:
        """Collapse figures of the quarter, before a law has turned it, and the relative residual of the whole field."""
        quarter = outputs.field.float()
        corner = corners_of_batch(quarter) if self.corner is None else self.corner
        field = self.extrapolate(quarter, corner)
        return super().health(outputs) | {"health/law_residual": relative_residual(self.law, field).item()}

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Objective.maps`; the residual of the extrapolated field shows the seams between quarters."""
        corner = corners_of_batch(images)
        field = self.extrapolate(self.encode(images, corner), corner)
        pixels = to_pixels(self.visible_mask(corner), self.patch)
        return {
            "visible": images * pixels[:, None],
            "visible_mask": pixels,
            "reconstruction": as_images(self.decoder(field), images, self.patch, self.target),
            "law_residual": self.law.residual(field),
        }

    @torch.no_grad()
    def extrapolation(self, images: Tensor) -> Extrapolation:
        """See :meth:`Objective.extrapolation`; the quarters are those that :meth:`maps` shows."""
        corner = corners_of_batch(images)
        filled = self.extrapolate(self.encode(images, corner), corner)
        return Extrapolation(filled, self.to_field(feature_map(self.backbone, images)), self.visible_mask(corner))


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

    Batches are shuffled, so each image meets every corner where a batch has four images or more; with fewer, see
    :func:`random_corners`. Sorted corners keep each propagation one product.
    """
    batch = images.shape[0]
    return torch.arange(batch, device=images.device) * len(CORNERS) // batch


def random_corners(images: Tensor) -> Tensor:
    """:func:`corners_of_batch`; but those of fewer than four images are drawn, so that no corner is never shown."""
    corner = corners_of_batch(images)
    if len(corner) >= len(CORNERS):
        return corner
    offset = int(torch.randint(len(CORNERS), ()))
    return ((corner + offset) % len(CORNERS)).sort().values


def check_stride(backbone: Any, stride: int, image_size: int) -> None:
    """Refuse images whose map a convolutional model rounds up: it shows each quarter with a part of its neighbours.

    Raises:
        UserError: when a position of the map is not as many pixels as the model's stride.
    """
    if is_token_model(backbone):
        return
    own = int(backbone.feature_info[-1]["reduction"])
    if stride != own:
        raise UserError(
            f"data.image_size={image_size} is no two halves of whole strides of {own} pixels, which "
            f"{type(backbone).__name__} has: use a multiple of {2 * own}"
        )
