"""Hidden waves: a field whose channels, in the right directions, are one-way waves zeta_x = lambda zeta_y.

Stated by the source (Hidden Waves, arXiv 2310.12976, as restated in 2410.08498, section 2.2): with z_x = A norm(z),
z_y = B norm(z) and B invertible, A B^-1 = V Lambda V^-1 and zeta = V^-1 z give zeta_x = Lambda zeta_y: C waves whose
speeds lambda_k are learned and shared by all images. The linear law z_x = A z, z_y = B z implies the same.

Ours: learning V and Lambda themselves, as C/2 pairs of complex conjugates so that fields stay real; the residual,
taken in the field's own coordinates, where neither the length of a direction nor a small zeta can make it small; the
differences, centred between four positions, which a flip of the image leaves as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.heat.law import Law, apply_matrix
from heatssl.ops import accumulator, full_precision


def wave_speeds(a: Tensor, b: Tensor) -> Tensor:
    """Speeds (C,) complex of the waves hidden in z_x = A z, z_y = B z (or of norm(z)): eigenvalues of A B^-1.

    Args:
        a: matrix (C, C).
        b: invertible matrix (C, C).
    """
    return torch.linalg.eigvals(torch.linalg.solve(b.T, a.T).T)


class HiddenWaves(Law):
    """The law z_x = V Lambda V^-1 z_y with complex directions V and speeds Lambda.

    A real speed carries a pattern along y by -lambda patches for each patch along x. At lambda = i the equation is
    Cauchy-Riemann's: then real and imaginary part of zeta obey Laplace's equation, and in general
    z_xx = V Lambda^2 V^-1 z_yy. The one field beside constants that the differences cannot see is a checkerboard.
    Parameters: C^2 + C; C^2 multiply-adds per position.

    Args:
        channels: C, even. Directions start orthogonal, speeds start standard normal in real and imaginary part.

    Raises:
        ValueError: on an odd number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1 or channels % 2:
            raise ValueError(f"hidden waves come in pairs: channels must be even and positive, not {channels}")
        # Column k is the real part of direction k, column k + C/2 its imaginary part.
        self.directions = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels)).Q)
        self.speed_parts = nn.Parameter(torch.randn(2, channels // 2))

    def no_weight_decay(self) -> set[str]:
        """Parameters that nothing should pull to zero, where all waves would stand still."""
        return {"speed_parts"}

    @property
    def speeds(self) -> Tensor:
        """Speeds lambda (C/2,), complex, in patches along y per patch along x; the other C/2 are their conjugates."""
        return torch.complex(self.speed_parts[0], self.speed_parts[1])

    def mixing(self) -> Tensor:
        """M = V Lambda V^-1 (C, C), real, of z_x = M z_y."""
        real, imaginary = torch.diag(self.speed_parts[0]), torch.diag(self.speed_parts[1])
        # Lambda on (real, imaginary) parts of the direction v: M (v_r + i v_i) = (l_r + i l_i) (v_r + i v_i).
        turns = torch.cat([torch.cat([real, imaginary], dim=1), torch.cat([-imaginary, real], dim=1)])
        with full_precision(turns):
            wide = accumulator(turns.dtype)  # half precision has no solver
            directions, turns = self.directions.to(wide), turns.to(wide)
            return torch.linalg.solve(directions.T, (directions @ turns).T).T.to(self.directions.dtype)

    def waves(self, z: Tensor) -> Tensor:
        """The waves zeta = V^-1 z (B, C/2, H, W), complex, one of each conjugate pair; z = 2 Re(V zeta).

        Complex numbers of float32, or float64 for float64.
        """
        wide = accumulator(z.dtype)
        with full_precision(z):
            real, imaginary = apply_matrix(torch.linalg.inv(self.directions.to(wide)), z.to(wide)).chunk(2, dim=1)
            return torch.complex(real, -imaginary) / 2

    def residual(self, z: Tensor) -> Tensor:
        """||z_x - M z_y||^2 / C in the middle of each four neighbouring positions.

        Args:
            z: field (B, C, H, W) of at least 2x2 positions.

        Returns:
            (B, H, W): at (y, x) the four positions down to (y+1, x+1); the last row and column repeat their neighbours.

        Raises:
            ValueError: on the wrong number of channels, or a smaller field.
        """
        return F.pad(self._errors(z), (0, 1, 0, 1), mode="replicate")

    def loss(self, z: Tensor) -> Tensor:
        """Mean of ||z_x - M z_y||^2 / C over the middles of four positions, a scalar: the same for a flipped image.

        Raises:
            ValueError: as :meth:`residual`.
        """
        return self._errors(z).mean()

    def _errors(self, z: Tensor) -> Tensor:
        """The residual in the middles of four positions alone: (B, C, H, W) -> (B, H - 1, W - 1)."""
        channels = len(self.directions)
        if z.ndim != 4 or z.shape[1] != channels or min(z.shape[2:]) < 2:
            raise ValueError(f"this law expects a field (B, {channels}, H, W) of at least 2x2, not {tuple(z.shape)}")
        along_x = z[..., 1:] - z[..., :-1]
        along_y = z[..., 1:, :] - z[..., :-1, :]
        z_x = (along_x[..., 1:, :] + along_x[..., :-1, :]) / 2
        z_y = (along_y[..., 1:] + along_y[..., :-1]) / 2
        with full_precision(z):
            return (z_x - apply_matrix(self.mixing(), z_y)).square().mean(dim=1)

    def extra_repr(self) -> str:
        return f"channels={len(self.directions)}"
