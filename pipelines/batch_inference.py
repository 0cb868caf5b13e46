"""Batch inference: a folder of studies -> masks, ledger, summary table.

One broken study never stops the others; the same command again does only what is not done.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from medseg import api
from medseg.batch.run import BatchResult
from medseg.cli import main
from medseg.cli_options import Allow, console
from medseg.display import Display

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def batch_inference(
    studies: Annotated[list[Path], typer.Argument(help="Trees of studies (DICOM, NIfTI), files, or a dataset.")],
    model: Annotated[str, typer.Option(help="Run folder, bundle, or models:/NAME@ALIAS.")],
    out: Annotated[Path, typer.Option(help="Folder for masks, ledger/ and summary.csv.")],
    allow: Allow = None,
    track: Annotated[Path, typer.Option(help="Folder of the MLflow store that models:/ is looked up in.")] = Path(),
) -> None:
    """Segment every study below some folders; exit 0 all done, 1 none, 3 some.

    Example: python -m pipelines.batch_inference archive/ --model models:/organs@champion --out masks
    """
    result = api.predict(
        *studies,
        model=api.local_model(model, track=track),
        out=out,
        cases="all",
        allow=allow or (),
        display=Display(console),
    )
    for line in summary(result):
        console.print(line, highlight=False, markup=False)
    raise typer.Exit(0 if result.complete else 3 if result.select("done") else 1)


def summary(result: BatchResult) -> list[str]:
    """Return the lines that a person reads: how many are done, and why others are not, most frequent reason first."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in result.entries:
        if entry.state != "done":
            reasons.setdefault((entry.state, entry.code), []).append(entry.id)
    lines = [f"{len(result.select('done'))} of {len(result.entries)} studies done"]
    for (state, code), number in Counter({key: len(ids) for key, ids in reasons.items()}).most_common():
        lines.append(f"  {number} {state}: {code} (for example {reasons[state, code][0]})")
    notes = Counter(note for entry in result.entries for note in entry.notes)
    lines += [f"  {number} with note {note}" for note, number in notes.most_common()]
    return [*lines, f"Table: {result.out / 'summary.csv'}; what each id stands for: {result.out / 'private'}"]


if __name__ == "__main__":
    main(app)
