"""The study report: offline, the same bytes from the same table, honest about failures, escaped."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from medseg.errors import ConfigError
from medseg.evaluation.evaluate import evaluate
from medseg.evaluation.pictures import case_pictures
from medseg.evaluation.report import case_lines, report

from .conftest import World, bar


class Page(HTMLParser):
    """Text, table rows and everything that could fetch something."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.rows, self.links, self.images, self._cell = "", [], [], 0, False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        assert tag not in ("script", "link", "iframe", "object")
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def scored(world: World) -> World:
    world.add("a", bar(4, 2), bar(4, 6))
    world.add("b", bar(6, 3), bar(2, 0))
    world.add("c", bar(5, 0), None)
    world.add("d", bar(5, 0), bar(5, 1))
    evaluate(world.predictions, world.root, out=world.out)
    return world


def test_says_what_the_table_says(scored: World, tmp_path: Path) -> None:
    path = report(scored.out, out=tmp_path / "report")
    page = Page(path)
    assert path == tmp_path / "report" / "report.html"
    assert ["one", "4", "3", "1", "0.750", "0.375 to 1.000", "0.625", "0.479", "0.000", "1.000"] in page.rows
    assert ["one", "3", "0", "0", "0"] in page.rows
    assert ["two", "1", "1", "1", "0"] in page.rows
    assert ["c", "PREDICTION_MISSING"] in page.rows
    assert "For research use." in page.text
    lines = case_lines(evaluate(scored.predictions, scored.root, out=scored.out))
    assert [line.case for line in lines] == ["b", "d", "a"]


def test_is_one_offline_file_and_the_same_every_time(scored: World, tmp_path: Path) -> None:
    picture = case_pictures(scored.predictions, scored.root)
    first = report(scored.out, out=tmp_path / "first", picture=picture)
    second = report(scored.out, out=tmp_path / "second", picture=picture)
    assert first.read_bytes() == second.read_bytes()
    page = Page(first)
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?://(?!www\.w3\.org)", page.source)
    assert str(tmp_path) not in page.source
    # Distribution, two plots for each of two labels, three worst cases and the median one.
    assert page.images == 1 + 4 + 3 + 1


def test_without_pictures(scored: World, tmp_path: Path) -> None:
    assert Page(report(scored.out, out=tmp_path)).images == 5


def test_compares_case_by_case(scored: World, tmp_path: Path) -> None:
    scored.predict("b", bar(6, 3))
    better = tmp_path / "better"
    evaluate(scored.predictions, scored.root, out=better)
    page = Page(report(better, out=tmp_path, against=scored.out))
    row = next(row for row in page.rows if row[0] == "one" and len(row) == 9)
    assert row[1:5] == ["4", "0.750", "0.625", "+0.125"]
    assert row[7:] == ["1 / 3 / 0", "0.000"]
    (scored.root / "images" / "d.nii.gz").unlink()
    evaluate(scored.predictions, scored.root, out=scored.out)
    with pytest.raises(ConfigError) as caught:
        report(better, out=tmp_path, against=scored.out)
    assert caught.value.code == "DIFFERENT_CASES"


def test_labels_cannot_inject_html(world: World, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> $\\frac"
    world.write_spec(labels={evil: 1})
    world.add("a", bar(3), bar(3))
    evaluate(world.predictions, world.root, out=world.out)
    page = Page(report(world.out, out=tmp_path))
    assert html.escape(evil) in page.source


def test_every_prediction_wrong_or_missing(world: World, tmp_path: Path) -> None:
    world.add("a", bar(3, 2), None)
    (world.predictions / "a.nii.gz").write_bytes(b"x")
    evaluate(world.predictions, world.root, out=world.out)
    page = Page(
        report(world.out, out=tmp_path, against=world.out, picture=case_pictures(world.predictions, world.root))
    )
    assert ["one", "1", "0", "1", "0.000", "0.000 to 0.000", "0.000", "–", "0.000", "0.000"] in page.rows


def test_pictures_of_a_folder_of_masks_and_of_an_unknown_case(scored: World) -> None:
    draw = case_pictures(scored.predictions, scored.root / "masks")
    assert draw("a").startswith(b"\x89PNG")
    assert draw("c").startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="case z"):
        draw("z")


def test_a_folder_without_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        report(tmp_path, out=tmp_path)
    assert caught.value.code == "NOT_AN_EVALUATION"
