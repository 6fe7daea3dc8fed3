"""A wrong neighbour or vote would shift every published kNN number without anyone noticing."""

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from heatssl.errors import UserError
from heatssl.evaluation import knn_accuracy
from heatssl.evaluation.knn import knn_accuracies, nearest, unit_bank


def _clusters(count: int, seed: int, classes: int = 5, channels: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, channels, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, channels, generator=generator), labels


TRAIN, TEST = _clusters(300, 1), _clusters(200, 2)


@pytest.mark.parametrize("k", [1, 7, 20])
def test_equals_scikit_learn(k: int) -> None:
    reference = KNeighborsClassifier(n_neighbors=k, metric="cosine").fit(*TRAIN).score(*TEST)
    assert 0.3 < reference < 0.95
    assert knn_accuracy(*TRAIN, *TEST, k=k) == pytest.approx(reference, abs=1e-9)


@pytest.mark.parametrize("temperature", [None, 0.07])
@pytest.mark.parametrize("bank_chunk", [13, 16384])
def test_several_k_in_one_pass_are_those_of_one_pass_each(temperature: float | None, bank_chunk: int) -> None:
    ks = [100, 1, 7, 20, 300]
    alone = [knn_accuracy(*TRAIN, *TEST, k=k, temperature=temperature) for k in ks]
    assert len(set(alone)) > 2
    assert knn_accuracies(*TRAIN, *TEST, ks, temperature, bank_chunk=bank_chunk) == alone


def test_shares_of_processes_add_up() -> None:
    whole = knn_accuracies(*TRAIN, *TEST, [1, 20], query_chunk=7)
    shares = [knn_accuracies(*TRAIN, *TEST, [1, 20], query_chunk=7, rank=rank, world=3) for rank in range(3)]
    assert all(0 < share < one for part in shares for share, one in zip(part, whole, strict=True))
    assert [sum(parts) for parts in zip(*shares, strict=True)] == pytest.approx(whole)


def test_a_float16_bank_of_any_scale_has_the_same_neighbours() -> None:
    """Features themselves may lie beyond the range of float16."""
    for scale in (1.0, 1e6, 1e-9):
        bank = unit_bank(scale * TRAIN[0], torch.device("cpu"), chunk=7, most_bytes=4 * TRAIN[0].numel() - 1)
        assert bank.dtype == torch.float16
        assert knn_accuracy(bank, TRAIN[1], *TEST, k=20) == pytest.approx(knn_accuracy(*TRAIN, *TEST, k=20), abs=0.01)


def test_the_bank_of_the_command_has_scikit_learns_neighbours_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    # Far from zero cosines are alike, as those of real features: in float16 seven queries have other neighbours.
    bank, queries = (2 + torch.randn(count, 64, generator=generator) for count in (2000, 500))
    reference = KNeighborsClassifier(n_neighbors=20, metric="cosine").fit(bank, torch.zeros(2000))
    expected = reference.kneighbors(queries, return_distance=False)
    _, found = nearest(torch.nn.functional.normalize(queries), unit_bank(bank, torch.device("cpu")), 20)
    # Two that are as near to within float32 may change places, but not with one that is left out.
    assert [set(row) for row in found.tolist()] == [set(row) for row in expected.tolist()]


def test_weighted_vote_equals_the_formula() -> None:
    similarity = torch.nn.functional.normalize(TEST[0]) @ torch.nn.functional.normalize(TRAIN[0]).T
    best = similarity.topk(20)
    votes = torch.zeros(len(TEST[0]), 5).scatter_add_(1, TRAIN[1][best.indices], (best.values / 0.07).exp())
    expected = (votes.argmax(1) == TEST[1]).float().mean().item()
    assert knn_accuracy(*TRAIN, *TEST, k=20, temperature=0.07) == pytest.approx(expected, abs=1e-6)


def test_a_tiny_temperature_is_the_nearest_neighbour_and_does_not_overflow() -> None:
    assert knn_accuracy(*TRAIN, *TEST, k=20, temperature=1e-5) == knn_accuracy(*TRAIN, *TEST, k=1)


@pytest.mark.parametrize("chunks", [(50, 1), (7, 13), (64, 300)])
def test_chunks_do_not_change_the_number(chunks: tuple[int, int]) -> None:
    whole = knn_accuracy(*TRAIN, *TEST, k=9)
    assert knn_accuracy(*TRAIN, *TEST, k=9, query_chunk=chunks[0], bank_chunk=chunks[1]) == whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_accepted(dtype: torch.dtype) -> None:
    halves = knn_accuracy(TRAIN[0].to(dtype), TRAIN[1], TEST[0].to(dtype), TEST[1], k=20)
    assert halves == pytest.approx(knn_accuracy(*TRAIN, *TEST, k=20), abs=0.02)


def test_labels_need_not_be_contiguous() -> None:
    assert knn_accuracy(TRAIN[0], TRAIN[1] * 100 + 7, TEST[0], TEST[1] * 100 + 7) == knn_accuracy(*TRAIN, *TEST)


def test_bad_input_is_named() -> None:
    broken = TEST[0].clone()
    broken[3, 2] = float("nan")
    for message, arguments in {
        "among 300": (*TRAIN, *TEST, 301),
        "test features contain NaN": (*TRAIN, broken, TEST[1]),
        "pool over positions": (TRAIN[0][..., None], TRAIN[1], *TEST),
        "same backbone": (*TRAIN, TEST[0][:, :4], TEST[1]),
        "train is empty": (TRAIN[0][:0], TRAIN[1][:0], *TEST),
        "labels integer": (TRAIN[0], TRAIN[1].float(), *TEST),
        "temperature": (*TRAIN, *TEST, 20, 0.0),
    }.items():
        with pytest.raises(UserError, match=message):
            knn_accuracy(*arguments)
