"""SUV by body weight against answers worked out by hand, and every way to get its time wrong.

The patient weighs 70 kg and got 350 MBq; a scan one half-life later finds 175 MBq left: 70000 g / 175e6 Bq = 4e-4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from medseg.batch.study import read_study
from medseg.batch.study_input import StudyInput
from medseg.channels import read_chosen
from medseg.errors import ReadError
from medseg.phantom.dicom import write_series
from medseg.readers.dicom_scan import find_series
from medseg.readers.dicom_series import read_series
from medseg.readers.dicom_suv import suv_factors
from medseg.spec import Channel, Spec
from medseg.studies import read_channels
from medseg.volume import Volume

Edit = Callable[[Dataset, int], object]
AFTER_ONE_HALF_LIFE = 4e-4
AT_INJECTION = 2e-4
SLICES = 6


def injection(**tags: Any) -> list[Dataset]:
    item = Dataset()
    facts = {"RadiopharmaceuticalStartTime": "100000", "RadionuclideTotalDose": 350e6, "RadionuclideHalfLife": 6588}
    for keyword, value in (facts | tags).items():
        if value is not None:
            setattr(item, keyword, value)
    return [item]


PLAIN = {
    "PatientWeight": 70,
    "Units": "BQML",
    "DecayCorrection": "START",
    "CorrectedImage": ["DECY", "ATTN", "SCAT"],
    "SeriesDate": "20240301",
    "SeriesTime": "114948",  # 6588 s after the injection
    "AcquisitionDate": "20240301",
    "AcquisitionTime": "114948",
    "ActualFrameDuration": 120000,
    "FrameReferenceTime": 0,
}


@pytest.fixture
def pet(tmp_path: Path) -> Callable[..., Path]:
    """Write a PET whose header is PLAIN with changes; None leaves an attribute out."""

    def write(edit: Edit = lambda dataset, number: None, *, given: dict[str, Any] | None = None, **tags: Any) -> Path:
        values = np.random.default_rng(1).uniform(0, 30000, (1, 12, 10, SLICES)).astype(np.float32)
        for number, file in enumerate(write_series(Volume(values, np.diag([-4.0, -4, 3, 1])), tmp_path, modality="PT")):
            dataset = pydicom.dcmread(file)
            with pydicom.config.disable_value_validation():
                dataset.RadiopharmaceuticalInformationSequence = injection(**(given or {}))
            for keyword, value in (PLAIN | tags).items():
                if value is not None:
                    with pydicom.config.disable_value_validation():
                        setattr(dataset, keyword, value)
                elif keyword in dataset:
                    del dataset[keyword]
            edit(dataset, number)
            dataset.save_as(file)
        return tmp_path

    return write


def factors(folder: Path) -> list[float]:
    (series,) = find_series(folder)
    assert series.refusal is None
    return suv_factors(sorted(series.headers, key=lambda header: int(header.instance)))


def refusal(folder: Path) -> str:
    (series,) = find_series(folder)
    with pytest.raises(ReadError) as caught:
        suv_factors(series.headers)
    assert caught.value.code == "SUV_INCOMPLETE"
    for secret in ("70", "20240301", "114948", "100000", "CANARY"):
        assert not re.search(rf"\b{secret}\b", str(caught.value))
    return str(caught.value)


def private(group: int, creator: str, element: int, vr: str, value: Any) -> Edit:
    return lambda dataset, number: dataset.private_block(group, creator, create=True).add_new(element, vr, value)


def beds(*times: str, reference: Callable[[float], float] | None = None, duration: float = 120.0) -> Edit:
    """Spread the slices over beds that were measured one after the other."""

    def change(dataset: Dataset, number: int) -> None:
        dataset.AcquisitionTime = times[number * len(times) // SLICES]
        if reference is not None:
            clock = int(dataset.AcquisitionTime[:2]) * 3600 + int(dataset.AcquisitionTime[2:4]) * 60
            dataset.FrameReferenceTime = round(1000 * reference(clock + int(dataset.AcquisitionTime[4:6])))

    return change


# ---- each vendor's way ----------------------------------------------------------------------------------------------


def test_values_in_becquerel_decayed_from_the_start(pet: Callable[..., Path]) -> None:
    folder = pet()
    plain, uptake = read_series(folder), read_series(folder, suv=True)
    np.testing.assert_allclose(uptake.array, plain.array * AFTER_ONE_HALF_LIFE, rtol=1e-6)
    assert (plain.meta["Units"], plain.notes) == ("BQML", ())
    assert (uptake.meta["Units"], uptake.notes) == ("GML", ("SUV_BW",))


def test_values_are_rounded_once(pet: Callable[..., Path]) -> None:
    folder = pet()
    stored = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    exact = [one.pixel_array.T.astype(np.float64) * float(one.RescaleSlope) * AFTER_ONE_HALF_LIFE for one in stored]
    np.testing.assert_array_equal(read_series(folder, suv=True).array[0], np.stack(exact, -1).astype(np.float32))


def test_decay_corrected_to_the_administration(pet: Callable[..., Path]) -> None:
    """GE's choice: no time is needed, and none is asked for."""
    folder = pet(DecayCorrection="ADMIN", AcquisitionTime=None, given={"RadiopharmaceuticalStartTime": None})
    assert factors(folder) == [AT_INJECTION] * SLICES


