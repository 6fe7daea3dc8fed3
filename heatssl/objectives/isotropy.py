"""Two measures of how far embeddings are from being isotropic: of their distribution, and of their covariance alone.

SIGReg asks for an isotropic Gaussian (LeJEPA, arXiv 2511.08544). A distribution is the standard normal when all its projections to a line are (Cramer and Wold). So the
embeddings are projected to random unit directions, and each projection is held against the normal
distribution by the test of Epps and Pulley (1983), which compares characteristic functions:

    T = N * integral of |phi_N(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt,   phi_N(t) = mean_n exp(i t x_n)

Stated by the paper and by its authors' code (github.com/rbalestr-lab/lejepa): the test, its weight, 17 knots,
the factor N, new directions at every step, the same on all devices; in the code also 256 directions, and the
trapezoidal rule on [0, 3], doubled, as the integrand is even. Ours: the sums over processes with gradients.

:class:`Isotropy` asks for a covariance that is a multiple of the identity, whatever the multiple: the aim of Barlow Twins
(arXiv 2103.03230) and of VICReg (arXiv 2105.04906), for one view.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.objectives.processes import sum_over_processes, world_size


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
    with torch.autocast(embeddings.device.type, enabled=False):
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


class Isotropy(nn.Module):
    """How unevenly fields of different images differ, once their heat has come to rest in an insulated body.

    There a field is its mean, which is what most evaluations see of an image. Without a word about it, objectives that
    paint leave a few directions of it that outweigh all others (brightness, hue), and neighbours are found by those.

        D |C / tr C|^2 - 1,   C the covariance of the means: D / K - 1 where K directions vary alike and the others do not

    Zero for a multiple of the identity; D / N for N images of which no direction stands out. Of all processes together.
    """

    def forward(self, field: Tensor) -> Tensor:
        """Fields (B, C, h, w) of B images -> scalar, at least 0, the same for every multiple of a field."""
        means = field.mean(dim=(2, 3))
        count = torch.ones_like(means[:, :1])
        total = sum_over_processes(torch.cat([count, means], dim=1).sum(dim=0))
        apart = means - total[1:] / total[0]
        covariance = sum_over_processes(apart.mT @ apart)
        spread = covariance.trace().square().clamp_min(1e-12)
        return len(covariance) * covariance.square().sum() / spread - 1
