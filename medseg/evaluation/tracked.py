"""Scores of a model, added to the MLflow run that made it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from medseg.evaluation.evaluate import PROVENANCE
from medseg.evaluation.table import Evaluation
from medseg.tracking import start


def track_evaluation(
    evaluation: Evaluation, predictions: Path, out: Path, *, store: Path, page: Path | None = None
) -> str | None:
    """Log the per-case table, the summary, the mean Dice and (with `page`) the report; returns the id of the run.

    The run is the one that trained the model (named in predictions.json), else a new one.
    """
    told = predictions / PROVENANCE
    origin = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}
    name = evaluation.provenance.get("dataset", "evaluation")
    with start(store, experiment=name, run_name="evaluation", run_id=origin.get("tracking_run")) as tracker:
        part = evaluation.provenance.get("split", "reference")
        tracker.table(f"{part}_cases", [asdict(row) for row in evaluation.rows])
        tracker.table(f"{part}_summary", [asdict(row) for row in evaluation.summary])
        scores = {f"{part}_dice_{row.label}": row.mean for row in evaluation.summary if row.metric == "dice"}
        tracker.metrics({key: value for key, value in scores.items() if value is not None}, step=0)
        tracker.artifact(out / "cases.csv", f"evaluation/{part}")
        tracker.artifact(out / "summary.csv", f"evaluation/{part}")
        if page is not None:
            tracker.artifact(page, f"evaluation/{part}")
        return tracker.run_id
