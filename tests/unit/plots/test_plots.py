"""Pictures: right side up and the right way round, true aspect, the same bytes twice, odd input."""

from __future__ import annotations

import io
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from medseg import plots
from medseg.plots.curves import _running_mean

RED = {1: "#ff0000"}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def centre_of_red(picture: np.ndarray) -> tuple[float, float]:
    red = (picture[..., 0] - picture[..., 1] > 90) & (picture[..., 0] - picture[..., 2] > 90)
    rows, columns = np.nonzero(red)
    return rows.mean() / picture.shape[0], columns.mean() / picture.shape[1]


def test_slice_rgb_paints_labels_over_grey() -> None:
    image = np.arange(12.0).reshape(3, 4)
    mask = np.zeros((3, 4), int)
    mask[0, 0], mask[2, 3] = 1, 7
    found = plots.slice_rgb(image, mask, RED, opacity=1.0)
    assert found.dtype == np.uint8
    assert found[0, 0].tolist() == [255, 0, 0]
    # Label 7 has no colour; the brightest voxel stays white.
    assert found[2, 3].tolist() == [255, 255, 255]
    assert (np.diff(found[..., 1].ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.full((4, 4), 1e30)])
def test_flat_images_are_drawn(image: np.ndarray) -> None:
    assert plots.slice_rgb(image, None, RED).shape == (4, 4, 3)
    assert plots.overlay_png(image, None, RED).startswith(b"\x89PNG")


def test_overlay_has_the_aspect_of_the_patient() -> None:
    height, width, _ = pixels(plots.overlay_png(np.zeros((10, 20)), None, RED, spacing=(5.0, 1.0))).shape
    assert height / width == pytest.approx(50 / 20, rel=0.01)


def test_three_planes_are_radiological() -> None:
    """A mark at the right, anterior, superior end: left in axial and coronal, left in sagittal; at the top in all."""
    image, mask = np.zeros((40, 40, 40)), np.zeros((40, 40, 40), int)
    mask[30:38, 30:38, 30:38] = 1
    picture = pixels(plots.three_planes_png(image, mask, (1, 1, 1), RED))
    for third in np.array_split(picture, 3, axis=1):
        row, column = centre_of_red(third)
        assert row < 0.4
        assert column < 0.4


def test_the_reference_decides_the_plane_and_is_white() -> None:
    image, mask = np.zeros((30, 30, 30)), np.zeros((30, 30, 30), int)
    reference = mask.copy()
    mask[2:4, 2:4, 2:4], reference[20:28, 20:28, 20:28] = 1, 1
    picture = pixels(plots.three_planes_png(image, mask, (1, 1, 1), RED, reference=reference))
    assert (picture.min(axis=2) > 200).sum() > 200
    assert not ((picture[..., 0] > 90) & (picture[..., 1] < 20)).any()
    alone = pixels(plots.three_planes_png(image, mask, (1, 1, 1), RED, reference=np.zeros_like(mask)))
    assert np.isfinite(centre_of_red(alone)).all()


def test_the_plane_of_a_hollow_shape_shows_it() -> None:
    mask = np.zeros((21, 21, 9), int)
    mask[2:5], mask[16:19] = 1, 1
    picture = pixels(plots.three_planes_png(np.zeros(mask.shape), mask, (1, 1, 1), RED))
    sagittal = np.array_split(picture, 3, axis=1)[2]
    assert np.isfinite(centre_of_red(sagittal)).all()


def test_thin_and_empty_volumes_are_drawn() -> None:
    for shape in ((64, 48, 1), (1, 1, 1), (200, 10, 3)):
        assert plots.three_planes_png(np.zeros(shape), None, (0.5, 0.5, 5), RED)


SERIES = plots.Series(
    "Anterior $x$ <b>", "#1f78b4", [1.0, 2.0, 4.0], reference=[1.1, 1.9, 4.2], marked=[True, False, False]
)
ONE = plots.Series("one", "#1f78b4", [1.0], reference=[1.0])
DRAWINGS: dict[str, Callable[[], str]] = {
    "strip": lambda: plots.strip_svg([SERIES, ONE, plots.Series("none", "#000000", [])], label="Dice", limits=(0, 5)),
    "bland_altman": lambda: plots.bland_altman_svg(SERIES, unit="mL"),
    "bland_altman of one": lambda: plots.bland_altman_svg(ONE, unit="mL"),
    "agreement": lambda: plots.agreement_svg(SERIES, unit="mL"),
    "agreement of one": lambda: plots.agreement_svg(ONE, unit="mL"),
    "differences": lambda: plots.differences_svg([SERIES, ONE], {"one": (-1, 0, 1)}, label="difference"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_plots_are_the_same_twice_whatever_the_user_has_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = DRAWINGS[name]()
    with matplotlib.rc_context({"font.size": 22, "svg.hashsalt": None, "axes.facecolor": "pink"}):
        assert DRAWINGS[name]() == first
        assert matplotlib.rcParams["font.size"] == 22
    root = ElementTree.fromstring(first)
    assert root.tag.endswith("svg")
    assert "<dc:date>" not in first


def test_planes_are_the_same_twice() -> None:
    rng = np.random.default_rng(1)
    image, mask = rng.normal(size=(12, 10, 8)), rng.integers(0, 2, (12, 10, 8))
    draw = lambda: plots.three_planes_png(image, mask, (1, 1, 2), RED, reference=mask)  # noqa: E731
    assert draw() == draw()


def test_curves(tmp_path: Path) -> None:
    training = [{"step": s, "seconds": s / 2, "loss": 1 / (s + 1), "lr": 1e-3} for s in range(50)]
    training[3]["loss"] = float("nan")
    validation = [{"step": s, "dice": {"a": s / 50, "b": None if s == 10 else 0.5}} for s in (10, 20)]
    path = tmp_path / "new" / "curves.png"
    plots.curves_png([*training, *validation], path)
    first = path.read_bytes()
    assert pixels(first).shape[1] > 500
    plots.curves_png([*training, *validation], path)
    assert path.read_bytes() == first
    for rows in ([], training[:1], validation[:1]):
        plots.curves_png(rows, path)
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]


def test_running_mean_skips_what_is_not_finite() -> None:
    found = _running_mean(np.array([np.nan, 2.0, 4.0, np.nan, 6.0]), 2)
    np.testing.assert_array_equal(found, [np.nan, 2, 3, 4, 6])


def test_colours() -> None:
    found = plots.colours_for([0, 1, 2, 3], {1: "#abcdef", 2: None})
    assert list(found) == [1, 2, 3]
    assert found[1] == "#abcdef"
    assert len(set(found.values())) == 3
    assert len(plots.colours_for(range(1, 105))) == 104
