"""Heat-JEPA: each quarter of an image predicts the features of the others: the heat in it, at rest. Ours.

QB-Heat (arXiv 2211.13228) extrapolates a quarter's features to pixels. Here they are extrapolated to features, as in
JEPA (I-JEPA, arXiv 2301.08243): the four quarters of an image are encoded in one pass, each without the others and in
colours of its own, and of each only a random part of its patches. Heat that flows from a quarter into an insulated
image comes to rest at the quarter's mean, everywhere: that is its prediction, and the quarters of one image must agree,
and with those of other crops of it. No pixel is painted, there is no decoder and no predictor, and no patch is encoded
twice.

``transport`` puts the commuting law z_x = A z, z_y = B z in front: every position is taken into the law's frame of
rest, where a field that obeys it is constant, and heat flows there. It has not paid (docs/recipe.md).

A constant field agrees with itself, so something must forbid it. Three ways:

* ``contrast``: a quarter must find the other quarters of its image among those of all other images (InfoNCE,
  arXiv 1807.03748; the positives do not compete with each other);
* ``isotropy``: agreement is a squared distance and SIGReg keeps the vectors an isotropic Gaussian (LeJEPA, 2511.08544);
* ``teacher``: the features that are predicted, position by position, are those of a slow copy of the encoder that
  sees the whole image (I-JEPA; the loss is its smooth L1 on layer-normalised targets).
"""

import copy
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.backbones import check_encodes_patches, cut_patches, encode_visible, feature_map, geometry
from heatssl.errors import check_choice
from heatssl.heat import Transport, heat_semigroup
from heatssl.objectives.extrapolation import Extrapolation, fill_from_corner
from heatssl.objectives.isotropy import sigreg
from heatssl.objectives.objective import Objective, Outputs, Story
from heatssl.objectives.painting import carry_rest, centred_positions
from heatssl.objectives.processes import gather, share_of_batch, world_size
from heatssl.objectives.targets import rows, to_pixels
from heatssl.objectives.views import recolour, view_settings
from heatssl.ops import accumulator, full_precision

AgainstCollapse = Literal["contrast", "isotropy", "teacher"]
LARGEST_DEVIATION = 2.0  # pixels that a point of heat spreads to, as in SimCLR's blur (2002.05709, appendix A)


