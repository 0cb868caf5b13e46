"""``medseg check``, which judges whether a dataset is fit to learn from.

run.py goes through the cases once and collects facts.py about each; rules.py and outliers.py turn the facts into
findings with reason codes (findings.py lists them all); page.py shows the result as a table or a page.
"""

from medseg.checking.findings import CODES, Finding, Kind, Severity
from medseg.checking.run import CheckResult, check, render

__all__ = ["CODES", "CheckResult", "Finding", "Kind", "Severity", "check", "render"]
