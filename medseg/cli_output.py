"""How the verbs show their results in a terminal."""

from __future__ import annotations

from typing import Any, NoReturn

import typer

from medseg.cli_options import as_json, console, errors, say
from medseg.files import legible

NAMED = 10
"""Ids that a line of the terminal names; files hold all."""


def display(json: bool = False) -> Any:
    """Return a display on stdout; on stderr where stdout is read by a machine."""
    from medseg.display import Display

    return Display(errors if json else console)


def end_batch(result: Any, *, json: bool = False) -> NoReturn:
    """Say how a batch ended, and exit: 0 all done, 3 some, 1 none."""
    if json:
        typer.echo(as_json([entry.model_dump(mode="json") for entry in result.entries]))
    else:
        _print_batch(result)
    raise typer.Exit(0 if result.complete else 3 if result.select("done") else 1)


def _print_batch(result: Any) -> None:
    """Say of each study that is not done where it lies and why, and how many are done."""
    for entry in result.entries:
        where = result.origins.get(entry.id, "")
        if entry.state != "done":
            errors.print(
                f"{entry.id} ({legible(where)}): {entry.state} {entry.code}: {entry.message}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    done = len(result.select("done"))
    say(f"{done} of {len(result.entries)} studies done; table: {result.out / 'summary.csv'}")
    spared = [entry for entry in result.entries if "SMALLER_BATCHES" in entry.notes]
    if spared:
        say(f"{len(spared)} done in smaller batches for want of memory (note SMALLER_BATCHES)")
    judged = [entry for entry in result.entries if entry.review is not None]
    if judged:
        say(f"{sum(entry.review for entry in judged)} of {len(judged)} should be looked at (column review says why)")


def print_scores(result: Any) -> None:
    """Print one table a metric, each narrow enough for a terminal, and who has no prediction."""
    from rich.table import Table

    for metric in dict.fromkeys(row.metric for row in result.summary):
        rows = [row for row in result.summary if row.metric == metric]
        title = f"{metric} ({rows[0].unit})" if rows[0].unit else metric
        table = Table(box=None, title=title, title_justify="left")
        for name in ("label", "n", "used", "imputed", "mean", "median", "q1", "q3"):
            table.add_column(name, justify="left" if name == "label" else "right", no_wrap=name != "label")
        for row in rows:
            numbers = [_short(value) for value in (row.mean, row.median, row.q1, row.q3)]
            table.add_row(row.label, str(row.n_total), str(row.n_used), str(row.n_imputed), *numbers)
        console.print(table)
    failed = {row.case: row.reason for row in result.rows if row.status == "imputed"}
    if failed:
        cases = ", ".join(f"{case} ({reason})" for case, reason in failed.items())
        say(f"{len(failed)} case(s) without a usable prediction count with Dice 0: {cases}")
    if result.not_scored:
        count, named = len(result.not_scored), ", ".join(result.not_scored[:NAMED])
        more = f" and {count - NAMED} more" if count > NAMED else ""
        say(f"{count} prediction(s) of which no reference case was chosen are not scored: {named}{more}")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
