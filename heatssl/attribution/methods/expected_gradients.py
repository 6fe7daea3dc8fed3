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
    baselines: Tensor | None = None,
    samples: int = 64,
    seed: int = 0,
    chunk: int = 64,
) -> Attribution:
    """Integrated gradients, averaged over other images as baselines.

    map = sum over colours of E[(x - x') dF/dx at x' + a (x - x')], x' a baseline, a uniform in [0, 1]. Every sample has
    a baseline and a position of its own; the positions are one from each of ``samples`` equal parts of the path, which
    changes no expectation and makes the estimate less noisy.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W), two or more where there are no baselines.
        target: the function F.
        baselines: normalised (K, 3, H, W), the same for every batch; the image itself among them adds nothing. None:
            the other images of the batch.
        samples: of each image.
        seed: of baselines and positions.
        chunk: images per forward pass.

    Returns:
        Signed maps (B, H, W), which sum to F(x) - mean of F(x') in expectation; no completeness error.

    Raises:
        UserError: on a single image without baselines, and on baselines of another shape.
    """
    batch = len(images)
    if baselines is None and batch < 2:
        raise UserError("expected_gradients takes its baselines from the batch: give two images or more, or baselines=")
    if baselines is not None and (not len(baselines) or baselines.shape[1:] != images.shape[1:]):
        raise UserError(
            f"baselines must be (K, {', '.join(map(str, images.shape[1:]))}) like the images, "
            f"not {tuple(baselines.shape)}"
        )
    generator = torch.Generator().manual_seed(seed)
    least, count = (1, batch) if baselines is None else (0, len(baselines))
    others = torch.randint(least, count, (samples, batch), generator=generator).to(images.device)
    positions = (torch.arange(samples)[:, None] + torch.rand(samples, batch, generator=generator)) / samples
    positions = positions.to(images)
    maps = torch.zeros(batch, *images.shape[2:], device=images.device)
    for owner, sample in owners(images, chunk, samples):
        other = others[sample, owner]
        baseline = images[(owner + other) % batch] if baselines is None else baselines[other].to(images)
        way = images[owner] - baseline
        points = baseline + positions[sample, owner][:, None, None, None] * way
        maps.index_add_(0, owner, (way.float() * input_gradient(target, points, owner, local=False)).sum(dim=1))
    return Attribution(maps / samples)
