"""Naive Bayes context extension, for vision: what several contexts of one object say of its class, made one.

NBCE (Su, kexue.fm 9617; arXiv 2403.17552) lets a language model read more than it was trained on: contexts S_1 ... S_K
are read one by one, and for each next token T

    log p(T | S_1 ... S_K) = (beta + 1) P[log p(T | S_k)] - beta log p(T) + const

with P a pooling over contexts. The mean with beta = K - 1 is naive Bayes; the context of least entropy, with a small
beta, is what its author settled on. Here T is the class, and contexts are tiles of a large image, crops, scales, or
several images of one object; any classifier will do.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from heatssl.errors import check_choice

Pooling = Literal["mean", "maximum", "entropy"]
BETA = 0.25  # of the author's program, with the pooling by entropy
_NEVER = -100.0  # log probability of what truncation leaves out


def nbce(
    logits: Tensor,
    prior: Tensor | None = None,
    *,
    pooling: Pooling = "entropy",
    beta: float | None = BETA,
    top_p: float | None = None,
) -> Tensor:
    """Evidence of K contexts for each class.

    Args:
        logits: of a classifier, (..., K, C); any constant may be added to those of a context.
        prior: logits of the empty context, broadcasting with (..., C), such as :func:`class_prior`, or what the
            classifier says of an empty image; None: all classes alike.
        pooling: ``mean`` of log probabilities; ``maximum`` for each class; ``entropy``: those of the context
            whose probabilities have the least.
        beta: weight of the prior, at least -1; None: K - 1, with ``mean`` naive Bayes.
        top_p: in each context, and in the prior, only the likeliest classes that together have this probability are
            kept (before pooling); None: all. A class that the prior leaves out has none subtracted.

    Returns:
        log probabilities (..., C).

    Raises:
        ValueError: on an unknown pooling, no context, beta below -1, or top_p outside (0, 1].
    """
    check_choice("pooling", pooling, get_args(Pooling))
    if logits.ndim < 2 or logits.shape[-2] < 1:
        raise ValueError(f"logits are (..., contexts, classes) of one context or more, not {tuple(logits.shape)}")
    beta = float(logits.shape[-2] - 1) if beta is None else beta
    if beta < -1:
        raise ValueError(f"beta must be at least -1, not {beta}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    evidence = truncated(logits.float().log_softmax(dim=-1), top_p)
    pooled = pool(evidence, pooling)
    if prior is None:
        return ((beta + 1) * pooled).log_softmax(dim=-1)
    empty = truncated(prior.to(pooled).log_softmax(dim=-1), top_p)
    fused = torch.where(empty > _NEVER, (beta + 1) * pooled - beta * empty, pooled)
    return fused.log_softmax(dim=-1)


def pool(log_probabilities: Tensor, pooling: str) -> Tensor:
    """P of :func:`nbce`: (..., K, C) -> (..., C)."""
    if pooling == "mean":
        return log_probabilities.mean(dim=-2)
    if pooling == "maximum":
        return log_probabilities.amax(dim=-2)
    entropy = torch.special.entr(log_probabilities.exp()).sum(dim=-1)  # 0 for a class that cannot be
    surest = entropy.argmin(dim=-1)[..., None, None].expand(
        *log_probabilities.shape[:-2], 1, log_probabilities.shape[-1]
    )
    return log_probabilities.gather(-2, surest).squeeze(-2)


def truncated(log_probabilities: Tensor, top_p: float | None) -> Tensor:
    """The smallest set of likeliest classes with a probability of ``top_p``; the others get a log of -100."""
    if top_p is None:
        return log_probabilities
    ordered, order = log_probabilities.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    kept = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before < top_p)
    return torch.where(kept, log_probabilities, _NEVER)


def class_prior(labels: Tensor, classes: int) -> Tensor:
    """Log frequencies (C,) of labels (N,), each class counted once more than it is there."""
    counts = torch.bincount(labels, minlength=classes).double() + 1
    return (counts / counts.sum()).log().float()


def mean_logits(logits: Tensor) -> Tensor:
    """The usual fusion: (..., K, C) -> log probabilities (..., C) of the mean logits."""
    return logits.float().mean(dim=-2).log_softmax(dim=-1)


def mean_probabilities(logits: Tensor) -> Tensor:
    """The other: (..., K, C) -> log of the mean probabilities (..., C)."""
    return logits.float().log_softmax(dim=-1).logsumexp(dim=-2) - math.log(logits.shape[-2])
