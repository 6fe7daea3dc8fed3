"""The page a user gets from a run folder: complete, honest about what is missing, safe to open and share."""

import html
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from heatssl.errors import UserError
from heatssl.objectives import Story, objective_class
from heatssl.report import write_report

Make = Callable[..., Any]
Config = dict[str, Any]


class Page(HTMLParser):
    """Text and attributes of a page, as a browser would read them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.chunks: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.chunks).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.chunks.append(data)

    def count(self, tag: str, **wanted: str) -> int:
        return sum(
            name == tag and all(attributes.get(key) == value for key, value in wanted.items())
            for name, attributes in self.tags
        )


def test_a_complete_run_shows_every_section(full_run: Path) -> None:
    path = write_report(full_run)
    assert path == full_run / "report.html"
    page = Page(path)
    assert "Linear probe 52.1 % : 20.3 points above random weights" in page.text
    assert "learning rate selected on 10 % of train" in page.text
    assert "2,000 test images · seed 0" in page.text
    for fact in ("vit_tiny_patch16_224", "qb_heat", "1f2e3d4c5b+changes", "2 cores of an Intel Xeon", "2 min 50 s"):
        assert fact in page.text
    assert "None" not in page.text
    assert page.count("svg") == 11  # six main curves and the five other logged keys
    assert page.count("button", **{"class": "enlarge"}) == 2 * 4 + 2 * 4
    assert "completeness error 1.3 %" in page.text
    assert "heatssl pretrain \\ output=runs/demo_again \\ data=shapes" in page.text
    assert page.count("p", **{"class": "remark"}) == 0


def test_other_heads_of_the_probe_stand_below_the_linear_one(full_run: Path, result: Make) -> None:
    file = full_run / "evaluation.json"
    more = [
        result("attentive", weights, accuracy, protocol="one attending query", selected=f"layer of {weights}")
        for weights, accuracy in (("pretrained", 0.613), ("random_init", 0.402))
    ]
    file.write_text(json.dumps({"results": json.loads(file.read_text())["results"] + more}))
    page = Page(write_report(full_run))
    assert "Linear probe 52.1 % : 20.3 points above random weights" in page.text, "the headline stays"
    row = page.text.index("attentive probe 61.3")
    assert page.text.index("linear probe 52.1") < row < page.text.index("kNN 41.7")
    assert "40.2" in page.text
    assert "+21.1" in page.text
    assert "one attending query; selected: layer of pretrained" in page.text
    assert "heatssl probe run=runs/demo_again head=attentive" in page.text
    assert "head=block" not in page.text


def test_every_picture_is_embedded_and_the_file_stays_small(tmp_path: Path, write_run: Make) -> None:
    path = write_report(write_run(tmp_path / "demo", images=8))
    images = [attributes for tag, attributes in Page(path).tags if tag == "img" and attributes.get("src")]
    assert len(images) == 8 * 4 + 8 * 4 + 1
    assert all(str(image["src"]).startswith("data:image/") and image["alt"] for image in images)
    assert path.stat().st_size < 3_000_000


def test_the_page_asks_the_network_for_nothing(full_run: Path) -> None:
    page = Page(write_report(full_run))
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert not re.match(r"\s*(https?:)?//", attributes.get(name) or ""), (tag, attributes)
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//|\bfetch\(|XMLHttpRequest", page.source)
    assert "default-src 'none'" in page.source


def test_only_a_configuration_still_gives_a_page_that_names_the_missing_commands(
    tmp_path: Path, config: Config
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_report(tmp_path))
    assert "Not evaluated yet" in page.text
    for command in ("probe", "knn", "attribute"):
        assert f"heatssl {command} run={tmp_path}" in page.text
    for name in ("metrics.jsonl", "pictures.npz"):
        assert name in page.text
    assert page.count("svg") == 0


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("config.yaml", "52.1"),
        ("evaluation.json", "RankMe"),
        ("attribution/attribution.json", "52.1"),
        ("pictures.npz", "52.1"),
        ("backbone.json", "52.1"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"{[ \x00\xff not this", b"[1, 2]"])
def test_a_broken_file_costs_its_section_only(full_run: Path, name: str, kept: str, content: bytes) -> None:
    (full_run / name).write_bytes(content)
    page = Page(write_report(full_run))
    assert kept in page.text
    if name != "backbone.json":  # only a stand-in for the configuration
        assert f"{name} cannot be read" in page.text


def test_half_a_line_of_metrics_and_numbers_that_are_none_are_skipped(full_run: Path) -> None:
    with (full_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1010, "train/loss": NaN, "knn/accuracy": 0.44}\n{"step": 1020, "train/lo')
    page = Page(write_report(full_run))
    assert ("output", {"data-last": "44\u00a0%"}) in page.tags
    assert "nan" not in page.text.lower()


def test_a_resumed_run_shows_each_step_once_with_its_later_value(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0")
    rows = [(0, 3.0), (10, 2.0), (20, 9.0), (10, 1.5), (20, 1.0)]
    lines = [json.dumps({"step": step, "train/loss": loss}) for step, loss in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    charts = [attributes for tag, attributes in Page(write_report(tmp_path)).tags if tag == "svg"]
    assert [point[2:] for point in json.loads(charts[0]["data-points"] or "")] == [
        ["0", "3"],
        ["10", "1.5"],
        ["20", "1"],
    ]


def test_names_from_the_data_set_cannot_run_as_script(full_run: Path, result: Make, config: Config) -> None:
    evil = "<script>alert('x')</script>\"'&"
    maps = json.loads((full_run / "attribution/attribution.json").read_text())
    maps["maps"][0] |= {"label": evil, "image": evil, "method": evil, "target": evil}
    maps["maps"].append({"image": evil, "label": evil, "file": f"../{evil}.png"})
    (full_run / "attribution/attribution.json").write_text(json.dumps(maps))
    arrays = dict(np.load(full_run / "pictures.npz"))
    np.savez(full_run / "pictures.npz", **(arrays | {"label": np.array([evil, "ring"])}))
    (full_run / "evaluation.json").write_text(
        json.dumps({"results": [result("linear", "pretrained", 0.5, protocol=evil)]})
    )
    (full_run / "config.yaml").write_text(yaml.safe_dump(config | {"backbone": evil}))
    with (full_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, f"health/{evil}": 1.0}) + "\n")
    page = Page(write_report(full_run))
    assert page.count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(evil) >= 6  # shown as it is, in every place


def test_the_gallery_is_linked_where_there_is_one(full_run: Path) -> None:
    assert Page(write_report(full_run)).count("a", href="attribution/gallery.html") == 0
    (full_run / "attribution/gallery.html").write_text("")
    assert Page(write_report(full_run)).count("a", href="attribution/gallery.html") == 1


def test_a_heatmap_path_cannot_pull_in_files_from_outside(full_run: Path, tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(next((full_run / "attribution").glob("*.png")).read_bytes())
    entry = {"image": "a", "label": "star", "method": "gradcam", "target": "self", "file": "../private.png"}
    (full_run / "attribution/attribution.json").write_text(json.dumps({"maps": [entry]}))
    page = Page(write_report(full_run))
    assert "../private.png cannot be shown" in page.text
    assert page.count("button", **{"class": "enlarge"}) == 2 * 4


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_what_is_no_run_folder_is_refused_with_a_hint(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "nothing"
    if make == "empty":
        folder.mkdir()
    with pytest.raises(UserError, match="heatssl pretrain"):
        write_report(folder)
    assert make == "missing" or not list(folder.iterdir())


def test_a_report_that_cannot_be_written_is_named(full_run: Path) -> None:
    (full_run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        write_report(full_run)
    assert not list(full_run.glob("*.tmp"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"visible": np.zeros((2, 64, 64), np.uint8)},
        {"image": np.zeros((2, 64, 64, 3), np.float32)},
        {"law_residual": np.zeros((1, 8, 8), np.float32)},
    ],
)
def test_pictures_of_a_wrong_shape_are_told_not_drawn(full_run: Path, wrong: dict[str, np.ndarray]) -> None:
    np.savez(full_run / "pictures.npz", **(dict(np.load(full_run / "pictures.npz")) | wrong))
    page = Page(write_report(full_run))
    assert f"pictures.npz cannot be read (ValueError: '{next(iter(wrong))}'" in page.text


def test_a_residual_that_is_not_finite_still_has_a_range(full_run: Path) -> None:
    residual = np.full((2, 8, 8), np.nan, np.float32)
    residual[0, 0, 0] = 0.25
    np.savez(full_run / "pictures.npz", **(dict(np.load(full_run / "pictures.npz")) | {"law_residual": residual}))
    assert "channels) 0 0.25" in Page(write_report(full_run)).text


def test_a_failed_write_keeps_the_old_report(full_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(full_run).read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(UserError, match="no space left"):
        write_report(full_run)
    assert (full_run / "report.html").read_bytes() == before
    assert not list(full_run.glob("*.tmp"))


def test_a_report_needs_neither_torch_nor_matplotlib(full_run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from heatssl.report import write_report;"
        "write_report(Path(sys.argv[1]));"
        "print(sorted({'torch', 'matplotlib', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(full_run)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("objective", "kept", "heading", "captions"),
    [
        (
            "qb_heat",
            ("visible", "reconstruction", "law_residual"),
            "What the law fills in",
            ["visible quarter", "filled in by the law", "law residual"],
        ),
        ("heat_jepa", ("visible", "law_residual"), "What quarters agree on", ["one quarter", "law residual"]),
        ("mae", ("visible", "reconstruction"), "What is filled in", ["visible part", "filled in"]),
        (
            "heat_completion",
            ("visible", "reconstruction", "from_rest", "law_residual"),
            "What heat fills in",
            ["visible patches", "filled in by heat", "painted from the mean", "residual of heat at rest"],
        ),
        ("simclr", ("first_view", "second_view"), "What is compared", ["one view", "another view"]),
        (None, ("visible", "law_residual"), "What the objective saw", ["visible part", "law residual"]),
    ],
)
def test_each_objective_says_what_its_pictures_show(
    full_run: Path, objective: str | None, kept: tuple[str, ...], heading: str, captions: list[str]
) -> None:
    arrays = dict(np.load(full_run / "pictures.npz"))
    arrays |= {"first_view": arrays["image"], "second_view": arrays["visible"], "from_rest": arrays["image"]}
    chosen = {name: array for name, array in arrays.items() if name in ("image", "label", *kept)}
    told = objective_class(objective).story if objective else Story(heading, "", {})
    if objective:  # runs of earlier versions have none
        chosen["story"] = np.array(json.dumps(told._asdict()))
    np.savez(full_run / "pictures.npz", **chosen)
    page = write_report(full_run).read_text()
    assert f"<h2>{heading}</h2>" in page
    assert told.explanation in html.unescape(page)
    for caption in captions:
        assert f"<figcaption>{caption}</figcaption>" in page
    assert page.count("<figure><button") == 2 * (1 + len(kept))
