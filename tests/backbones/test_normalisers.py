"""If these fail, attention is weighted wrongly, above all where the number of tokens is not that of training."""

import math

import pytest
import torch

from heatssl.backbones import set_normaliser
from heatssl.backbones.normalisers import Normaliser, NormaliserSettings, Weighting, number_of_keys
from heatssl.ops import attention_weights

WIDTH = 16


def weights(raw: torch.Tensor, kind: str, length: int, valid: torch.Tensor | None = None, **settings) -> torch.Tensor:
    normaliser = Normaliser(WIDTH, NormaliserSettings(kind, length, **settings)).eval()
    places = torch.zeros(raw.shape[0], raw.shape[-1], 2)
    return weighted(raw, normaliser(number_of_keys(places, valid)), valid)


def weighted(raw: torch.Tensor, weighting: Weighting, valid: torch.Tensor | None = None) -> torch.Tensor:
    return attention_weights(raw * weighting.factor, weighting.activation, valid)


@pytest.fixture
def raw() -> torch.Tensor:
    torch.manual_seed(0)
    return 5 * torch.randn(2, 40, 40)


def test_formulas(raw):
    scaled = raw / math.sqrt(WIDTH)
    torch.testing.assert_close(weights(raw, "relu2", 20), scaled.clamp_min(0) ** 2 / 40)
    torch.testing.assert_close(weights(raw, "relu2_fixed", 20), scaled.clamp_min(0) ** 2 / 20)
    torch.testing.assert_close(weights(raw, "softmax", 20), scaled.softmax(-1))
    plus = (scaled * math.log(40) / math.log(20)).softmax(-1)
    torch.testing.assert_close(weights(raw, "softmax_plus", 20), plus)
    torch.testing.assert_close(weights(raw, "softmax", 20, log_n_at_test=True), plus)


def test_at_the_length_of_training_softmax_plus_is_softmax(raw):
    torch.testing.assert_close(weights(raw, "softmax_plus", 40), weights(raw, "softmax", 40))
    # few count as 16
    torch.testing.assert_close(weights(raw[..., :4], "softmax_plus", 9), weights(raw[..., :4], "softmax", 9))


def test_log_n_at_test_never_sharpens_less_than_training_and_is_off_there(raw):
    shorter = weights(raw, "softmax", 80, log_n_at_test=True)
    torch.testing.assert_close(shorter, weights(raw, "softmax", 80))
    training = Normaliser(WIDTH, NormaliserSettings("softmax", 20, log_n_at_test=True)).train()
    sharpened = weighted(raw, training(torch.tensor(40.0)))
    torch.testing.assert_close(sharpened, weights(raw, "softmax", 20))


@pytest.mark.parametrize(("keys", "factor"), [(64, math.log(64) / math.log(6)), (9, math.log(9) / math.log(6)), (5, 1)])
def test_log_n_at_test_counts_few_keys_as_they_are(keys, factor):
    normaliser = Normaliser(1, NormaliserSettings("softmax", 6, log_n_at_test=True)).eval()
    assert normaliser(torch.tensor(float(keys))).factor.item() == pytest.approx(factor)


@pytest.mark.parametrize("kind", ["relu2", "relu2_fixed", "softmax", "softmax_plus"])
def test_padding_is_as_if_it_were_not_there(raw, kind):
    valid = torch.zeros(2, 1, 40, dtype=torch.bool)
    valid[:, :, :25] = True
    found = weights(raw, kind, 20, valid)
    torch.testing.assert_close(found[..., :25], weights(raw[..., :25], kind, 20))
    assert not found[..., 25:].any()


@pytest.mark.parametrize("kind", ["relu2", "softmax", "softmax_plus"])
def test_rows_without_a_key_give_zeros_and_finite_gradients(raw, kind):
    scores = raw.clone().requires_grad_()
    out = weights(scores, kind, 20, torch.zeros(2, 1, 40, dtype=torch.bool))
    out.sum().backward()
    assert not out.any()
    assert scores.grad.isfinite().all()


def test_the_entropy_of_softmax_plus_hardly_depends_on_the_number_of_keys():
    torch.manual_seed(0)
    query, key = torch.randn(64, 64), torch.randn(2048, 64)
    entropy = {}
    for kind in ("softmax", "softmax_plus"):
        normalise = Normaliser(64, NormaliserSettings(kind, 512)).eval()
        for number in (128, 2048):
            raw = 2 * query @ key[:number].T
            weight = weighted(raw, normalise(torch.tensor(float(number))))
            entropy[kind, number] = -(weight * weight.clamp_min(1e-12).log()).sum(-1).mean().item()
    growth = {kind: entropy[kind, 2048] - entropy[kind, 128] for kind in ("softmax", "softmax_plus")}
    assert growth["softmax_plus"] < 0.6 * growth["softmax"]


def test_a_model_can_be_given_another():
    model = torch.nn.Sequential(Normaliser(WIDTH, NormaliserSettings("relu2")))
    set_normaliser(model, NormaliserSettings("softmax", 9))
    weight = weighted(torch.randn(1, 3, 3), model[0](torch.tensor(3.0)))
    assert weight.sum(-1).allclose(torch.ones(1, 3))
    with pytest.raises(ValueError, match="no normaliser"):
        set_normaliser(torch.nn.Linear(2, 2), NormaliserSettings())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormaliserSettings("relu3"), "choose one of relu2"),
        (lambda: NormaliserSettings(length=0), "at least 1"),
        (lambda: NormaliserSettings("relu2", log_n_at_test=True), "for normaliser=softmax"),
        (lambda: NormaliserSettings("softmax", 1, log_n_at_test=True), "at least 2"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
