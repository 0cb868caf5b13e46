"""A study with several sequences becomes one image: the right series, one grid, or a refusal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest

from medseg.channels import choose_channels, combine, read_chosen, with_rules
from medseg.errors import MedsegError, SpecError
from medseg.readers.dicom_scan import scan
from medseg.readers.dicom_series import read_series
from medseg.spec import Spec
from medseg.volume import Volume


@pytest.fixture
def spec(two_sequences: SimpleNamespace) -> Spec:
    return Spec.model_validate({"name": "two", "channels": two_sequences.channels, "labels": {"ball": 1}})


@pytest.fixture
def study(tmp_path: Path, two_sequences: SimpleNamespace) -> Path:
    return Path(two_sequences.write(tmp_path / "study"))


def edit(folder: Path, **tags: Any) -> None:
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        for word, value in tags.items():
            setattr(dataset, word, value)
        dataset.save_as(file)


def refused(spec: Spec, *paths: Path) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        read_chosen(spec, choose_channels(spec, paths))
    assert "DOE" not in str(caught.value)
    assert "POST" not in str(caught.value), "no text of a header in a message"
    return caught.value


def test_the_rules_find_the_series_in_any_arrangement(study: Path, spec: Spec, tmp_path: Path) -> None:
    expected = read_chosen(spec, choose_channels(spec, (study,)))
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted(study.rglob("*.dcm"), key=lambda path: path.name)):
        shutil.copy(file, flat / f"{number:03d}")
    found = read_chosen(spec, choose_channels(spec, tuple(sorted(flat.iterdir()))))
    np.testing.assert_array_equal(found.array, expected.array)


def test_the_other_channel_lies_on_the_grid_of_the_reference(study: Path, spec: Spec) -> None:
    image = read_chosen(spec, choose_channels(spec, (study,)))
    t1 = read_series(study / "S1")
    assert np.array_equal(image.affine, t1.affine)
    np.testing.assert_array_equal(image.array[0], t1.array[0])
    assert image.notes == ("CHANNEL_RESAMPLED",)


def test_the_landmark_of_one_sequence_is_found_at_the_same_place(
    study: Path, spec: Spec, tiny: SimpleNamespace
) -> None:
    image = read_chosen(spec, choose_channels(spec, (study,)))
    _, mask = tiny.case(0)
    weight = (image.array[1] - 340).clip(0)
    found = (np.stack(np.meshgrid(*(np.arange(n) for n in weight.shape), indexing="ij")) * weight).sum((1, 2, 3))
    np.testing.assert_allclose(found / weight.sum(), np.argwhere(mask == 2).mean(0), atol=0.25)


def test_another_channel_may_be_the_reference(study: Path, spec: Spec) -> None:
    other = spec.model_copy(update={"reference": "flair"})
    image = read_chosen(other, choose_channels(other, (study,)))
    flair = read_series(study / "S2")
    assert np.array_equal(image.affine, flair.affine)
    np.testing.assert_array_equal(image.array[1], flair.array[0])
    assert image.array.shape[0] == 2
    assert "CHANNEL_PADDED" in image.notes, "the field of the T1 is smaller"


def test_a_sequence_that_is_not_there(tmp_path: Path, two_sequences: SimpleNamespace, spec: Spec) -> None:
    error = refused(spec, two_sequences.write(tmp_path / "t1", flair=False))
    assert error.code == "CHANNEL_MISSING"
    assert str(error).startswith("none of the 3 series fits the rule of channel 'flair' (MR by EchoTime)")


def test_two_series_that_fit(study: Path, spec: Spec) -> None:
    shutil.copytree(study / "S2", study / "again")
    edit(study / "again", SeriesInstanceUID="1.2.3")
    error = refused(spec, study)
    assert error.code == "CHANNEL_AMBIGUOUS"
    assert "2 series fit the rule of channel 'flair' (MR by EchoTime): 25×29×17 at 1.8×1.6×2.5 mm; 25×29×17" in str(
        error
    )


def test_a_damaged_series_competes(study: Path, spec: Spec) -> None:
    shutil.copytree(study / "S2", study / "again")
    edit(study / "again", SeriesInstanceUID="1.2.3")
    sorted((study / "again").iterdir())[7].unlink()
    error = refused(spec, study)
    assert error.code == "CHANNEL_AMBIGUOUS"
    assert "refused (MISSING_SLICES)" in str(error)
    shutil.rmtree(study / "S2")
    error = refused(spec, study)
    assert error.code == "MISSING_SLICES"
    assert str(error).startswith("channel 'flair': ")


def test_what_is_no_volume_does_not_compete(study: Path, spec: Spec, two_sequences: SimpleNamespace) -> None:
    loose = two_sequences.channels | {"t1": {"modality": "MR", "match": {"SeriesDescription": "^AX T1 POST$|SCOUT"}}}
    chosen = choose_channels(spec.model_validate({**spec.model_dump(), "channels": loose}), (study,))
    assert chosen["t1"].files[0].parent.name == "S1"
    only = two_sequences.channels | {"t1": {"modality": "MR", "match": {"SeriesDescription": "SCOUT"}}}
    error = refused(spec.model_validate({**spec.model_dump(), "channels": only}), study)
    assert error.code == "CHANNEL_MISSING"
    assert "1 fit and are no volumes (20×22×3 at 1.5×1.5×12 mm, refused (LOCALIZER))" in str(error)


def test_single_slices_do_not_compete(study: Path, spec: Spec) -> None:
    """A key image is often derived from the very series that it resembles in every attribute."""
    for file in sorted((study / "S4").iterdir())[1:]:
        file.unlink()
    edit(study / "S4", ImageType=["ORIGINAL", "PRIMARY"])
    assert choose_channels(spec, (study,))["t1"].files[0].parent.name == "S1"
    shutil.rmtree(study / "S1")
    assert refused(spec, study).code == "CHANNEL_MISSING"


def test_one_series_is_never_two_channels(study: Path, spec: Spec) -> None:
    channels = {"a": {"match": {"EchoTime": 110}}, "b": {"match": {"EchoTime": [80, 200]}}}
    error = refused(spec.model_validate({**spec.model_dump(), "channels": channels}), study)
    assert error.code == "CHANNEL_AMBIGUOUS"
    assert "fits the rules of the channels 'a' and 'b'" in str(error)


@pytest.mark.parametrize("frame", ["1.2.3.4", ""])
def test_frames_of_reference_must_agree_unless_the_spec_says_otherwise(study: Path, spec: Spec, frame: str) -> None:
    edit(study / "S2", FrameOfReferenceUID=frame)
    assert refused(spec, study).code == "FRAME_OF_REFERENCE_DIFFERS"
    if not frame:
        edit(study / "S1", FrameOfReferenceUID=frame)
        assert refused(spec, study).code == "FRAME_OF_REFERENCE_DIFFERS", "two unknown ones are not the same one"
    known = spec.model_copy(update={"frame_of_reference": "any"})
    notes = read_chosen(known, choose_channels(known, (study,))).notes
    assert {"CHANNEL_RESAMPLED", "FRAME_OF_REFERENCE_DIFFERS"} <= set(notes)


def test_another_part_of_the_body_is_refused_and_a_smaller_field_is_noted(study: Path, spec: Spec) -> None:
    chosen = choose_channels(spec, (study,))
    volumes = {name: read_series(series) for name, series in chosen.items()}

    def moved(millimetres: float) -> dict[str, Volume]:
        affine = volumes["flair"].affine.copy()
        affine[0, 3] += millimetres
        return volumes | {"flair": Volume(volumes["flair"].array, affine)}

    assert combine(spec, moved(8)).notes == ("CHANNEL_PADDED", "CHANNEL_RESAMPLED")
    with pytest.raises(MedsegError, match="share 0% of the space") as caught:
        combine(spec, moved(200))
    assert caught.value.code == "CHANNEL_COVERAGE"


def test_without_resampling_other_grids_are_refused(study: Path, spec: Spec) -> None:
    strict = spec.model_copy(update={"resample": False})
    error = refused(strict, study)
    assert error.code == "CHANNEL_GRID"
    assert "resample: true" in str(error)


def test_nifti_files_are_resampled_where_the_spec_asks(
    tmp_path: Path, tiny: SimpleNamespace, make_spec: Callable[..., Spec]
) -> None:
    from medseg.studies import read_channels

    array, _ = tiny.case(1)
    tiny.save(tmp_path / "a.nii.gz", array)
    tiny.save(tmp_path / "b.nii.gz", array[::2, ::2], tiny.affine @ np.diag([2, 2, 1, 1]))
    paths = (tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    with pytest.raises(MedsegError) as caught:
        read_channels(make_spec(channels=("a", "b")), paths)
    assert caught.value.code == "CHANNEL_GRID"
    image = read_channels(make_spec(channels=("a", "b"), resample=True), paths)
    np.testing.assert_array_equal(image.array[0], array)
    assert "CHANNEL_RESAMPLED" in image.notes
    small = make_spec(channels=("a", "b"), resample=True, reference="b")
    assert read_channels(small, paths).shape == (10, 11, 18)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"reference": "flare"}, "reference: 'flare' is not a channel, did you mean 'flair'"),
        ({"channels": {"t1": {"match": {}}, "t2": {}}}, "channels.t2: has no `match`, another channel has one"),
        ({"channels": {"t1": {"modality": "MX", "match": {}}}}, "channels.t1.modality: with `match` it is one of CT"),
        ({"images": "{case}/{channel}"}, "without {channel}"),
        ({"channels": {"t1": {"match": {"SeriesDescripton": "x"}}}}, "did you mean 'SeriesDescription'"),
    ],
)
def test_rules_that_are_wrong(
    tmp_path: Path, two_sequences: SimpleNamespace, changes: dict[str, Any], problem: str
) -> None:
    import yaml

    from medseg import config

    values = {"name": "x", "channels": two_sequences.channels, "labels": {"a": 1}, **changes}
    with pytest.raises(SpecError) as caught:
        config.parse(Spec, yaml.safe_dump(values), name="x.yaml", error=SpecError)
    assert problem in str(caught.value)


def test_the_headers_texts_are_never_shown(study: Path) -> None:
    assert "POST" not in repr(scan(study))


def test_rules_of_another_site(tmp_path: Path, study: Path, spec: Spec, make_spec: Callable[..., Spec]) -> None:
    edit(study / "S1", SeriesDescription="t1_tse_km")
    assert refused(spec, study).code == "CHANNEL_MISSING"
    file = tmp_path / "rules.yaml"
    file.write_text("channels:\n  flair: {match: {EchoTime: [80, null]}}\n  t1: {match: {SeriesDescription: tse_km}}\n")
    ruled = with_rules(spec, file)
    assert list(ruled.channels) == ["t1", "flair"], "in the order of the model"
    assert ruled.channels["t1"].modality == "MR"
    assert read_chosen(ruled, choose_channels(ruled, (study,))).array.shape[0] == 2
    from_files = with_rules(make_spec(channels=("t1", "flair"), images="{case}_{channel}.nii.gz"), file)
    assert read_chosen(from_files, choose_channels(from_files, (study,))).array.shape[0] == 2
    assert from_files.resamples


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("channels: {t1: {match: {}}}", "it names the channels t1, the model needs t1, flair"),
        ("channels: {t1: {match: {X: y}}, flair: {match: {}}}", "'X' is not one of"),
        ("channels: {t1: {modality: MX}, flair: {match: {}}}", "with `match` it is one of"),
        ("channel: {}", "unknown key, did you mean 'channels'"),
    ],
)
def test_wrong_rules_of_another_site(tmp_path: Path, spec: Spec, text: str, problem: str) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        with_rules(spec, tmp_path / "rules.yaml")
    assert problem in str(caught.value)
    assert "rules.yaml" in str(caught.value)
