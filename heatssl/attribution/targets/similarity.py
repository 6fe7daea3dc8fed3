"""Cosine to an embedding: the image's own, another image's, a class's.

A trap lies in "cosine to the image's own embedding". At the image itself that cosine is 1, its maximum, so
its gradient vanishes and every method that takes the gradient there (Grad-CAM, saliency) returns zero or
rounding noise. The zero comes from the norm in the denominator alone. A local method therefore asks for the
cosine with that norm held fixed (``local=True``): the value is the same, and the gradient is that of the
inner product with the embedding, which says how much each position adds to it. Path methods (integrated
gradients) meet the image only in the limit, and use the cosine proper.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.attribution.targets.target import embed


class Similarity:
    """Cosine of the pooled embedding to a reference (B, C), one per image of the batch."""

    uses_classifier = False

    def __init__(self, model: nn.Module, reference: Tensor) -> None:
        self.model = model
        self.reference = F.normalize(reference.float(), dim=1)

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:
        embedding = embed(self.model, points).float()
        norm = embedding.norm(dim=1).clamp_min(1e-12)
        if local:
            norm = norm.detach()
        return (embedding * self.reference[owner]).sum(dim=1) / norm