class HeatJEPA(Objective):
    """Quarters -> encoder -> heat at rest -> agreement.

    Args:
        backbone: a timm transformer that encodes single patches.
        image_size: pixels of the square images; the backbone's grid must have even sides.
        against_collapse: ``contrast``, ``isotropy`` or ``teacher``.
        visible_ratio: share of each quarter's patches that is encoded, drawn anew for each image.
        crops: of each image in a batch; all their quarters must agree.
        transport: whether the commuting law turns the field first; without, heat flows between features as they are.
        channels: width of the field; null: that of the backbone.
        temperature: divides the cosines (contrast).
        isotropy_weight: lambda of LeJEPA, in (0, 1); it belongs to a batch size (isotropy).
        momentum: share of the teacher that each step keeps (teacher).
        colour_jitter, grey: of each quarter on its own, see :class:`heatssl.objectives.views.ViewSettings`.
        blur: probability that heat flows within a quarter before it is seen, for a time of its own. How sharp it is
            then tells nothing of the image, and larger images, which are less sharp, keep their features.

    Raises:
        UserError: when the backbone cannot encode single patches, or the patch grid cannot be quartered.
        ValueError: on settings out of their range.
    """

    story = Story(
        "What quarters agree on",
        "The encoder saw each quarter without the others, and what it says of them, its mean, must be what they say. "
        "Nothing is painted. The residual is each position's squared distance from the mean of all: bright is what the "
        "other quarters could not have foretold.",
        {"visible": "one quarter"},
    )

    def __init__(
        self,
        backbone: nn.Module,
        image_size: int,
        *,
        against_collapse: AgainstCollapse = "contrast",
        visible_ratio: float = 0.25,
        crops: int = 2,
        transport: bool = False,
        channels: int | None = None,
        temperature: float = 0.1,
        isotropy_weight: float = 0.05,
        momentum: float = 0.996,
        colour_jitter: float = 0.4,
        grey: float = 0.2,
        blur: float = 0.0,
    ) -> None:
        super().__init__()
        check_encodes_patches(backbone, "heat_jepa")
        check_choice("against_collapse", against_collapse, get_args(AgainstCollapse))
        if temperature <= 0 or not 0 < isotropy_weight < 1 or not 0 <= momentum < 1:
            raise ValueError("temperature must be positive, isotropy_weight and momentum between 0 and 1")
        if crops < 1:
            raise ValueError(f"crops must be at least 1, not {crops}")
        self.crops = crops
        self.least_images = 2 if against_collapse == "contrast" else 1
        grid = geometry(backbone, image_size)
        self.height, self.width = grid.quarter()
        self.visible = round(visible_ratio * self.height * self.width)
        if not 0 < self.visible <= self.height * self.width:
            raise ValueError(
                f"visible_ratio={visible_ratio} shows {self.visible} of the {self.height * self.width} patches of a "
                "quarter: choose more than 0, at most 1"
            )
        self.grid = (grid.rows, grid.columns)
        self.patch = grid.stride
        self.against_collapse = against_collapse
        self.temperature, self.isotropy_weight, self.momentum = temperature, isotropy_weight, momentum
        self.colours = view_settings(image_size // 2, (1.0, 1.0), colour_jitter, grey, 0.0)
        if not 0 <= blur <= 1:
            raise ValueError(f"blur={blur} is a probability: choose 0 to 1")
        self.blur = blur
        channels = grid.channels if channels is None else channels
        self.backbone = backbone
        self.to_field = nn.Linear(grid.channels, channels)
        self.transport = Transport(channels) if transport else None
        self.teacher: nn.Module | None = None
        if against_collapse == "teacher":
            self.teacher = copy.deepcopy(backbone).requires_grad_(False).eval()
            self.predict = nn.Linear(channels, grid.channels)

    def train(self, mode: bool = True) -> Self:
        """As any module's; but the teacher stays in evaluation mode, where dropping paths makes no noise of targets."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images (B, 3, S, S) -> loss, how well quarters agree, the visible field (4 B, C, n, 1)."""
        visible = self.some_of(self.quarters(len(images), images.device))
        values = self.encode(self.recoloured(self.cut(self.blurred(images), visible)), visible)
        at_rest = self.to_rest(values, visible).mean(dim=1).unflatten(0, (4, -1))  # 4 B C: what each quarter says
        parts = at_rest.unflatten(1, (-1, self.crops)).transpose(1, 2).flatten(0, 1)  # those of one image: 4 K B/K C
        logs = {"similarity/quarters": agreement(parts).detach()}
        if self.against_collapse == "contrast":
            loss = contrast_of_parts(parts, self.temperature)
        elif self.against_collapse == "isotropy":
            distance, isotropy = (parts - parts.mean(dim=0)).square().mean(), sigreg(parts)
            distance = distance * share_of_batch(parts.shape[1], parts.device)
            loss = (1 - self.isotropy_weight) * distance + self.isotropy_weight * isotropy
            logs |= {"loss/distance": distance.detach(), "loss/isotropy": isotropy.detach()}
        else:
            loss = self.distance_to_teacher(images, at_rest)
        return Outputs(loss, logs, values.detach().transpose(1, 2)[..., None])

    def quarters(self, batch: int, device: torch.device) -> Tensor:
        """Row-major indices of the four quarters' patches (4 B, n): quarter k of image i is row k B + i."""
        index = torch.arange(self.grid[0] * self.grid[1], device=device).view(2, self.height, 2, self.width)
        return index.transpose(1, 2).reshape(4, -1).repeat_interleave(batch, dim=0)

    def some_of(self, quarters: Tensor) -> Tensor:
        """A random choice of each quarter's patches: (4 B, h w / 4) -> (4 B, n)."""
        if self.visible == quarters.shape[1]:
            return quarters
        order = torch.rand(quarters.shape, device=quarters.device).argsort(dim=1)
        return quarters.gather(1, order[:, : self.visible])

    @torch.no_grad()
    def blurred(self, images: Tensor) -> Tensor:
        """Each quarter after some time of the heat equation, where that is asked for: (B, 3, S, S) -> same."""
        if not self.blur:
            return images
        half = (images.shape[2] // 2, images.shape[3] // 2)
        apart = images.unflatten(3, (2, half[1])).unflatten(2, (2, half[0])).permute(2, 4, 0, 1, 3, 5)
        chance, deviation = torch.rand(2, apart.shape[:3].numel(), 1, 1, 1, device=images.device)
        time = torch.where(chance < self.blur, (LARGEST_DEVIATION * deviation).square() / 2, 0.0)
        changed = heat_semigroup(apart.flatten(0, 2), time)
        return changed.view(apart.shape).permute(2, 3, 0, 4, 1, 5).reshape(images.shape)

    def cut(self, images: Tensor, visible: Tensor) -> Tensor:
        """Pixels of the patches that each quarter shows: (B, 3, S, S), (4 B, n) -> (4 B, n, 3, p, p)."""
        return cut_patches(images, visible, (self.patch, self.patch))

    def recoloured(self, patches: Tensor) -> Tensor:
        """Each quarter in colours of its own: patches (4 B, n, 3, p, p) -> same. What is not shown costs nothing."""
        strips = patches.transpose(1, 2).flatten(2, 3)
        changed = recolour(strips, self.colours, self.mean, self.std)
        return changed.unflatten(2, patches.shape[1:4:2]).transpose(1, 2)

    def encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """The field of each quarter, encoded without the others: (4 B, n, 3, p, p), (4 B, n) -> (4 B, n, C)."""
        return self.to_field(encode_visible(self.backbone, patches, visible))

    def to_rest(self, values: Tensor, index: Tensor) -> Tensor:
        """Values (B, n, C) at patches (B, n) in the law's frame of rest, (B, n, C): without a law, as they are."""
        return values if self.transport is None else self.transport.to_rest(values, centred_positions(index, self.grid))

    def distance_to_teacher(self, images: Tensor, at_rest: Tensor) -> Tensor:
        """Smooth L1 between what each quarter (4, B, C) says of the other three and what the teacher sees there."""
        assert self.teacher is not None
        with torch.no_grad():
            if self.training:
                for slow, fast in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
                    slow.lerp_(fast, 1 - self.momentum)
            seen = rows(feature_map(self.teacher, images))
            target = F.layer_norm(seen, seen.shape[-1:])
        own = self.quarters(1, images.device)
        errors = []
        for quarter, said in enumerate(at_rest):
            others = torch.ones_like(target[0, :, 0], dtype=torch.bool).index_fill(0, own[quarter], False)
            errors.append(F.smooth_l1_loss(self.predict(self.everywhere(said)[:, others]), target[:, others]))
        return torch.stack(errors).mean()

    def everywhere(self, at_rest: Tensor) -> Tensor:
        """What the heat at rest (B, C) says of every patch, (B, h w, C)."""
        patches = torch.arange(self.grid[0] * self.grid[1], device=at_rest.device).expand(len(at_rest), -1)
        return carry_rest(at_rest, patches, self.grid, self.transport)

    @torch.no_grad()
    def health(self, outputs: Outputs) -> dict[str, float]:
        """Collapse figures, and how far the law has learned to turn, in radians per patch."""
        learned = {} if self.transport is None else {"health/rotation": self.transport.rotation.abs().mean().item()}
        return super().health(outputs) | learned

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Objective.maps`: the first quarter, and where the image breaks the law.

        The residual is the squared distance of each position from the whole image's mean, in the law's frame of
        rest, mean over channels: what a quarter could not have told the others.
        """
        visible = self.quarters(len(images), images.device)
        values = self.encode(self.cut(images, visible), visible)
        at_rest = self.to_rest(values, visible).unflatten(0, (4, -1))  # 4 B n C
        distance = (at_rest - at_rest.mean(dim=(0, 2), keepdim=True)).square().mean(dim=3)
        residual = torch.zeros(len(images), self.grid[0] * self.grid[1], device=images.device)
        residual.scatter_(1, torch.cat(visible.chunk(4), dim=1), torch.cat(distance.unbind(), dim=1).to(residual))
        mask = torch.zeros_like(residual, dtype=torch.bool).scatter(1, visible[: len(images)], True)
        pixels = to_pixels(mask.unflatten(1, self.grid), self.patch)
        return {
            "visible": images * pixels[:, None],
            "visible_mask": pixels,
            "law_residual": residual.unflatten(1, self.grid),
        }

    @torch.no_grad()
    def extrapolation(self, images: Tensor) -> Extrapolation:
        """See :meth:`Objective.extrapolation`: the heat of the top left quarter, at rest everywhere."""

        def fill(values: Tensor, visible: Tensor) -> Tensor:
            return self.everywhere(self.to_rest(values, visible).mean(dim=1))

        return fill_from_corner(self.backbone, self.to_field, images, self.grid, fill)


def contrast_of_parts(parts: Tensor, temperature: float) -> Tensor:
    """InfoNCE with several positives: -log(e^s / (e^s + sum of e^t over other images)), mean over pairs of parts.

    Args:
        parts: vectors (P, B, D) of P parts of B images, of any length but zero.
        temperature: divides the cosines.

    Returns:
        scalar; on several processes each has its share, and the mean over processes is the loss of the joint batch.
    """
    number, batch = parts.shape[:2]
    with full_precision(parts):  # cosines over a small temperature need their digits
        own = F.normalize(parts.to(accumulator(parts.dtype)), dim=2)
        everyone, start = gather(own.transpose(0, 1).flatten(1))  # a row for each image: (N, P D)
        logits = torch.einsum("pbd,nqd->pbnq", own, everyone.unflatten(1, (number, -1))) / temperature
        image = torch.arange(batch, device=parts.device)
        same = torch.zeros(batch, len(everyone), dtype=torch.bool, device=parts.device)
        same[image, start + image] = True
        others = logits.masked_fill(same[:, :, None], -torch.inf).flatten(2).logsumexp(dim=2)  # P B
        positive = logits[:, image, start + image]  # P B P: similarity of part p to part q of its image
        loss = torch.logaddexp(others[..., None], positive) - positive
        pairs = ~torch.eye(number, dtype=torch.bool, device=parts.device)[:, None].expand_as(loss)
        return loss[pairs].sum() * (world_size() / (len(everyone) * number * (number - 1)))


def agreement(parts: Tensor) -> Tensor:
    """Mean cosine between different parts of an image: (P, B, D) -> scalar; at most 1."""
    unit = F.normalize(parts.float(), dim=2)
    total = unit.sum(dim=0).square().sum(dim=1).mean()  # P ones from each part with itself, and all pairs twice
    return (total - len(parts)) / (len(parts) * (len(parts) - 1))
