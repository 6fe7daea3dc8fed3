"""Heat completion: hidden features are what heat flowing from the visible ones settles to. Ours.

QB-Heat (arXiv 2211.13228) extrapolates from one block. Here visible patches may lie anywhere and are the boundary
conditions: the encoder sees them alone; a linear map takes its features into the field; there the law, commuting
and diagonal, turns each position into its frame of rest, where an ideal field is constant; heat flows from the
visible to the hidden positions, either until it rests (the Dirichlet problem) or for a learned time (the heat
kernel); and the law turns every position back. A small painter, position by position, makes pixels of it.

There is no mask token and no decoder that mixes tokens: hidden positions meet the visible ones only in a weighted
mean, so all understanding must be in the encoder, and nearly all operations are. As each hidden position is
painted on its own, any share of them can be asked for, and one image can serve several times, once for each
disjoint set of its patches.

What is visible also says, by its mean alone, what the whole picture is: the heat at rest, which the law carries to
every position (:mod:`heatssl.objectives.painting`). Users keep the mean; without this loss nothing is asked of it.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from heatssl.backbones import check_encodes_patches, encode_visible, geometry
from heatssl.errors import check_choice
from heatssl.heat import (
    Transport,
    complete,
    harmonic_weights,
    heat_kernel_weights,
    laplacian,
)
from heatssl.objectives.extrapolation import Extrapolation, fill_from_corner
from heatssl.objectives.masks import random_blocks, random_cells, random_parts, random_scales
from heatssl.objectives.objective import Objective, Outputs, Story
from heatssl.objectives.painting import RestLaw, RestPainter, centred_positions, painter
from heatssl.objectives.targets import Target, as_images, as_target, from_rows, rows, to_pixels

Mask = Literal["random", "block", "blocks", "scales"]
Flow = Literal["kernel", "steady", "correlated"]
BLOCK_SIDE = 2  # patches, of each of several blocks
LARGEST_ANGLE = 0.9 * math.pi  # at pi the law is a wave equation, and nothing comes to rest
FROM_REST = (
    "What is painted from the mean is all that the mean of the visible patches, carried to every position, knows of "
    "the picture: the features that you keep."
)


class HeatCompletion(Objective):
    """Visible patches -> encoder -> heat -> painter -> pixels of hidden patches.

    Args:
        backbone: a timm transformer that encodes single patches.
        image_size: pixels of the square images.
        mask: ``random`` patches; one ``block`` of half the grid's sides, anywhere; several ``blocks`` of two patches
            a side; or ``scales``, patches of a block of any size, anywhere.
        visible_ratio: share of the patches in each visible set (a block is always a quarter).
        parts: visible sets for each image; those of ``random`` and ``blocks`` do not overlap.
        predicted_ratio: share of the hidden patches that is painted.
        flow: ``kernel``, heat that has flowed for a learned time; ``steady``, heat at rest; or ``correlated``, heat at
            rest where channels conduct into each other, z_xx + S z_yy = 0, in the eigenbasis of S: its eigenvalues are
            learned, their angle at most ``LARGEST_ANGLE``.
        transport: whether the law turns the field; without, heat flows between the features as they are.
        groups: of channels, each with a time of its own, or an anisotropy (an eigenvalue of S) of its own.
        channels: width of the field; null: that of the backbone.
        painter_width: hidden channels of the painter; 0: it is linear.
        target: ``normalised`` patches or ``plain`` pixels.
        rest_weight: of painting the whole picture from the mean over what is visible; 0: not at all.
        rest_law: what carries the mean to the positions, see :class:`heatssl.objectives.painting.RestPainter`.

    Raises:
        UserError: when the backbone cannot encode single patches.
        ValueError: on an unknown law, or settings that leave nothing visible or hidden, or do not fit the channels.
    """

    story = Story(
        "What heat fills in",
        "The encoder saw only the visible patches. Heat flowed from them to the hidden ones, and a small painter made "
        "pixels of it.",
        {
            "visible": "visible patches",
            "reconstruction": "filled in by heat",
            "law_residual": "residual of heat at rest",
        },
    )

    def __init__(
        self,
        backbone: nn.Module,
        image_size: int,
        *,
        mask: Mask = "random",
        visible_ratio: float = 0.25,
        parts: int = 1,
        predicted_ratio: float = 1.0,
        flow: Flow = "kernel",
        transport: bool = True,
        groups: int = 4,
        channels: int | None = None,
        painter_width: int = 256,
        target: Target = "normalised",
        rest_weight: float = 1.0,
        rest_law: RestLaw = "commuting",
    ) -> None:
        super().__init__()
        check_encodes_patches(backbone, "heat_completion")
        check_choice("mask", mask, get_args(Mask))
        check_choice("flow", flow, get_args(Flow))
        check_choice("target", target, get_args(Target))
        grid = geometry(backbone, image_size)
        channels = grid.channels if channels is None else channels
        self.grid = (grid.rows, grid.columns)
        self.positions = grid.rows * grid.columns
        self.patch = grid.stride
        self.block = (grid.rows // 2, grid.columns // 2) if mask == "block" else None
        self.visible = int(visible_ratio * self.positions) if self.block is None else self.block[0] * self.block[1]
        if mask == "blocks":
            if grid.rows % BLOCK_SIDE or grid.columns % BLOCK_SIDE:
                raise ValueError(f"blocks of {BLOCK_SIDE} x {BLOCK_SIDE} do not tile {self.grid}: choose mask=random")
            self.visible -= self.visible % BLOCK_SIDE**2
        self.predicted = round(predicted_ratio * (self.positions - self.visible))
        if not 0 < self.visible < self.positions or not 0 < self.predicted <= self.positions - self.visible:
            raise ValueError(
                f"{self.visible} of {self.positions} patches visible and {self.predicted} painted: "
                "choose a visible_ratio and predicted_ratio between 0 and 1"
            )
        if parts < 1 or (mask in ("random", "blocks") and parts * self.visible > self.positions):
            raise ValueError(f"{parts} sets of {self.visible} patches do not fit into {self.positions}")
        if rest_weight < 0:
            raise ValueError(f"rest_weight={rest_weight} is negative: choose 0 or more")
        if groups < 1 or channels % (2 * groups):
            raise ValueError(f"{channels} channels do not fall into two halves of {groups} groups")
        self.mask, self.parts = mask, parts
        self.flow = flow
        self.target: Target = target
        self.backbone = backbone
        self.to_field = nn.Linear(grid.channels, channels)
        self.transport = Transport(channels) if transport else None
        # Times from a neighbour's to a few patches' reach; anisotropies from 1, where x and y are alike.
        start = torch.linspace(-1.2, 1.8, groups) if flow == "kernel" else torch.zeros(groups)
        self.log_flow = nn.Parameter(start)
        self.raw_angle = nn.Parameter(torch.zeros(groups)) if flow == "correlated" else None
        self.painter = painter(channels, painter_width, 3 * self.patch**2)
        self.rest_weight = rest_weight
        self.from_rest: RestPainter | None = None
        if rest_weight:
            self.story = self.story._replace(explanation=f"{self.story.explanation} {FROM_REST}")
            self.from_rest = RestPainter(grid.channels, channels, self.grid, painter_width, 3 * self.patch**2, rest_law)

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images (B, 3, S, S) -> loss over painted patches, its parts, the visible field (P B, C, n, 1)."""
        visible, hidden = self.split(images)
        asked = hidden[:, : self.predicted]
        images = images.repeat(self.parts, 1, 1, 1)
        tokens = encode_visible(self.backbone, images, visible)
        values = self.to_field(tokens)
        painted = self.painter(self.fill_in(values, visible, asked))
        patches = rows(as_target(images, self.patch, self.target))
        loss = (painted - torch.take_along_dim(patches, asked[..., None], dim=1)).square().mean()
        logs = {"loss/hidden": loss.detach()}
        if self.from_rest is not None:
            whole = self.from_rest(tokens.mean(dim=1), self.everywhere(images))
            rest = (whole - patches).square().mean()
            loss, logs["loss/rest"] = loss + self.rest_weight * rest, rest.detach()
        return Outputs(loss, logs, values.detach().transpose(1, 2)[..., None])

    def everywhere(self, images: Tensor) -> Tensor:
        """Row-major indices of all patches, for each of the images (B, N)."""
        return torch.arange(self.positions, device=images.device).expand(len(images), -1)

    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Row-major indices of visible (P B, n) and hidden patches (P B, N - n), new for each image."""
        if self.block:
            return random_blocks(len(images), self.grid, self.block, self.parts, images.device)
        if self.mask == "blocks":
            cells = self.visible // BLOCK_SIDE**2
            return random_cells(len(images), self.grid, BLOCK_SIDE, cells, self.parts, images.device)
        if self.mask == "scales":
            return random_scales(len(images), self.grid, self.visible, self.parts, images.device)
        return random_parts(len(images), self.positions, self.visible, self.parts, images.device)

    def fill_in(self, values: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
        """The field at the patches asked for: values (B, n, C) at visible (B, n), asked (B, m) -> (B, m, C)."""
        known, wanted = (centred_positions(index, self.grid) for index in (visible, asked))
        if self.transport is None:
            return complete(values, self.weights(visible, asked))
        at_rest = complete(self.transport.to_rest(values, known), self.weights(visible, asked))
        return self.transport.from_rest(at_rest, wanted)

    def weights(self, visible: Tensor, asked: Tensor) -> Tensor:
        """Share of each visible patch in each one asked for: (B, n), (B, m) -> (B, K, m, n)."""
        flow = self.log_flow.exp()
        if self.flow == "kernel":
            return heat_kernel_weights(centred_positions(visible, self.grid), centred_positions(asked, self.grid), flow)
        if self.raw_angle is not None:
            flow = torch.polar(flow, LARGEST_ANGLE * self.raw_angle.tanh())
        return harmonic_weights(visible, asked, self.grid, flow)

    @torch.no_grad()
    def health(self, outputs: Outputs) -> dict[str, float]:
        """Collapse figures, and what the law has learned."""
        learned = {f"health/{'time' if self.flow == 'kernel' else 'anisotropy'}": self.log_flow.exp().mean().item()}
        if self.transport is not None:
            learned["health/rotation"] = self.transport.rotation.abs().mean().item()  # radians per patch
        return super().health(outputs) | learned

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Objective.maps`; the residual is Laplace's, of the completed field in its frame of rest.

        ``from_rest`` is what the mean over the visible patches says of the whole picture.
        """
        visible, _ = (index[: len(images)] for index in self.split(images))
        tokens = encode_visible(self.backbone, images, visible)
        values = self.to_field(tokens)
        everywhere = self.everywhere(images)
        filled = self.fill_in(values, visible, everywhere)
        rest = filled
        if self.transport is not None:
            rest = self.transport.to_rest(filled, centred_positions(everywhere, self.grid))
        pictures = {"reconstruction": self.painter(filled)}
        if self.from_rest is not None:
            pictures["from_rest"] = self.from_rest(tokens.mean(dim=1), everywhere)
        nothing = torch.zeros(len(images), self.positions, dtype=torch.bool, device=images.device)
        pixels = to_pixels(nothing.scatter(1, visible, True).unflatten(1, self.grid), self.patch)
        field = from_rows(rest, self.grid)
        return {
            "visible": images * pixels[:, None],
            "visible_mask": pixels,
            **{
                name: as_images(from_rows(patches, self.grid), images, self.patch, self.target)
                for name, patches in pictures.items()
            },
            "law_residual": laplacian(field, boundary="replicate").square().mean(dim=1),
        }

    @torch.no_grad()
    def extrapolation(self, images: Tensor) -> Extrapolation:
        """See :meth:`Objective.extrapolation`: what heat from the top left quarter comes to, whatever the mask."""
        everywhere = self.everywhere(images)
        return fill_from_corner(
            self.backbone,
            self.to_field,
            images,
            self.grid,
            lambda values, visible: self.fill_in(values, visible, everywhere),
        )
