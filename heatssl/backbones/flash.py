"""flash_*: gated units whose attention is quadratic inside chunks and linear across (FLASH, arXiv 2202.10447).

Chunks are rectangles of the patch grid of at most ``chunk`` patches a side, all of one size. Where a grid does not fill
them, and where only some patches are visible, places stay empty. Few patches are not sorted into chunks at all: where
all their pairs are no more than those of all chunks, a mask says which two share one.
"""

import math
from typing import Any

import torch
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from heatssl.backbones.attend import Whereabouts
from heatssl.backbones.gau import GatedAttentionEncoder
from heatssl.backbones.mixed_chunk_attention import MixedChunkAttention, into_chunks, into_tiles
from heatssl.backbones.normalisers import number_of_keys
from heatssl.backbones.positions import scaled


class ChunkPlaces(nn.Module):
    """Which place in which chunk each token has; a module, so that timm's graphs can take it as one step.

    Args:
        longest: side of a chunk, at most.
    """

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def forward(
        self, places: Tensor, valid: Tensor | None, grid: tuple[int, int], is_grid: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[int, int, int, int] | None]:
        """Sort tokens into G chunks of m places each.

        Args:
            places: row and column (B or 1, n, 2) of each.
            valid: (B, n) bool, which of them are there; None: all.
            grid: rows and columns of patches.
            is_grid: whether the tokens are all patches of the grid, row by row.

        Returns:
            rows and columns (B or 1, G, m, 2) in chunks, zero where a place is empty, or as they were; and ``keys``,
            ``slots`` and ``tiles`` of :class:`Whereabouts`, the slot of padding being G m.
        """
        height, width = chunk_size(grid, self.longest)
        down, across = math.ceil(grid[0] / height), math.ceil(grid[1] / width)
        chunks, size, tokens = down * across, height * width, places.shape[1]
        row, column = places[..., 0].long(), places[..., 1].long()
        chunk = row // height * across + column // width
        if tokens**2 <= chunks * size**2:
            keys = None if valid is None else valid.unsqueeze(-2)
            if chunks > 1:
                share = chunk.unsqueeze(-1) == chunk.unsqueeze(-2)
                keys = share if keys is None else share & keys
            return places, keys, None, None
        if is_grid and chunks * size == tokens:
            tiles = (down, across, height, width)
            return into_tiles(places, tiles), None, None, tiles
        if is_grid:
            rank = row % height * width + column % width
        else:
            size = min(size, tokens)
            if valid is not None:
                chunk = torch.where(valid, chunk, chunks)  # padding goes behind the last chunk
            rank = rank_among_equals(chunk)
        slots = (chunk * size + rank).clamp_max(chunks * size)
        in_chunks = into_chunks(places.expand(slots.shape[0], -1, -1), slots, chunks, size)
        ones = torch.ones(slots.shape[0], tokens, 1, device=places.device)
        taken = into_chunks(ones, slots, chunks, size).squeeze(-1) > 0
        return in_chunks, taken.unsqueeze(-2), slots, None


class MixedChunkEncoder(GatedAttentionEncoder):
    """Patches -> mixed chunk attention -> tokens.

    Args:
        chunk: the longest side of a chunk, in patches; 16 make the 256 tokens of the paper.
        **settings: see :class:`GatedAttentionEncoder`.
    """

    unit = MixedChunkAttention

    def __init__(self, *, chunk: int = 16, **settings: Any) -> None:
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 patch, not {chunk}")
        self.chunk = chunk
        super().__init__(**settings)
        self.chunks = ChunkPlaces(chunk)

    def tokens_attended(self) -> int:
        """Patches of a chunk, in an image of ``img_size``."""
        height, width = chunk_size(self.patch_embed.grid_size, self.chunk)
        return height * width

    def locate(self, places: Tensor, valid: Tensor | None, grid: tuple[int, int], is_grid: bool = False) -> Whereabouts:
        """See :meth:`PatchEncoder.locate`: places in chunks, and where each token is there."""
        in_chunks, keys, slots, tiles = self.chunks(places, valid, grid, is_grid and valid is None)
        rotation = self.positions(in_chunks, grid)
        activation, factor = self.normaliser(number_of_keys(in_chunks, keys))
        far = scaled(rotation, share(places, valid, in_chunks))
        return Whereabouts(scaled(rotation, factor), rotation, activation, keys, valid, far, slots, tiles)


def share(places: Tensor, valid: Tensor | None, in_chunks: Tensor) -> Tensor:
    """1 / sqrt(n), n the tokens of an image, to go with what ``in_chunks`` has of each, (..., 1)."""
    root = number_of_keys(places, None if valid is None else valid.unsqueeze(-2)).rsqrt()
    return root.unsqueeze(1) if in_chunks.ndim == 4 else root


def chunk_size(grid: tuple[int, int], longest: int) -> tuple[int, int]:
    """Rows and columns of chunks of at most ``longest`` a side, as even as they come."""
    height = math.ceil(grid[0] / math.ceil(grid[0] / longest))
    width = math.ceil(grid[1] / math.ceil(grid[1] / longest))
    return height, width


def rank_among_equals(values: Tensor) -> Tensor:
    """How many equal values stand before each one: (B, n) long, not negative -> (B, n)."""
    order = values.argsort(dim=1, stable=True)
    sorted_values = values.gather(1, order)
    index = torch.arange(values.shape[1], device=values.device).expand_as(values)
    first = torch.searchsorted(sorted_values, sorted_values.contiguous())
    return torch.empty_like(values).scatter(1, order, index - first)


# What branches on a number of tokens is one step in a graph of timm's.
register_notrace_function(share)
register_notrace_module(ChunkPlaces)
register_notrace_module(MixedChunkAttention)
