"""Validation report: model × labelled dataset -> masks -> scores -> one HTML page, logged to MLflow.

OUT/predictions (masks, ledger)  OUT/scores (per-case table, summary)  OUT/report.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medseg import api
from medseg.cli import main
from medseg.cli_options import Cases, console
from medseg.display import Display
from medseg.evaluation.tracked import track_evaluation

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def validation_report(
    dataset: Annotated[Path, typer.Argument(help="Labelled dataset: spec file or folder.")],
    model: Annotated[str, typer.Option(help="Run folder, bundle, or models:/NAME@ALIAS.")],
    out: Annotated[Path, typer.Option(help="Folder for predictions, scores and the page.")],
    cases: Annotated[Cases | None, typer.Option(help="Which cases (default: test if there are any).")] = None,
    splits: Annotated[Path | None, typer.Option(help="File with lists `train` and `test` of case ids.")] = None,
    against: Annotated[Path | None, typer.Option(help="OUT of an earlier report on the same cases.")] = None,
    track: Annotated[Path, typer.Option(help="Folder of the MLflow store.")] = Path(),
    no_track: Annotated[bool, typer.Option("--no-track", help="Do not record in MLflow.")] = False,
) -> None:
    """Predict a labelled dataset, score it and write the study report; exit 3 if some cases could not be predicted.

    Example: python -m pipelines.validation_report data_specs/hippocampus.yaml --model runs/hippocampus --out validation
    """
    predictions, scores = out / "predictions", out / "scores"
    chosen: Literal["test", "train", "all"] | None = None if cases is None else cases.value
    result = api.predict(
        dataset,
        model=api.local_model(model, track=track),
        out=predictions,
        cases=chosen,
        splits=splits,
        display=Display(console),
    )
    evaluation = api.evaluate(predictions, dataset, out=scores, cases=chosen, splits=splits)
    page = api.report(
        scores,
        out=out,
        against=None if against is None else against / "scores",
        predictions=predictions,
        reference=dataset,
        splits=splits,
    )
    if not no_track:
        track_evaluation(evaluation, predictions, scores, store=track, page=page)
    mean = "-" if evaluation.mean_dice is None else f"{evaluation.mean_dice:.3f}"
    console.print(f"{len(evaluation.cases)} cases, {len(evaluation.failed)} failed, mean Dice {mean}", highlight=False)
    console.print(f"Page: {page}", highlight=False)
    raise typer.Exit(0 if result.complete else 3)


if __name__ == "__main__":
    main(app)
