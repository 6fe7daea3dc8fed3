"""What a layer returns, as a field of positions."""

import inspect
import math
from collections.abc import Iterator
from typing import Any

from timm.layers import HybridEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from heatssl.errors import UserError

MOST_DISTORTED = 0.5  # strides round sides, and a grid may be as small as 2 x 3
Grid = tuple[int, int]  # rows and columns


def as_field(backbone: Any, output: Tensor, images: Tensor) -> Tensor:
    """What a layer returns, or its gradient, as a field, by the model's own geometry.

    Args:
        backbone: the model the layer belongs to.
        output: tokens (B, k + n, C), or a map (B, C, h, w) or (B, h, w, C), whichever has the shape of the image.
        images: the images (B, 3, H, W) behind it.

    Returns:
        (B, C, h, w), prefix tokens left out.

    Raises:
        UserError: when the output is no grid of positions.
    """
    field = field_or_none(backbone, output, images)
    if field is None:
        shape = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UserError(f"a layer of {type(backbone).__name__} returns {shape}, no grid: choose another layer")
    return field


def field_or_none(backbone: Any, output: object, images: Tensor) -> Tensor | None:
    """:func:`as_field`, or None where that refuses."""
    if not isinstance(output, Tensor):
        return None
    return _of_map(backbone, output, images) if output.ndim == 4 else _of_tokens(backbone, output, images)


def is_token_model(backbone: Any) -> bool:
    """Whether :func:`heatssl.backbones.encode_visible` can run this model."""
    if takes_visible(backbone):
        return True
    # A hybrid's patches are those of a convolutional net's map, which sees beyond them.
    return isinstance(backbone, VisionTransformer | Eva) and not isinstance(backbone.patch_embed, HybridEmbed)


def check_encodes_patches(backbone: Any, asker: str) -> None:
    """Refuse a model that :func:`heatssl.backbones.encode_visible` cannot run, in the name of who asks for it.

    Raises:
        UserError: with the kinds that it can.
    """
    if not is_token_model(backbone):
        raise UserError(
            f"{asker} encodes single patches, which {type(backbone).__name__} cannot: choose a vit_*, deit_*, eva*, "
            "gau_*, flash_* or roformer_v2_* backbone, or objective=qb_heat, which encodes one block"
        )


def takes_visible(backbone: Any) -> bool:
    """Whether the model itself can be told which patches are visible."""
    return _takes(backbone, "visible")


def takes_valid(backbone: Any) -> bool:
    """Whether it can also be told which of them are padding."""
    return takes_visible(backbone) and _takes(backbone, "valid")


def _takes(backbone: Any, argument: str) -> bool:
    forward_features = getattr(backbone, "forward_features", None)
    return forward_features is not None and argument in inspect.signature(forward_features).parameters


def patch_sides(backbone: Any) -> Grid | None:
    """Height and width of a patch in pixels; None for models that do not say."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    return (size, size) if isinstance(size, int) else size and (int(size[0]), int(size[1]))


def _of_map(backbone: Any, output: Tensor, images: Tensor) -> Tensor | None:
    """Channels lie first or last; inside a model some layers have them where its final map has not."""
    first, last = (_distortion(sides, images) for sides in (output.shape[2:], output.shape[1:3]))
    is_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC" if first == last else last < first
    if min(first, last) > MOST_DISTORTED:
        return None
    return output.permute(0, 3, 1, 2) if is_last else output


def _distortion(sides: tuple[int, ...], images: Tensor) -> float:
    """How far the shape of a grid is from that of the image, as a share of the grid's shorter side; 0: the same."""
    rows, columns = sides
    height, width = images.shape[2:]
    if not 0 < rows <= height or not 0 < columns <= width:
        return math.inf
    return abs(rows * width - columns * height) / (max(height, width) * min(rows, columns))


def _of_tokens(backbone: Any, output: Tensor, images: Tensor) -> Tensor | None:
    if output.ndim != 3:
        return None
    count = output.shape[1]
    if hasattr(backbone, "reroll"):  # Hiera keeps its tokens by windows, and knows the order of each of its blocks
        blocks = [block for block, (_, size) in backbone.reroll.schedule.items() if math.prod(size) == count]
        return backbone.reroll(output, blocks[0]).permute(0, 3, 1, 2) if blocks else None
    prefix = int(getattr(backbone, "num_prefix_tokens", 0))
    grids, prefixes = [*_of_patches(backbone, images)], [prefix]
    if not is_token_model(backbone):  # where another number of tokens is that of visible patches, which lie anywhere
        prefixes += [0, int(hasattr(backbone, "cls_token"))]  # layers ahead of a class token have none, as in CaiT
        grids += _of_any_stride(images) if len(output) == len(images) else []  # of windows there are more
    found = [grid for grid in grids for prefix in prefixes if math.prod(grid) == count - prefix]
    if not found:
        return None
    return output[:, count - math.prod(found[0]) :].transpose(1, 2).unflatten(2, found[0])


def _of_patches(backbone: Any, images: Tensor) -> Iterator[Grid]:
    patch = patch_sides(backbone)
    if patch is not None:
        yield images.shape[2] // patch[0], images.shape[3] // patch[1]


def _of_any_stride(images: Tensor) -> Iterator[Grid]:
    """Grids that tokens may lie on, row by row."""
    height, width = images.shape[2:]
    for stride in range(1, min(height, width) // 2 + 1):
        yield height // stride, width // stride
        yield -(-height // stride), -(-width // stride)
