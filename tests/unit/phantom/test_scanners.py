from __future__ import annotations

import numpy as np
import pytest

from medseg.phantom.scanners import FIELD_OF_VIEW_MM, PROTOCOLS, SCANNERS, Protocol, expose, grid
from medseg.volume import Volume


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_grid_is_what_its_protocol_says(protocol: Protocol) -> None:
    centre = np.array([3.0, -8.0, 21.0])
    shape, affine = grid(protocol, centre)
    volume = Volume(np.zeros((1, *shape)), affine)
    assert volume.axis_codes == protocol.axes
    assert volume.spacing == pytest.approx(protocol.spacing)
    assert volume.orthogonal
    np.testing.assert_allclose(affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3], centre)
    extent = sorted(np.array(shape) * protocol.spacing)
    np.testing.assert_allclose(extent, sorted(FIELD_OF_VIEW_MM.values()), atol=3)


def test_air_is_rayleigh_and_fat_is_gain(rng: np.random.Generator) -> None:
    """Magnitude noise without signal has mean sigma × sqrt(pi / 2) (Gudbjartsson and Patz, 1995)."""
    scanner = SCANNERS[1]
    size = (40, 40, 40)
    places = (np.indices(size, np.float32).reshape(3, -1) - 20) * 4
    air = expose(np.zeros(size, np.float32), places, scanner, rng).astype(float) - scanner.offset
    assert air.mean() == pytest.approx(scanner.gain * scanner.noise * np.sqrt(np.pi / 2), rel=0.02)
    fat = expose(np.ones(size, np.float32), places, scanner, rng).astype(float) - scanner.offset
    assert fat.mean() == pytest.approx(scanner.gain, rel=0.1)
    low, high = np.percentile(fat / scanner.gain, (2, 98))
    assert np.exp(-scanner.shading) - 0.1 < low < 1 < high < np.exp(scanner.shading) + 0.1
