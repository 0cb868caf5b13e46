"""The pages that medseg writes, in a real browser: complete, silent, fetching nothing, readable on a narrow screen."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import nibabel
import numpy as np
import pytest

import medseg

WIDE, NARROW = 1200, 400
# Chromium makes no window narrower than 500 px, so the page of a phone stands in a frame. What the frame tells is
# written into the outer page, because scripts are forbidden in the inner one.
FRAME = """<!doctype html><body style="margin: 0">
<iframe src="{url}" width="{width}" height="2400" style="border: 0; display: block" onload="
const page = this.contentDocument;
document.body.dataset.told = JSON.stringify({{
  inner: this.contentWindow.innerWidth, needed: page.documentElement.scrollWidth,
  pictures: [...page.images].map(image => image.naturalWidth)}})"></iframe></body>
"""


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page: its document, what its console said, and a picture (height, width, 3)."""

    document: str
    console: list[str]
    picture: np.ndarray


Browser = Callable[..., Seen]


@pytest.fixture
def browser(program: Callable[[str], str], tmp_path: Path) -> Browser:
    """Open a file in a fresh headless Chromium: ``browser(path, width=1200)``."""

    def view(path: Path, *, width: int = WIDE) -> Seen:
        shot = tmp_path / "shot.png"
        shot.unlink(missing_ok=True)
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        switches += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        switches += ["--enable-logging=stderr", "--v=0", "--allow-file-access-from-files"]
        switches += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400"]
        command = [program("chromium"), *switches, f"--screenshot={shot}", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return Seen(done.stdout, console, matplotlib.image.imread(shot)[..., :3])

    return view


class Page(HTMLParser):
    """Text of a document, and everything in it that could fetch something."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        values = [value for name, value in attrs if name in ("src", "srcset", "href", "data", "poster") and value]
        (self.pictures if tag == "img" else self.links).extend(values)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def dataset(tiny_dataset: Callable[..., Path], tiny: SimpleNamespace, tmp_path: Path) -> Path:
    """Seven cases; the mask of c1 holds nothing."""
    root = tiny_dataset(tmp_path / "data")
    tiny.save(root / "masks" / "c1.nii.gz", np.zeros(tiny.shape, np.uint8))
    return root


def moved(root: Path, folder: Path, step: int, tiny: SimpleNamespace) -> Path:
    """Predictions for the test cases: the reference, moved by some voxels."""
    for case in ("c5", "c6"):
        mask = np.asarray(nibabel.load(root / "masks" / f"{case}.nii.gz").dataobj)
        tiny.save(folder / f"{case}.nii.gz", np.roll(mask, step, axis=0))
    return folder


def check_page(root: Path, out: Path, tiny: SimpleNamespace) -> tuple[Path, list[str]]:
    found = medseg.check(root, out=out)
    assert any(finding.case == "c1" for finding in found.findings)
    told = [text for finding in found.findings for text in (finding.code, finding.message)]
    assert found.page is not None
    return found.page, ["Check of tiny", "ball", "box", *(f"c{number}" for number in range(7)), *told]


def report_page(root: Path, out: Path, tiny: SimpleNamespace) -> tuple[Path, list[str]]:
    near, far = moved(root, out / "near", 1, tiny), moved(root, out / "far", 3, tiny)
    score = medseg.evaluate(near, root, out=out / "scores", cases="test")
    medseg.evaluate(far, root, out=out / "other", cases="test")
    page = medseg.report(out / "scores", out=out, against=out / "other", predictions=near, reference=root)
    told = ["For research use.", "Compared with another evaluation", "Worst cases", f"{score.mean_dice:.3f}"]
    return page, ["ball", "box", "c5", "c6", *told]


MAKERS = {"check": check_page, "report": report_page}


@pytest.mark.parametrize("name", MAKERS)
def test_a_page_is_complete_and_fetches_nothing(
    name: str, browser: Browser, dataset: Path, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    path, told = MAKERS[name](dataset, tmp_path / "out", tiny)
    seen = browser(path)
    page = Page(seen.document)
    assert [text for text in told if " ".join(text.split()) not in page.text] == []
    assert page.pictures
    assert all(source.startswith("data:image/") for source in page.pictures)
    assert page.links == []
    assert not re.search(r"url\(|@import", seen.document)
    # The page forbids itself to fetch: what it would have fetched, the console tells.
    assert "default-src 'none'" in seen.document
    assert seen.console == []
    assert_shows_something(seen.picture, WIDE)


@pytest.mark.parametrize("name", MAKERS)
def test_a_page_fits_a_narrow_screen(
    name: str, browser: Browser, dataset: Path, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    path, _ = MAKERS[name](dataset, tmp_path / "out", tiny)
    seen, told = framed(browser, path, tmp_path)
    assert told["inner"] == NARROW
    assert told["needed"] == NARROW, "the page scrolls sideways"
    assert told["pictures"]
    assert min(told["pictures"]) > 0, "a picture does not decode"
    assert seen.console == []
    assert_shows_something(seen.picture[:, :NARROW], NARROW)


def test_these_tests_would_notice(browser: Browser, tmp_path: Path) -> None:
    head = medseg_head()
    (tmp_path / "bad.html").write_text(
        f'{head}<body><img src="http://127.0.0.1:9/x.png"><img src="data:image/png;base64,AAAA">'
        f'<div style="width: 700px">x</div></body>'
    )
    seen, told = framed(browser, tmp_path / "bad.html", tmp_path)
    assert any("127.0.0.1:9" in line and "Content Security Policy" in line for line in seen.console)
    assert told["needed"] > NARROW
    assert told["pictures"] == [0, 0]
    (tmp_path / "blank.html").write_text("<!doctype html><body></body>")
    with pytest.raises(AssertionError, match="blank"):
        assert_shows_something(browser(tmp_path / "blank.html").picture, WIDE)


def medseg_head() -> str:
    """The policy that the pages carry, as they carry it."""
    base = (Path(medseg.__file__).parent / "templates" / "base.html").read_text(encoding="utf-8")
    policy = re.search(r"<meta http-equiv=.*>", base)
    assert policy
    return f"<!doctype html><head>{policy[0]}</head>"


def framed(browser: Browser, path: Path, folder: Path) -> tuple[Seen, Any]:
    """Open a page as a narrow screen does; also what the frame told of it."""
    outer = folder / "frame.html"
    outer.write_text(FRAME.format(url=path.as_uri(), width=NARROW))
    seen = browser(outer)
    told = re.search(r'data-told="([^"]*)"', seen.document)
    assert told, seen.document
    return seen, json.loads(told[1].replace("&quot;", '"'))


def assert_shows_something(picture: np.ndarray, width: int) -> None:
    assert picture.shape[1] == width
    pixels = np.rint(picture.reshape(-1, 3) * 255).astype(np.uint8)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert len(colours) >= 30, "blank"
    assert 1 - counts.max() / counts.sum() > 0.02, "blank"