def test_no_decay_correction(pet: Callable[..., Path]) -> None:
    """Each bed has its own time; a frame of 122.7 s and a half-life of 122.7 s: the mean is met after 0.5288 of it.

    Mean of 2^-t over [0, 1] is 0.5 / ln 2 = 0.72135 = 2^-0.47123: the moment is 0.47123 of the frame.
    """
    folder = pet(
        beds("100000", "100200"),
        DecayCorrection="NONE",
        CorrectedImage=["ATTN"],
        ActualFrameDuration=120000,
        given={"RadionuclideHalfLife": 120},
    )
    left = 0.5 / math.log(2)
    expected = [70000 / (350e6 * left)] * 3 + [2 * 70000 / (350e6 * left)] * 3
    np.testing.assert_allclose(factors(folder), expected, rtol=1e-9)


def test_philips_factor_to_uptake(pet: Callable[..., Path]) -> None:
    """Counts times slope times (7053,1000); nothing else is needed."""
    folder = pet(private(0x7053, "Philips PET Private Group", 0x00, "DS", "0.000551"), Units="CNTS", PatientWeight=None)
    assert factors(folder) == [0.000551] * SLICES


def test_philips_factor_to_becquerel(pet: Callable[..., Path]) -> None:
    """(7053,1000) is zero where the scanner did not know the weight; (7053,1009) leads to Bq/mL."""

    def change(dataset: Dataset, number: int) -> None:
        private(0x7053, "Philips PET Private Group", 0x00, "DS", "0")(dataset, number)
        private(0x7053, "Philips PET Private Group", 0x09, "UN", b"2.5 ")(dataset, number)

    np.testing.assert_allclose(factors(pet(change, Units="CNTS")), [2.5 * AFTER_ONE_HALF_LIFE] * SLICES)


def test_a_private_block_of_another_maker_is_not_asked(pet: Callable[..., Path]) -> None:
    folder = pet(private(0x7053, "SOMEONE ELSE", 0x00, "DS", "0.5"), Units="CNTS")
    assert "(7053,1000)" in refusal(folder)


@pytest.mark.parametrize("kind", ["BW", None, ""])
def test_values_that_are_uptake_already(kind: str | None, pet: Callable[..., Path]) -> None:
    def change(dataset: Dataset, number: int) -> None:
        if kind is not None:
            dataset.SUVType = kind

    folder = pet(change, Units="GML", PatientWeight=None)
    assert factors(folder) == [1.0] * SLICES
    np.testing.assert_array_equal(read_series(folder, suv=True).array, read_series(folder).array)
    assert read_series(folder, suv=True).notes == ("SUV_BW",)


# ---- the time -------------------------------------------------------------------------------------------------------


def test_beds_share_the_start_of_the_series(pet: Callable[..., Path]) -> None:
    """Not each slice's own AcquisitionTime, which would add 3 % a bed."""
    assert factors(pet(beds("114948", "115248", "115548"))) == [AFTER_ONE_HALF_LIFE] * SLICES


def test_a_series_time_after_the_scan_is_not_used(pet: Callable[..., Path]) -> None:
    """A post-processed series was made two hours later; the first bed counts, whichever slice it is."""
    folder = pet(beds("115548", "115248", "114948"), SeriesTime="134948")
    assert factors(folder) == [AFTER_ONE_HALF_LIFE] * SLICES


