"""Pictures are shown as they are stored; patients as they are looked at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from medseg.checking.facts import thumbnail
from medseg.plots import three_planes_png
from medseg.spec import Case, Channel, Label, Spec
from medseg.studies import Study
from medseg.volume import Volume, reorient, shown_axes

SPEC = Spec(name="p", unit="pixel", channels={"grey": Channel()}, labels={"a": Label(value=1)})


def corner() -> Volume:
    """A picture (20 columns, 12 rows), bright in its upper left."""
    rows = np.zeros((12, 20), np.uint8)
    rows[:4, :5] = 200
    return Volume(rows.T[None, :, :, None], np.eye(4), "pixel")


def test_thumbnail() -> None:
    image = corner()
    study = Study(Case("c", (Path("c.png"),), None, "c"), image, image.with_array((image.array > 0).astype(np.uint8)))
    (shown,) = thumbnail(SPEC, study)
    np.testing.assert_array_equal(shown.grey > 0, image.array[0, :, :, 0].T > 0)
    np.testing.assert_array_equal(shown.labels, image.array[0, :, :, 0].T > 0)


def test_one_plane_without_letters() -> None:
    image = reorient(corner(), shown_axes("pixel"))
    content = three_planes_png(image.array[0], None, image.spacing, {}, letters=False)
    grey = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    height, width = grey.shape
    bright = np.argwhere(grey > 200)
    assert bright[:, 0].max() < height / 2
    assert bright[:, 1].max() < width / 2
    assert 0.8 < width / height < 2.2, "one plane, not three"
