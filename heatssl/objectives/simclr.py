"""SimCLR: a simple framework for contrastive learning of visual representations (Chen et al., arXiv 2002.05709).

Two random views of each image are encoded; a small head embeds them; each view must find the other view of its
image among all other views of the batch.

Stated by the paper: the views (see :mod:`heatssl.objectives.views` for what is ours there); a head with one
hidden layer, as wide as the features, and 128 outputs, thrown away afterwards; the loss NT-Xent, eq. 1, with
negatives from all devices; for ImageNet a temperature of 0.1.

Ours: features are the mean over positions, as everywhere in heatssl's evaluation; batch norm over all devices in the
head alone, where the paper has it everywhere: a backbone with batch norm, a CNN, keeps each device's own statistics.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.backbones import feature_map, geometry
from heatssl.objectives.objective import Objective, Outputs, Story
from heatssl.objectives.processes import gather, world_size
from heatssl.objectives.projector import embedding_head
from heatssl.objectives.views import random_view, view_settings
from heatssl.ops import accumulator, full_precision


class SimCLR(Objective):
    """Two views -> backbone -> embeddings -> NT-Xent.

    Args:
        backbone: a timm model.
        image_size: pixels of the square images and views.
        temperature: of the softmax over similarities.
        head_width: of the head's hidden layer; null: that of the features.
        embedding_width: of the head's output.
        crop_scale, colour_jitter, grey, blur: see :class:`heatssl.objectives.views.ViewSettings`.

    Raises:
        ValueError: on a temperature that is not positive, or views that cannot be drawn.
    """

    least_images = 2
    story = Story("What is compared", "Two random views of each image: features of the same image must agree.", {})

    def __init__(
        self,
        backbone: nn.Module,
        image_size: int,
        *,
        temperature: float = 0.1,
        head_width: int | None = None,
        embedding_width: int = 128,
        crop_scale: Sequence[float] = (0.08, 1.0),
        colour_jitter: float = 0.8,
        grey: float = 0.2,
        blur: float = 0.5,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.temperature = temperature
        self.settings = view_settings(image_size, crop_scale, colour_jitter, grey, blur)
        self.backbone = backbone
        channels = geometry(backbone, image_size).channels
        self.head = embedding_head([channels, channels if head_width is None else head_width, embedding_width])

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images (B, 3, S, S) -> loss, similarity of the pairs, the views' feature maps (2 B, C, h, w)."""
        field = feature_map(self.backbone, torch.cat(self.views(images)))
        first, second = self.head(field.mean(dim=(2, 3))).chunk(2)
        loss = nt_xent(first, second, self.temperature)
        return Outputs(loss, {"similarity/pairs": F.cosine_similarity(first, second).mean().detach()}, field.detach())

    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Two independent views of each image, (B, 3, S, S) each."""
        first, second = (random_view(images, self.settings, self.mean, self.std) for _ in range(2))
        return first, second

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Objective.maps`: two views, as nothing is hidden or painted."""
        first, second = self.views(images)
        return {"first_view": first, "second_view": second}


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy, eq. 1 of SimCLR, over the batches of all processes.

    Args:
        first: embeddings (B, D) of one view of each image, of any length but zero.
        second: embeddings (B, D) of the other, in the same order.
        temperature: divides the cosines.

    Returns:
        scalar; on several processes each has its share, and the mean over processes is the loss of the joint batch.
    """
    with full_precision(first):  # cosines over a small temperature need their digits
        own = F.normalize(torch.cat([first, second]).to(accumulator(first.dtype)), dim=1)
        everyone, start = gather(own)
        row = torch.arange(len(own), device=own.device)
        partner = start + row.roll(len(first))
        logits = own @ everyone.T / temperature
        logits = logits.index_put((row, start + row), logits.new_tensor(-torch.inf))  # nobody is its own negative
        return F.cross_entropy(logits, partner, reduction="sum") * (world_size() / len(everyone))
