"""The table of formats, and the words of the command line that choose from it."""

from __future__ import annotations

import pytest

from medseg.errors import ConfigError
from medseg.exporters import EXPORTERS, choose_formats


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nifti"], ("nifti",)),
        (["nifti,seg"], ("nifti", "seg")),
        (["seg", "nifti", "seg"], ("seg", "nifti")),
        ([" nifti , seg,"], ("nifti", "seg")),
        (["sr"], ("seg", "sr")),
    ],
)
def test_words(words: list[str], expected: tuple[str, ...]) -> None:
    assert choose_formats(words) == expected


WRONG = [([], "no format"), ([","], "no format"), (["sge"], "did you mean 'seg'")]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_words(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_formats(words)


def test_rows_do_not_write_into_each_other() -> None:
    suffixes = [row.suffix for _, row in EXPORTERS.items()]
    assert not any(one.endswith(other) for one in suffixes for other in suffixes if one is not other)
    for _, row in EXPORTERS.items():
        assert set(row.refers_to) <= set(EXPORTERS)
