"""Plant one fault in a clean dataset: exactly that fault must be found, and the right case named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml
from rich.console import Console

from medseg.checking import CODES, CheckResult, check, render
from medseg.checking.page import PICTURED
from medseg.errors import ExportError, SpecError

CASES = [f"case_{n:02d}" for n in range(12)]


@dataclass
class Folder:
    """A small dataset on disk that a test may damage: one T1 channel, labels tumour (1) and oedema (2)."""

    root: Path
    spec: dict[str, object] = field(
        default_factory=lambda: {
            "name": "toy",
            "images": "images/{case}.nii.gz",
            "masks": "masks/{case}.nii.gz",
            "channels": {"T1": {"modality": "MR"}},
            "labels": {"tumour": 1, "oedema": 2},
        }
    )

    def image(self, case: str) -> Path:
        return self.root / "images" / f"{case}.nii.gz"

    def mask(self, case: str) -> Path:
        return self.root / "masks" / f"{case}.nii.gz"

    def change(self, path: Path, edit: Callable[[np.ndarray], np.ndarray], *, scale: tuple[float, ...] = (1, 1, 1)):
        """Rewrite a file with edited voxels and a spacing multiplied by `scale`."""
        old = nibabel.load(path)
        affine = old.affine @ np.diag([*scale, 1.0])
        nibabel.save(nibabel.Nifti1Image(edit(np.asarray(old.dataobj)), affine), path)

    def check(self, **options: object) -> CheckResult:
        file = self.root / "toy.yaml"
        file.write_text(yaml.safe_dump(self.spec))
        return check(file, **options)


def found(result: CheckResult) -> set[tuple[str, str | None]]:
    return {(finding.code, finding.case) for finding in result.findings}


def write_case(folder: Folder, case: str, rng: np.random.Generator, *, shape=(20, 18, 16)) -> None:
    """Write noise with a bright block (tumour) and a dark one (oedema); all cases alike, none the same."""
    image = rng.normal(100, 10, shape).astype(np.float32) * np.float32(rng.uniform(0.9, 1.1))
    mask = np.zeros(shape, np.uint8)
    start = rng.integers(3, 6)
    mask[start : start + 4, 4:9, 4:9] = 1
    mask[start + 5 : start + 8, 4:9, 4:9] = 2
    image[mask == 1] += 40
    image[mask == 2] -= 30
    affine = np.diag([1.0, 1.0, 1.5, 1.0])
    for path, array in ((folder.image(case), image), (folder.mask(case), mask)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine), path)


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Folder:
    made = Folder(tmp_path / "secret-place")
    for case in CASES:
        write_case(made, case, rng)
    return made


def test_a_clean_dataset_has_no_findings(folder: Folder) -> None:
    result = folder.check()
    assert result.findings == ()
    assert result.ok
    assert result.n_cases == len(result.cases) == 12
    facts = result.cases[0]
    assert (facts.size, facts.spacing, facts.unit, facts.dtype) == ((20, 18, 16), (1.0, 1.0, 1.5), "mm", "float32")
    # 4 x 5 x 5 voxels of 1.5 mm³ and 3 x 5 x 5.
    assert facts.volumes == pytest.approx({"tumour": 0.15, "oedema": 0.1125})


# --- faults of one file ------------------------------------------------------------------------------------------


def truncate(folder: Folder) -> None:
    path = folder.image("case_03")
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit(folder: Folder) -> None:
    path = folder.image("case_03")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # in the CRC and length that end a gzip member
    path.write_bytes(content)


def empty_file(folder: Folder) -> None:
    folder.mask("case_03").write_bytes(b"")


def shift_mask(folder: Folder) -> None:
    folder.change(folder.mask("case_03"), lambda a: a, scale=(1, 1, 1.1))


def crop_mask(folder: Folder) -> None:
    folder.change(folder.mask("case_03"), lambda a: a[:, :, :-1])


def foreign_value(folder: Folder) -> None:
    folder.change(folder.mask("case_03"), lambda a: np.where(a == 2, 7, a).astype(np.uint8))


def soft_mask(folder: Folder) -> None:
    folder.change(folder.mask("case_03"), lambda a: a.astype(np.float32) / 2)


def not_a_number(folder: Folder) -> None:
    folder.change(folder.image("case_03"), lambda a: np.where(a > 120, np.nan, a).astype(np.float32))


def no_mask(folder: Folder) -> None:
    folder.mask("case_03").unlink()


def empty_label(folder: Folder) -> None:
    folder.change(folder.mask("case_03"), np.zeros_like)


def forget_a_label(folder: Folder) -> None:
    folder.change(folder.mask("case_03"), lambda a: np.where(a == 2, 0, a).astype(np.uint8))


def touch_the_border(folder: Folder) -> None:
    folder.change(folder.mask("case_03"), lambda a: np.roll(a, -4, axis=1))


def label_far_too_large(folder: Folder) -> None:
    def grow(a: np.ndarray) -> np.ndarray:
        a = np.where(a == 1, 0, a)
        inner = a[1:-1, 1:-1, 1:-1]
        inner[inner == 0] = 1
        return a.astype(np.uint8)

    folder.change(folder.mask("case_03"), grow)


def constant_image(folder: Folder) -> None:
    folder.change(folder.image("case_03"), lambda a: np.full_like(a, 7))


def brighter(folder: Folder) -> None:
    folder.change(folder.image("case_03"), lambda a: a * 50)


def inverted(folder: Folder) -> None:
    folder.change(folder.image("case_03"), lambda a: a + 1000)


def coarser(folder: Folder) -> None:
    for path in (folder.image("case_03"), folder.mask("case_03")):
        folder.change(path, lambda a: a[:, :, ::2], scale=(1, 1, 2))


def larger(folder: Folder) -> None:
    folder.change(folder.image("case_03"), lambda a: np.concatenate([a, a[::-1]]))
    folder.change(folder.mask("case_03"), lambda a: np.concatenate([a, np.zeros_like(a)]))


def sheared(folder: Folder) -> None:
    for path in (folder.image("case_03"), folder.mask("case_03")):
        old = nibabel.load(path)
        affine = old.affine.copy()
        affine[1, 2] = 0.4
        header = nibabel.Nifti1Header()
        made = nibabel.Nifti1Image(np.asarray(old.dataobj), None, header)
        made.set_sform(affine, code=1)
        made.set_qform(None, code=0)
        nibabel.save(made, path)


FAULTS = {
    "TRUNCATED": truncate,
    "CORRUPT": flip_a_bit,
    "LABEL_GRID": shift_mask,
    "LABEL_VALUES": foreign_value,
    "LABEL_NOT_INTEGER": soft_mask,
    "NON_FINITE": not_a_number,
    "UNLABELLED": no_mask,
    "EMPTY_LABEL": empty_label,
    "LABEL_ABSENT": forget_a_label,
    "MASK_TOUCHES_BORDER": touch_the_border,
    "OUTLIER_LABEL_VOLUME": label_far_too_large,
    "CONSTANT_IMAGE": constant_image,
    "OUTLIER_INTENSITY": brighter,
    "OUTLIER_SPACING": coarser,
    "OUTLIER_SIZE": larger,
    "NOT_ORTHOGONAL": sheared,
}


@pytest.mark.parametrize("code", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(folder: Folder, code: str) -> None:
    FAULTS[code](folder)
    result = folder.check()
    assert found(result) == {(code, "case_03")}
    severity = result.findings[0].severity
    assert severity == (CODES[code].severity if code in CODES else "error")
    assert result.ok == (severity != "error")
    assert "case_03" in console(result)


@pytest.mark.parametrize(
    ("fault", "code"),
    [(empty_file, "TRUNCATED"), (crop_mask, "LABEL_GRID"), (inverted, "OUTLIER_INTENSITY")],
)
def test_other_forms_of_the_same_faults(folder: Folder, fault: Callable[[Folder], None], code: str) -> None:
    fault(folder)
    assert found(folder.check()) == {(code, "case_03")}


def test_a_missing_channel_names_the_channel(folder: Folder) -> None:
    folder.spec |= {"images": "{channel}/{case}.nii.gz", "channels": {"T1": {"file": "images"}, "T2": {}}}
    (folder.root / "T2").mkdir()
    for case in CASES:
        (folder.root / "T2" / f"{case}.nii.gz").write_bytes(folder.image(case).read_bytes())
    assert folder.check().findings == ()
    (folder.root / "T2" / "case_03.nii.gz").unlink()
    result = folder.check()
    assert found(result) == {("CHANNEL_MISSING", "case_03")}
    assert "'T2'" in result.findings[0].message


# --- faults of two cases -----------------------------------------------------------------------------------------


def copy_image(folder: Folder, source: str, target: str, *, mask: bool) -> None:
    folder.image(target).write_bytes(folder.image(source).read_bytes())
    if mask:
        folder.mask(target).write_bytes(folder.mask(source).read_bytes())


def same_patient(folder: Folder) -> None:
    """Let cases 00 and 01 be patient 0, 02 and 03 patient 1, ..."""
    names = {f"case_{n:02d}": f"pat{n // 2}_{n % 2}" for n in range(12)}
    for old, new in names.items():
        folder.image(old).rename(folder.image(new))
        folder.mask(old).rename(folder.mask(new))
    folder.spec["patient"] = "pat[0-9]+"


def test_a_duplicate_names_both_cases_and_says_that_the_masks_differ(folder: Folder) -> None:
    copy_image(folder, "case_01", "case_05", mask=False)
    folder.change(folder.mask("case_05"), lambda a: np.roll(a, 1, axis=2))
    [finding] = folder.check().findings
    assert (finding.code, finding.severity, finding.case, finding.value) == (
        "DUPLICATE_IMAGE",
        "error",
        "case_05",
        "case_01",
    )
    assert "case_01" in finding.message
    assert "masks differ" in finding.message
    assert "different patients" in finding.message


def test_a_duplicate_is_found_in_another_format_axis_order_and_data_type(folder: Folder) -> None:
    folder.change(folder.image("case_01"), lambda a: np.rint(a).astype(np.int16))
    old = nibabel.load(folder.image("case_01"))
    turned = nibabel.Nifti1Image(np.asarray(old.dataobj).astype(np.float32), old.affine).as_reoriented(
        np.array([[2, -1], [0, 1], [1, -1]])
    )
    copy_image(folder, "case_01", "case_05", mask=True)
    nibabel.save(turned, folder.image("case_05"))
    codes = {f.code: f for f in folder.check().findings}
    assert codes.keys() == {"DUPLICATE_IMAGE", "MIXED_DTYPE"}
    assert "masks differ" not in codes["DUPLICATE_IMAGE"].message


def test_a_duplicate_within_one_patient_and_split_with_the_same_mask_is_a_warning(folder: Folder) -> None:
    copy_image(folder, "case_02", "case_03", mask=True)
    same_patient(folder)
    result = folder.check()
    assert [(f.code, f.severity, f.case) for f in result.findings] == [("DUPLICATE_IMAGE", "warning", "pat1_1")]
    assert result.ok


def test_a_duplicate_across_splits_is_an_error_that_says_so(folder: Folder) -> None:
    copy_image(folder, "case_01", "case_05", mask=True)
    folder.spec["splits"] = {"test": ["case_05"]}
    [finding] = folder.check().findings
    assert (finding.code, finding.severity) == ("DUPLICATE_IMAGE", "error")
    assert "one is in train, the other in test" in finding.message


def test_one_image_three_times_is_reported_against_the_first(folder: Folder) -> None:
    for target in ("case_04", "case_09"):
        copy_image(folder, "case_01", target, mask=True)
    assert [(f.case, f.value) for f in folder.check().findings] == [("case_04", "case_01"), ("case_09", "case_01")]


def test_one_patient_in_two_splits_is_an_error(folder: Folder) -> None:
    same_patient(folder)
    folder.spec["splits"] = {"test": ["pat4_1", "pat5_0", "pat5_1"]}
    result = folder.check()
    assert [(f.code, f.severity, f.case, f.value) for f in result.findings] == [
        ("PATIENT_IN_TWO_SPLITS", "error", "pat4_1", "pat4")
    ]
    assert "train (pat4_0) and in test (pat4_1)" in result.findings[0].message
    assert not result.ok


def test_splits_from_a_file_replace_those_of_the_spec(folder: Folder, tmp_path: Path) -> None:
    same_patient(folder)
    folder.spec["splits"] = {"test": ["pat4_1"]}
    good = tmp_path / "splits.yaml"
    good.write_text("test: [pat4_0, pat4_1]\n")
    assert folder.check(splits=good).findings == ()


# --- faults of the whole dataset ---------------------------------------------------------------------------------


def test_a_label_that_no_training_case_has(folder: Folder) -> None:
    folder.spec["labels"] = {"tumour": 1, "oedema": 2, "necrosis": 3}
    folder.spec["splits"] = {"test": ["case_11"]}
    folder.change(folder.mask("case_11"), lambda a: np.where(a == 2, 3, a).astype(np.uint8))
    result = folder.check()
    assert ("LABEL_NEVER_SEEN", None) in found(result)
    assert not result.ok
    assert "necrosis" in result.findings[0].message


def test_a_label_in_few_cases_is_rare(folder: Folder) -> None:
    for case in CASES[3:]:
        folder.change(folder.mask(case), lambda a: np.where(a == 2, 0, a).astype(np.uint8))
    [finding] = folder.check().findings
    assert (finding.code, finding.case, finding.value) == ("LABEL_RARE", None, "oedema")
    assert "3 of 12" in finding.message


def test_several_kinds_of_intensity_are_a_mixture_and_no_outliers(folder: Folder) -> None:
    for case in CASES[:4]:
        folder.change(folder.image(case), lambda a: a * 1000)
    [finding] = folder.check().findings
    assert (finding.code, finding.case) == ("MIXED_INTENSITY_RANGE", None)
    assert "4 of 12 cases" in finding.message


def test_several_spacings_are_a_mixture(folder: Folder) -> None:
    for case in CASES[:4]:
        for path in (folder.image(case), folder.mask(case)):
            folder.change(path, lambda a: a[:, :, ::2], scale=(1, 1, 2))
    assert found(folder.check()) == {("SEVERAL_SPACINGS", None)}


def test_mixed_data_types_are_noted_with_their_ranges(folder: Folder) -> None:
    for case in CASES[:4]:
        folder.change(folder.image(case), lambda a: np.rint(a).astype(np.uint8))
    [finding] = folder.check().findings
    assert (finding.code, finding.severity) == ("MIXED_DTYPE", "note")
    assert finding.message.startswith("8 images hold float32")
    assert "4 images hold uint8" in finding.message


def test_thick_slices_are_noted(folder: Folder) -> None:
    for case in CASES:
        for path in (folder.image(case), folder.mask(case)):
            folder.change(path, lambda a: a, scale=(1, 1, 4))
    [finding] = folder.check().findings
    assert (finding.code, finding.value) == ("ANISOTROPIC", 6.0)


def test_a_ct_without_negative_values_is_no_hounsfield(folder: Folder) -> None:
    folder.spec["channels"] = {"CT": {"modality": "CT"}}
    for case in CASES:
        folder.change(folder.image(case), lambda a: (a * 10 - 1000).astype(np.float32))
    assert folder.check().findings == ()
    folder.change(folder.image("case_03"), lambda a: a + 1024)
    # The same fault twice: it has no negative value, and it is unlike the others.
    assert found(folder.check()) == {("NOT_HOUNSFIELD", "case_03"), ("OUTLIER_INTENSITY", "case_03")}


def test_few_patients_and_few_cases_are_judged_without_statistics(tmp_path: Path, rng: np.random.Generator) -> None:
    small = Folder(tmp_path / "small")
    for case in CASES[:3]:
        write_case(small, case, rng)
    brighter_one = small.image("case_01")
    small.change(brighter_one, lambda a: a * 100)
    assert found(small.check()) == {("FEW_PATIENTS", None)}


def test_an_id_that_stands_for_two_cases(folder: Folder) -> None:
    rows = [{"image": f"images/{case}.nii.gz", "label": f"masks/{case}.nii.gz"} for case in [*CASES, "case_03"]]
    content = {"name": "toy", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "tumour", "2": "oedema"}}
    (folder.root / "dataset.json").write_text(json.dumps(content | {"training": rows}))
    assert ("CASE_ID_TWICE", "case_03") in found(check(folder.root))


def test_a_dataset_of_unreadable_cases_still_answers(folder: Folder, tmp_path: Path) -> None:
    for case in CASES:
        folder.image(case).write_bytes(b"nothing")
    result = folder.check(out=tmp_path / "out")
    assert {f.code for f in result.findings} == {"TRUNCATED", "LABEL_NEVER_SEEN"}
    assert not result.ok
    assert result.cases == ()


def test_a_path_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="does not exist"):
        check(tmp_path / "nothing")


# --- what is written and shown -----------------------------------------------------------------------------------


def console(result: CheckResult) -> str:
    terminal = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    terminal.print(render(result))
    return terminal.export_text()


def test_the_terminal_table_has_one_row_per_code_and_keeps_brackets(folder: Folder) -> None:
    folder.spec["labels"] = {"[bold]tumour": 1, "oedema": 2}
    for case in CASES[:7]:
        folder.image(case).write_bytes(b"nothing")
    touch_the_border(folder)
    folder.change(folder.mask("case_09"), lambda a: np.where(a == 1, 0, a).astype(np.uint8))
    text = console(folder.check())
    assert text.count("TRUNCATED") == 1
    assert "and 4 more" in text
    assert "NOT fit to learn from" in text


def test_one_row_for_different_messages_says_whose_it_shows(folder: Folder) -> None:
    folder.image(CASES[1]).write_bytes(folder.image(CASES[1]).read_bytes()[:-20])
    folder.image(CASES[2]).write_bytes(b"")
    text = " ".join(console(folder.check()).split())
    assert f"{CASES[1]}: " in text
    assert "(the others: --json or the" in text


def test_nothing_tells_where_the_data_lie(folder: Folder, tmp_path: Path) -> None:
    for name in ("TRUNCATED", "LABEL_GRID", "CORRUPT"):
        FAULTS[name](folder)
        out = tmp_path / f"out-{name}"
        result = folder.check(out=out)
        written = [(out / "check.html").read_text(), (out / "check.json").read_text(), result.to_json()]
        for text in written:
            assert str(tmp_path) not in text
            assert "secret-place" not in text


def test_hashed_cases_do_not_show_the_names_of_their_files(folder: Folder, tmp_path: Path) -> None:
    folder.spec |= {"case_ids": "hash", "images": "{case}/T1.nii.gz", "masks": "{case}/seg.nii.gz"}
    names = [f"SMITH^JOHN^{n}" for n in range(6)]
    for case, name in zip(CASES, names, strict=False):
        (folder.root / name).mkdir()
        folder.image(case).rename(folder.root / name / "T1.nii.gz")
        folder.mask(case).rename(folder.root / name / "seg.nii.gz")
    (folder.root / names[2] / "T1.nii.gz").write_bytes(b"")
    folder.change(folder.root / names[3] / "seg.nii.gz", lambda a: a[:-1])
    result = folder.check(out=tmp_path / "out")
    assert {f.code for f in result.findings} == {"TRUNCATED", "LABEL_GRID"}
    for text in ((tmp_path / "out" / "check.html").read_text(), result.to_json(), console(result)):
        assert "SMITH" not in text
        assert "JOHN" not in text


def test_names_in_a_readers_message_are_taken_out(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader names files by their own names; where these are patients' names the report must not repeat them."""
    from medseg.checking.facts import without_names
    from medseg.spec import Case, Spec

    spec = Spec.model_validate({**folder.spec, "images": "{case}/mr/image", "masks": "{case}/mr/mask"})
    case = Case("case-1", (Path("/data/SMITH/mr/image"),), Path("/data/SMITH/mr/mask"), "pat-1")
    text = "case case-1: /data/SMITH/mr/image: the image of SMITH has a gap"
    assert without_names(text, spec, case) == "image: the image of … has a gap"


