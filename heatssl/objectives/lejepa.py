"""LeJEPA: provable and scalable self-supervised learning without the heuristics (Balestriero and LeCun, 2511.08544).

The embeddings of all views of an image are drawn to the mean of its global views'; a regulariser, SIGReg, keeps
the embeddings of the batch an isotropic Gaussian, so that they cannot collapse. No teacher, no stopped gradient.

Stated by the paper: loss = lambda SIGReg + (1 - lambda) prediction, the one setting to tune. Stated by its
authors' code and notes (github.com/rbalestr-lab/lejepa): 2 global views of 30 to 100 % of the image and 6 local
ones of 5 to 30 % at 98 of 224 pixels; a head of two hidden layers 2048 wide with batch norm; SIGReg of each
view's embeddings, averaged over views; lambda 0.02 on Imagenette.

Ours: how views are drawn (see :mod:`heatssl.objectives.views`), with SimCLR's list of changes, without
solarisation; features are the mean over positions; batch norm over all processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heatssl.backbones import feature_map, geometry
from heatssl.errors import UserError
from heatssl.objectives.isotropy import sigreg
from heatssl.objectives.objective import Objective, Outputs, Story
from heatssl.objectives.processes import share_of_batch
from heatssl.objectives.projector import embedding_head
from heatssl.objectives.views import random_view, view_settings

LOCAL_SIZE = 98 / 224  # side of a local view over that of a global one


class LeJEPA(Objective):
    """Views -> backbone -> embeddings -> prediction loss and SIGReg.

    Args:
        backbone: a timm model.
        image_size: pixels of the square images and global views.
        isotropy_weight: lambda, between 0 and 1; it belongs to a batch size, see :func:`sigreg`.
        global_views, local_views: number of views of each kind; local ones are small and cheap.
        head_width: of the head's two hidden layers.
        embedding_width: of the head's output.
        global_scale, local_scale: area of the views, as fractions of the image.
        colour_jitter, grey, blur: see :class:`heatssl.objectives.views.ViewSettings`.

    Raises:
        UserError: when the backbone takes no images as small as a local view.
        ValueError: on fewer than one global or two views, a lambda out of range, or views that cannot be drawn.
    """

    story = Story("What is compared", "Two random views of each image: features of the same image must agree.", {})

    def __init__(
        self,
        backbone: nn.Module,
        image_size: int,
        *,
        isotropy_weight: float = 0.02,
        global_views: int = 2,
        local_views: int = 6,
        head_width: int = 2048,
        embedding_width: int = 128,
        global_scale: Sequence[float] = (0.3, 1.0),
        local_scale: Sequence[float] = (0.05, 0.3),
        colour_jitter: float = 0.4,
        grey: float = 0.2,
        blur: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 <= isotropy_weight <= 1:
            raise ValueError(f"isotropy_weight={isotropy_weight} is not between 0 and 1")
        if global_views < 1 or local_views < 0 or global_views + local_views < 2:
            raise ValueError("there must be at least one global view, and two views in all")
        self.isotropy_weight = isotropy_weight
        self.global_views, self.local_views = global_views, local_views
        grid = geometry(backbone, image_size)
        local_size = max(1, round(LOCAL_SIZE * grid.rows)) * grid.stride
        self.global_settings = view_settings(image_size, global_scale, colour_jitter, grey, blur)
        self.local_settings = view_settings(local_size, local_scale, colour_jitter, grey, blur)
        if local_views:
            check_size(backbone, local_size)
        self.backbone = backbone
        self.head = embedding_head([grid.channels, head_width, head_width, embedding_width])

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images (B, 3, S, S) -> loss, its two parts, the global views' feature maps (V B, C, h, w)."""
        views = [random_view(images, self.global_settings, self.mean, self.std) for _ in range(self.global_views)]
        field = feature_map(self.backbone, torch.cat(views))
        features = [field.mean(dim=(2, 3))]
        if self.local_views:
            views = [random_view(images, self.local_settings, self.mean, self.std) for _ in range(self.local_views)]
            features.append(feature_map(self.backbone, torch.cat(views)).mean(dim=(2, 3)))
        embeddings = self.head(torch.cat(features)).unflatten(0, (-1, len(images))).float()  # (V, B, D)
        prediction = prediction_loss(embeddings, self.global_views)
        isotropy = sigreg(embeddings)
        loss = self.isotropy_weight * isotropy + (1 - self.isotropy_weight) * prediction
        logs = {"loss/prediction": prediction.detach(), "loss/isotropy": isotropy.detach()}
        return Outputs(loss, logs, field.detach())

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Objective.maps`: a global view and, where there are any, a local one."""
        second = self.local_settings if self.local_views else self.global_settings
        return {
            "first_view": random_view(images, self.global_settings, self.mean, self.std),
            "second_view": random_view(images, second, self.mean, self.std),
        }


def check_size(backbone: nn.Module, size: int) -> None:
    """Raise a UserError when a backbone takes no images of this size: some are made for one size only."""
    try:
        geometry(backbone, size)
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"{type(backbone).__name__} takes no local views of {size} pixels ({error}): "
            "set objective.local_views=0 objective.global_views=4"
        ) from error


def prediction_loss(embeddings: Tensor, global_views: int) -> Tensor:
    """Mean squared distance of every view to the mean of its image's global views.

    Args:
        embeddings: (V, B, D), global views first.
        global_views: their number.

    Returns:
        scalar; on several processes the mean over processes is the loss of the joint batch.
    """
    distance = (embeddings - embeddings[:global_views].mean(dim=0)).square()
    return distance.mean() * share_of_batch(embeddings.shape[1], embeddings.device)
