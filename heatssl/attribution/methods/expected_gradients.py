"""Expected gradients (Erion et al., 2021, arXiv 1906.10670): integrated gradients without a baseline to choose."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.points import input_gradient, owners
from heatssl.attribution.targets import Target
from heatssl.errors import UserError


def expected_gradients(
    model: nn.Module,  # noqa: ARG001 - every method has the same signature
    images: Tensor,
    target: Target,
    *,
    samples: int = 64,
    seed: int = 0,
    chunk: int = 64,
) -> Attribution:
    """Integrated gradients, averaged over the other images of the batch as baselines.

    map = sum over colours of E[(x - x') dF/dx at x' + a (x - x')], x' an image of the batch other than x, a uniform in
    [0, 1]. Every sample has a baseline and a position of its own; the positions are one from each of ``samples`` equal
    parts of the path, which changes no expectation and makes the estimate less noisy.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W), two or more.
        target: the function F.
        samples: of each image.
        seed: of baselines and positions.
        chunk: images per forward pass.

    Returns:
        Signed maps (B, H, W), which sum to F(x) - mean of F(x') in expectation; no completeness error.

    Raises:
        UserError: on a single image.
    """
    batch = len(images)
    if batch < 2:
        raise UserError("expected_gradients takes its baselines from the batch: give two images or more")
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(1, batch, (samples, batch), generator=generator).to(images.device)
    positions = (torch.arange(samples)[:, None] + torch.rand(samples, batch, generator=generator)) / samples
    positions = positions.to(images)
    maps = torch.zeros(batch, *images.shape[2:], device=images.device)
    for owner, sample in owners(images, chunk, samples):
        baseline = images[(owner + others[sample, owner]) % batch]
        way = images[owner] - baseline
        points = baseline + positions[sample, owner][:, None, None, None] * way
        maps.index_add_(0, owner, (way.float() * input_gradient(target, points, owner, local=False)).sum(dim=1))
    return Attribution(maps / samples)
