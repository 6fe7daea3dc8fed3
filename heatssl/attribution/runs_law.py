"""The law that an objective has learned, about the final map of its backbone."""

from torch import Tensor, nn

from heatssl.heat import Law


class RunsLaw(Law):
    """A law of a field that a projector makes of the map.

    Args:
        to_field: map (B, C, h, w) -> field (B, D, h, w).
        law: of such fields.
    """

    def __init__(self, to_field: nn.Module, law: Law) -> None:
        super().__init__()
        self.to_field = to_field
        self.law = law

    def residual(self, z: Tensor) -> Tensor:
        """Residual of the law at each position: map (B, C, h, w) -> (B, h, w)."""
        return self.law.residual(self.to_field(z))
