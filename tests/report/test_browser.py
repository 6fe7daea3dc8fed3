"""The report in a real Chromium: a phone does not scroll sideways, and the script does its work."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heatssl.report import write_report

Make = Callable[..., Any]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

# A page of its own holds the report in a frame as wide as a phone, and tells what it finds there.
WRAPPER = """<!doctype html><body style="margin:0">
<iframe width="{width}" height="844" style="border:0" srcdoc="{report}"></iframe>
<script>window.onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, found = {{}};
  found.width = frame.contentWindow.innerWidth;
  page.querySelectorAll("details").forEach(element => element.open = true);
  found.scrollWidth = page.documentElement.scrollWidth;
  // What scrolls on purpose, such as the configuration, does not overflow.
  const overflows = element => element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0
    && frame.contentWindow.getComputedStyle(element).overflowX === "visible";
  found.overflowing = [...page.querySelectorAll("main, main :not(svg, svg *)")].filter(overflows)
    .map(element => `${{element.tagName}}#${{element.id}}.${{element.className}}`);
  found.unloaded = [...page.images].filter(image => image.currentSrc && !image.naturalWidth).length;
  const chart = page.querySelector(".chart"), output = chart.parentElement.querySelector("output");
  const box = chart.getBoundingClientRect();
  found.last = output.textContent;
  const place = {{clientX: box.left + 1, clientY: box.top + 9}};
  chart.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", place));
  found.hover = output.textContent;
  chart.dispatchEvent(new frame.contentWindow.PointerEvent("pointerleave"));
  found.after = output.textContent;
  const dialog = page.querySelector("dialog"), buttons = page.querySelectorAll(".enlarge");
  buttons[0].click();
  found.open = dialog.open;
  found.first = dialog.querySelector("p").textContent;
  dialog.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", {{key: "ArrowLeft", bubbles: true}}));
  found.before = dialog.querySelector("p").textContent;
  document.body.dataset.found = JSON.stringify(found);
}}</script>"""


def browse(page: Path, profile: Path, width: int = 1280) -> tuple[str, list[str]]:
    """The page's DOM after its script ran, and the errors on its console."""
    done = subprocess.run(
        [
            str(CHROMIUM),
            *(
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-sync",
            ),
            *(
                "--disable-background-networking",
                "--disable-component-update",
                "--enable-logging=stderr",
                "--v=0",
            ),
            *(
                f"--user-data-dir={profile}",
                f"--window-size={width},900",
                "--virtual-time-budget=3000",
                "--dump-dom",
            ),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, write_run: Make) -> Path:
    """The report of a complete run."""
    return write_report(write_run(tmp_path_factory.mktemp("runs") / ("a_long_name_without_a_break" * 4)))


@pytest.mark.parametrize("width", [360, 390, 1280])  # of which a scroll bar takes some
def test_it_fits_the_screen_and_its_script_works(report: Path, tmp_path: Path, width: int) -> None:
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(WRAPPER.format(width=width, report=html.escape(report.read_text(encoding="utf-8"))))
    dom, errors = browse(wrapper, tmp_path / "profile")
    assert errors == []
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))  # type: ignore[index]
    assert found["width"] == width
    assert found["scrollWidth"] <= width
    assert found["overflowing"] == []
    assert found["unloaded"] == 0
    assert found["hover"].endswith("at step 0")
    assert found["after"] == found["last"] != found["hover"]
    assert found["open"] is True
    assert found["first"] == "star: original"
    assert found["before"].startswith("integrated gradients of ring")  # from the first picture around to the last


def test_it_opens_from_disk_without_a_complaint(report: Path, tmp_path: Path) -> None:
    dom, errors = browse(report, tmp_path / "profile")
    assert "20.3 points above random weights" in dom
    assert errors == []


def test_errors_on_the_console_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><script>nothing.here()</script>")
    assert "nothing is not defined" in "".join(browse(page, tmp_path / "profile")[1])
