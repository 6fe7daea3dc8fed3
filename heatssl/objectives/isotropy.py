"""SIGReg: a measure of how far embeddings are from an isotropic Gaussian (LeJEPA, arXiv 2511.08544).

A distribution is the standard normal when all its projections to a line are (Cramer and Wold). So the
embeddings are projected to random unit directions, and each projection is held against the normal
distribution by the test of Epps and Pulley (1983), which compares characteristic functions:

    T = N * integral of |phi_N(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt,   phi_N(t) = mean_n exp(i t x_n)

Stated by the paper and by its authors' code (github.com/rbalestr-lab/lejepa): the test, its weight, 17 knots,
the factor N, new directions at every step, the same on all devices; in the code also 256 directions, and the
trapezoidal rule on [0, 3], doubled, as the integrand is even. Ours: the sums over processes with gradients.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from heatssl.objectives.processes import sum_over_processes, world_size
from heatssl.ops import full_precision


def sigreg(
    embeddings: Tensor,
    directions: int = 256,
    knots: int = 17,
    *,
    reach: float = 3.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean of the Epps-Pulley statistic over random directions, for the embeddings of all processes together.

    The statistic of N normal samples has the same mean for every N, about 1.06; any other distribution's grows
    like N. The weight of the regulariser therefore belongs to a batch size.

    Args:
        embeddings: (..., N, D); with leading axes, such as views, each has its own statistic and the mean is taken.
        directions: number of random unit vectors.
        knots: points of the quadrature, at least 2.
        reach: the largest frequency t.
        generator: where the directions come from; None: torch's global generator, with which each step of a run
            repeats exactly. Of several processes, the first one's directions are used by all.

    Returns:
        scalar, at least 0.
    """
    with full_precision(embeddings):
        samples = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        lines = unit_vectors(samples.shape[-1], directions, samples, generator)
        frequency = torch.linspace(0, reach, knots, dtype=samples.dtype, device=samples.device)
        normal = torch.exp(-frequency.square() / 2)  # the characteristic function sought, and the weight
        angle = (samples @ lines)[..., None] * frequency  # (..., N, directions, knots)
        real, imaginary = angle.cos().sum(dim=-3), angle.sin().sum(dim=-3)
        count = torch.tensor(float(samples.shape[-2]), dtype=samples.dtype, device=samples.device)
        if world_size() > 1:
            real, imaginary = sum_over_processes(torch.stack([real, imaginary])).unbind()
            dist.all_reduce(count)
        distance = (real / count - normal).square() + (imaginary / count).square()
        return 2 * count * torch.trapezoid(distance * normal, frequency, dim=-1).mean()


def unit_vectors(width: int, number: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random directions (width, number), uniform on the sphere, the same on all processes; device and type of like."""
    vectors = torch.randn(width, number, generator=generator, dtype=like.dtype, device=like.device)
    if world_size() > 1:
        dist.broadcast(vectors, src=0)
    return F.normalize(vectors, dim=0)
