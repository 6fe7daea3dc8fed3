"""Several contexts are one answer, and it is the one of the formula."""

from functools import partial

import pytest
import torch

from heatssl.evaluation.contexts import crops, scales, tiles
from heatssl.evaluation.nbce import class_prior, mean_logits, mean_probabilities, nbce, truncated

POOLINGS = ["mean", "maximum", "entropy"]
FUSIONS = {
    "mean logit": mean_logits,
    "mean probability": mean_probabilities,
    **{f"nbce, {pooling}": partial(nbce, pooling=pooling) for pooling in POOLINGS},
}


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return 2 * torch.randn(5, 3, 7)


def test_naive_bayes_is_exact_for_contexts_that_are_independent_given_the_class():
    """Two noisy looks at a class, each right with its own likelihood: Bayes' rule by hand."""
    torch.manual_seed(0)
    prior = torch.tensor([0.6, 0.3, 0.1])
    likelihood = torch.rand(2, 3)  # p(S_k | T)
    posteriors = likelihood * prior / (likelihood * prior).sum(-1, keepdim=True)  # p(T | S_k)
    expected = likelihood.prod(0) * prior / (likelihood.prod(0) * prior).sum()
    found = nbce(posteriors.log()[None], prior.log(), pooling="mean", beta=None)
    torch.testing.assert_close(found.exp()[0], expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_context_with_no_beta_is_the_classifier_itself(logits, pooling):
    torch.testing.assert_close(nbce(logits[:, :1], pooling=pooling, beta=0.0), logits[:, 0].log_softmax(-1))


@pytest.mark.parametrize("name", FUSIONS)
def test_answers_are_probabilities_whatever_is_added_and_in_any_order(logits, name):
    fuse = FUSIONS[name]
    found = fuse(logits)
    assert found.shape == (5, 7)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5))
    torch.testing.assert_close(fuse(logits[:, torch.randperm(3)]), found)
    if name != "mean logit":
        torch.testing.assert_close(fuse(logits + torch.randn(5, 3, 1)), found)
    torch.testing.assert_close(fuse(logits[2]), found[2])


def test_the_usual_fusions(logits):
    torch.testing.assert_close(mean_logits(logits), logits.mean(1).log_softmax(-1))
    torch.testing.assert_close(mean_probabilities(logits).exp(), logits.softmax(-1).mean(1))


def test_the_surest_context_decides():
    sure, unsure = torch.tensor([0.0, 5.0, 0.0]), torch.tensor([1.2, 1.0, 1.0])
    found = nbce(torch.stack([unsure, sure, unsure]), pooling="entropy", beta=0.0)
    torch.testing.assert_close(found, sure.log_softmax(-1))
    assert nbce(torch.stack([unsure, sure, unsure]), pooling="maximum").argmax() == 1
    never = torch.tensor([0.0, 0.0, -torch.inf])  # a class that cannot be has no part in how sure a context is
    masked = nbce(torch.stack([unsure + never, sure + never]), pooling="entropy", beta=0.0)
    torch.testing.assert_close(masked, (sure + never).log_softmax(-1))


def test_a_prior_is_taken_out_again():
    """The classifier leans to class 0 whatever it sees; the answer does not."""
    lean = torch.tensor([3.0, 0.0, 0.0])
    seen = torch.stack([lean + torch.tensor([0.0, 1.0, 0.0])] * 4)
    assert mean_logits(seen).argmax() == 0
    assert nbce(seen, lean, pooling="mean", beta=3.0).argmax() == 1


def test_truncation_keeps_the_likeliest():
    log = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert (truncated(log, 0.75) > -100).tolist() == [[True, True, False, False]]
    assert (truncated(log, 0.81) > -100).tolist() == [[True, True, True, False]]
    assert (truncated(log, 0.01) > -100).tolist() == [[True, False, False, False]]
    assert torch.equal(truncated(log, None), log)
    # A class that no context keeps is out; one that the prior leaves out has nothing subtracted.
    found = nbce(log.expand(2, -1), log[0], top_p=0.75, beta=1.0, pooling="mean")
    assert found[:2].exp().sum().item() == pytest.approx(1)


def test_class_prior_counts_what_is_missing_too():
    prior = class_prior(torch.tensor([0, 0, 2]), 4)
    torch.testing.assert_close(prior.exp(), torch.tensor([3.0, 1.0, 2.0, 1.0]) / 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "median"}, "unknown pooling 'median': did you mean 'mean'. choose one of mean"),
        ({"beta": -2.0}, "at least -1"),
        ({"top_p": 0.0}, "top_p must be in"),
    ],
)
def test_bad_settings_are_named(logits, settings, message):
    with pytest.raises(ValueError, match=message):
        nbce(logits, **settings)
    with pytest.raises(ValueError, match="one context or more"):
        nbce(logits[:, :0])


def test_tiles_cover_an_image_and_no_more_than_they_must():
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).float()
    even = tiles(images, 4)
    assert even.shape == (2, 6, 3, 4, 4)
    assert torch.equal(even[:, 0], images[..., :4, :4])
    assert torch.equal(even[:, 5], images[..., 4:, 8:])
    odd = tiles(images, 5)  # 2 rows of 3, overlapping
    assert odd.shape[1] == 6
    assert set(odd[0, :, 0].flatten().tolist()) == set(images[0, 0].flatten().tolist())
    assert torch.equal(tiles(images[..., :8], 8)[:, 0], images[..., :8])
    with pytest.raises(ValueError, match="smaller than a tile of 9"):
        tiles(images, 9)


def test_crops_and_scales_show_what_they_say():
    ramp = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64).contiguous()
    found = crops(ramp, 5, 0.25, 32, torch.Generator().manual_seed(0))
    assert found.shape == (2, 5, 3, 32, 32)
    spans = found.amax((2, 3, 4)) - found.amin((2, 3, 4))
    torch.testing.assert_close(spans, torch.full_like(spans, 1.0), atol=0.06, rtol=0)  # half of the ramp
    assert found.mean((2, 3, 4)).std() > 0.05, "places differ"
    whole = crops(ramp, 1, 1.0, 64)[:, 0]
    torch.testing.assert_close(whole, ramp)
    again = crops(ramp, 5, 0.25, 32, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)
    middle = scales(ramp, [1.0, 0.5], 32)
    assert middle.shape == (2, 2, 3, 32, 32)
    assert (middle[:, 1].amax() - middle[:, 1].amin()).item() == pytest.approx(1, abs=0.06)
    with pytest.raises(ValueError, match="area must be in"):
        crops(ramp, 1, 0.0, 32)
