"""Addresses: what they mean, and that a wrong one is told without repeating who it names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medseg.errors import ConfigError
from medseg.pacs.address import is_address, parse_address, split_addresses
from medseg.pacs.credentials import find_credentials


def test_the_parts_of_an_address() -> None:
    whole = parse_address("dicomweb://127.0.0.1:8042/dicom-web/")
    assert (whole.base, whole.study, whole.series) == ("http://127.0.0.1:8042/dicom-web", "", "")
    one = parse_address(
        "dicomwebs://pacs.example/rs/studies/1.2.3/series/4.5?ModalitiesInStudy=CT&Modality=CT&00100020=7"
    )
    assert (one.base, one.study, one.series, one.host) == ("https://pacs.example/rs", "1.2.3", "4.5", "pacs.example")
    assert one.study_filters == (("ModalitiesInStudy", "CT"), ("00100020", "7"))
    assert one.series_filters == (("Modality", "CT"),)
    assert parse_address("DICOMweb://[::1]:80/studies").base == "http://[::1]:80"
    assert "1.2.3" not in repr(one) + str(one)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dicomweb://", "dicomweb://HOST"),
        ("dicomweb:///path", "host"),
        ("dicomweb://h:99999/x", "port"),
        ("dicomweb://nele:geheim@h/x", "MEDSEG_DICOMWEB_USER"),
        ("dicomweb://h/x/studies/NELE", "UID"),
        ("dicomweb://h/x/studies/1.2/series/..", "UID"),
        ("dicomweb://h/x/studies/" + "1" * 65, "UID"),
        ("dicomweb://h/x?PatientNam=Nele", "did you mean 'PatientName'"),
    ],
)
def test_wrong_addresses(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", "[?]")) as error:
        parse_address(text)
    assert not any(word in str(error.value) for word in ("geheim", "NELE", "Nele"))


def test_results_go_to_an_archive_as_a_whole() -> None:
    with pytest.raises(ConfigError, match="as a whole"):
        parse_address("dicomweb://h/x/studies/1.2", whole=True)


def test_paths_stay_paths() -> None:
    paths, addresses = split_addresses(["a/b", Path("c"), "dicomweb://h:1/x", "C:\\scan"])
    assert (paths, [address.base for address in addresses]) == (
        [Path("a/b"), Path("c"), Path("C:\\scan")],
        ["http://h:1/x"],
    )
    assert not is_address("https://h/x")


HERE = parse_address("dicomweb://127.0.0.1:1/x")
SECURE = parse_address("dicomwebs://pacs.example/rs")


def test_credentials_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_credentials(HERE).header == ""
    monkeypatch.setenv("MEDSEG_DICOMWEB_USER", "nele")
    with pytest.raises(ConfigError, match="go together"):
        find_credentials(HERE)
    monkeypatch.setenv("MEDSEG_DICOMWEB_PASSWORD", "geheim")
    assert find_credentials(HERE, [HERE]).header == "Basic bmVsZTpnZWhlaW0="
    assert "geheim" not in repr(find_credentials(HERE))
    with pytest.raises(ConfigError, match="for one archive"):
        find_credentials(HERE, [SECURE])
    with pytest.raises(ConfigError, match="clear text"):
        find_credentials(parse_address("dicomweb://pacs.example/rs"))
    monkeypatch.setenv("MEDSEG_DICOMWEB_TOKEN", "t")
    with pytest.raises(ConfigError, match="not both"):
        find_credentials(HERE)


def test_credentials_from_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine 127.0.0.1:1 login nele password geheim\nmachine pacs.example login bearer password abc\n")
    monkeypatch.setenv("MEDSEG_DICOMWEB_NETRC", str(file))
    os.chmod(file, 0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        find_credentials(HERE)
    os.chmod(file, 0o600)
    assert find_credentials(HERE, [SECURE]).header.startswith("Basic ")
    assert find_credentials(SECURE, [HERE]).header == "Bearer abc"
    assert find_credentials(parse_address("dicomwebs://other.example/rs")).header == ""
    file.write_text("machine pacs.example geheim")
    with pytest.raises(ConfigError) as error:
        find_credentials(SECURE)
    assert "geheim" not in str(error.value)
    monkeypatch.setenv("MEDSEG_DICOMWEB_NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        find_credentials(SECURE)