def test_the_private_time_of_ge_is_used(pet: Callable[..., Path]) -> None:
    folder = pet(
        private(0x0009, "GEMS_PETD_01", 0x0D, "DT", "20240301114948.00"),
        SeriesTime="134948",
        AcquisitionTime="115548",
    )
    assert factors(folder) == [AFTER_ONE_HALF_LIFE] * SLICES
    late = pet(
        private(0x0009, "GEMS_PETD_01", 0x0D, "DT", "20240301124948.00"),
        SeriesTime="134948",
        AcquisitionTime="115548",
    )
    assert "(0009,100d)" in refusal(late)


def middle(clock: float) -> float:
    """Seconds from 11:49:48 to the mean of a frame of 120 s that began at `clock`, of F-18."""
    decay = math.log(2) / 6588
    lost = decay * 120
    return clock - (11 * 3600 + 49 * 60 + 48) + math.log(lost / (1 - math.exp(-lost))) / decay


def test_frame_reference_time_leads_back_to_the_start(pet: Callable[..., Path]) -> None:
    """A sub-series that lacks the first beds, with a new SeriesTime: its first AcquisitionTime would be 20 min late."""
    folder = pet(beds("120948", "121248", reference=middle), SeriesTime="134948")
    np.testing.assert_allclose(factors(folder), AFTER_ONE_HALF_LIFE, rtol=1e-6)


def test_a_series_time_long_before_the_scan_is_confirmed_or_refused(pet: Callable[..., Path]) -> None:
    """It may be that of a late part of a scan, or one that was set to midnight when the patient's name was removed."""
    late = beds("120948", "121248", reference=middle)
    np.testing.assert_allclose(factors(pet(late)), AFTER_ONE_HALF_LIFE, rtol=1e-9)
    assert "SeriesTime lies 20 minutes before" in refusal(pet(beds("120948", "121248")))
    assert "SeriesTime" in refusal(pet(SeriesTime="000000"))
    folder = pet(beds("114948", "115248", reference=middle), SeriesTime="000000")
    np.testing.assert_allclose(factors(folder), AFTER_ONE_HALF_LIFE, rtol=1e-6)


def test_a_reference_time_that_means_nothing_is_refused(pet: Callable[..., Path]) -> None:
    """A second after the start of the scan, in the middle of a frame of an hour."""
    folder = pet(SeriesTime="134948", FrameReferenceTime=1000, ActualFrameDuration=3600000)
    assert "FrameReferenceTime" in refusal(folder)


@pytest.mark.parametrize("dated", [True, False])
def test_an_injection_before_midnight(dated: bool, pet: Callable[..., Path]) -> None:
    """22:40:12 and 00:30:00 are one half-life apart."""
    given = {"RadiopharmaceuticalStartTime": "224012"}
    if dated:
        given |= {"RadiopharmaceuticalStartDateTime": "20240229224012"}
    folder = pet(beds("003000", "003300"), SeriesTime="003000", given=given)
    np.testing.assert_allclose(factors(folder), AFTER_ONE_HALF_LIFE, rtol=1e-9)


def test_a_scan_over_midnight(pet: Callable[..., Path]) -> None:
    """The smallest time of day is not the first."""

    def change(dataset: Dataset, number: int) -> None:
        beds("235800", "000200")(dataset, number)
        dataset.AcquisitionDate = "20240301" if number < 3 else "20240302"

    given = {"RadiopharmaceuticalStartTime": "220812"}
    folder = pet(change, SeriesTime="235800", given=given)
    np.testing.assert_allclose(factors(folder), AFTER_ONE_HALF_LIFE, rtol=1e-9)

    def undated(dataset: Dataset, number: int) -> None:
        change(dataset, number)
        dataset.AcquisitionDate = dataset.SeriesDate = ""

    np.testing.assert_allclose(factors(pet(undated, SeriesTime="235800", given=given)), AFTER_ONE_HALF_LIFE, rtol=1e-9)
    # nothing but the order of the slices tells, and the series was made the next morning
    np.testing.assert_allclose(factors(pet(undated, SeriesTime="083000", given=given)), AFTER_ONE_HALF_LIFE, rtol=1e-9)


def test_times_without_dates(pet: Callable[..., Path]) -> None:
    assert factors(pet(SeriesDate="", AcquisitionDate="")) == [AFTER_ONE_HALF_LIFE] * SLICES


