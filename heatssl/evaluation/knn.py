"""k-nearest-neighbour classification of frozen features: no training, hence nothing to tune but k."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.errors import UserError
from heatssl.evaluation.accuracy import right_answers
from heatssl.evaluation.checks import check_features
from heatssl.evaluation.processes import total
from heatssl.progress_bar import progress_bar

EXACT_BYTES = 2**30  # of a bank in float32


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

    Memory beyond the input is ``query_chunk * (bank_chunk + k) + bank_chunk * C`` floats however large the bank: the
    best k so far are merged with each chunk's best k.

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
    features = (train_x, train_y, test_x, test_y)
    return knn_accuracies(*features, [k], temperature, query_chunk=query_chunk, bank_chunk=bank_chunk)[0]


@torch.inference_mode()
def knn_accuracies(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    ks: Sequence[int],
    temperature: float | None = None,
    *,
    query_chunk: int = 1024,
    bank_chunk: int = 16384,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> list[float]:
    """:func:`knn_accuracy` for each of several k: the neighbours are looked for once.

    Args:
        train_x: as there, and so are the arguments that are not named here.
        train_y: labels.
        test_x: queries.
        test_y: their labels.
        ks: numbers of neighbours.
        temperature: of the votes.
        query_chunk: rows of test.
        bank_chunk: rows of train.
        rank: of this process (:mod:`heatssl.evaluation.processes`): it classifies its share of the chunks of test, and
            a chunk meets the same rows as with one process.
        world: number of processes, each with all features.
        progress: show a bar on a terminal once the work has taken two seconds.
    """
    check_features(train_x, train_y, test_x, test_y)
    check_neighbours(ks, len(train_x), temperature)
    labels, train_class = train_y.unique(return_inverse=True)
    right = torch.zeros(len(ks), dtype=torch.long)
    chunks = list(zip(test_x.split(query_chunk), test_y.split(query_chunk), strict=True))
    for queries, wanted in progress_bar(chunks[rank::world], name="neighbours", shown=progress):
        similarity, neighbour = nearest(F.normalize(queries.float(), dim=1), train_x, max(ks), bank_chunk)
        if temperature is None:
            votes = torch.ones_like(similarity)
        else:
            # Relative to the nearest neighbour: the vote is the same and no small temperature overflows.
            votes = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
        classes = train_class[neighbour]
        for place, k in enumerate(ks):
            tally = votes.new_zeros(len(queries), len(labels))
            tally.scatter_add_(1, classes[:, :k], votes[:, :k])
            right[place] += right_answers(labels[tally.argmax(dim=1)], wanted)
    right = total(right) if world > 1 else right
    return [int(number) / len(test_x) for number in right]


def check_neighbours(ks: Sequence[int], count: int, temperature: float | None) -> None:
    """Numbers of neighbours among so many training images, and the temperature of their votes.

    Raises:
        UserError: when one of them is out of range.
    """
    for k in ks:
        if not 1 <= k <= count:
            raise UserError(f"k={k} neighbours cannot be found among {count} training images: set 1 <= k <= {count}")
    if temperature is not None and not temperature > 0:
        raise UserError(f"temperature={temperature} must be positive: use 0.07, or null for a plain majority vote")


@torch.inference_mode()
def unit_bank(
    x: Tensor,
    device: torch.device,
    prepare: Callable[[Tensor], Tensor] | None = None,
    chunk: int = 16384,
    most_bytes: int = EXACT_BYTES,
) -> Tensor:
    """Features (N, C), prepared, at unit length, on the device, made by chunks.

    In float32 up to ``most_bytes``; beyond in float16: half the memory, cosines to about 1e-5, so that a bank of
    ImageNet fits.
    """
    dtype = torch.float32 if 4 * x.numel() <= most_bytes else torch.float16
    bank = torch.empty(x.shape, dtype=dtype, device=device)
    for rows, place in zip(x.split(chunk), bank.split(chunk), strict=True):
        given = rows.to(device).float()
        place.copy_(F.normalize(given if prepare is None else prepare(given), dim=1))
    return bank


def nearest(queries: Tensor, bank: Tensor, k: int, chunk: int = 16384) -> tuple[Tensor, Tensor]:
    """Cosine and index (M, k) of the k rows of the bank (N, C) nearest to each unit query (M, C), nearest first."""
    similarity = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), chunk):
        part = F.normalize(bank[start : start + chunk].float(), dim=1)
        best = (queries @ part.T).topk(min(k, len(part)), dim=1)
        similarity = torch.cat([similarity, best.values], dim=1)
        index = torch.cat([index, best.indices + start], dim=1)
        if start:
            similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
            index = index.gather(1, order)
    return similarity, index