def test_the_page_is_offline_complete_and_limited(tmp_path: Path, rng: np.random.Generator) -> None:
    many = Folder(tmp_path / "many")
    names = [f"case_{n:03d}" for n in range(PICTURED + 5)]
    for name in names:
        write_case(many, name, rng)
    many.change(many.mask(names[-1]), np.zeros_like)
    many.image(names[0]).write_bytes(b"")
    result = many.check(out=tmp_path / "out")
    html = (tmp_path / "out" / "check.html").read_text()
    assert result.page == tmp_path / "out" / "check.html"
    assert html.count("<figure") == PICTURED
    # The flagged case comes first although it is the last.
    assert html.index(f"slice of {names[-1]}") < html.index(f"slice of {names[1]}")
    for text in ("EMPTY_LABEL", "TRUNCATED", "65", "tumour", CODES["EMPTY_LABEL"].advice):
        assert text in html
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")
    assert 'src="data:image/png;base64,' in html
    content = json.loads((tmp_path / "out" / "check.json").read_text())
    assert content == json.loads(result.to_json())
    assert content["n_cases"] == 65
    assert content["n_readable"] == 64
    assert content["counts"] == {"error": 1, "warning": 1, "note": 0}


def test_names_are_escaped_on_the_page(folder: Folder, tmp_path: Path) -> None:
    folder.spec |= {"description": "<script>alert(1)</script>", "labels": {"<b>x": 1, "oedema": 2}}
    folder.check(out=tmp_path / "out")
    html = (tmp_path / "out" / "check.html").read_text()
    assert "<script>" not in html
    assert "<b>x" not in html


