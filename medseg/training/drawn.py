"""What a training drew: patches of each case, and of each label how many patches held it and with how many voxels."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.files import write_text
from medseg.planning.plan import Plan
from medseg.preparation.sampling import tally
from medseg.spec import Case, Spec

COLUMNS = ("case", "patches", "foreground_forced", "label", "patches_with_label", "voxels")


def label_voxels(masks: Tensor, values: Iterable[int]) -> Tensor:
    """Return (B, labels) int64: voxels of each label value in each patch of (B, 1, *S), counted where the masks are."""
    wanted = list(values)
    top = max(wanted) + 1
    rows = masks.flatten(1).long().clamp(0, top)  # what is above all labels (an ignore value) is not asked for
    rows = rows + (top + 1) * torch.arange(len(rows), device=rows.device)[:, None]
    counts = torch.bincount(rows.flatten(), minlength=len(rows) * (top + 1))
    return counts.reshape(len(rows), top + 1)[:, wanted]


def add_drawn(seen: Tensor, cases: Sequence[int], voxels: NDArray[np.float64]) -> None:
    """Count a batch: `voxels` (B, labels) of patches from `cases` into `seen` (cases, labels, 2): patches, voxels."""
    for case, row in zip(cases, voxels, strict=True):
        found = torch.from_numpy(row).long()
        seen[case, :, 0] += found > 0
        seen[case, :, 1] += found


def write_drawn(path: Path, spec: Spec, plan: Plan, cases: Sequence[Case], *, steps: int, seen: Tensor) -> None:
    """Write draws.csv, a row for each case and label: COLUMNS.

    Patches are counted as the network saw them, after augmentation. How often a case was drawn follows from the seed;
    `seen` was counted. Where it is empty (a training begun by a version that did not count) its columns are, too. Of a
    case that stands several times in `cases` the rows are added up.
    """
    drawn, forced = tally(
        seed=plan.seed,
        steps=steps,
        batch_size=plan.batch_size,
        cases=len(cases),
        foreground_share=plan.foreground_share,
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    places: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        places.setdefault(case.id, []).append(number)
    for name, own in places.items():
        for at, label in enumerate(spec.foreground):
            counted = seen[own, at].sum(0).tolist() if len(seen) else ["", ""]
            writer.writerow([name, drawn[own].sum(), forced[own].sum(), label, *counted])
    write_text(path, text.getvalue())
