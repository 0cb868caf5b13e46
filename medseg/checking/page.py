"""The result of ``medseg check`` for people: a table for the terminal, and one offline page."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medseg.checking.facts import CaseFacts, Slice
from medseg.checking.findings import SEVERITIES, Finding, Severity, advice, short
from medseg.checking.outliers import DIRECTIONS
from medseg.checking.run import CheckResult
from medseg.html import data_uri, render
from medseg.plots import colours_for, slice_rgb

PICTURED = 60
"""Cases with pictures on the page, those with findings first."""
LISTED = 200
"""Findings of one code that the page writes out."""
HEIGHT = 104
"""Height of a thumbnail on the page, in CSS pixels."""
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class FindingGroup:
    """The findings of one code and severity."""

    code: str
    severity: Severity
    findings: tuple[Finding, ...]

    @property
    def cases(self) -> list[str]:
        """Ids of the cases concerned, each once."""
        return list(dict.fromkeys(f.case for f in self.findings if f.case is not None))

    @property
    def advice(self) -> str:
        """What to do about it."""
        return advice(self.code)


def grouped(findings: Iterable[Finding]) -> list[FindingGroup]:
    """Put findings of one code and severity together, in the order in which they come."""
    groups: dict[tuple[str, Severity], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.code, finding.severity), []).append(finding)
    return [FindingGroup(code, severity, tuple(rows)) for (code, severity), rows in groups.items()]


def summary(result: CheckResult) -> str:
    """Return the answer in one line."""
    counts = ", ".join(f"{n} {severity}{'s' * (n != 1)}" for severity, n in result.counts.items() if n)
    fit = "fit to learn from" if result.ok else "NOT fit to learn from"
    return f"{result.spec.name}: {result.n_cases} case(s), {counts or 'nothing found'}: {fit}"


def terminal(result: CheckResult) -> RenderableType:
    """Return the findings as a rich table (one row per code) with the answer below."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("finding", overflow="fold", max_width=24)
    table.add_column("what was found, and what to do", overflow="fold")
    for group in grouped(result.findings):
        cases = group.cases
        shown = ", ".join(cases[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")
        kind = Text(f"{group.severity} ", style=_STYLES[group.severity])
        kind.append(f"\n{group.code}\n{shown or 'all'}", style="default")
        # Text, because brackets in a message are no markup.
        message = Text(_example(group.findings))
        message.append(f"\n{group.advice}" if group.advice else "", style="dim")
        table.add_row(kind, message)
    parts: list[RenderableType] = [table] if result.findings else []
    return Group(*parts, Text(summary(result), style="bold green" if result.ok else "bold red"))


def _example(findings: Sequence[Finding]) -> str:
    """Return the message of the first finding, and whose it is where the others' differ."""
    first = findings[0]
    if first.case is None or len({finding.message for finding in findings}) == 1:
        return first.message
    return f"{first.case}: {first.message.removeprefix(f'case {first.case}: ')} (the others: --json or the page)"


def page_html(result: CheckResult, pictures: Mapping[str, Sequence[Slice]]) -> str:
    """Return check.html.

    Parameters
    ----------
    pictures : case id -> its slices, see medseg.checking.facts.thumbnail.
    """
    given = {label.value: label.color for label in result.spec.labels.values()}
    colours = colours_for(result.spec.foreground.values(), given)
    shown = _worth_showing(result)[:PICTURED]
    return render(
        "check.html",
        result=result,
        summary=summary(result),
        groups=grouped(result.findings),
        listed=LISTED,
        facts=_facts(result),
        labels=_labels(result, colours),
        unit="mL" if result.spec.unit == "mm" else "pixels",
        pictures=[_picture(case, result, pictures[case.id], colours) for case in shown],
        severities=SEVERITIES,
    )


def _worth_showing(result: CheckResult) -> list[CaseFacts]:
    """Order the cases by their worst finding, those without any last; a duplicate brings the case that it repeats."""
    worst = {f.value: SEVERITIES.index(f.severity) for f in reversed(result.findings) if f.code == "DUPLICATE_IMAGE"}
    worst |= {f.case: SEVERITIES.index(f.severity) for f in reversed(result.findings)}
    return sorted(result.cases, key=lambda case: worst.get(case.id, len(SEVERITIES)))


def _facts(result: CheckResult) -> list[tuple[str, str]]:
    cases, spec = result.cases, result.spec
    if not cases:
        return []
    splits = {split: [c for c in cases if c.split == split] for split in ("train", "test")}
    dtypes = {dtype: sum(c.dtype == dtype for c in cases) for dtype in sorted({c.dtype for c in cases})}
    rows = [
        (f"{split} split", f"{len(group)} cases of {len({c.patient for c in group})} patients")
        for split, group in splits.items()
        if group
    ]
    for axis, direction in enumerate(DIRECTIONS):
        spacing, voxels = _spread(c.spacing[axis] for c in cases), _spread(c.size[axis] for c in cases)
        rows.append((direction, f"spacing {spacing} {spec.unit}, size {voxels} voxels"))
    for index, (name, channel) in enumerate(spec.channels.items()):
        low = _spread(c.intensities[index].low for c in cases)
        high = _spread(c.intensities[index].high for c in cases)
        modality = f" ({channel.modality})" if channel.modality and channel.modality != name else ""
        rows.append((f"channel {name}{modality}", f"0.5th percentile {low}, 99.5th percentile {high}"))
    rows.append(("voxels read as", ", ".join(f"{dtype} ({n})" for dtype, n in dtypes.items())))
    return rows


def _spread(values: Iterable[float]) -> str:
    """Return the median, and the extremes where they differ."""
    low, middle, high = (short(float(v)) for v in np.percentile(list(values), (0, 50, 100)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _labels(result: CheckResult, colours: Mapping[int, str]) -> list[dict[str, Any]]:
    rows = []
    masks = [case.volumes for case in result.cases if case.volumes is not None]
    for name, value in result.spec.foreground.items():
        volumes = [mask[name] for mask in masks if mask[name] > 0]
        low, middle, high = np.percentile(volumes, (0, 50, 100)) if volumes else (None, None, None)
        row = {"name": name, "value": value, "colour": colours[value], "cases": len(volumes), "of": len(masks)}
        rows.append({**row, "low": low, "middle": middle, "high": high})
    return rows


def _picture(
    case: CaseFacts, result: CheckResult, slices: Sequence[Slice], colours: Mapping[int, str]
) -> dict[str, Any]:
    found = [f for f in result.findings if f.case == case.id]
    tallest = max(s.grey.shape[0] * s.spacing[0] for s in slices)
    planes = [
        {
            "uri": data_uri(png(slice_rgb(s.grey, s.labels, colours))),
            "width": max(1, round(s.grey.shape[1] * s.spacing[1] / tallest * HEIGHT)),
            "height": max(1, round(s.grey.shape[0] * s.spacing[0] / tallest * HEIGHT)),
        }
        for s in slices
    ]
    return {"case": case, "findings": found, "planes": planes, "worst": found[0].severity if found else ""}


def png(rgb: NDArray[np.uint8]) -> bytes:
    """Return a PNG of (rows, columns, 3) uint8: three chunks (W3C PNG section 11), some 100 times faster than a figure.

    Every row is stored with filter 0 (none).
    """
    rows, columns, _ = rgb.shape
    scanlines = np.concatenate([np.zeros((rows, 1), np.uint8), rgb.reshape(rows, -1)], axis=1).tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