def test_two_runs_write_the_same_bytes(folder: Folder, tmp_path: Path) -> None:
    brighter(folder)
    for out in ("a", "b"):
        folder.check(out=tmp_path / out)
    for name in ("check.html", "check.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_progress_is_told_after_every_case(folder: Folder) -> None:
    empty_file(folder)
    seen: list[tuple[int, int]] = []
    folder.check(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 12) for n in range(1, 13)]


def test_an_out_that_cannot_be_written_is_an_export_error(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError):
        folder.check(out=tmp_path / "file" / "out")


def test_checking_imports_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, medseg.checking, medseg.checking.page; "
        "bad = {'torch', 'mlflow', 'monai'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_code_is_documented(repository: Path) -> None:
    text = (repository / "docs" / "reference" / "reason-codes.md").read_text()
    assert [code for code in CODES if f"`{code}`" not in text] == []


# --- real data ---------------------------------------------------------------------------------------------------


def test_the_hippocampus_set_passes_and_its_mixture_is_said(data: Path, tmp_path: Path) -> None:
    result = check(data / "hippocampus", out=tmp_path)
    assert result.ok
    codes = {finding.code: finding for finding in result.findings}
    assert codes.keys() == {"MIXED_DTYPE", "MIXED_INTENSITY_RANGE"}
    assert "155 images hold float32" in codes["MIXED_DTYPE"].message
    assert "45 images hold uint8" in codes["MIXED_DTYPE"].message
    assert codes["MIXED_INTENSITY_RANGE"].value > 1000
    assert len(result.cases) == 200
    page = (tmp_path / "check.html").read_text()
    assert str(data) not in page
    assert len(page) < 2_000_000
