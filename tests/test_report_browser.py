"""The report page in a browser: it shows its marks, says nothing on the console, and loads nothing.

Needs chromium, and is skipped without it. A script that is added to a copy of the page does what a
reader does, and writes what it sees into the title.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
PAGES = [RESULTS / "epyc-2core" / "report.html", RESULTS / "index.html"]
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")

READER = """<script>
const seen = {}, svg = document.querySelector("section svg"), marks = [...svg.querySelectorAll("[data-mark]")];
const press = (key) => svg.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
seen.drawn = marks.every((mark) => mark.getBoundingClientRect().width > 0);
marks[3].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
seen.pointed = [tip.hidden, tip.textContent === marks[3].getAttribute("aria-label")];
document.body.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
seen.left = tip.hidden;
press("ArrowRight"); press("ArrowRight");
seen.keyed = tip.textContent === marks[1].getAttribute("aria-label");
press("Escape");
seen.escaped = tip.hidden;
const select = document.querySelector("select");
if (select) {
  const shown = () => [...document.querySelectorAll(`[data-group="${select.dataset.for}"]`)]
    .filter((figure) => !figure.hidden).map((figure) => figure.dataset.tokens);
  select.value = select.options[0].value;
  select.dispatchEvent(new Event("change"));
  seen.selected = new Set(shown()).size === 1 && shown()[0] === select.value;
}
document.documentElement.style.width = "400px";
seen.narrow = document.body.scrollWidth;
document.title = JSON.stringify(seen);
</script>"""


def browse(path: Path, folder: Path, *options: str) -> tuple[str, list[str]]:
    """What the browser prints, and what the page says on the console."""
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"]
    command = [CHROMIUM, *fixed, f"--user-data-dir={folder / 'profile'}", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def read(path: Path, folder: Path, script: str) -> tuple[dict[str, Any], list[str]]:
    """What a script sees on a copy of the page."""
    copy = folder / "copy.html"
    copy.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8")
    dom, console = browse(copy, folder, "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    return json.loads(html.unescape(title[1])), console


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_reader_reaches_the_numbers(path: Path, tmp_path: Path) -> None:
    seen, console = read(path, tmp_path, READER)
    assert console == []
    assert seen["drawn"] and seen["pointed"] == [False, True] and seen["left"]
    assert seen["keyed"] and seen["escaped"] and seen.get("selected", True)
    assert seen["narrow"] <= 400


def test_a_page_that_loaded_something_would_say_so(tmp_path: Path) -> None:
    """The policy of the page forbids it, and the browser complains on the console."""
    script = "<img src='other.png'><script>document.title = '{}'</script>"
    _, console = read(PAGES[0], tmp_path, script)
    assert len(console) == 1 and "Content Security Policy" in console[0]


@pytest.mark.parametrize("width", [1280, 500])
def test_a_screenshot_is_not_blank(width: int, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = tmp_path / "page.png"
    browse(PAGES[0], tmp_path, f"--window-size={width},2000", f"--screenshot={picture}")
    with image.open(picture) as shot:
        assert shot.size == (width, 2000)
        colors = sorted(count for count, _ in shot.convert("RGB").getcolors(2**24))
    assert len(colors) > 100  # lines and letters in several colours, with smooth edges
    assert sum(colors[:-2]) > 0.02 * width * 2000  # beside paper and figures