def test_a_long_lived_tracer_needs_its_date(pet: Callable[..., Path]) -> None:
    """Zirconium is given days before the scan: 78.4 h are one half-life."""
    given = {"RadionuclideHalfLife": 282240, "RadiopharmaceuticalStartTime": "052548"}
    assert "RadiopharmaceuticalStartDateTime is absent" in refusal(pet(given=given))
    given |= {"RadiopharmaceuticalStartDateTime": "20240227052548"}
    np.testing.assert_allclose(factors(pet(given=given)), AFTER_ONE_HALF_LIFE, rtol=1e-9)


def test_another_time_zone_is_brought_to_that_of_the_series(pet: Callable[..., Path]) -> None:
    given = {"RadiopharmaceuticalStartDateTime": "20240301090000+0000"}
    folder = pet(TimezoneOffsetFromUTC="+0100", given=given)
    np.testing.assert_allclose(factors(folder), AFTER_ONE_HALF_LIFE, rtol=1e-9)


def test_older_forms_of_times_areread_study(pet: Callable[..., Path]) -> None:
    folder = pet(
        SeriesDate="2024.03.01",
        SeriesTime="11:49:48",
        AcquisitionTime="114948.000000",
        given={"RadiopharmaceuticalStartTime": "10"},
    )
    assert factors(folder) == [AFTER_ONE_HALF_LIFE] * SLICES


# ---- channels -------------------------------------------------------------------------------------------------------


def spec_of(channel: dict[str, Any]) -> Spec:
    return Spec.model_validate({"name": "toy", "channels": {"pet": channel}, "labels": {"tumour": 1}})


CHANNELS: dict[str, tuple[dict[str, str], float]] = {
    "PET is uptake": ({"modality": "PT"}, AFTER_ONE_HALF_LIFE),
    "by its other name": ({"modality": "PET"}, AFTER_ONE_HALF_LIFE),
    "also where the spec does not say that it is PET": ({}, AFTER_ONE_HALF_LIFE),
    "on demand": ({"values": "suv"}, AFTER_ONE_HALF_LIFE),
    "as stored, on demand": ({"modality": "PT", "values": "stored"}, 1.0),
}


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("how", ["file by pattern", "series of a batch", "series by rule"])
def test_a_channel_of_pet(name: str, how: str, pet: Callable[..., Path]) -> None:
    keys, factor = CHANNELS[name]
    match = {"match": {}} if how == "series by rule" else {}
    spec = spec_of(keys | match)
    folder = pet()
    plain = read_series(folder).array
    found = {
        "file by pattern": lambda: read_channels(spec, (folder,)),
        "series of a batch": lambda: read_study(StudyInput("x", (folder,), find_series(folder)[0], folder), spec),
        "series by rule": lambda: read_chosen(spec, {"pet": find_series(folder)[0]}),
    }[how]()
    np.testing.assert_allclose(found.array, plain * factor, rtol=1e-6)
    assert ("SUV_BW" in found.notes) == (factor != 1)


def test_other_modalities_are_as_they_were(tmp_path: Path) -> None:
    write_series(Volume(np.arange(48, dtype=np.float32).reshape(1, 4, 4, 3), np.eye(4)), tmp_path, modality="CT")
    found = read_channels(spec_of({"modality": "CT"}), (tmp_path,))
    assert (float(found.array.max()), found.notes) == (47.0, ())
    with pytest.raises(ReadError, match="only PET"):
        read_channels(spec_of({"values": "suv"}), (tmp_path,))


def test_uptake_of_ct_is_no_spec() -> None:
    with pytest.raises(ValueError, match="values: suv is for PET, the modality is 'CT'"):
        Channel(modality="CT", values="suv")


# ---- refused --------------------------------------------------------------------------------------------------------


def differing(keyword: str, value: Any) -> Edit:
    return lambda dataset, number: setattr(dataset, keyword, value) if number == 2 else None


def no_injection(dataset: Dataset, number: int) -> None:
    dataset.RadiopharmaceuticalInformationSequence = []


def two_injections(dataset: Dataset, number: int) -> None:
    dataset.RadiopharmaceuticalInformationSequence = [*injection(), *injection()]


