"""The page of slices: where the patient's right is, which slices are shown, and nothing that depends on chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from medseg.plots import Structure, overlay_page
from medseg.plots.overlay_page import HEIGHT, WIDTH, telling_slices
from medseg.volume import Volume, reorient

RED, GREEN = "#ff0000", "#00ff00"
ROWS = (Structure(1, "one", RED, "1 mL"), Structure(2, "two", GREEN, "2 mL"))


def scene(axes: str = "RAS", shape: tuple[int, int, int] = (24, 30, 20)) -> tuple[Volume, Volume]:
    """A body with a bright octant at the patient's right, front and head end, and a label in each half."""
    image = np.full((1, *shape), 100.0, np.float32)
    image[0, 12:, 15:, 10:] = 180
    image[..., 0] = 0
    mask = np.zeros((1, *shape), np.uint8)
    mask[0, 15:20, 8:20, 5:9] = 1
    mask[0, 4:7, 8:12, 12:16] = 2
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = -24, -30, -30
    return reorient(Volume(image, affine), axes), reorient(Volume(mask, affine), axes)


def page(image: Volume, mask: Volume, rows: Any = ROWS, footer: str = "made by us") -> Any:
    return overlay_page(image, mask, rows, footer=footer)


def quadrants(cell: Any) -> Any:
    """Mean brightness of the four quarters of the picture in a cell: [[top left, top right], [bottom ...]]."""
    body = cell.min(axis=2) > 90
    rows, columns = np.flatnonzero(body.mean(axis=1) > 0.3), np.flatnonzero(body.mean(axis=0) > 0.3)
    picture = cell[rows[0] : rows[-1], columns[0] : columns[-1]].min(axis=2)
    half = [n // 2 for n in picture.shape]
    parts = (picture[:, : half[1]], picture[:, half[1] :])
    return np.array([[np.median(p[: half[0]]) for p in parts], [np.median(p[half[0] :]) for p in parts]])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SLA", "IAL", "ASR"])
def test_the_page_is_the_same_however_the_patient_is_sliced(axes: str) -> None:
    expected = page(*scene())
    assert expected.shape == (HEIGHT, WIDTH, 3)
    assert expected.dtype == np.uint8
    assert np.array_equal(page(*scene(axes)), expected)


def test_right_is_on_the_left_and_front_and_head_are_up() -> None:
    image, _ = scene()
    whole = Volume(np.zeros(image.array.shape, np.uint8), image.affine)
    # Without labels the slices are spread evenly: the last of a direction goes through the bright half.
    drawn = page(image, whole)
    width, height = WIDTH * 0.79 / 4, int(HEIGHT * 0.285)
    cells = []
    for row in range(3):
        top = int(HEIGHT * (1 - 0.945 + row * 0.305))
        left = int(WIDTH * 0.005 + 3 * width)
        cells.append(drawn[top + 2 : top + height - 40, left : int(left + width - 14)].astype(int))
    for cell in cells:
        found = quadrants(cell)
        assert found.argmax() == 0, found
        assert found[0, 0] > found[0, 1] + 40
        assert found[0, 0] > found[1, 0] + 40


def test_outlines_have_the_colour_of_the_legend() -> None:
    drawn = page(*scene())
    colours = drawn[:, : int(WIDTH * 0.8)].reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 255, 0)):
        assert (colours == colour).all(axis=1).sum() > 100
    legend = drawn[:, int(WIDTH * 0.8) :].reshape(-1, 3)
    assert (legend == (255, 0, 0)).all(axis=1).sum() > 200


def test_it_is_the_same_every_time_and_says_what_it_is_told() -> None:
    one = page(*scene())
    assert np.array_equal(one, page(*scene()))
    differs = np.argwhere((one != page(*scene(), footer="made by them")).any(axis=2))
    assert differs[:, 0].min() > HEIGHT * 0.95, "the footer stands at the foot"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["肝臓", "$T_1$ <b>", "a" * 200, "", "\u0000bell\u0007"])
def test_names_of_any_kind(name: str) -> None:
    assert page(*scene(), rows=[Structure(1, name, RED, "1 mL")]).any()


def test_more_labels_than_the_legend_holds() -> None:
    image, mask = scene()
    rows = [Structure(n, f"label {n}", RED, "") for n in range(1, 60)]
    assert not np.array_equal(page(image, mask, rows), page(image, mask, rows[:50])), "the rest is counted"


@pytest.mark.parametrize("change", ["constant", "nan", "flat", "ct"])
def test_images_without_much_to_show(change: str) -> None:
    image, mask = scene()
    array = image.array.copy()
    if change == "constant":
        array[:] = 7
    if change == "nan":
        array[0, 3] = np.nan
    flat = slice(6, 7) if change == "flat" else slice(None)
    meta = {"Modality": "CT"} if change == "ct" else {}
    image = Volume(array[..., flat], image.affine, meta=meta)
    assert page(image, Volume(mask.array[..., flat], mask.affine)).any()


def test_ct_is_shown_in_the_soft_tissue_window() -> None:
    image, mask = scene()
    cold = Volume(np.where(image.array > 150, 3000, -900).astype(np.float32), image.affine, meta={"Modality": "CT"})
    warm = Volume(np.where(image.array > 150, 1500, -300).astype(np.float32), image.affine, meta={"Modality": "CT"})
    assert np.array_equal(page(cold, mask), page(warm, mask))


def test_slices_show_the_largest_structures_where_they_are_largest(rng: np.random.Generator) -> None:
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[5:30, 5:30, 8] = mask[10:20, 10:20, 4:12] = 1
    mask[2:6, 2:6, 30:34] = 2
    mask[2:9, 2:9, 32] = 2
    assert 8 in telling_slices(mask, [1, 2], 2, 3)
    assert 32 in telling_slices(mask, [1, 2], 2, 3)
    assert telling_slices(mask, [1], 2, 1) == [8]
    empty = telling_slices(np.zeros((9, 9, 9), np.uint8), [1], 0, 3)
    assert empty == [1, 4, 7]
    for _ in range(20):
        noise = rng.integers(0, 4, (5, 6, 7)).astype(np.uint8)
        for axis in range(3):
            found = telling_slices(noise, [1, 2, 3], axis, 3)
            assert found == sorted(set(found))
            assert len(found) == 3


def test_an_oblique_series_has_two_letters(dicom_result: Callable[..., Any], tmp_path: Any) -> None:
    from medseg.plots.overlay_page import _Scene

    found = {}
    for grid in ("axial", "oblique", "feet-first"):
        result = dicom_result(tmp_path / grid, grid)
        shown = _Scene.of(result.image, result.mask, ())
        found[grid] = [shown.letters(axis, sign) for axis in range(3) for sign in (1, -1)]
    assert found["axial"] == found["feet-first"] == ["R", "L", "A", "P", "S", "I"]
    assert found["oblique"] == ["RA", "LP", "AL", "PR", "SP", "IA"]
