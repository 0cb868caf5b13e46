"""Go through a dataset once, and say what was found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.checking.facts import CaseFacts, Slice, case_facts, thumbnail, without_names
from medseg.checking.findings import SEVERITIES, Finding
from medseg.checking.rules import RULES, case_list_findings
from medseg.errors import MedsegError
from medseg.files import write_json, write_text
from medseg.spec import Dataset, Spec, load_dataset, spec_digest
from medseg.studies import read_study

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = Callable[[int, int], None]
"""Called after every case with how many are done, of how many."""


@dataclass(frozen=True)
class CheckResult:
    """What ``medseg check`` found.

    Attributes
    ----------
    spec : of the dataset.
    findings : errors first, then warnings and notes; in the order of the cases within.
    cases : facts of the cases that could be read.
    n_cases : how many cases there are, readable or not.
    page : check.html, None where none was asked for.
    """

    spec: Spec
    findings: tuple[Finding, ...]
    cases: tuple[CaseFacts, ...]
    n_cases: int
    page: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether the dataset is fit to learn from: no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0: fit to learn from; 1: not."""
        return 0 if self.ok else 1

    @property
    def counts(self) -> dict[str, int]:
        """How many findings there are of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; no path and nothing else that tells where or who."""
        return {
            "dataset": self.spec.name,
            "spec_sha256": spec_digest(self.spec),
            "ok": self.ok,
            "counts": self.counts,
            "n_cases": self.n_cases,
            "n_readable": len(self.cases),
            "findings": [asdict(finding) for finding in self.findings],
            "cases": [asdict(case) for case in self.cases],
        }

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False)


def check(
    dataset_path: Path, *, splits: Path | None = None, out: Path | None = None, progress: Progress | None = None
) -> CheckResult:
    """Read every case of a dataset once and judge whether it is fit to learn from.

    Memory: one case at a time, and with `out` three small pictures per case (at most 60 kB together).

    Parameters
    ----------
    dataset_path : a spec file or a dataset folder, as for ``medseg train``.
    splits : replaces the spec's own splits.
    out : folder for check.html and check.json; nothing is written unless told.
    progress : called after every case.

    Raises
    ------
    SpecError : the path is no dataset, or its spec is wrong. Anything wrong with a case is a finding instead.
    ExportError : the page cannot be written.
    """
    dataset = load_dataset(dataset_path, splits=splits)
    unreadable, facts, pictures = _read_all(dataset, pictured=out is not None, progress=progress)
    found = [*case_list_findings(dataset.cases), *unreadable]
    for rule in RULES:
        found += rule(facts, dataset.spec)
    order = {case.id: number for number, case in enumerate(dataset.cases)}
    found.sort(key=lambda f: (SEVERITIES.index(f.severity), f.code, -1 if f.case is None else order[f.case]))
    page = None if out is None else out / "check.html"
    result = CheckResult(dataset.spec, tuple(found), tuple(facts), len(dataset.cases), page)
    if page is not None:
        # The page needs jinja2 and matplotlib, the findings do not.
        from medseg.checking.page import page_html

        write_text(page, page_html(result, pictures))
        write_json(page.with_suffix(".json"), result.to_dict())
    return result


def _read_all(
    dataset: Dataset, *, pictured: bool, progress: Progress | None
) -> tuple[list[Finding], list[CaseFacts], dict[str, tuple[Slice, ...]]]:
    """Return what could not be read, the facts of the rest, and their pictures."""
    unreadable: list[Finding] = []
    facts: list[CaseFacts] = []
    pictures: dict[str, tuple[Slice, ...]] = {}
    for number, case in enumerate(dataset.cases, start=1):
        try:
            study = read_study(dataset.spec, case)
        except MedsegError as error:
            text = without_names(str(error), dataset.spec, case)
            unreadable.append(Finding(error.code, "error", case.id, text))
        else:
            facts.append(case_facts(dataset.spec, study))
            if pictured:
                pictures[case.id] = thumbnail(dataset.spec, study)
            del study
        if progress is not None:
            progress(number, len(dataset.cases))
    return unreadable, facts, pictures


def render(result: CheckResult) -> RenderableType:
    """Return the findings for the terminal: print it with rich."""
    # Rich and the page are only needed by those who look.
    from medseg.checking.page import terminal

    return terminal(result)
