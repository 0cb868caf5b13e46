"""Rules on headers: what fits, what is no rule."""

from __future__ import annotations

import re

import pytest

from medseg.readers.series_rules import WORDS, Condition, SeriesRule, condition_problem

VALUES = {"SeriesDescription": "AX T1 POST GD", "EchoTime": "12.5", "ImageType": "ORIGINAL\\PRIMARY\\M\\SE"}


@pytest.mark.parametrize(
    ("word", "condition", "fits"),
    [
        ("SeriesDescription", "(?i)t1.*post", True),
        ("SeriesDescription", "t1", False),
        ("SeriesDescription", "^T1", False),
        ("SeriesDescription", "^(?!.*POST)", False),
        ("ImageType", r"\\M\\", True),
        ("ContrastBolusAgent", "^$", True),
        ("ContrastBolusAgent", ".", False),
        ("EchoTime", 12.5, True),
        ("EchoTime", 12.51, True),
        ("EchoTime", 13, False),
        ("EchoTime", (None, 12.5), True),
        ("EchoTime", (12.6, None), False),
        ("EchoTime", (10, 20), True),
        ("InversionTime", (None, 10), False),
    ],
)
def test_one_condition(word: str, condition: Condition, fits: bool) -> None:
    assert SeriesRule("MR", {word: condition}).fits("MR", VALUES) is fits


def test_all_conditions_and_the_modality_must_hold() -> None:
    rule = SeriesRule("MR", {"SeriesDescription": "T1", "EchoTime": (None, 20)})
    assert rule.fits("MR", VALUES)
    assert not rule.fits("CT", VALUES)
    assert not rule.fits("MR", VALUES | {"EchoTime": "90"})
    assert not rule.fits("MR", VALUES | {"EchoTime": "damaged"})


def test_modalities_have_other_names_and_none_is_any() -> None:
    assert SeriesRule("PET", {}).fits("PT", {})
    assert SeriesRule("", {}).fits("CT", {})


def test_a_rule_in_words_holds_no_expression() -> None:
    assert str(SeriesRule("MR", {"SeriesDescription": "Doe", "EchoTime": 3})) == "MR by SeriesDescription, EchoTime"
    assert str(SeriesRule("", {})) == "any modality"


@pytest.mark.parametrize(
    ("word", "condition", "problem"),
    [
        ("SeriesDescripton", "x", "'SeriesDescripton' is not one of .*, did you mean 'SeriesDescription'"),
        ("PatientName", "x", "is not one of"),
        ("SeriesDescription", "(", "SeriesDescription: '\\(' is not a regular expression"),
        ("SeriesDescription", 5, "a regular expression is needed, found 5"),
        ("EchoTime", "10", "a number or \\[lowest, highest\\]"),
        ("EchoTime", [1, 2, 3], "is needed, found \\[1, 2, 3\\]"),
        ("EchoTime", [None, None], "is needed"),
        ("EchoTime", [30, 10], "is needed"),
        ("EchoTime", True, "is needed"),
    ],
)
def test_what_is_no_condition(word: str, condition: object, problem: str) -> None:
    assert re.search(problem, condition_problem(word, condition))


def test_no_attribute_is_an_identifier() -> None:
    assert not [
        word
        for word in WORDS
        if re.search("Patient(?!Position)|UID|Name$|Date|Institution|Station|Comments", word)
        and word not in ("ProtocolName", "SequenceName", "PulseSequenceName", "ManufacturerModelName")
    ]
