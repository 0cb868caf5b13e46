"""Several datasets as one: a spec of all their labels, and cases that remember whose they are.

Labels, regions and channels are the same where their names are. The first dataset keeps its values; a value of a later
one that is taken gives way to the next free number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg import config
from medseg.cases import image_files
from medseg.errors import SpecError
from medseg.files import digest, file_digest
from medseg.joined import JoinedCase
from medseg.readers.series_rules import modality_name
from medseg.spec import Case, Channel, Dataset, Spec, Splits, load_dataset, split_cases

DIFFER = "DATASETS_DIFFER"


def load_datasets(paths: Sequence[Path], *, splits: Path | None = None) -> Dataset:
    """Load one dataset, or several as one (see `join`).

    Parameters
    ----------
    splits : file with lists `train` and `test` that replaces those of all specs; of several datasets it names cases as
        they are called after joining.

    Raises
    ------
    SpecError : one of them is no dataset, a split names a case that is not there; DATASETS_DIFFER.
    """
    if len(paths) == 1:
        return load_dataset(paths[0], splits=splits)
    whole = join([load_dataset(path, splits=None if splits is None else Splits()) for path in paths])
    if splits is None:
        return whole
    return split_cases(whole, config.load(Splits, splits, error=SpecError), name=str(splits))


def join(datasets: Sequence[Dataset]) -> Dataset:
    """Return the cases of several datasets under a spec of all their labels.

    Case ids stay as they are where no two are the same, else the name of the dataset is put before them; that of
    patients always is. Cases of different datasets with the same image files, byte for byte, are of one patient.

    Raises
    ------
    SpecError : DATASETS_DIFFER, with everything that does not go together.
    """
    specs = [dataset.spec for dataset in datasets]
    spec = join_specs(specs)
    counts = Counter(case.id for dataset in datasets for case in dataset.cases)
    cases = [_named(case, dataset.spec, counts) for dataset in datasets for case in dataset.cases]
    ids = Counter(case.id for case in cases)
    if repeated := sorted(name for name, count in ids.items() if count > 1):
        raise SpecError(
            f"two cases are called {repeated[0]} with the name of their dataset before it; change `name` in one spec",
            code=DIFFER,
        )
    return Dataset(spec, _one_patient(cases))


def _named(case: Case, own: Spec, counts: Mapping[str, int]) -> JoinedCase:
    return JoinedCase(
        id=case.id if counts[case.id] == 1 else f"{own.name}.{case.id}",
        images=case.images,
        mask=case.mask,
        patient=f"{own.name}.{case.patient}",
        split=case.split,
        own=own,
        own_id=case.id,
        own_patient=case.patient,
    )


def join_specs(specs: Sequence[Spec]) -> Spec:
    """Return the spec of all labels, without files; raise SpecError (DATASETS_DIFFER) where they do not go together."""
    first = specs[0]
    names = [spec.name for spec in specs]
    if problems := [text for check in _CHECKS for text in check(specs)]:
        raise SpecError(
            f"the datasets {', '.join(names)} cannot be learnt together: {'; '.join(problems)}", code=DIFFER
        )
    values = _values(specs)
    labels = {name: {**_label(specs, name), "value": value} for name, value in values.items()}
    regions = {name: row.model_dump() for spec in reversed(specs) for name, row in spec.regions.items()}
    order = list(dict.fromkeys(name for spec in specs for name in spec.regions))
    licences = dict.fromkeys(spec.licence for spec in specs if spec.licence)
    return Spec.model_validate(
        {
            **first.model_dump(),
            "name": "_".join(names),
            "description": f"{', '.join(names)} together",
            "licence": "; ".join(licences),
            "root": ".",
            "images": "",
            "masks": "",
            "studies": "",
            "channels": _channels(specs),
            "labels": labels,
            "regions": {name: regions[name] for name in order},
            "ignore": _ignore(specs, values),
            "patient": None,
            "case_ids": None,
            "splits": {},
            "spacing": next((spec.spacing for spec in specs if spec.spacing), None),
        }
    )


def _label(specs: Sequence[Spec], name: str) -> dict[str, Any]:
    """Return what the first dataset that has a label says of it, and of what it does not say, what the others do."""
    rows = [spec.labels[name].model_dump() for spec in specs if name in spec.labels]
    said: dict[str, Any] = {}
    for row in reversed(rows):
        said |= {key: value for key, value in row.items() if value is not None}
    return said


def _values(specs: Sequence[Spec]) -> dict[str, int]:
    """Return label -> value: its own where it is free (the first dataset's are), else the next free number."""
    values = dict(specs[0].foreground)
    kept = {specs[0].ignore}
    for spec in specs[1:]:
        for name, value in spec.foreground.items():
            if name not in values:
                values[name] = _free(value, {*values.values(), *kept})
    return values


def _ignore(specs: Sequence[Spec], values: Mapping[str, int]) -> int | None:
    wanted = next((spec.ignore for spec in specs if spec.ignore is not None), None)
    return None if wanted is None else _free(wanted, set(values.values()))


def _free(value: int, taken: set[int | None] | set[int]) -> int:
    while value in taken:
        value += 1
    return value


def _channels(specs: Sequence[Spec]) -> dict[str, dict[str, Any]]:
    """Return the channels in the order of the first; rules that find them are those of the first that has any."""
    ruled = next((spec for spec in specs if spec.rules), None)
    found = {}
    for name, row in specs[0].channels.items():
        words = [spec.channels[name].modality for spec in specs]
        modality = next((word for word in words if modality_name(word)), next(filter(None, words), ""))
        schemes = [spec.channels[name].normalisation for spec in specs]
        match = None if ruled is None else (ruled.channels[name].match or {})
        if ruled is not None:
            modality = ruled.channels[name].modality or modality_name(modality)
        found[name] = {
            **row.model_dump(),
            "modality": modality,
            "normalisation": next((scheme for scheme in schemes if scheme != "auto"), "auto"),
            "match": match,
            "file": None,
        }
    return found


def _name_problems(specs: Sequence[Spec]) -> list[str]:
    counts = Counter(spec.name for spec in specs)
    return [f"{count} are called {name}; `name` tells them apart" for name, count in counts.items() if count > 1]


def _unit_problems(specs: Sequence[Spec]) -> list[str]:
    problems = []
    if len({spec.unit for spec in specs}) > 1:
        problems.append("some are in mm and some in pixel")
    if len(spacings := {spec.spacing for spec in specs if spec.spacing}) > 1:
        problems.append(f"`spacing` is {' and '.join(map(str, sorted(spacings)))}")
    return problems


def _channel_problems(specs: Sequence[Spec]) -> list[str]:
    first, problems = specs[0], []
    for spec in specs[1:]:
        if set(spec.channels) != set(first.channels):
            problems.append(
                f"{first.name} has the channels {', '.join(first.channels)}, {spec.name} has "
                f"{', '.join(spec.channels)}; name the same images alike, and leave out what not all have"
            )
            continue
        for name, row in first.channels.items():
            for what, said in _CHANNEL_FACTS.items():
                one, other = said(row), said(spec.channels[name])
                if one != other and one and other:
                    problems.append(f"channel {name}: {what} {one} in {first.name}, {other} in {spec.name}")
    return problems


def _normalisation(row: Channel) -> str:
    if row.normalisation != "auto":
        return row.normalisation
    return {"": "", "CT": "ct"}.get(modality_name(row.modality) or row.modality, "zscore")


_CHANNEL_FACTS: Mapping[str, Callable[[Channel], str]] = {
    "modality": lambda row: modality_name(row.modality),
    "normalisation": _normalisation,
    "values": lambda row: row.values if modality_name(row.modality) in ("PT", "") else "",
}


def _label_problems(specs: Sequence[Spec]) -> list[str]:
    """Find labels of one name with different codes, and names that differ in writing only."""
    problems = []
    written: dict[str, tuple[str, str]] = {}
    codes: dict[str, tuple[str, str]] = {}
    for spec in specs:
        for name in spec.foreground:
            plain = "".join(filter(str.isalnum, name.casefold())) or name
            before, where = written.setdefault(plain, (name, spec.name))
            if before != name:
                problems.append(f"the label {name!r} of {spec.name} is {before!r} in {where}; write it alike")
            code = spec.labels[name].snomed
            told = "" if code is None else f"{code.scheme} {code.value}"
            same, by = codes.setdefault(name, (told, spec.name)) if told else ("", "")
            if told != same:
                problems.append(f"the label {name} is {same} in {by} and {told} in {spec.name}: two names are needed")
    return list(dict.fromkeys(problems))


def _region_problems(specs: Sequence[Spec]) -> list[str]:
    if len({bool(spec.regions) for spec in specs}) > 1:
        without = ", ".join(spec.name for spec in specs if not spec.regions)
        return [f"some learn regions, {without} exclusive labels; give all of them `regions`, or none"]
    problems, found = [], dict[str, Any]()
    for spec in specs:
        for name, row in spec.regions.items():
            if found.setdefault(name, row) != row:
                problems.append(f"the region {name} is not the same everywhere; use two names")
    return list(dict.fromkeys(problems))


_CHECKS = (_name_problems, _unit_problems, _channel_problems, _label_problems, _region_problems)


def _one_patient(cases: Sequence[JoinedCase]) -> tuple[JoinedCase, ...]:
    """Give cases of different datasets whose images are the same files one patient: folds must not part them.

    Only files whose sizes are the same are read.
    """
    sizes: dict[tuple[int, ...], list[JoinedCase]] = {}
    for case in cases:
        sizes.setdefault(tuple(sorted(file.stat().st_size for file in image_files(case))), []).append(case)
    same: dict[str, list[str]] = {}
    for rows in sizes.values():
        if len({case.own.name for case in rows}) > 1:
            for case in rows:
                content = digest(sorted(file_digest(file) for file in image_files(case)))
                same.setdefault(content, []).append(case.patient)
    name = {case.patient: case.patient for case in cases}
    for patients in same.values():
        merged = {name[patient] for patient in patients}
        name = {patient: min(merged) if group in merged else group for patient, group in name.items()}
    return tuple(replace(case, patient=name[case.patient]) for case in cases)
