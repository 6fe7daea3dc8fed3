"""Occlusion sensitivity (Zeiler and Fergus, ECCV 2014, arXiv 1311.2901)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.points import owners, scores
from heatssl.attribution.targets import Target
from heatssl.errors import UserError


@torch.no_grad()
def occlusion(
    model: nn.Module,  # noqa: ARG001 - every method has the same signature
    images: Tensor,
    target: Target,
    *,
    window: int | None = None,
    stride: int | None = None,
    chunk: int = 64,
) -> Attribution:
    """How far the score falls when a square of the image is replaced by the mean colour.

    map = mean over the squares that cover a pixel of F(x) - F(x without the square) (section 4.2).

    Args:
        model: in evaluation mode; no gradient is taken.
        images: normalised (B, 3, H, W).
        target: the function F.
        window: side of the square in pixels; None: an eighth of the shorter side of the image.
        stride: pixels between squares, from 1 to ``window``; None: half a square. The last one of a line ends at the
            edge.
        chunk: images per forward pass.

    Returns:
        Signed maps (B, H, W); no completeness error.

    Raises:
        UserError: on a square or a stride out of range.
    """
    height, width = images.shape[2:]
    window = max(1, min(height, width) // 8) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window <= min(height, width):
        raise UserError(
            f"occlusion needs 1 <= stride <= window <= {min(height, width)} pixels, "
            f"not stride {stride} and window {window}"
        )
    squares = torch.cartesian_prod(_starts(height, window, stride), _starts(width, window, stride)).to(images.device)
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    whole = scores(target, images, chunk).float()
    fall = torch.zeros(len(images), height, width, device=images.device)
    covered = torch.zeros_like(fall)
    for owner, square in owners(images, chunk, len(squares)):
        top, left = squares[square, :, None].unbind(1)
        in_rows, in_columns = (rows >= top) & (rows < top + window), (columns >= left) & (columns < left + window)
        hidden = in_rows[:, :, None] & in_columns[:, None, :]
        score = target(images[owner].masked_fill(hidden[:, None], 0), owner).float()
        fall.index_add_(0, owner, (whole[owner] - score)[:, None, None] * hidden)
        covered.index_add_(0, owner, hidden.float())
    return Attribution(fall / covered)


def _starts(side: int, window: int, stride: int) -> Tensor:
    """First pixel of each square along a side: (n,) long."""
    starts = torch.arange(0, side - window + stride, stride)
    return starts.clamp_max(side - window)
