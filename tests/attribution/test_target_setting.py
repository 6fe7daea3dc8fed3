"""The setting ``target``: what the words stand for, held against the same target made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heatssl.attribution import run_attribute
from heatssl.attribution.pictures import Pictures, read_picture
from heatssl.attribution.target_setting import read_target
from heatssl.attribution.targets import make_target
from heatssl.backbones import feature_map
from heatssl.config import AttributeConfig
from heatssl.errors import UserError
from heatssl.evaluation.source import open_source


@pytest.fixture
def photograph(tmp_path: Path) -> str:
    """64 pixels across and 32 down: the backbone sees 16 to 48 across."""
    file = tmp_path / "photograph.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)).save(file)
    return str(file)


def config(run: Path, **settings: object) -> AttributeConfig:
    return AttributeConfig(**({"run": str(run), "workers": 0, "methods": ["gradcam"], "size": 32} | settings))


@pytest.mark.parametrize("target", ["margin", "entropy", "neighbours", "channel:3", "region:{}@0.5,0.5"])
def test_every_word_gives_named_maps(run: Path, photograph: str, target: str) -> None:
    run_attribute(config(run, target=target.format(photograph), count=2))
    maps = json.loads((run / "attribution" / "attribution.json").read_text())["maps"]
    word = target.split(":", maxsplit=1)[0]
    assert all(entry["target"].startswith(f"{word}: ") for entry in maps)
    assert all(f"_{target.replace(':', '').split('{')[0]}" in entry["file"] for entry in maps)


@pytest.mark.parametrize(
    ("numbers", "columns"),
    [("32,0,16,32", [2, 3]), ("0.5,0.0,0.25,1.0", [2, 3]), ("17,3", [0]), ("0,0,64,32", [0, 1, 2, 3])],
)
def test_a_region_is_where_the_user_sees_it(run: Path, photograph: str, numbers: str, columns: list[int]) -> None:
    """In pixels or fractions of the file, which is wider than what the backbone sees."""
    settings = config(run, target=f"region:{photograph}@{numbers}")
    source = open_source(settings)
    picture = read_picture(photograph, source)
    wish = read_target(settings, source)
    found = make_target(source.backbone, picture[None], wish.of(Pictures(picture[None], [""], [""])))
    field = feature_map(source.backbone, picture[None]).detach()[0]
    part = field[:, :1, columns] if numbers == "17,3" else field[:, :, columns]
    expected = torch.nn.functional.normalize(part.mean(dim=(1, 2)), dim=0)
    torch.testing.assert_close(found.reference, expected)


def test_neighbours_are_those_of_the_runs_own_train(run: Path, photograph: str) -> None:
    settings = config(run, target="neighbours", images=[photograph])
    source = open_source(settings)
    assert "20 of 20 images of train (shapes)" in read_target(settings, source).description


def test_mistakes_are_named(run: Path, photograph: str) -> None:
    for message, target in {
        "write region:FILE@x,y": f"region:{photograph}@1,2,3",
        "write region:FILE@x,y or": f"region:{photograph}@nan,nan",
        "has a negative size": f"region:{photograph}@20,20,-5,2",
        "lies outside the middle square, pixels 16 to 48": f"region:{photograph}@2,2,4,4",
        "cannot be read": "region:nowhere.png@1,1",
        "there is no channel 24": "channel:24",
        "channel:N": "chanel",
    }.items():
        with pytest.raises(UserError, match=message):
            run_attribute(config(run, target=target))
