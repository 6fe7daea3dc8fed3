"""What gau_*, flash_* and roformer_v2_* share: patches in, blocks with rotary positions, timm's interface around.

There is no class token, and a position table only on request. Features are the mean over patches, and a set of visible
patches is encoded as the whole grid is, at its true positions.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed, to_2tuple
from timm.models import checkpoint, register_notrace_function, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from heatssl.backbones.attend import Whereabouts, attend
from heatssl.backbones.norm import RMSNorm
from heatssl.backbones.normalisers import Normaliser, NormaliserSettings, number_of_keys
from heatssl.backbones.patch_embedding import embed_patches
from heatssl.backbones.position_table import PositionTable
from heatssl.backbones.positions import PositionSettings, RotaryPositions, scaled
from heatssl.backbones.residual import NormPlace
from heatssl.backbones.timm_records import tell_timm_of_arguments, tell_timm_of_size
from heatssl.ops.surroundings import autocast_type

register_notrace_module(RotaryPositions)
register_notrace_module(Normaliser)
register_notrace_function(attend)
register_notrace_function(number_of_keys)


class PatchEncoder(nn.Module):
    """Base of the models: a subclass makes the blocks.

    Args:
        img_size, patch_size, in_chans, num_classes, global_pool, embed_dim, depth, drop_rate,
            drop_path_rate, dynamic_img_size: as in timm's ``VisionTransformer``; ``global_pool`` is ``avg`` or empty.
        key_width: s of the queries and keys of one head.
        norm_place: ``pre``, with a norm after the last block, or ``post``.
        pos_embed: ``learn`` adds a table of absolute positions to the patches, as timm's ViTs have it; ``none``.
        positions, position_base, position_scale, position_window: see
            :class:`heatssl.backbones.positions.PositionSettings`.
        normaliser, log_n_at_test: see :class:`heatssl.backbones.normalisers.NormaliserSettings`.
        length: tokens at training; null: the patches of an image of ``img_size``, or of one chunk of it.
        trained_grid: rows and columns of patches at training, which a position table has and ``interpolated`` positions
            are measured by; null: those of an image of ``img_size``. Weights hold neither: name both where they are
            loaded into a model of another ``img_size`` than that of their training. What timm saves has them.

    Raises:
        ValueError: on settings out of their range.
    """

    num_prefix_tokens = 0
    has_class_token = False

    def __init__(
        self,
        *,
        key_width: int,
        norm_place: NormPlace,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        pos_embed: str = "none",
        positions: Any = "rope",
        position_base: float = 100.0,
        position_scale: float | None = None,
        position_window: float = 4.0,
        normaliser: Any = "softmax_plus",
        log_n_at_test: bool = False,
        length: int | None = None,
        trained_grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_counts(patch_size=min(to_2tuple(patch_size)), embed_dim=embed_dim)
        if depth < 0:
            raise ValueError(f"depth must not be negative, and is {depth}")
        if norm_place not in ("pre", "post"):
            raise ValueError(f"norm_place must be pre or post, not {norm_place!r}")
        if pos_embed not in ("none", "learn"):
            raise ValueError(f"pos_embed must be none or learn, not {pos_embed!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = pool_of(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            strict_img_size=not dynamic_img_size,
        )
        grid = self.patch_embed.grid_size if trained_grid is None else check_grid(trained_grid)
        self.position_table = PositionTable(grid, embed_dim) if pos_embed == "learn" else None
        settings = PositionSettings(positions, position_base, position_scale, position_window)
        self.positions = RotaryPositions(key_width, settings, grid)
        usual = self.tokens_attended() if length is None else length
        weighting = NormaliserSettings(normaliser, usual, log_n_at_test)
        self.normaliser = Normaliser(key_width, weighting)
        self.norm_in = RMSNorm(embed_dim, eps=1e-6, elementwise_affine=False) if norm_place == "post" else nn.Identity()
        self.blocks = nn.ModuleList(self.block(drop_path_rate * k / max(1, depth - 1)) for k in range(depth))
        self.norm = RMSNorm(embed_dim, eps=1e-6) if norm_place == "pre" else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        reduction = max(self.patch_embed.patch_size)
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": embed_dim, "reduction": reduction} for index in range(depth)
        ]
        tell_timm_of_arguments(self, **self.made_as_trained())

    def block(self, drop_path: float) -> nn.Module:
        """One block: tokens (B, n, d), where they are -> (B, n, d)."""
        raise NotImplementedError

    def tokens_attended(self) -> int:
        """How many keys a query has in an image of ``img_size``."""
        return int(self.patch_embed.num_patches)

    def locate(
        self,
        places: Tensor,
        valid: Tensor | None,
        grid: tuple[int, int],
        is_grid: bool = False,  # noqa: ARG002
    ) -> Whereabouts:
        """What the blocks are told of tokens.

        Args:
            places: row and column (B or 1, n, 2) of each.
            valid: (B, n) bool, which of them are there; None: all.
            grid: rows and columns of the image's patches.
            is_grid: whether the tokens are all patches of the grid, row by row.
        """
        keys = None if valid is None else valid.unsqueeze(-2)
        rotation = self.positions(places, grid)
        activation, factor = self.normaliser(number_of_keys(places, keys))
        return Whereabouts(scaled(rotation, factor), rotation, activation, keys)

    def forward_features(self, x: Tensor, visible: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Encode images, or some patches of each; the cost is that of these patches alone.

        With several chunks (``flash_*``) and more than a few patches each has as many places as the largest could need.

        Args:
            x: normalised images (B, 3, H, W); or the visible patches (B, n, 3, h, w) of images of ``img_size``.
            visible: (B, n) long, row-major patch indices, any order, each at most once but for padding; None: all.
            valid: (B, n) bool, False where an entry of ``visible`` is padding; None: none is.

        Returns:
            (B, n, d), in the order of ``visible``.
        """
        if visible is None:
            grid = self.grid(x.shape[2], x.shape[3])
            tokens = self.embed(x, grid)
            places = grid_places(x, grid[0], grid[1])
        else:
            grid = self.patch_embed.grid_size if x.ndim == 5 else self.grid(x.shape[2], x.shape[3])
            tokens = self.embed_visible(x, visible, grid)
            if valid is not None:  # what stands in padding may be anything, and nothing times zero is zero but a number
                tokens = tokens.masked_fill(~valid.unsqueeze(-1), 0.0)
            places = places_of(visible, grid[1])
        where = self.locate(places, valid, grid, visible is None)
        tokens = self.norm_in(widened(tokens))
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                tokens = checkpoint(block, tokens, where)
            else:
                tokens = block(tokens, where)
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False, valid: Tensor | None = None) -> Tensor:
        """Tokens (B, n, d) -> logits; without a pool those of each token; ``pre_logits``: what the head would see.

        ``valid`` (B, n) as :meth:`forward_features` had it: padding is not pooled.
        """
        if self.global_pool == "avg":
            x = x.mean(dim=1) if valid is None else mean_over(x, valid)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,  # noqa: ARG002
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features after chosen blocks, as timm's models give them; there are no prefix tokens."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, not {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        grid = self.grid(x.shape[2], x.shape[3])
        places = grid_places(x, grid[0], grid[1])
        where = self.locate(places, None, grid, True)
        tokens = self.norm_in(widened(self.embed(x, grid)))
        found = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            tokens = checkpoint(block, tokens, where) if self.grad_checkpointing else block(tokens, where)
            if index in taken:
                found.append(self.norm(tokens) if norm else tokens)
        if output_fmt == "NCHW":
            found = [features.transpose(1, 2).unflatten(2, grid).contiguous() for features in found]
        if output_dict:
            final = {} if intermediates_only else {"image_features": self.norm(tokens)}
            return {"image_intermediates": found} | final
        return found if intermediates_only else (self.norm(tokens), found)

    @torch.jit.ignore
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor]:
        """DINO's form of :meth:`forward_intermediates`, as timm's ViTs have it: the last ``n`` blocks, or those named.

        Returns:
            each (B, n, d); with ``reshape`` (B, d, rows, columns).
        """
        form = "NCHW" if reshape else "NLC"
        found: list[Tensor] = self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=form, intermediates_only=True
        )
        return found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen blocks do not need; the indices of those that stay to be taken."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes, 0 for none; another pool: ``avg`` or empty."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = pool_of(global_pool)
        weight = self.patch_embed.proj.weight
        new = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head = new.to(weight.device, weight.dtype)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Expect images of another size; no weight changes. What the normaliser holds to be usual stays as trained."""
        self.patch_embed.set_input_size(img_size)
        tell_timm_of_size(self, self.patch_embed.img_size)

    @torch.jit.ignore
    def made_as_trained(self) -> dict[str, Any]:
        """Arguments beside its own with which a new model of any input size computes what this one does."""
        return {"length": self.normaliser.length, "trained_grid": [self.positions.rows, self.positions.columns]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass, to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone: those that a module inside names."""
        inside = ((path, module) for path, module in self.named_modules() if path)
        return {f"{path}.{name}" for path, module in inside for name in getattr(module, "no_weight_decay", set)()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """Groups of parameters, for timm's layer decay."""
        return {"stem": r"^patch_embed|^position_table", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return height // self.patch_embed.patch_size[0], width // self.patch_embed.patch_size[1]

    def embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images (B, 3, H, W) -> patches (B, n, d)."""
        tokens = self.patch_embed(images).contiguous()
        return tokens if self.position_table is None else tokens + self.position_table(grid)

    @torch.jit.unused
    def embed_visible(self, images: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
        """The chosen patches only, (B, 3, H, W) or (B, n, 3, h, w), (B, n) -> (B, n, d)."""
        tokens = embed_patches(self.patch_embed, images, visible)
        return tokens if self.position_table is None else tokens + self.position_table(grid)[0, visible]


def check_counts(**counts: int) -> None:
    """Refuse what there cannot be less than one of.

    Raises:
        ValueError: on the first such number, by its name.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")


def check_grid(grid: Sequence[int]) -> tuple[int, int]:
    """Rows and columns.

    Raises:
        ValueError: when they are not two numbers of at least 1.
    """
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"trained_grid must be rows and columns, such as [14, 14], not {list(grid)}")
    return int(grid[0]), int(grid[1])


def mean_over(tokens: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid tokens: (B, n, d), (B, n) bool -> (B, d); zeros where none is."""
    there = valid.unsqueeze(-1)
    # Chosen, not multiplied by zero: what stands in padding may be anything.
    return torch.where(there, tokens, torch.zeros_like(tokens)).sum(dim=1) / there.sum(dim=1).clamp_min(1)


def pool_of(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: when there is no such pool: tokens that nothing pools would pass for logits.
    """
    if name not in ("", "avg"):
        raise ValueError(f"global_pool must be avg or empty, not {name!r}")
    return name


def grid_places(images: Tensor, rows: int, columns: int) -> Tensor:
    """Row and column of each patch of a grid, in row-major order: (1, n, 2), as float32."""
    return places_of(torch.arange(rows * columns, device=images.device), columns)[None]


def places_of(index: Tensor, columns: int) -> Tensor:
    """Row and column of patches by their row-major index: (...) -> (..., 2), as float32."""
    return torch.stack([index // columns, index % columns], dim=-1).float()


def widened(tokens: Tensor) -> Tensor:
    """Under autocast in float32, as a table of positions makes them: half precision rounds off what late layers add."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (the compiler of scripts passes over what is inside)
        if autocast_type(tokens) is not None:
            return tokens.float()
    return tokens


register_notrace_function(grid_places)
register_notrace_function(widened)


def truncated_normal_(layers: Iterable[nn.Module], depth: int, order: int) -> None:
    """GAU-alpha's and RoFormerV2's initialisation of linear layers: deviation 1.137 / sqrt(inputs) L^(-1 / order).

    1.137 undoes the cut at two deviations. Biases are zero.
    """
    for layer in layers:
        if isinstance(layer, nn.Linear):
            deviation = 1.13684723 / layer.in_features**0.5 * depth ** (-1 / order)
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
