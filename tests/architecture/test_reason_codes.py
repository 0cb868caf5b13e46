"""Every reason code that the code can raise is explained in docs/reference/reason-codes.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CODE = re.compile(r'code="([A-Z][A-Z_]+)"|^    code = "([A-Z][A-Z_]+)"', re.MULTILINE)
PACKAGES = ["batch", "exporters", "training", "inference", "tracking", "evaluation", "pacs"]


@pytest.mark.parametrize("package", PACKAGES)
def test_codes_are_documented(repository: Path, package: str) -> None:
    page = (repository / "docs" / "reference" / "reason-codes.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `([A-Z_]+)`", page, re.MULTILINE))
    used = {
        match[1] or match[2]
        for file in (repository / "medseg" / package).rglob("*.py")
        for match in CODE.finditer(file.read_text(encoding="utf-8"))
    }
    assert used - explained == set()
