"""Probes that see every position of a frozen feature map: one learned query, or one transformer block.

A linear probe of mean-pooled features cannot tell what lies in the positions and not in their mean.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from heatssl.errors import UserError, check_choice
from heatssl.evaluation.accuracy import accuracy
from heatssl.evaluation.checks import check_grid, check_labels, check_maps
from heatssl.evaluation.held_out import stratified_split
from heatssl.evaluation.linear import moments
from heatssl.progress_bar import progress_bar
from heatssl.schedule import warmup_cosine

HEADS = ("attentive", "block")
# By head: 9,000 maps of 128 x 8 x 8 take half a minute and three on one processor core (docs/imagenette.md).
EPOCHS = {"attentive": 30, "block": 10}
LEARNING_RATES = {"attentive": (3e-3, 1e-2, 3e-2), "block": (1e-3, 3e-3, 1e-2)}
BATCH = 64
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # share of the steps
MOST_ATTENTION_HEADS = 8


@dataclass(frozen=True)
class TokenProbeResult:
    """What :func:`token_probe` found."""

    accuracy: float  # on test, in [0, 1]
    held_out_accuracy: float  # of the selected learning rate, on the part of train that selected it
    selected: float  # that learning rate
    probe: "TokenProbe"  # trained on the whole of train
    seconds: float


@torch.inference_mode(mode=False)  # where nothing could be trained
def token_probe(
    train_maps: Tensor,
    train_y: Tensor,
    test_maps: Tensor,
    test_y: Tensor,
    *,
    head: str = "attentive",
    depth: int = 1,
    learning_rates: Sequence[float] = (),
    epochs: int | None = None,
    batch_size: int = BATCH,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> TokenProbeResult:
    """Select a learning rate on a held-out part of train, retrain with it on the whole of train, test once.

    AdamW, weight decay 0.05 on matrices, linear warm-up over a tenth of the steps, then cosine to zero. Each learning
    rate is tried for a quarter of the epochs, with a schedule that ends there. Channels are standardised by the
    statistics of the whole of train.

    Args:
        train_maps: (N, C, h, w) frozen feature maps, any floating type; each batch is computed in float32.
        train_y: (N,) labels; the probe has ``train_y.max() + 1`` classes.
        test_maps: (M, C, h, w), looked at once, after everything is chosen.
        test_y: (M,).
        head: ``attentive``, see :class:`AttentivePooling`, or ``block``, see :class:`BlockPooling`.
        depth: transformer blocks of ``block``.
        learning_rates: peaks, those of a batch: not rescaled; empty for ``LEARNING_RATES`` of the head.
        epochs: of the final training; None for ``EPOCHS`` of the head.
        batch_size: maps per step; changes the result.
        held_out: share of each class that selects, at least one image of each class that has two.
        seed: of the split, the first weights and the order of batches; on one machine with one number of threads
            the result depends on nothing else.
        device: where batches are computed; the maps stay where they are.
        progress: show a bar on a terminal once the work has taken two seconds.

    Raises:
        UserError: on an unknown head, shapes that do not fit, NaN maps, negative labels, one class only, a label of
            test that train lacks, no class with two images, or settings outside their range.
    """
    start = time.perf_counter()
    check_token_settings(head, depth, learning_rates, epochs, batch_size, held_out)
    epochs = EPOCHS[head] if epochs is None else epochs
    learning_rates = tuple(learning_rates) or LEARNING_RATES[head]
    check_maps(train_maps, train_y, test_maps, test_y)
    check_labels(train_y, test_y)
    train_maps, test_maps, train_y, test_y = train_maps.detach(), test_maps.detach(), train_y.long(), test_y.long()
    classes, statistics = int(train_y.max()) + 1, moments(train_maps)
    fit, held = stratified_split(train_y, held_out, seed)
    trial = trial_epochs(epochs)
    steps = len(learning_rates) * _steps(fit, trial, batch_size) + _steps(train_y, epochs, batch_size)
    with progress_bar(total=steps, name="probe", shown=progress) as bar:

        def train(rows: Tensor, rate: float, length: int) -> TokenProbe:
            probe = _create(head, depth, classes, *statistics, seed).to(device)
            _train(probe, train_maps, train_y, rows, rate, length, batch_size, seed, bar.update)
            return probe

        scores = []
        for rate in learning_rates:
            accuracy, loss = _evaluate(train(fit, rate, trial), train_maps, train_y, held)
            scores.append((accuracy, -loss))
        best = max(range(len(scores)), key=scores.__getitem__)
        every = torch.arange(len(train_y), device=train_y.device)
        probe = train(every, learning_rates[best], epochs)
    accuracy, _ = _evaluate(probe, test_maps, test_y, torch.arange(len(test_y), device=test_y.device))
    return TokenProbeResult(accuracy, scores[best][0], learning_rates[best], probe, time.perf_counter() - start)


def trial_epochs(epochs: int) -> int:
    """Epochs that each learning rate is tried for when the final training has ``epochs``."""
    return max(1, epochs // 4)


class TokenProbe(nn.Module):
    """Standardises each channel, pools the positions and classifies: maps (B, C, h, w) -> logits (B, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, pooling: nn.Module, mean: Tensor, std: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.pooling = pooling
        self.classifier = nn.Linear(len(mean), classes)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = maps.flatten(2).transpose(1, 2).to(self.mean.dtype)
        return self.classifier(self.pooling((tokens - self.mean) / self.std))


class AttentivePooling(nn.Module):
    """One learned query attends over all positions, with several heads: tokens (B, P, C) -> (B, C).

    The cross-attention of the attentive probes of CAE (arXiv 2202.03026, section 4.1) and V-JEPA (arXiv 2404.08471),
    without an MLP behind it: the same functions as timm's ``AttentionPoolLatent(out_features=0)``. Of query and keys a
    head's softmax sees only the vector W_k^T q, learned here directly, and the mean of values is the value of the
    mean (arXiv 2506.10178 makes the same savings): a position costs 2 H C products instead of 2 C^2.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, channels), std=channels**-0.5))
        self.values = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(heads, channels // heads, channels), std=channels**-0.5)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        attention = (tokens @ self.queries.T).softmax(dim=1)  # (B, P, H)
        return torch.einsum("bhc,hdc->bhd", attention.transpose(1, 2) @ tokens, self.values).flatten(1)


class BlockPooling(nn.Module):
    """Transformer blocks, then the mean over positions: tokens (B, P, C) -> (B, C).

    "tran-1" probing of QB-Heat (arXiv 2211.13228) and FINOLA (arXiv 2310.05956): one pre-norm block with
    self-attention and an MLP of ratio 4, here timm's; "tran-4" has four. Only the features themselves say where they
    are: the blocks add no position embedding.
    """

    def __init__(self, channels: int, heads: int, depth: int = 1) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(channels, heads, qkv_bias=True) for _ in range(depth)))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.blocks[:-1](tokens)
        last: Any = self.blocks[-1]  # timm declares less of its parts than they are
        tokens = tokens + last.attn(last.norm1(tokens))
        # The mean passes through the last MLP's last linear map: the same numbers, a fifth of one block's time less.
        hidden = last.mlp.act(last.mlp.fc1(last.norm2(tokens))).mean(dim=1)
        return tokens.mean(dim=1) + last.mlp.fc2(hidden)


def _create(head: str, depth: int, classes: int, mean: Tensor, std: Tensor, seed: int) -> TokenProbe:
    """A fresh probe that depends on the seed alone; torch's global generator stays as it was."""
    channels = len(mean)
    attention_heads = math.gcd(channels, MOST_ATTENTION_HEADS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pooling: nn.Module
        if head == "block":
            pooling = BlockPooling(channels, attention_heads, depth)
        else:
            pooling = AttentivePooling(channels, attention_heads)
        return TokenProbe(pooling, mean, std, classes)


def _train(
    probe: TokenProbe,
    maps: Tensor,
    y: Tensor,
    rows: Tensor,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
    tick: Callable[[], object],
) -> None:
    """Minimise cross-entropy on the given rows of maps (N, C, h, w) and labels (N,); ``tick`` after each step."""
    device = probe.mean.device
    optimizer = torch.optim.AdamW(param_groups_weight_decay(probe, WEIGHT_DECAY), lr=learning_rate)
    steps = _steps(rows, epochs, batch_size)
    warmup = math.ceil(WARM_UP * steps) - 1
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, steps))
    generator = torch.Generator().manual_seed(seed)
    # CUDA's other attention kernels add up gradients in an order of their own: two runs would differ.
    repeatable = sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()
    with repeatable, torch.enable_grad():
        for _ in range(epochs):
            order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
            for batch in order.split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(probe(maps[batch].to(device)), y[batch].to(device)).backward()
                optimizer.step()
                schedule.step()
                tick()


def _steps(rows: Tensor, epochs: int, batch_size: int) -> int:
    return epochs * math.ceil(len(rows) / batch_size)


@torch.no_grad()
def _evaluate(probe: TokenProbe, maps: Tensor, y: Tensor, rows: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on the given rows."""
    device = probe.mean.device
    logits = torch.cat([probe(maps[batch].to(device)) for batch in rows.split(BATCH)])
    labels = y[rows].to(device)
    return accuracy(logits.argmax(dim=1), labels), F.cross_entropy(logits, labels).item()


def check_token_settings(
    head: str, depth: int, learning_rates: Sequence[float], epochs: int | None, batch_size: int, held_out: float
) -> None:
    """Settings of :func:`token_probe`, before maps cost time.

    Raises:
        UserError: on an unknown head, or a setting outside its range.
    """
    check_choice("head", head, HEADS, UserError)
    if depth < 1 or (depth > 1 and head != "block"):
        raise UserError(f"depth={depth}: head=block has one block or more, and no other head has any")
    check_grid(learning_rates)
    if (epochs is not None and epochs < 1) or batch_size < 1 or not 0 < held_out < 1:
        raise UserError("epochs and batch_size must be at least 1, and held_out between 0 and 1")
