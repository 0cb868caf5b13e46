"""The result of ``medseg check FOLDER`` for people: a table for the terminal, and one offline page."""

from __future__ import annotations

from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medseg.checking.tree import SeriesFacts, TreeResult, findings, summary
from medseg.files import legible
from medseg.html import render

SHOWN = 40
"""Series that the terminal lists."""
_STYLES = {"usable": "green", "refused": "bold red", "set aside": "dim"}
_COLOURS = {0: "bold green", 3: "bold yellow", 1: "bold red"}


def numbers(row: SeriesFacts, times: str = " × ") -> tuple[str, str]:
    """Return size and spacing as text."""
    return times.join(map(str, row.size)), times.join(f"{step:.3g}" for step in row.spacing)


def terminal(result: TreeResult) -> RenderableType:
    """Return the series and the reasons as rich tables, with the answer below."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("study", "series", "kind", "size", "spacing mm", "verdict"):
        table.add_column(name, no_wrap=name != "verdict", overflow="fold")
    order = {study: str(number) for number, study in enumerate(dict.fromkeys(row.study for row in result.series), 1)}
    for row in result.series[:SHOWN]:
        verdict = Text(row.code or "usable", style=_STYLES[row.verdict])
        more = [row.part] if row.part not in ("", row.code) else []
        verdict.append("".join(f" {part}" for part in more), style="dim")
        table.add_row(order[row.study] if row.study else "", row.id, row.modality, *numbers(row, "×"), verdict)
    parts: list[RenderableType] = [table] if result.series else []
    if len(result.series) > SHOWN:
        parts.append(Text(f"and {len(result.series) - SHOWN} more: --json or --out", style="dim"))
    for code, rows in findings(result).items():
        places = ", ".join(dict.fromkeys(legible(row.origin) for row in rows[:3]))
        text = Text(f"{code} ({len(rows)})", style=_STYLES[rows[0].verdict])
        text.append(f" {rows[0].message}", style="default").append(f"\n  {rows[0].advice}\n  {places}", style="dim")
        text.append(" ..." if len(rows) > 3 else "", style="dim")
        parts.append(text)
    rest = {**result.ignored, **result.others}
    if rest:
        parts.append(Text("Also there: " + ", ".join(f"{n} {kind}" for kind, n in rest.items()), style="dim"))
    return Group(*parts, Text(summary(result), style=_COLOURS[result.exit_code]))


def page_html(result: TreeResult) -> str:
    """Return check.html; no path stands in it."""
    studies = [(study, list(rows)) for study, rows in groupby(result.series, key=lambda row: row.study)]
    return render(
        "check_tree.html",
        result=result,
        summary=summary(result),
        findings=findings(result),
        studies=studies,
        numbers=numbers,
    )
