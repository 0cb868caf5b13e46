"""From what a person types to studies: files, series folders, trees of studies and datasets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from medseg.batch.archived import member_name, refused_archives, with_origins
from medseg.batch.dicom_inputs import chosen_input, dicom_inputs
from medseg.batch.names import refuse_same_names, told_apart
from medseg.batch.study_input import INPUT_AWAY, StudyInput
from medseg.errors import BatchError, MedsegError, ReadError
from medseg.exporters import EXPORTERS
from medseg.files import PARTIAL_PREFIX, place_of
from medseg.readers.archives import Archives, unpacked
from medseg.readers.dicom_scan import scan
from medseg.readers.nifti import is_nifti, stem
from medseg.readers.picture import is_picture
from medseg.spec import Case, Spec, load_dataset

Choice = Literal["test", "train", "all"]


@contextmanager
def opened_inputs(
    paths: Sequence[Path], spec: Spec, *, choice: Choice | None, splits: Path | None, out: Path
) -> Iterator[list[StudyInput]]:
    """Give the studies of `find_inputs`, those in archives too, which are unpacked for as long as the block lasts.

    Archives in a dataset's folder are not looked for. They are unpacked below OUT/private, which nobody else reads.

    Raises
    ------
    BatchError : as `find_inputs`; INPUT_AWAY, the system does not say what is there.
    """
    with ExitStack() as stack:
        try:
            others = [path for path in paths if not path.exists() or _is_dataset(path)]
            rest = [path for path in paths if path not in others]
            archives = stack.enter_context(unpacked(rest, scratch=out / "private"))
            everything = [*others, *archives.paths]
            found = find_inputs(everything, spec, choice=choice, splits=splits, out=out, archives=archives)
        except OSError as error:
            raise BatchError(
                f"the inputs cannot be looked through ({error.strerror or type(error).__name__}): look at their drive "
                "and at the rights to read it, then run the same command again; what is done stays done",
                code=INPUT_AWAY,
            ) from error
        yield found


def find_inputs(
    paths: Sequence[Path],
    spec: Spec,
    *,
    choice: Choice | None = None,
    splits: Path | None = None,
    out: Path | None = None,
    archives: Archives | None = None,
) -> list[StudyInput]:
    """Return the studies below `paths`, ordered by id.

    Parameters
    ----------
    spec : of the model: with several channels, ``<case>_<channel>.nii.gz`` files are put together; its rules find
        the series of DICOM studies. Pictures in folders are inputs of a model in pixels only: beside volumes they are
        previews.
    choice, splits : which cases of a dataset (the test cases if it has any, unless told).
    out : where masks are written: nothing below it is an input, however it lies to `paths`; files that it
        knows from an earlier run keep their ids.
    archives : what `paths` were unpacked from: origins and ids then are those of archive and member.

    A file that is given twice is one study. Files of one name are told apart by a hash in their ids.

    Raises
    ------
    BatchError : NOT_FOUND, EMPTY_INPUT, SAME_NAME (cases of two datasets), OVERWRITES_INPUT.
    """
    archives = archives or Archives()
    found: list[StudyInput] = []
    images: list[Path] = []
    places: list[Path] = []
    for path in paths:
        if not path.exists():
            raise BatchError(f"{path}: this input does not exist", code="NOT_FOUND")
        if _is_dataset(path):
            found += _dataset_inputs(path, spec, choice, splits)
        elif path.is_file() and (is_nifti(path) or is_picture(path)):
            images.append(path)
        else:
            images += (
                sorted(p for p in _files_below(path) if _is_input(p, path, out, pictures=spec.unit == "pixel"))
                if path.is_dir()
                else []
            )
            places.append(path)
    found += with_origins(dicom_inputs(places, spec, archives), archives)
    found = list({(study.id, study.images): study for study in found}.values())
    known = {place_of(path) for study in found for path in study.images}
    named = {member_name(path, archives): path for path in images if place_of(path) not in known}
    single = {(place_of(name), stem(name)): name for name in named}
    rows = _nifti_inputs(single.values(), spec)
    found += told_apart(rows, taken={study.id for study in found}, out=out, unpacked=named)
    found += refused_archives(archives, found)
    if not found:
        kinds = ".nii or .nii.gz files, folders with DICOM series"
        kinds += ", PNG, TIFF or JPEG pictures" if spec.unit == "pixel" else ""
        raise BatchError(
            f"{', '.join(str(p) for p in paths)}: no image was found; give {kinds}, or a dataset",
            code="EMPTY_INPUT",
        )
    refuse_same_names(found)
    _refuse_overwriting(found, out)
    return sorted(found, key=lambda study: study.id)


def _is_input(path: Path, root: Path, out: Path | None, *, pictures: bool) -> bool:
    """Tell whether a file below `root` is an image that somebody gave us, not one of ours or half a file."""
    dangling = path.is_symlink() and not path.exists()  # is refused later; who is left out here is forgotten
    if (
        not (is_nifti(path) or (pictures and is_picture(path)))
        or path.name.startswith(".")
        or path.parent.name.startswith(PARTIAL_PREFIX)
        or not (_is_regular(path) or dangling)
    ):
        return False
    # A mask (or corrected image) of this or an earlier run, for example of another model, below the input.
    if (path.parent / "ledger" / f"{stem(path).removesuffix('.image')}.json").exists():
        return False
    if out is None:
        return True
    place, found = place_of(out), place_of(path)
    return not (place_of(root) in place.parents and place in found.parents)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder; folders that may not be listed are told of by the search for series."""
    for place, _, names in os.walk(folder):
        yield from (Path(place) / name for name in names)


