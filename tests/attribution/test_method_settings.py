"""Options of methods on the command line: what is given must have an effect, or be refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heatssl.attribution import explain
from heatssl.attribution.method_settings import check_used, method_options
from heatssl.attribution.pictures import read_picture
from heatssl.cli import main
from heatssl.config import AttributeConfig
from heatssl.errors import UserError
from heatssl.evaluation.source import open_source


@pytest.fixture
def photograph(tmp_path: Path) -> str:
    file = tmp_path / "photograph.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return str(file)


def attribute(run: Path, *words: str) -> int:
    return main(["attribute", f"run={run}", "workers=0", "size=32", *words])


def listed(run: Path) -> list[dict[str, object]]:
    return json.loads((run / "attribution" / "attribution.json").read_text())["maps"]


@pytest.mark.parametrize(
    ("method", "words", "options"),
    [
        ("heat_flow:ig", ["steps=3"], {"steps": 3}),  # the base's own option
        ("heat_flow", ["border=0"], {"border": 0.0}),
        ("smoothgrad", ["samples=2"], {"samples": 2}),
        ("smoothgrad", ["seed=7"], {"seed": 7}),
        ("heat_flow:rise", ["seed=7", "samples=4"], {"seed": 7, "samples": 4}),
        ("layercam", ["layer=blocks.0.norm1"], {"layer": "blocks.0.norm1"}),
        ("heat_flow:layercam", ["layer=blocks.0.norm1", "border=0.5"], {"layer": "blocks.0.norm1", "border": 0.5}),
    ],
)
def test_an_option_gives_the_map_that_it_gives_from_python(
    run: Path, photograph: str, method: str, words: list[str], options: dict[str, object]
) -> None:
    assert attribute(run, photograph, "--method", method, *words) == 0
    source = open_source(AttributeConfig(run=str(run), workers=0))
    image = read_picture(photograph, source)[None]
    (entry,) = listed(run)
    raw = np.load((run / str(entry["file"])).with_suffix(".npy"))
    np.testing.assert_allclose(raw, explain(source.backbone, image, method, **options).maps[0], rtol=1e-3, atol=1e-6)
    assert not np.allclose(raw, explain(source.backbone, image, method).maps[0], rtol=1e-3, atol=1e-6)


def test_other_options_are_other_columns_and_other_rows(run: Path) -> None:
    """A number or a map would else stand for a setting that it is not of."""
    words = ["--method", "heat_flow", "count=2", "scores=[deletion]", "score_count=2"]
    for more in ([], ["border=0"], ["border=0"]):
        assert attribute(run, *words, *more) == 0
    assert [entry["options"] for entry in listed(run)] == ["", "", "border=0", "border=0"]
    assert len({entry["file"] for entry in listed(run)}) == 4
    table = (run / "attribution" / "scores.md").read_text()
    assert "| heat_flow | " in table
    assert "| heat_flow, border=0 | " in table
    page = (run / "attribution" / "gallery.html").read_text()
    assert "<b>heat flow of" not in page
    assert '<th scope="col" role="columnheader"><b>heat flow, border=0</b>' in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=[gradcam]", "steps=64"], "gradcam takes no steps: leave it out, or use one of integrated_gradients"),
        (["methods=[heat_flow]", "samples=8"], "heat_flow takes no samples"),
        (["methods=[heat_flow:uniform]", "layer=blocks.0"], "heat_flow:uniform takes no layer"),
        (["methods=[gradcam]", "border=0"], "takes no border: leave it out, or use one of heat_flow"),
        (["methods=[heat_flow]", "border=-1"], "border at least 0"),
        (["methods=[heat_flow]", "border=nan"], "border at least 0, and finite"),
        (["methods=[heat_flow]", "border=inf"], "border at least 0, and finite"),
        (["methods=[heat_flow:gradcan]"], "did you mean 'gradcam'"),
        (["data=folder", "data.root=/x", "x.jpg"], "data=... has no effect with images of your own"),
        (["scores=[all,deletion]"], "names all of them, and deletion once more"),
        (["scores=[deletoin]"], "unknown score 'deletoin': did you mean 'deletion'? choose all, or some of"),
        (["scores=[zzzz]"], "unknown score 'zzzz': choose all, or some of"),
        (["count=3", "x.jpg"], "count=3 has no effect with images of your own"),
        (["split=train", "x.jpg"], "split=train has no effect with images of your own"),
        (["--score", "score_count=5", "x.jpg"], "score_count=5 has no effect with images of your own"),
        (["--score", "ignore=[3]", "x.jpg"], "ignore=[3] has no effect with images of your own"),
        (["ignore=[3]"], "ignore=[3] has no effect with score=false"),
        (["objects=[2]"], "objects=[2] has no effect with score=false"),
        (["score_count=5"], "score_count=5 has no effect with score=false"),
    ],
)
def test_settings_without_effect_are_refused(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attribute(run, *words) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (run / "attribution").exists()


def test_one_method_that_takes_an_option_is_enough() -> None:
    config = AttributeConfig(border=0.0, steps=64, layer="blocks.0")
    check_used(config)
    assert {method: sorted(method_options(method, config, {})) for method in config.methods} == {
        "gradcam": ["chunk", "layer"],
        "integrated_gradients": ["chunk", "steps"],
        "heat_flow": ["border", "chunk", "layer"],
    }
    with pytest.raises(UserError, match="samples must be at least 1"):
        check_used(AttributeConfig(samples=0, methods=["rise"]))


def test_values_of_masks_need_masks(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("train/a", "val/a"):
        (tmp_path / "plain" / place).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "plain" / place / "1.png")
    words = ["data=folder", f"data.root={tmp_path / 'plain'}", "methods=[gradcam]", "--score", "ignore=[3]"]
    assert attribute(run, *words) == 2
    assert "these images have none" in capsys.readouterr().err
