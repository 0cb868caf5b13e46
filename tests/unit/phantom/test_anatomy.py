from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medseg.phantom.anatomy import PhantomPatient, make_patient
from medseg.phantom.scanners import PROTOCOLS, SCANNERS
from medseg.phantom.template import LABELS, LESION_RADIUS_MM, PARTS
from medseg.volume import reorient, same_grid

PLAUSIBLE_ML = {
    "liver": (350, 1200),
    "spleen": (25, 250),
    "kidney_right": (40, 200),
    "kidney_left": (40, 200),
    "lesion": (20, 160),
}


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


def centre_mm(patient: PhantomPatient, label: str) -> np.ndarray:
    index = np.argwhere(patient.mask.array[0] == LABELS[label]).mean(axis=0)
    return patient.mask.affine[:3, :3] @ index + patient.mask.affine[:3, 3]


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second = (make_patient(5, index=2) for _ in range(2))
    assert first.image.array.tobytes() == second.image.array.tobytes()
    assert first.mask.array.tobytes() == second.mask.array.tobytes()
    assert first.image.affine.tobytes() == second.image.affine.tobytes()


@pytest.mark.parametrize(("seed", "index"), [(6, 2), (5, 17)])  # 17 has the protocol and scanner of 2
def test_seed_and_index_change_the_patient(seed: int, index: int) -> None:
    first, second = make_patient(5, index=2), make_patient(seed, index=index)
    assert first.image.shape == second.image.shape
    assert dice(first.mask.array == LABELS["liver"], second.mask.array == LABELS["liver"]) < 0.93


def test_a_volume_is_small_and_holds_every_label(cohort: list[PhantomPatient]) -> None:
    for patient in cohort:
        assert same_grid(patient.image, patient.mask)
        assert patient.image.array.dtype == np.uint16
        assert patient.mask.array.dtype == np.uint8
        assert patient.image.array[0].size < 130_000
        assert set(np.unique(patient.mask.array)) == {0, *LABELS.values()}
        assert all((patient.mask.array == value).sum() >= 150 for value in LABELS.values())


@pytest.mark.parametrize("label", list(LABELS))
def test_organs_have_plausible_volumes_that_differ(label: str, cohort: list[PhantomPatient]) -> None:
    volumes = np.array([(p.mask.array == LABELS[label]).sum() * p.mask.voxel_volume / 1000 for p in cohort])
    low, high = PLAUSIBLE_ML[label]
    assert low < volumes.min()
    assert volumes.max() < high
    assert volumes.std() > 0.05 * volumes.mean()


@pytest.mark.parametrize("label", ["liver", "spleen", "kidney_right", "kidney_left", "lesion"])
def test_an_organ_is_one_piece(label: str, cohort: list[PhantomPatient]) -> None:
    for patient in cohort:
        pieces, count = ndimage.label(patient.mask.array[0] == LABELS[label], np.ones((3, 3, 3)))
        sizes = np.bincount(pieces.ravel())[1:]
        assert count >= 1
        assert sizes.max() > 0.97 * sizes.sum()


def test_organs_lie_on_their_side(cohort: list[PhantomPatient]) -> None:
    for patient in cohort:
        places = {label: centre_mm(patient, label) for label in LABELS}
        assert places["liver"][0] > places["spleen"][0] + 60  # RAS+: x grows towards the right
        assert places["kidney_right"][0] > places["kidney_left"][0] + 60
        assert places["liver"][1] > places["kidney_right"][1]  # more anterior
        assert places["spleen"][2] > places["kidney_left"][2]  # higher


def test_a_mirrored_patient_does_not_overlap(cohort: list[PhantomPatient]) -> None:
    """Else a program that swaps left and right would go unnoticed."""
    for patient in cohort:
        mask = reorient(patient.mask, "RAS").array[0]
        mirrored = mask[::-1]
        for label in ("liver", "spleen", "kidney_right", "kidney_left"):
            assert dice(mask == LABELS[label], mirrored == LABELS[label]) < 0.45


def test_the_lesion_lies_in_the_liver(cohort: list[PhantomPatient]) -> None:
    """Nearly everything just outside the lesion is liver."""
    for patient in cohort:
        mask = patient.mask.array[0]
        lesion = mask == LABELS["lesion"]
        shell = ndimage.binary_dilation(lesion) & ~lesion
        assert (mask[shell] == LABELS["liver"]).mean() > 0.6
        radius = (lesion.sum() * patient.mask.voxel_volume * 3 / (4 * np.pi)) ** (1 / 3)
        assert 0.7 * LESION_RADIUS_MM[0] < radius < 1.35 * LESION_RADIUS_MM[1]


def test_the_lesion_is_darker_than_the_liver_but_not_darkest(cohort: list[PhantomPatient]) -> None:
    for patient in cohort:
        grey = {name: np.median(patient.image.array[patient.mask.array == value]) for name, value in LABELS.items()}
        noise = np.median(patient.image.array)
        assert grey["lesion"] < 0.85 * grey["liver"]
        assert grey["lesion"] != noise


def test_scanners_and_protocols_all_occur(cohort: list[PhantomPatient]) -> None:
    assert {patient.manufacturer for patient in cohort} == {scanner.manufacturer for scanner in SCANNERS}
    assert {patient.image.axis_codes for patient in cohort} == {protocol.axes for protocol in PROTOCOLS}
    assert len({patient.image.spacing for patient in cohort}) >= 3
    brightest = [np.percentile(patient.image.array, 99) for patient in cohort]
    assert max(brightest) > 3 * min(brightest)


def test_some_acquisitions_are_oblique(cohort: list[PhantomPatient]) -> None:
    cosines = [np.abs(p.image.affine[:3, :3] / p.image.spacing).max(axis=0).min() for p in cohort]
    assert min(cosines) < 0.995
    assert max(cosines) == pytest.approx(1.0)


def test_the_organs_are_inside_the_field_of_view(cohort: list[PhantomPatient]) -> None:
    for patient in cohort:
        mask = patient.mask.array[0].copy()
        total = (mask > 0).sum()
        mask[1:-1, 1:-1, 1:-1] = 0
        assert (mask > 0).sum() < 0.01 * total


def test_the_parts_table_is_consistent() -> None:
    assert {part.label for part in PARTS.values() if part.label} | {"lesion"} == set(LABELS)
    for part in PARTS.values():
        assert part.follows is None or PARTS[part.follows].shape is not None
