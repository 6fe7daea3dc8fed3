"""If these fail, tokens are told the wrong place, or a larger grid is met in another way than the settings say."""

import math

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat

from heatssl.backbones import set_positions
from heatssl.backbones.positions import (
    PositionSettings,
    RotaryPositions,
    Rotation,
    frequencies,
    scores_with_window,
    turn,
)

WIDTH = 16


def grid(rows: int, columns: int) -> torch.Tensor:
    index = torch.arange(rows * columns)
    return torch.stack([index // columns, index % columns], dim=-1)[None].float()


def query_key(tokens: int, *lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, *lead, tokens, WIDTH), torch.randn(2, *lead, tokens, WIDTH)


def turned(settings: PositionSettings, places: torch.Tensor, grid: tuple[int, int] = (8, 8)) -> Rotation:
    """By a model that was trained on 8 x 8 patches."""
    return RotaryPositions(WIDTH, settings, (8, 8))(places, grid)


def scores(query: torch.Tensor, key: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    if rotation.beyond.numel() > 0:
        return scores_with_window(query, key, rotation, rotation)
    return turn(query, rotation) @ turn(key, rotation).mT


def raw(settings: PositionSettings, places: torch.Tensor, *lead: int) -> torch.Tensor:
    query, key = query_key(places.shape[1], *lead)
    rotation = turned(settings, places)
    if lead:
        rotation = Rotation(*(x.unsqueeze(2) for x in rotation))
    return scores(query, key, rotation)


def test_the_same_numbers_as_timm():
    theirs = RotaryEmbeddingCat(WIDTH, max_res=224, temperature=100.0, in_pixels=False, feat_shape=[3, 5])
    query, key = query_key(15)
    table = theirs.get_embed()
    expected = apply_rot_embed_cat(query, table) @ apply_rot_embed_cat(key, table).mT
    torch.testing.assert_close(raw(PositionSettings(base=100.0), grid(3, 5)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["rope", "ntk", "ntk_mixed", "rerope", "leaky_rerope"])
def test_only_offsets_count(kind):
    settings = PositionSettings(kind, scale=3.0, window=1.5)
    shift = torch.tensor([5.0, -2.5])
    torch.testing.assert_close(raw(settings, grid(4, 3)), raw(settings, grid(4, 3) + shift), atol=1e-4, rtol=1e-4)


def test_rows_and_columns_are_told_apart():
    down, right = (raw(PositionSettings(), places) for places in (grid(4, 1), grid(1, 4)))
    assert not torch.allclose(down, right)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize(
    "settings",
    [PositionSettings("rerope", window=4.0), PositionSettings("leaky_rerope", scale=1.0, window=1.0)],
    ids=["window of the grid", "leak of one"],
)
def test_nothing_changes_inside_the_window_or_with_a_leak_of_one(settings, lead):
    torch.testing.assert_close(raw(settings, grid(5, 4), *lead), raw(PositionSettings(), grid(5, 4), *lead))


@pytest.mark.parametrize(
    "settings",
    [
        PositionSettings("rerope", window=2.0),
        PositionSettings("leaky_rerope", scale=4.0, window=2.0),
        PositionSettings("leaky_rerope", scale=0.5, window=2.0),
    ],
    ids=["rerope", "leaky", "inverse leaky"],
)
def test_far_offsets_count_as_the_formula_says(settings):
    """One pair of tokens at a time, turned by the offset that kexue.fm 9708 writes down, each axis by itself."""
    places = grid(6, 5)
    found = raw(settings, places)
    query, key = query_key(30)
    leak = 0.0 if settings.kind == "rerope" else 1 / settings.scale

    def counted(offset: float) -> float:
        far = abs(offset) - settings.window
        return offset if far <= 0 else math.copysign(settings.window + far * leak, offset)

    for i, j in [(0, 29), (29, 0), (4, 25), (12, 13), (7, 27), (20, 2)]:
        offset = torch.tensor([counted(d) for d in (places[0, i] - places[0, j]).tolist()])
        pair = torch.stack([offset, torch.zeros(2)])[None]
        both = torch.stack([query[0, i], key[0, j]])[None]
        torch.testing.assert_close(
            found[0, i, j], scores(both, both, turned(PositionSettings(), pair))[0, 0, 1], atol=1e-5, rtol=1e-5
        )


def test_interpolated_positions_keep_offsets_in_parts_of_the_image():
    """The places of 8 x 8 patches, and every third of 24 x 24: the same scores, inside a patch of 1x too."""
    both = torch.randn(1, 5, WIDTH)
    places = 7 * torch.rand(1, 5, 2)
    expected = scores(both, both, turned(PositionSettings(), places))
    for scale in (3.0, None):
        found = scores(both, both, turned(PositionSettings("interpolated", scale=scale), 3 * places, (24, 24)))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, scores(both, both, turned(PositionSettings(), 3 * places)), atol=1e-1)
    longer = places * torch.tensor([0.5, 3.0])
    found = scores(both, both, turned(PositionSettings("interpolated"), longer, (4, 24)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_ntk_leaves_the_fastest_turn_and_slows_the_slowest_by_the_scale():
    plain = frequencies(8, PositionSettings())
    slowed = plain / frequencies(8, PositionSettings("ntk", scale=3.0))
    assert slowed[0].item() == pytest.approx(1)
    assert slowed[-1].item() == pytest.approx(3)
    mixed = plain / frequencies(8, PositionSettings("ntk_mixed", scale=3.0))
    assert mixed[-1].item() == pytest.approx(3)
    assert mixed[0] > 1
    assert (mixed.diff() > 0).all()


def test_positions_of_a_model_change_without_its_weights():
    model = torch.nn.Sequential(RotaryPositions(WIDTH, PositionSettings(), (2, 9)), torch.nn.Linear(2, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rotation = model[0](grid(2, 9), (2, 9))
    set_positions(model, PositionSettings("rerope", window=2.0))
    assert model[0](grid(2, 9), (2, 9)).beyond.numel() > rotation.beyond.numel() == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no rotary positions: choose a gau"):
        set_positions(torch.nn.Linear(2, 2), PositionSettings())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PositionSettings("rope3"), "choose one of rope, interpolated, ntk"),
        (lambda: PositionSettings(window=0), "window of positions must be positive"),
        (lambda: PositionSettings(scale=math.nan), "scale of positions must be positive and finite, not nan"),
        (lambda: PositionSettings(base=math.inf), "base of positions must be positive and finite, not inf"),
        (lambda: RotaryPositions(6, PositionSettings(), (8, 8)), "4 divides, not 6"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_as_complex_numbers_and_written_out_turns_are_the_same(dtype, monkeypatch):
    """Of queries as they come, parts of a wider tensor, with their gradients: graphs have them written out."""
    torch.manual_seed(0)
    rotation = turned(PositionSettings(), grid(3, 4))
    both, upstream = torch.randn(2, 12, 2, WIDTH).to(dtype).requires_grad_(), torch.randn(2, 12, WIDTH).to(dtype)
    results = []
    for plain in (False, True):
        monkeypatch.setattr("heatssl.backbones.positions.must_be_plain", lambda plain=plain: plain)
        out = turn(both.unbind(-2)[1], rotation)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, both, upstream)))
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-7  # the turns are of float32
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=8 * rounding, rtol=8 * rounding)
