"""From the facts of all cases to findings; each rule is one function of the table RULES."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from medseg.checking.facts import CaseFacts
from medseg.checking.findings import SEVERITIES, Finding, finding, short
from medseg.checking.outliers import MINIMUM, RARE, geometry_outliers, intensity_outliers, volume_outliers
from medseg.spec import Case, Spec

FEW = 5
"""Fewer patients than this cannot be dealt to five folds; a label in fewer cases than this is rare."""
THICK = 3.0
"""Slices this many times as far apart as the voxels within them are thick (as in nnU-Net's anisotropy rule)."""
SHOWN = 5


def case_list_findings(cases: Sequence[Case]) -> list[Finding]:
    """Judge the list of cases itself, before any file is opened."""
    found = [
        finding("CASE_ID_TWICE", f"{n} cases have this id", case=name, value=n)
        for name, n in Counter(case.id for case in cases).items()
        if n > 1
    ]
    training = {case.patient for case in cases if case.split == "train"}
    if len(training) < FEW:
        found.append(finding("FEW_PATIENTS", f"{len(training)} patient(s) to learn from", value=len(training)))
    for patient in sorted(training & {case.patient for case in cases if case.split == "test"}):
        rows = [case for case in cases if case.patient == patient]
        sides = {side: [case.id for case in rows if case.split == side] for side in ("train", "test")}
        text = f"patient {patient} is in train ({_some(sides['train'])}) and in test ({_some(sides['test'])})"
        found.append(finding("PATIENT_IN_TWO_SPLITS", text, case=sides["test"][0], value=patient))
    for case in cases:
        if case.mask is None and case.split == "train":
            found.append(finding("UNLABELLED", "it has no mask and teaches nothing", case=case.id))
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def duplicates(cases: Sequence[CaseFacts], spec: Spec) -> list[Finding]:
    """Find images with the same voxels (constant images have said nothing of their own and are left out)."""
    groups: dict[str, list[CaseFacts]] = defaultdict(list)
    for case in cases:
        if any(channel.span > 0 for channel in case.intensities):
            groups[case.image_hash].append(case)
    return [_duplicate(rows[0], other) for rows in groups.values() for other in rows[1:]]


def _duplicate(first: CaseFacts, second: CaseFacts) -> Finding:
    reasons = []
    if first.split != second.split:
        reasons.append(f"one is in {first.split}, the other in {second.split}")
    if first.patient != second.patient:
        reasons.append("they count as different patients, so cross-validation may separate them")
    if first.mask_hash != second.mask_hash and None not in (first.mask_hash, second.mask_hash):
        reasons.append("their masks differ, so one image teaches two answers")
    text = f"its image is, voxel for voxel, that of case {first.id}" + (f": {'; '.join(reasons)}" if reasons else "")
    severity = SEVERITIES[0] if reasons else SEVERITIES[1]
    return Finding("DUPLICATE_IMAGE", severity, second.id, text, first.id)


def images(cases: Sequence[CaseFacts], spec: Spec) -> list[Finding]:
    """Judge each image by itself."""
    found = []
    for case in cases:
        for (name, channel), values in zip(spec.channels.items(), case.intensities, strict=True):
            if values.largest == values.smallest:
                text = f"every voxel of channel {name} is {values.smallest:g}"
                found.append(finding("CONSTANT_IMAGE", text, case=case.id, value=values.smallest))
            elif channel.modality.upper() == "CT" and values.smallest >= 0:
                text = f"a CT without a value below {values.smallest:g}: air would be −1000, fat −100"
                found.append(finding("NOT_HOUNSFIELD", text, case=case.id, value=values.smallest))
        if not case.orthogonal:
            found.append(finding("NOT_ORTHOGONAL", "the axes of its grid are not at right angles", case=case.id))
        found += [
            Finding(note, "note", case.id, "noted by the reader, explained in docs/reference/reason-codes.md")
            for note in case.notes
        ]
    return found


def mixtures(cases: Sequence[CaseFacts], spec: Spec) -> list[Finding]:
    """Say what the cases as a whole look like where that matters for learning."""
    found = []
    types: dict[str, list[CaseFacts]] = defaultdict(list)
    for case in cases:
        types[case.dtype].append(case)
    if len(types) > 1:
        rows = sorted(types.items(), key=lambda item: -len(item[1]))
        text = "; ".join(f"{len(group)} images hold {dtype} ({_range(group)})" for dtype, group in rows)
        found.append(finding("MIXED_DTYPE", text, value=len(types)))
    if cases:
        spacing = np.median([case.spacing for case in cases if case.size], axis=0)
        flat = all(1 in case.size for case in cases)
        ratio = float(max(spacing) / min(spacing))
        if ratio >= THICK and not flat:
            shown = " × ".join(f"{s:.3g}" for s in spacing)
            text = f"the median spacing is {shown} {spec.unit}, {ratio:.1f} times as coarse in one direction"
            found.append(finding("ANISOTROPIC", text, value=ratio))
    return found


def _range(cases: Sequence[CaseFacts]) -> str:
    low, high = (float(np.median([getattr(case.intensities[0], end) for case in cases])) for end in ("low", "high"))
    return f"typically {short(low)} to {short(high)}"


def labels(cases: Sequence[CaseFacts], spec: Spec) -> list[Finding]:
    """Judge the masks: empty ones, labels that hardly or never occur, and labels that one case lacks."""
    labelled = [case for case in cases if case.volumes is not None]
    empty = [case for case in labelled if not any((case.volumes or {}).values())]
    found = [finding("EMPTY_LABEL", "its mask is all background", case=case.id) for case in empty]
    filled = [case for case in labelled if case not in empty]
    for name in spec.foreground:
        found += _label(name, filled, len([case for case in labelled if case.split == "train"]))
    for case in filled:
        if case.touching:
            text = f"labels at the edge of the image: {_some(case.touching)}"
            found.append(finding("MASK_TOUCHES_BORDER", text, case=case.id, value=len(case.touching)))
    return found


def _label(name: str, cases: Sequence[CaseFacts], training: int) -> list[Finding]:
    having = [case for case in cases if (case.volumes or {})[name] > 0]
    learnt = sum(case.split == "train" for case in having)
    if learnt == 0:
        return [finding("LABEL_NEVER_SEEN", f"no training case that can be read has {name}", value=name)]
    if learnt < FEW and learnt < training / 2:
        return [finding("LABEL_RARE", f"{learnt} of {training} training cases have {name}", value=name)]
    lacking = [case for case in cases if case not in having]
    if len(cases) < MINIMUM or len(lacking) > RARE * len(cases):
        return []
    text = f"it has no {name}, {len(having)} of {len(cases)} cases with labels do"
    return [finding("LABEL_ABSENT", text, case=case.id, value=name) for case in lacking]


Rule = Callable[[Sequence[CaseFacts], Spec], list[Finding]]
RULES: tuple[Rule, ...] = (
    duplicates,
    images,
    labels,
    geometry_outliers,
    intensity_outliers,
    volume_outliers,
    mixtures,
)
"""Every rule: facts of the cases that could be read, and the spec -> findings. Rules do not know each other."""
