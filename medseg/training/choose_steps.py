"""Which post-processing a model brings along: what raises the Dice of cases that its networks have not learnt from.

For each label on its own, first one way to remove objects is chosen, then whether cavities are filled. Test cases have
no part in it. The steps of a label are measured with the other labels as the networks left them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from medseg.bundle import PostStep
from medseg.inference.postprocess import FULL, fill_holes, grid_of
from medseg.planning.fingerprint import Fingerprint
from medseg.spec import Spec
from medseg.volume import Volume

MARGIN = 0.002
"""A step is kept if it raises the mean Dice of its label by at least this, and more cases rise than fall."""
MIN_CASES = 5
"""With fewer cases in which a label is there or was found, nothing is chosen for it."""
SHARES = (0.01, 0.05, 0.2)
"""Objects below these shares of the median volume of a label are tried as too small."""


@dataclass(frozen=True)
class Evidence:
    """What one step did to one label.

    Attributes
    ----------
    n : cases in which the label is there or was found.
    before, after : mean Dice over these cases, without and with the step; after what was chosen before it. A case
        without the label counts 1 where nothing is left of what was found, else 0.
    better, worse : cases whose Dice rose, and fell.
    kept : whether the model does it.
    """

    label: str
    step: str
    n: int
    before: float
    after: float
    better: int
    worse: int
    kept: bool


def removals(spec: Spec, fingerprint: Fingerprint) -> dict[str, list[PostStep]]:
    """Return label -> the ways to remove objects that are tried."""
    found = {}
    for label in spec.foreground:
        median = 1000 * fingerprint.label_ml.get(label, 0.0)
        sizes = dict.fromkeys(float(f"{share * median:.2g}") for share in SHARES)
        found[label] = [
            PostStep(kind="largest_component", labels=(label,)),
            *(PostStep(kind="min_volume", labels=(label,), size=size) for size in sizes if size),
        ]
    return found


class StepTrial:
    """Dice of every label of every case under every candidate; a case at a time, so that no mask is kept.

    Candidate 2 n is removal n (0: none) alone, 2 n + 1 the same and then filled cavities.
    """

    def __init__(self, spec: Spec, fingerprint: Fingerprint) -> None:
        self.spec = spec
        self.removals = removals(spec, fingerprint)
        self.dice: dict[str, list[NDArray[np.float64]]] = {label: [] for label in spec.foreground}
        self.complete = True

    def add(self, predicted: Volume, reference: Volume, labels: Collection[str] | None = None) -> None:
        """Try all on one case; both are (1, I, J, K) label values on one grid.

        `labels` are those that the reference tells of (all unless told).
        """
        from scipy.ndimage import find_objects

        found, truth = predicted.array[0], reference.array[0]
        boxes = find_objects(found)
        for label, value in self.spec.foreground.items():
            if labels is not None and label not in labels:
                continue
            box = boxes[value - 1] if value <= len(boxes) else None
            total = int(np.count_nonzero(truth == value))
            if box is None and not total:
                continue
            if box is None:
                self.dice[label].append(np.zeros(2 + 2 * len(self.removals[label])))
                continue
            self.dice[label].append(self._dice(label, predicted, found[box], truth[box], total))

    def _dice(
        self, label: str, grid_source: Volume, found: NDArray[np.generic], truth: NDArray[np.generic], total: int
    ) -> NDArray[np.float64]:
        """Return the Dice of each candidate; `total` voxels of the label are in the whole reference."""
        from scipy.ndimage import label as number_objects

        value, grid = self.spec.foreground[label], grid_of(grid_source)
        present, wanted = found == value, truth == value
        counted = np.ones(truth.shape, bool) if self.spec.ignore is None else truth != self.spec.ignore
        parts, count = number_objects(present, structure=FULL)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        scored = np.bincount(parts[counted], minlength=count + 1)
        shared = np.bincount(parts[wanted & counted], minlength=count + 1)
        holes = bool((fill_holes(present, grid) != present).any())
        rows: list[float] = []
        for step in (None, *self.removals[label]):
            kept = _kept(step, sizes, grid.voxel)
            alone = _ratio(int(shared[kept].sum()), int(scored[kept].sum()), total)
            rows.append(alone)
            if not holes:  # then no smaller set of its objects has one
                rows.append(alone)
                continue
            left = kept[parts]
            free = (found == 0) | present
            filled = left | (fill_holes(left, grid) & free)
            both = int(np.count_nonzero(filled & wanted & counted))
            rows.append(_ratio(both, int(np.count_nonzero(filled & counted)), total))
        return np.array(rows)

    def choose(self) -> tuple[tuple[PostStep, ...], list[Evidence]]:
        """Return the steps that are worth it, and what each candidate did; nothing where not every case was tried."""
        steps: list[PostStep] = []
        evidence: list[Evidence] = []
        for label, rows in self.dice.items():
            if len(rows) < MIN_CASES or not self.complete:
                continue
            dice = np.array(rows)
            chosen = 0
            tried = [_evidence(label, step, dice[:, 0], dice[:, 2 * n]) for n, step in self._numbered(label)]
            good = [n for n, row in enumerate(tried, start=1) if _worth(row)]
            if good:
                chosen = max(good, key=lambda n: (tried[n - 1].after, -n))
                steps.append(self.removals[label][chosen - 1])
            fill = PostStep(kind="fill_holes", labels=(label,))
            last = _evidence(label, fill, dice[:, 2 * chosen], dice[:, 2 * chosen + 1])
            if _worth(last):
                steps.append(fill)
            names = {str(step) for step in steps}
            evidence += [replace(row, kept=row.step in names) for row in (*tried, last)]
        return tuple(steps), evidence

    def _numbered(self, label: str) -> list[tuple[int, PostStep]]:
        return list(enumerate(self.removals[label], start=1))


def _kept(step: PostStep | None, sizes: NDArray[np.int64], voxel: float) -> NDArray[np.bool_]:
    """Return which objects a removal leaves; object 0 is the background."""
    kept = np.ones(len(sizes), bool)
    if step is not None and step.kind == "largest_component":
        kept[:] = False
        kept[1 + int(sizes[1:].argmax())] = True
    elif step is not None:
        kept = sizes * voxel * (1 + 1e-9) >= step.size
    kept[0] = False
    return kept


def _ratio(shared: int, found: int, total: int) -> float:
    return 2 * shared / (found + total) if found + total else 1.0


def _evidence(label: str, step: PostStep, before: NDArray[np.float64], after: NDArray[np.float64]) -> Evidence:
    return Evidence(
        label,
        str(step),
        len(before),
        float(before.mean()),
        float(after.mean()),
        int((after > before).sum()),
        int((after < before).sum()),
        kept=False,
    )


def _worth(row: Evidence) -> bool:
    return row.after - row.before >= MARGIN and row.better > row.worse


def evidence_csv(rows: Sequence[Evidence]) -> str:
    """Return the table of what each candidate did."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Evidence)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def told(steps: Sequence[PostStep], trial: StepTrial, *, folds: int, basis: str = "") -> str:
    """Say in a line what was chosen, and how much that is worth.

    `basis` : what the cases are, where they are not simply out-of-fold or validation cases.
    """
    cases = max((len(rows) for rows in trial.dice.values()), default=0)
    basis = f"{cases} {basis or ('out-of-fold cases' if folds > 1 else 'validation cases of a single split')}"
    if not trial.complete:
        return "post-processing: none chosen, the budget left no time to try it"
    if not any(len(rows) >= MIN_CASES for rows in trial.dice.values()):
        return f"post-processing: none chosen, {basis} are too few ({MIN_CASES} are needed)"
    weak = "" if folds > 1 else "; that is weak evidence, --folds 5 gives better"
    return f"post-processing: {'; '.join(map(str, steps)) or 'none helps'} ({basis}{weak})"
