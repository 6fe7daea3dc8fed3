"""Laws: partial differential equations as priors on a feature field z of shape (B, C, H, W).

Derivatives z_x and z_y run along width and height, in units of one patch. Every law has
``residual(z) -> (B, H, W)``, how far z is from obeying it at each position; a first-order law also has
``propagate(z, dx, dy)``, the field moved by an offset. A field that is the same for every image can obey any law, so a
residual alone is no sign of good features: objectives log the rank beside it.
"""

from heatssl.heat.completion import complete, coordinates, harmonic_weights, heat_kernel_weights
from heatssl.heat.controls import Copy, FreeLinear, MultilayerPerceptron
from heatssl.heat.correlated_laplace import CorrelatedLaplace
from heatssl.heat.first_order import FirstOrder
from heatssl.heat.hidden_waves import HiddenWaves, wave_speeds
from heatssl.heat.laplace import Laplace, laplacian, laplacian_stencil
from heatssl.heat.law import Law, Propagator, commutator, relative_residual, spectral_radius
from heatssl.heat.norm_linear import NormLinear, normalise_channels
from heatssl.heat.semigroup import HeatFlow, heat_semigroup
from heatssl.heat.transport import Transport

__all__ = [
    "Copy",
    "CorrelatedLaplace",
    "FirstOrder",
    "FreeLinear",
    "HeatFlow",
    "HiddenWaves",
    "Laplace",
    "Law",
    "MultilayerPerceptron",
    "NormLinear",
    "Propagator",
    "Transport",
    "commutator",
    "complete",
    "coordinates",
    "harmonic_weights",
    "heat_kernel_weights",
    "heat_semigroup",
    "laplacian",
    "laplacian_stencil",
    "normalise_channels",
    "relative_residual",
    "spectral_radius",
    "wave_speeds",
]
