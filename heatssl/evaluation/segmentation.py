"""Semantic segmentation with frozen feature maps: a linear classifier of positions, or their nearest neighbours.

Either gives every position of the map a score for each class; scores are interpolated to the pixels of the mask, where
the classes are compared. Quality is the mean intersection over union (torchmetrics), pixels pooled over all images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm

from heatssl.errors import UserError
from heatssl.evaluation.knn import nearest
from heatssl.evaluation.linear import moments
from heatssl.progress_bar import progress_bar

IGNORED = 255  # class of pixels that count nowhere
LEARNING_RATES = (1e-3, 1e-2, 1e-1)
EPOCHS = 20
BATCH = 16


@dataclass(frozen=True)
class SegmentationScores:
    """How well predicted classes lie over the true ones, over all pixels that count."""

    ious: list[float]  # intersection over union of each class, in [0, 1]; nan: neither predicted nor there
    pixel_accuracy: float

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that are there or were predicted."""
        known = [iou for iou in self.ious if iou == iou]  # noqa: PLR0124 (nan)
        return sum(known) / len(known)


def linear_segmentation(
    train_maps: Tensor,
    train_masks: Tensor,
    test_maps: Tensor,
    test_masks: Tensor,
    classes: int,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = EPOCHS,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[SegmentationScores, float]:
    """A linear layer on standardised channels, cross-entropy at every pixel, AdamW with a cosine schedule.

    Args:
        train_maps: (N, C, h, w), any floating type.
        train_masks: (N, S, S) uint8 classes, ``IGNORED`` where none counts.
        test_maps: (M, C, h, w).
        test_masks: (M, S, S).
        classes: how many there are.
        learning_rates: the one with the best mean IoU on the held-out images is taken.
        epochs: of every training.
        held_out: share of train that selects, at least one image.
        seed: of the split, the first weights and the order; the result depends on nothing else.
        device: where batches are computed.
        progress: show a bar on a terminal.

    Returns:
        scores on test, and the learning rate that was selected.

    Raises:
        UserError: on shapes that do not fit, fewer than two images, maps that are not finite, or a class out of range.
    """
    _check(train_maps, train_masks, test_maps, test_masks, classes)
    if epochs < 1:
        raise UserError(f"epochs={epochs} must be at least 1")
    fit, held = split_rows(train_masks, held_out, seed)
    order = torch.cat([held, fit])
    mean, std = moments(train_maps)
    with progress_bar(
        total=(len(learning_rates) * len(fit) + len(order)) * epochs, name="segmentation", shown=progress
    ) as bar:

        def train(rows: Tensor, rate: float) -> nn.Module:
            with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it was
                torch.manual_seed(seed)
                head = _LinearHead(mean, std, classes).to(device)
                _train(head, train_maps, train_masks, rows, rate, epochs, device, bar)
            return head

        quality = [
            scores(_predict(train(fit, rate), train_maps[held], device), train_masks[held], classes).mean_iou
            for rate in learning_rates
        ]
        best = learning_rates[max(range(len(quality)), key=quality.__getitem__)]
        head = train(order, best)
    return scores(_predict(head, test_maps, device), test_masks, classes), best


def split_rows(masks: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of masks (N, S, S) to fit, and rows held out: the share of them, at least one.

    Raises:
        UserError: on fewer than two masks, a share out of range, and when all pixels of either part are ignored.
    """
    if len(masks) < 2 or not 0 < held_out < 1:
        raise UserError("segmentation needs two images of train or more, and held_out between 0 and 1")
    order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(seed))
    held = max(1, round(held_out * len(order)))
    for rows, part in (
        (order[held:], "the rest of train"),
        (order[:held], f"the held-out part of train ({held_out:g})"),
    ):
        check_counted(masks[rows], part, "another seed or held_out")
    return order[held:], order[:held]


def check_counted(masks: Tensor, part: str, else_give: str = "other images") -> None:
    """Masks (N, S, S) have a pixel that counts, or there is nothing to measure.

    Raises:
        UserError: naming them, and what would help.
    """
    if bool((masks == IGNORED).all()):
        raise UserError(f"all pixels of the masks of {part} are ignored: shorten ignore, or give {else_give}")


class _LinearHead(nn.Module):
    """Maps (B, C, h, w) -> scores (B, K, h, w)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])
        self.classify = nn.Conv2d(len(mean), classes, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.classify((maps.to(self.mean) - self.mean) / self.std)


def _train(
    head: nn.Module,
    maps: Tensor,
    masks: Tensor,
    rows: Tensor,
    rate: float,
    epochs: int,
    device: torch.device | str,
    bar: "tqdm[Any]",
) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=1e-2)
    steps = epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for chosen in rows[torch.randperm(len(rows))].split(BATCH):
            loss = F.cross_entropy(
                to_pixels(head(maps[chosen].to(device)), masks.shape[1:]),
                masks[chosen].long().to(device),
                ignore_index=IGNORED,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(len(chosen))


@torch.no_grad()
def _predict(head: nn.Module, maps: Tensor, device: torch.device | str) -> Tensor:
    return torch.cat([head(part.to(device)).cpu() for part in maps.split(BATCH)])


@torch.inference_mode()
def knn_segmentation(
    train_maps: Tensor,
    train_masks: Tensor,
    test_maps: Tensor,
    test_masks: Tensor,
    classes: int,
    *,
    k: int = 30,
    temperature: float = 0.07,
    chunk: int = 4096,
    bank_chunk: int = 16384,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> SegmentationScores:
    """Each position is what the k positions of train most like it are, weighted by exp(cosine / temperature).

    A position of train votes for the classes of its pixels, each by its share; positions without a pixel that counts
    do not vote. Memory beyond the input is a copy of the maps of train, and ``chunk * (bank_chunk + k * classes)``
    floats.

    Args:
        train_maps: (N, C, h, w), any floating type.
        train_masks: (N, S, S) uint8 classes, ``IGNORED`` where none counts.
        test_maps: (M, C, h, w).
        test_masks: (M, S, S).
        classes: how many there are.
        k: neighbours that vote, at most the positions of train.
        temperature: of their votes.
        chunk: positions of test that are compared at a time.
        bank_chunk: positions of train that they are compared with at a time.
        device: where they are compared.
        progress: show a bar on a terminal.

    Raises:
        UserError: see :func:`linear_segmentation`, and on k out of range.
    """
    _check(train_maps, train_masks, test_maps, test_masks, classes)
    bank = _positions(train_maps)
    votes = _positions(class_shares(train_masks, classes, train_maps.shape[2:]))
    counted = votes.sum(dim=1) > 0
    bank, votes = bank[counted].to(device), votes[counted].to(device)
    if not 1 <= k <= len(bank):
        raise UserError(f"k={k} neighbours cannot be found among {len(bank)} positions: set 1 <= k <= {len(bank)}")
    if not temperature > 0:
        raise UserError(f"temperature={temperature:g} must be positive: use 0.07")
    found = []
    parts = _positions(test_maps).split(chunk)
    for part in progress_bar(parts, name="neighbours", shown=progress):
        cosine, neighbour = nearest(F.normalize(part.to(device).float(), dim=1), bank, k, bank_chunk)
        weight = (cosine / temperature).softmax(dim=1)
        found.append((weight[..., None] * votes[neighbour]).sum(dim=1).cpu())
    height, width = test_maps.shape[2:]
    maps = torch.cat(found).unflatten(0, (-1, height, width)).permute(0, 3, 1, 2)
    return scores(maps, test_masks, classes)


def _positions(maps: Tensor) -> Tensor:
    """(N, C, h, w) -> (N h w, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def class_shares(masks: Tensor, classes: int, grid: Sequence[int]) -> Tensor:
    """Shares of the classes in each cell of a grid, among the pixels that count: (N, S, S) -> (N, K, h, w)."""
    cells = (grid[0], grid[1])
    counts = torch.stack([F.adaptive_avg_pool2d((masks == label).float(), cells) for label in range(classes)], 1)
    return counts / counts.sum(dim=1, keepdim=True).clamp_min(1e-9)


def to_pixels(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Scores (B, K, h, w) at the pixels of a mask, (B, K, *size), bilinear."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def scores(maps: Tensor, masks: Tensor, classes: int) -> SegmentationScores:
    """Class scores (M, K, h, w) against masks (M, S, S)."""
    confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORED)
    for part, mask in zip(maps.split(BATCH), masks.split(BATCH), strict=True):
        confusion.update(to_pixels(part, masks.shape[1:]).argmax(dim=1), mask.long())
    # True class down, predicted across. MulticlassJaccardIndex divides the same counts in float32, which is exact for
    # less than 16.8 million pixels.
    table = confusion.compute().double()
    right = table.diagonal()
    ious = right / (table.sum(dim=0) + table.sum(dim=1) - right)
    return SegmentationScores(ious.tolist(), (right.sum() / table.sum()).item())


def _check(train_maps: Tensor, train_masks: Tensor, test_maps: Tensor, test_masks: Tensor, classes: int) -> None:
    for split, maps, masks in (("train", train_maps, train_masks), ("test", test_maps, test_masks)):
        if maps.ndim != 4 or masks.ndim != 3 or len(maps) != len(masks) or not len(maps):
            raise UserError(
                f"{split} maps must be (N, C, h, w) and masks (N, S, S), not {tuple(maps.shape)} and "
                f"{tuple(masks.shape)}"
            )
        if not torch.isfinite(maps).all():
            raise UserError(f"{split} maps contain NaN or infinity: the weights are broken, use an earlier checkpoint")
        wrong = (masks >= classes) & (masks != IGNORED)
        check_counted(masks, split)
        if wrong.any():
            raise UserError(f"{split} masks hold the class {int(masks[wrong][0])}, there are {classes} from 0 on")
