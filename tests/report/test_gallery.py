"""The gallery's page without a browser: whole, closed to the network, and honest about what is missing."""

import base64
import html
import io
import json
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heatssl.errors import UserError
from heatssl.report.gallery import write_gallery

Make = Callable[..., Path]
VOID = {"meta", "link", "img", "input", "br"}


class Tags(HTMLParser):
    """All tags with their attributes; open ones that were never closed stay on the stack."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_every_map_is_a_picture_without_a_script(write_maps: Make, tmp_path: Path) -> None:
    page = Tags(write_gallery(write_maps(tmp_path / "run")).read_text())
    assert page.stack == [], "every tag is closed"
    pictures = page.all("img")
    assert len(pictures) == 3 * 3 + 3 * 1 + 3 * 3  # methods and features; checkpoints; law
    for picture in pictures:
        assert picture["alt"]
        source = base64.b64decode(str(picture["src"]).partition(",")[2])
        assert Image.open(io.BytesIO(source)).size in {(4, 4), (32, 32)}
    photos = [attributes for attributes in page.all("span") if attributes.get("class") == "photo"]
    assert {photo["aria-label"] for photo in photos} >= {"val/ring 1.jpg"}
    for link in page.all("a"):
        if link.get("class") and "download" not in link:
            assert (tmp_path / "run" / "attribution" / str(link["href"])).is_file()


def test_nothing_is_fetched_and_the_browser_would_refuse_to(write_maps: Make, tmp_path: Path) -> None:
    page = write_gallery(write_maps(tmp_path / "run")).read_text()
    assert not re.search(r"(?:https?:)?//\w", re.sub(r'base64,[^"&)]*|data-codes="[^"]*"|// .*', "", page))
    (policy,) = [meta["content"] for meta in Tags(page).all("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_file_names_cannot_break_out_of_the_page(write_maps: Make, tmp_path: Path) -> None:
    folder = write_maps(tmp_path / "<i>run")
    page = write_gallery(folder).read_text()
    assert '<b>"quoted' not in page
    assert "<i>run" not in page
    assert "<h1>&lt;i&gt;run</h1>" in page
    tags = Tags(page)
    name = json.loads((folder / "attribution.json").read_text())["maps"][2]["image"]
    assert name.startswith("val/<b>\"quoted\" & 'so'")
    assert [row.get("data-image") for row in tags.all("tr")].count(name) == 3
    assert name in "".join(tags.text)
    (facts,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', page)
    assert set(json.loads(facts)["scores"]) >= {name}


def test_scores_can_be_sorted_by_and_stand_below_their_map(write_maps: Make, tmp_path: Path) -> None:
    page = write_gallery(write_maps(tmp_path / "run")).read_text()
    target = "self: cosine to the image's own embedding"
    options = [html.unescape(option) for option in re.findall(r"<option>(.*?)</option>", page)]
    assert options == [
        f"completeness error · integrated gradients, {target}",
        f"deletion auc · Grad-CAM, {target}",
        "error of the law",
    ]
    assert "<small>completeness error 0.3</small>" in page
    assert "<small>deletion auc 0.4</small>" in page


def test_maps_of_other_weights_have_columns_that_name_them(write_maps: Make, tmp_path: Path) -> None:
    """After `run=R/best`, or longer training, maps of two steps would else stand in one column."""
    folder = write_maps(tmp_path / "run")
    listed = json.loads((folder / "attribution.json").read_text())
    first = listed["maps"][0]
    listed["maps"] = [
        entry | {"source": "last", "step": 5000 if entry["method"] == "gradcam" else 100} for entry in listed["maps"]
    ]
    listed["maps"].append(first | {"source": "best", "step": 100})
    (folder / "attribution.json").write_text(json.dumps(listed))
    page = html.unescape(write_gallery(folder).read_text())
    methods = page[page.index('<section id="methods">') : page.index("</section>")]
    head = re.findall(r'<th scope="col".*?</th>', methods)
    told = [re.sub(r"<.*?>", " ", column).split() for column in head[1:4]]
    assert [" ".join(words[-4:]) for words in told] == [
        "last weights, step 5000",
        "last weights, step 100",
        "best weights, step 100",
    ]
    options = re.findall(r"<option>(deletion.*?)</option>", page)
    assert [option.rpartition("embedding, ")[2] for option in options] == [
        "best weights, step 100",
        "last weights, step 5000",
    ]


def test_the_error_of_the_law_is_that_of_hidden_positions(write_maps: Make, tmp_path: Path) -> None:
    folder = write_maps(tmp_path / "run")
    arrays = np.load(folder / "extrapolation.npz")
    page = write_gallery(folder).read_text()
    for i in range(3):
        hidden = ~arrays["visible"][i]
        law, mean = (arrays[name][i][hidden].mean() for name in ("error", "error_of_mean"))
        assert f"<small>law {law:.2f}, mean {mean:.2f}</small>" in page
    assert page.count('style="top:0%;left:50%;height:50%;width:50%"') == 2, "the frame lies where the quarter does"


def test_what_is_not_there_is_left_out(write_maps: Make, tmp_path: Path) -> None:
    """Sources outside a run have no law; maps of an older heatssl have no array beside them."""
    folder = write_maps(tmp_path / "run", photos=False)
    (folder / "extrapolation.npz").unlink()
    (folder / "features.npz").unlink()
    listed = json.loads((folder / "attribution.json").read_text())
    del listed["checkpoints"]
    (folder / "attribution.json").write_text(json.dumps(listed))
    (folder / "001_gradcam_90.npy").unlink()
    page = write_gallery(folder).read_text()
    tags = Tags(page)
    assert [section["id"] for section in tags.all("section")] == ["methods"]
    assert len(tags.all("img")) == 5
    assert "--photo: url" not in page
    assert all("alone" in str(link["class"]) for link in tags.all("a") if link.get("class"))


@pytest.mark.parametrize("broken", ["attribution.json", "features.npz", "000_gradcam_90.npy", "photo_0.png"])
def test_a_broken_file_is_told_in_one_line(write_maps: Make, tmp_path: Path, broken: str) -> None:
    folder = write_maps(tmp_path / "run")
    (folder / broken).write_bytes(b"half a file")
    with pytest.raises(UserError, match="run heatssl attribute again"):
        write_gallery(folder)
    assert not (folder / "gallery.html").exists()


def test_a_path_out_of_the_run_is_refused(write_maps: Make, tmp_path: Path) -> None:
    """Pages are passed on: a listed path must not pull other files of the machine into one."""
    folder = write_maps(tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    listed = json.loads((folder / "attribution.json").read_text())
    listed["maps"][0]["photo"] = "../secret.png"
    (folder / "attribution.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match="outside the run folder"):
        write_gallery(folder)


def test_the_page_is_made_without_torch(write_maps: Make, tmp_path: Path, python: str) -> None:
    folder = write_maps(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from heatssl.report.gallery import write_gallery; "
        f"write_gallery(Path({str(folder)!r})); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([python, "-c", code], check=True)
