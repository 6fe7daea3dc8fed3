"""RISE (Petsiuk, Das and Saenko, BMVC 2018, arXiv 1806.07421): randomised input sampling for explanation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.points import owners
from heatssl.attribution.targets import Target
from heatssl.errors import UserError


@torch.no_grad()
def rise(
    model: nn.Module,  # noqa: ARG001 - every method has the same signature
    images: Tensor,
    target: Target,
    *,
    samples: int = 512,
    cells: int = 7,
    kept: float = 0.5,
    seed: int = 0,
    chunk: int = 64,
) -> Attribution:
    """Random masks, weighted by the score of what they leave of the image.

    map = 1 / (p N) sum over k of F(x M_k) M_k (eq. 6), where M_k is a random grid of zeros and ones, enlarged
    bilinearly and moved by a random part of a cell. Here F counts from its mean over the masks: that takes from the map
    a constant in expectation, and most of its noise with it. The smallest value of a map is then set to zero. What is
    hidden is the mean colour, zero in normalised space. All images meet the same masks.

    Args:
        model: in evaluation mode; no gradient is taken.
        images: normalised (B, 3, H, W).
        target: the function F.
        samples: N, masks; the paper takes 4,000 and more.
        cells: of a mask along each side.
        kept: p, chance that a cell is seen.
        seed: of the masks.
        chunk: images per forward pass.

    Returns:
        Maps (B, H, W) >= 0; no completeness error.

    Raises:
        UserError: on no samples or cells, or a chance outside (0, 1].
    """
    if samples < 1 or cells < 1 or not 0 < kept <= 1:
        raise UserError(f"rise needs samples >= 1, cells >= 1 and kept in (0, 1], not {samples}, {cells} and {kept}")
    generator = torch.Generator().manual_seed(seed)
    # One cell more than is seen, for the move.
    grids = (torch.rand(samples, 1, cells + 1, cells + 1, generator=generator) < kept).to(images.device, torch.float32)
    moves = torch.rand(samples, 2, generator=generator)
    maps = torch.zeros(len(images), *images.shape[2:], device=images.device)
    score_sum, mask_sum = torch.zeros(len(images), device=images.device), torch.zeros_like(maps)
    for owner, sample in owners(images, chunk, samples):
        masks = _enlarged(grids[sample], moves[sample.cpu()], (images.shape[2], images.shape[3]))
        score = target(images[owner] * masks[:, None].to(images.dtype), owner).float()
        maps.index_add_(0, owner, score[:, None, None] * masks)
        score_sum.index_add_(0, owner, score)
        mask_sum.index_add_(0, owner, masks)
    maps = (maps - score_sum[:, None, None] / samples * mask_sum) / (kept * samples)
    return Attribution(maps - maps.amin(dim=(1, 2), keepdim=True))


def _enlarged(grids: Tensor, moves: Tensor, size: tuple[int, int]) -> Tensor:
    """Grids (n, 1, cells + 1, cells + 1) and moves (n, 2) in cells -> masks (n, *size)."""
    cells = grids.shape[-1] - 1
    steps = [-(-side // cells) for side in size]
    large = F.interpolate(grids, [step * (cells + 1) for step in steps], mode="bilinear", align_corners=False)[:, 0]
    starts = (moves * torch.tensor(steps)).long().tolist()
    cut = [mask[top : top + size[0], left : left + size[1]] for mask, (top, left) in zip(large, starts, strict=True)]
    return torch.stack(cut)