def _is_regular(path: Path) -> bool:
    """Tell whether it is a file; one of which the system tells nothing may be one, and is refused later."""
    try:
        return path.is_file()
    except OSError:
        return True


def _is_dataset(path: Path) -> bool:
    if path.is_file():
        return path.suffix in (".yaml", ".yml")
    return (path / "dataset.yaml").exists() or (path / "dataset.json").exists()


def _dataset_inputs(path: Path, spec: Spec, choice: Choice | None, splits: Path | None) -> list[StudyInput]:
    dataset = load_dataset(path, splits=splits)
    wanted = choice or ("test" if dataset.select("test") else "all")
    cases = dataset.cases if wanted == "all" else dataset.select("test" if wanted == "test" else "train")
    if not cases:
        raise BatchError(f"{path}: the dataset has no {wanted} case; choose other --cases", code="EMPTY_INPUT")
    order = _channel_order(dataset.spec, spec, path)
    if dataset.spec.rules:
        return [_chosen_case(dataset.spec, case, order) for case in cases]
    images = {c.id: tuple(c.images[n] for n in order) if len(c.images) > 1 else c.images for c in cases}
    allow = frozenset(dataset.spec.allow)
    return [StudyInput(case.id, images[case.id], None, case.images[0], allow=allow) for case in cases]


def _chosen_case(spec: Spec, case: Case, order: Sequence[int]) -> StudyInput:
    """Return a case whose channels the rules of its own dataset choose."""
    names, allow = list(spec.channels), frozenset(spec.allow)
    try:
        series = scan(case.images).series
        if not series:
            raise ReadError("there is no DICOM series", code="NO_SERIES")
    except MedsegError as error:
        return StudyInput(case.id, case.images, None, case.images[0], refusal=error)
    return replace(chosen_input(case.id, spec, series, [names[n] for n in order]), allow=allow)


def _channel_order(found: Spec, wanted: Spec, path: Path) -> list[int]:
    """Return which channel of a dataset stands where the model expects it; names decide where they are the same."""
    have, need = list(found.channels), list(wanted.channels)
    if set(have) != set(need) or have == need:
        return list(range(len(have)))
    if "{channel}" not in found.images and not found.rules:
        raise BatchError(
            f"{path}: its images hold the channels {', '.join(have)}, the model needs them as {', '.join(need)}; "
            "reorder them where the images are made",
            code="CHANNEL_ORDER",
        )
    return [have.index(name) for name in need]


def _nifti_inputs(images: Iterable[Path], spec: Spec) -> list[StudyInput]:
    """Return one study a file; with several channels, one a group of files.

    A group is ``<case>_<channel>`` in one folder, or ``<case>/<channel>``.
    """
    tokens = [channel.file or name for name, channel in spec.channels.items()]
    if len(tokens) == 1:
        return [StudyInput(stem(path), (path,), None, path) for path in images]
    rows: dict[tuple[Path, str], StudyInput] = {}
    for path in images:
        name = stem(path)
        ending = path.name.removeprefix(name)
        # the longest, because one name may end like another: t1 and post_t1
        token = max((t for t in tokens if name.endswith(f"_{t}")), key=len, default=None)
        if name in tokens:
            case = path.absolute().parent.name
            files = tuple(path.with_name(f"{t}{ending}") for t in tokens)
        elif token is not None:
            case = name.removesuffix(f"_{token}")
            files = tuple(path.with_name(f"{case}_{t}{ending}") for t in tokens)
        else:
            case, files = name, (path,)
        rows.setdefault((path.parent / ending, case), StudyInput(case, files, None, path))
    return list(rows.values())


def _refuse_overwriting(studies: Sequence[StudyInput], out: Path | None) -> None:
    for study in studies if out is not None else ():
        # Of every format: where a study is refused, what stands there of an earlier run is removed.
        targets = {place_of((out or Path()) / f"{study.id}{row.suffix}") for _, row in EXPORTERS.items()}
        if targets & {place_of(path) for path in study.images}:
            raise BatchError(
                f"the mask of {study.origin} would be written over it; choose another --out", code="OVERWRITES_INPUT"
            )
