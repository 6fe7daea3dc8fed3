"""k-nearest-neighbour classification of frozen features: no training, hence nothing to tune but k."""

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.errors import UserError
from heatssl.evaluation.checks import check_features


@torch.inference_mode()
def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    k: int = 20,
    temperature: float | None = None,
    *,
    query_chunk: int = 1024,
    bank_chunk: int = 16384,
) -> float:
    """Share of test features whose k nearest training features, by cosine, vote for the right label.

    Memory beyond the input is ``query_chunk * (bank_chunk + k)`` floats however large the bank: the best k so
    far are merged with each chunk's best k.

    Args:
        train_x: (N, C), any floating type; each chunk is computed in float32.
        train_y: (N,) integer labels, any values.
        test_x: (M, C).
        test_y: (M,). A label that train lacks counts as an error.
        k: neighbours that vote.
        temperature: None gives every neighbour one vote, as scikit-learn's
            ``KNeighborsClassifier(metric="cosine")`` does (on equal votes the smaller label wins); a number T
            > 0 weighs each vote by exp(cosine / T) (Wu et al., arXiv 1805.01978, section 3.4; T = 0.07).
        query_chunk: rows of test that are compared at a time.
        bank_chunk: rows of train that they are compared with at a time.

    Returns:
        Accuracy in [0, 1].

    Raises:
        UserError: on shapes that do not fit, features that are not finite, k outside 1..N, or T <= 0.
    """
    check_features(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(train_x):
        raise UserError(
            f"k={k} neighbours cannot be found among {len(train_x)} training features: set 1 <= k <= {len(train_x)}"
        )
    if temperature is not None and not temperature > 0:
        raise UserError(f"temperature={temperature} must be positive: use 0.07, or null for a plain majority vote")
    labels, train_class = train_y.unique(return_inverse=True)
    right = 0
    for queries, wanted in zip(test_x.split(query_chunk), test_y.split(query_chunk), strict=True):
        similarity, neighbour = nearest(F.normalize(queries.float(), dim=1), train_x, k, bank_chunk)
        if temperature is None:
            votes = torch.ones_like(similarity)
        else:
            # Relative to the nearest neighbour: the vote is the same and no small temperature overflows.
            votes = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
        tally = votes.new_zeros(len(queries), len(labels)).scatter_add_(1, train_class[neighbour], votes)
        right += int((labels[tally.argmax(dim=1)] == wanted).sum())
    return right / len(test_x)


def nearest(queries: Tensor, bank: Tensor, k: int, chunk: int = 16384) -> tuple[Tensor, Tensor]:
    """Cosine and index of each query's k nearest rows of the bank: unit (M, C), (N, C) -> (M, k), (M, k)."""
    similarity = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), chunk):
        part = F.normalize(bank[start : start + chunk].float(), dim=1)
        best = (queries @ part.T).topk(min(k, len(part)), dim=1)
        similarity = torch.cat([similarity, best.values], dim=1)
        index = torch.cat([index, best.indices + start], dim=1)
        if similarity.shape[1] > k:
            similarity, order = similarity.topk(k, dim=1)
            index = index.gather(1, order)
    return similarity, index
