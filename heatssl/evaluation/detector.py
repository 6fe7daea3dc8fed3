"""FCOS (arXiv 1904.01355) over a simple feature pyramid (ViTDet, arXiv 2203.16527, section 3) of one frozen map.

FCOS, because it has no anchors: RetinaNet and Faster R-CNN need sizes and shapes of boxes chosen for images of about
800 pixels, FCOS takes its ranges from the strides. Its head, loss and suppression of overlaps are torchvision's.
"""

import math
from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS

from heatssl.errors import UserError

SCORE_THRESHOLD = 0.05  # FCOS, section 3.1: detections below it are left out
GROUPS = 32  # of channels, in the normalisation of torchvision's head


class SimplePyramid(nn.Module):
    """Maps of several strides from one map, each resized by itself, with no path between them.

    Args:
        channels: of the map.
        width: channels of every level, C'.
        scales: sizes of the levels, as multiples of the map's: powers of two, the largest first.

    Attributes:
        out_channels: the width, where torchvision looks for it.
    """

    def __init__(self, channels: int, width: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.out_channels = width
        self.levels = nn.ModuleList(_level(channels, width, scale) for scale in scales)

    def forward(self, maps: Tensor) -> list[Tensor]:
        """(B, C, h, w) -> (B, C', s h, s w) for each scale s; half of an odd number is rounded up."""
        return [level(maps) for level in self.levels]


def _level(channels: int, width: int, scale: float) -> nn.Sequential:
    """Deconvolutions or pooling, then a 1x1 and a 3x3 convolution, each with LayerNorm: ViTDet's."""
    layers: list[nn.Module] = []
    doublings = round(math.log2(scale))
    for number in range(doublings):
        half = max(channels // 2, 1)
        layers += [nn.ConvTranspose2d(channels, half, 2, stride=2)]
        layers += [LayerNorm2d(half), nn.GELU()] if number < doublings - 1 else []
        channels = half
    layers += [nn.MaxPool2d(2, stride=2, ceil_mode=True) for _ in range(-doublings)]
    layers += [nn.Conv2d(channels, width, 1, bias=False), LayerNorm2d(width)]
    layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)]
    return nn.Sequential(*layers)


class Detector(FCOS):
    """Boxes from frozen maps: torchvision's FCOS with maps in the place of images.

    Args:
        channels: C of the maps.
        prepare: what is done to the maps first, (B, C, h, w) -> same; it is not trained.
        classes: number K of classes.
        size: side S of the images in pixels; maps are h x h, their stride is S / h.
        width: channels of pyramid and head, a multiple of 32.
        scales: of the pyramid's levels.

    Raises:
        UserError: on a width or scales that cannot work.
    """

    def __init__(
        self, channels: int, prepare: nn.Module, classes: int, size: int, *, width: int, scales: Sequence[float]
    ) -> None:
        check_detector(width, scales)
        super().__init__(SimplePyramid(channels, width, scales), classes, score_thresh=SCORE_THRESHOLD)
        self.prepare = prepare
        self.size = size
        self.scales = tuple(scales)

    def losses(self, maps: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The three losses of FCOS, by name: the two of equation 2, and that of centre-ness (equation 3).

        Args:
            maps: (B, C, h, w).
            targets: of each image ``boxes`` (K, 4) in pixels, left, top, right, bottom, and ``labels`` (K,).
        """
        outputs, places, counts = self._read(maps)
        return self.compute_loss(targets, outputs, [places] * len(maps), counts)

    def forward(self, maps: Tensor) -> list[dict[str, Tensor]]:
        """What is found: of each image ``boxes`` (D, 4) in pixels, ``scores`` (D,) and ``labels`` (D,), D at most 100.

        Args:
            maps: (B, C, h, w).
        """
        outputs, places, counts = self._read(maps)
        by_level = {name: list(output.split(counts, dim=1)) for name, output in outputs.items()}
        anchors = [list(places.split(counts))] * len(maps)
        return self.postprocess_detections(by_level, anchors, [(self.size, self.size)] * len(maps))

    def _read(self, maps: Tensor) -> tuple[dict[str, Tensor], Tensor, list[int]]:
        """The head's outputs at all positions, where these are, and how many each level has."""
        levels = self.backbone(self.prepare(maps))
        stride = self.size / maps.shape[3]
        places = [
            locations(level.shape[2], level.shape[3], stride / scale)
            for level, scale in zip(levels, self.scales, strict=True)
        ]
        return self.head(levels), torch.cat(places).to(maps.device), [len(each) for each in places]


def locations(rows: int, columns: int, stride: float) -> Tensor:
    """Where the positions of a level stand in the image: squares (rows columns, 4) of the stride's side, in pixels.

    The centre of position (x, y) is (s / 2 + x s, s / 2 + y s): FCOS, section 3.1. torchvision's own anchors leave out
    s / 2, so that a level and its mirror image would not fit the same boxes.
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corner = torch.stack([x, y], dim=2).flatten(0, 1) * stride
    return torch.cat([corner, corner + stride], dim=1)


def check_detector(width: int, scales: Sequence[float]) -> None:
    """Refuse what no detector can be made of.

    Raises:
        UserError: naming the setting.
    """
    if width < GROUPS or width % GROUPS:
        raise UserError(f"width={width} must be a multiple of {GROUPS}, such as 64: the head has so many groups")
    if not scales or any(scale <= 0 or not math.log2(scale).is_integer() for scale in scales):
        raise UserError(f"scales={list(scales)} must be powers of two, such as [2,1,0.5]")
    if list(scales) != sorted(set(scales), reverse=True):
        raise UserError(f"scales={list(scales)} must fall, each once, such as [2,1,0.5]")
