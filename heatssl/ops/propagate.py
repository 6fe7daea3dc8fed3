"""A quarter of a map moved onto the other three in one operation: what the quarter-block objectives extrapolate."""

import torch
from torch import Tensor

from heatssl.ops.precision import full_precision
from heatssl.ops.stencil import accumulator
from heatssl.ops.surroundings import must_be_plain


def turn(z: Tensor, modulus: Tensor, angle: Tensor, dim: int) -> Tensor:
    """Complex channels times modulus exp(i angle); along ``dim`` channels k and k + C/2 are one number's two parts.

    Args:
        z: of C channels along ``dim``.
        modulus: broadcasts against z with C/2 channels there.
        angle: likewise, in radians.
        dim: of the channels.

    Returns:
        of z's type.
    """
    real, imaginary = z.chunk(2, dim)
    along, across = modulus * torch.cos(angle), modulus * torch.sin(angle)
    return torch.cat([along * real - across * imaginary, across * real + along * imaginary], dim).to(z.dtype)


def fill_quarters_commuting(quarter: Tensor, corner: Tensor, decay: Tensor, rotation: Tensor) -> Tensor:
    """The whole map around one visible quarter of each image, by elementwise complex powers.

    Block (i, j) is the quarter times exp(dx g_x + dy g_y), g = decay + i rotation, where (dx, dy) leads from the
    visible block to it. All blocks of all images are one product; the visible one is multiplied by 1.

    Args:
        quarter: (B, C, h, w); channels k and k + C/2 are the parts of one complex number.
        corner: (B,) which block is visible: 0 top left, 1 top right, 2 bottom left, 3 bottom right.
        decay: (2, C/2), per patch; row 0 is along x (:meth:`heatssl.heat.FirstOrder.generators`).
        rotation: (2, C/2), likewise.

    Returns:
        (B, C, 2h, 2w).
    """
    check_corners(quarter, corner)
    height, width = quarter.shape[2:]
    block = torch.arange(4, device=corner.device)[:, None]
    dx = ((block % 2 - corner % 2) * width).to(decay.dtype)[..., None]  # (4, B, 1)
    dy = ((block // 2 - corner // 2) * height).to(decay.dtype)[..., None]
    modulus = torch.exp(dx * decay[0] + dy * decay[1])
    angle = dx * rotation[0] + dy * rotation[1]
    return _assemble(turn(quarter[None], modulus[..., None, None], angle[..., None, None], dim=2))


def fill_quarters_full(quarter: Tensor, corner: Tensor, step_x: Tensor, step_y: Tensor) -> Tensor:
    """The same for full matrices: block (i, j) is the quarter times step_y^dy step_x^dx, along x first.

    Each visible block is multiplied by all its powers in one product. Positive and negative powers are one repeated
    squaring each.

    Args:
        quarter: (B, C, h, w).
        corner: (B,) in ascending order, see :func:`fill_quarters_commuting`.
        step_x: I + A, (C, C).
        step_y: I + B, (C, C).

    Returns:
        (B, C, 2h, 2w).
    """
    height, width = quarter.shape[2:]
    along_x, along_y = _powers(step_x, width), _powers(step_y, height)
    moved = []
    for group, row, column in by_corner(quarter, corner):
        with full_precision(step_x):
            products = [along_y[i - row] @ along_x[j - column] for i in (0, 1) for j in (0, 1)]
        moved.append(_apply(torch.cat(products), group))
    return _assemble(torch.cat(moved, dim=1))


def check_corners(quarter: Tensor, corner: Tensor) -> None:
    """One corner for each quarter (B, C, h, w), 0 to 3; on a GPU their values are not looked at, to wait for nothing.

    Raises:
        ValueError: saying what they are.
    """
    if corner.shape != quarter.shape[:1]:
        raise ValueError(f"corner is one number for each of {len(quarter)} quarters, not {tuple(corner.shape)}")
    if corner.device.type == "cpu" and not must_be_plain() and not bool(((corner >= 0) & (corner < 4)).all()):
        raise ValueError(f"corner must be 0 to 3, not {corner.tolist()}")


def by_corner(quarter: Tensor, corner: Tensor) -> list[tuple[Tensor, int, int]]:
    """Quarters that lie in the same corner, with its row and column: (B, C, h, w), (B,) in ascending order.

    Empty groups are left out, but for one of a batch without images.

    Raises:
        ValueError: when corners are not in ascending order, not 0 to 3, or not one for each quarter.
    """
    check_corners(quarter, corner)
    if not bool((corner.diff() >= 0).all()):
        raise ValueError("corner must be in ascending order: sort the images by their corner")
    counts = torch.bincount(corner, minlength=4).tolist()
    found = [(group, *divmod(number, 2)) for number, group in enumerate(quarter.split(counts)) if len(group)]
    return found or [(quarter, 0, 0)]


def _powers(step: Tensor, exponent: int) -> dict[int, Tensor]:
    """{0: I, 1: step^n, -1: step^-n}; torch squares repeatedly, and the inverse is taken once, at the end."""
    step = step.to(accumulator(step.dtype))  # half precision has no inverse
    with full_precision(step):
        power = torch.linalg.matrix_power(step, exponent)
        identity = torch.eye(step.shape[0], dtype=step.dtype, device=step.device)
        return {0: identity, 1: power, -1: torch.linalg.inv(power)}


def _apply(matrices: Tensor, z: Tensor) -> Tensor:
    """N matrices, one above the other (N C, C), times a field (B, C, h, w), which is read once: (N, B, C, h, w)."""
    return (
        (matrices.to(z.dtype) @ z.flatten(2)).unflatten(1, (-1, z.shape[1])).unflatten(3, z.shape[2:]).transpose(0, 1)
    )


def _assemble(blocks: Tensor) -> Tensor:
    """Four blocks (4, B, C, h, w) in reading order as one map (B, C, 2h, 2w)."""
    _, batch, channels, height, width = blocks.shape
    grid = blocks.unflatten(0, (2, 2))
    return grid.permute(2, 3, 0, 4, 1, 5).reshape(batch, channels, 2 * height, 2 * width)