def given(**tags: Any) -> dict[str, Any]:
    return {"given": tags}


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "no weight": ("PatientWeight is absent", {"PatientWeight": None}),
    "weight empty": ("PatientWeight is absent", {"PatientWeight": ""}),
    "weight zero": ("PatientWeight is implausible", {"PatientWeight": 0}),
    "weight in grams": ("PatientWeight is implausible", {"PatientWeight": 70000}),
    "weights differ": ("PatientWeight differs", {"edit": differing("PatientWeight", 71)}),
    "no dose": ("RadionuclideTotalDose is absent", given(RadionuclideTotalDose=None)),
    "dose in MBq": ("RadionuclideTotalDose is implausible", given(RadionuclideTotalDose=350)),
    "dose in kBq": ("RadionuclideTotalDose is implausible", given(RadionuclideTotalDose=350e3)),
    "no half-life": ("RadionuclideHalfLife is absent", given(RadionuclideHalfLife=None)),
    "half-life in minutes": ("half-lives", given(RadionuclideHalfLife=109.8)),
    "half-life in hours": ("RadionuclideHalfLife is implausible", given(RadionuclideHalfLife=1.83)),
    "no start": ("RadiopharmaceuticalStartTime are absent", given(RadiopharmaceuticalStartTime=None)),
    "start is no time": ("RadiopharmaceuticalStartTime are absent", given(RadiopharmaceuticalStartTime="CANARY")),
    "start after the scan": ("half-lives", given(RadiopharmaceuticalStartTime="120000")),
    "start on the wrong day": (
        "half-lives",
        given(RadiopharmaceuticalStartDateTime="20200301100000", RadiopharmaceuticalStartTime="100000"),
    ),
    "two starts": (
        "contradict",
        given(RadiopharmaceuticalStartDateTime="20240301103000", RadiopharmaceuticalStartTime="100000"),
    ),
    "nothing injected": ("RadiopharmaceuticalInformationSequence has 0", {"edit": no_injection}),
    "two tracers": ("RadiopharmaceuticalInformationSequence has 2", {"edit": two_injections}),
    "no units": ("Units is absent", {"Units": ""}),
    "proportional units": ("Units is another", {"Units": "PROPCNTS"}),
    "lean body mass": ("SUVType is not BW", {"Units": "GML", "SUVType": "LBM"}),
    "counts of an unknown maker": ("(7053,1000)", {"Units": "CNTS"}),
    "no attenuation correction": ("ATTN", {"CorrectedImage": ["DECY"]}),
    "nothing said of corrections": ("ATTN", {"CorrectedImage": None}),
    "decay corrected or not": ("DecayCorrection", {"CorrectedImage": ["ATTN"]}),
    "not decay corrected and yet": ("DecayCorrection", {"DecayCorrection": "NONE"}),
    "no decay correction stated": ("DecayCorrection is absent", {"DecayCorrection": None}),
    "decay correction unknown": ("DecayCorrection is absent or unknown", {"DecayCorrection": "CANARY"}),
    "no acquisition time": ("AcquisitionTime is absent", {"AcquisitionTime": ""}),
    "series times differ": ("SeriesTime differs", {"edit": differing("SeriesTime", "114900")}),
    "frame of no duration": (
        "ActualFrameDuration",
        {"DecayCorrection": "NONE", "CorrectedImage": ["ATTN"], "ActualFrameDuration": 0},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_is_named(name: str, pet: Callable[..., Path]) -> None:
    words, changes = REFUSED[name]
    assert words in refusal(pet(**changes))


def test_a_weight_that_is_no_number(pet: Callable[..., Path]) -> None:
    folder = pet()
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"DS\x04\x0070.0", b"DS\x04\x007x.0"))
    assert "PatientWeight is no number" in refusal(folder)


def test_a_ct_has_no_uptake(tmp_path: Path) -> None:
    write_series(Volume(np.ones((1, 4, 4, 3), np.float32), np.eye(4)), tmp_path, modality="CT")
    with pytest.raises(ReadError, match="only PET") as caught:
        read_series(tmp_path, suv=True)
    assert caught.value.code == "SUV_INCOMPLETE"


def test_slices_in_different_units_are_refused(pet: Callable[..., Path]) -> None:
    with pytest.raises(ReadError) as caught:
        read_series(pet(differing("Units", "CNTS")))
    assert caught.value.code == "BAD_RESCALE"


@pytest.mark.data
def test_the_pet_of_the_sarcoma_set_is_uptake(data: Path) -> None:
    """Its Units are GML with SUVType BW, so nothing may be multiplied; its header would give a factor of 3e-4."""
    folder = data / "sarcoma" / "dicom" / "STS_044" / "PET" / "image"
    plain, uptake = read_series(folder), read_series(folder, suv=True)
    np.testing.assert_array_equal(plain.array, uptake.array)
    assert 5 < uptake.array.max() < 100
    assert "SUV_BW" in uptake.notes
