"""Case ids of DICOM studies: stable for one user, meaningless to others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medseg.errors import ConfigError
from medseg.privacy import key_file, keyed_id


def test_an_id_is_stable_and_says_nothing() -> None:
    name = keyed_id("case", "SMITH^JOHN", "1.2.3")
    assert name == keyed_id("case", "SMITH^JOHN", "1.2.3")
    assert re.fullmatch(r"case-[0-9a-f]{12}", name)


def test_different_identifiers_have_different_ids() -> None:
    ids = {keyed_id("case", *parts) for parts in [("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""), ("a\0", "b")]}
    assert len(ids) == 5
    assert keyed_id("pat", "a") != keyed_id("case", "a")


def test_parts_cannot_be_shifted_into_one_another() -> None:
    assert keyed_id("case", "a\0b") != keyed_id("case", "a", "b")


def test_text_that_is_no_unicode_has_an_id_too() -> None:
    assert keyed_id("case", "M\udcfcller") != keyed_id("case", "M\udcfdller")


def test_processes_that_start_together_agree_on_the_key(tmp_path: Path) -> None:
    code = "from medseg.privacy import keyed_id; print(keyed_id('case', 'a'))"
    environment = {**os.environ, "MEDSEG_KEY_FILE": str(tmp_path / "fresh" / "key")}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(4)]
    ids = {process.communicate(timeout=60)[0] for process in running}
    assert len(ids) == 1
    assert [path.name for path in (tmp_path / "fresh").iterdir()] == ["key"]


def test_the_first_of_two_keys_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another process write its key between our look and our writing."""
    link = os.link

    def other_first(source: Path, target: Path) -> None:
        Path(target).write_text("0" * 64)
        link(source, target)

    monkeypatch.setattr("medseg.privacy.os.link", other_first)
    first = keyed_id("case", "a")
    assert key_file().read_text() == "0" * 64
    monkeypatch.undo()
    monkeypatch.setenv("MEDSEG_KEY_FILE", str(tmp_path / "copy"))
    (tmp_path / "copy").write_text("0" * 64)
    assert keyed_id("case", "a") == first


def test_a_key_that_cannot_be_made_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDSEG_KEY_FILE", str(tmp_path / "file" / "key"))
    with pytest.raises(ConfigError, match="MEDSEG_KEY_FILE"):
        keyed_id("case", "a")


def test_another_key_gives_other_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = keyed_id("case", "a")
    monkeypatch.setenv("MEDSEG_KEY_FILE", str(tmp_path / "other" / "key"))
    assert keyed_id("case", "a") != mine


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_the_key_is_made_once_and_only_for_its_owner() -> None:
    keyed_id("case", "a")
    content = key_file().read_text()
    assert len(content.strip()) == 64
    assert key_file().stat().st_mode & 0o777 == 0o600
    keyed_id("case", "b")
    assert key_file().read_text() == content


def test_a_key_that_is_too_short_is_refused() -> None:
    key_file().write_text("short\n")
    with pytest.raises(ConfigError, match="at least 32"):
        keyed_id("case", "a")


def test_where_the_key_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_file() == tmp_path / "medseg.key"
    monkeypatch.delenv("MEDSEG_KEY_FILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert key_file() == tmp_path / "config" / "medseg" / "key"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert key_file() == tmp_path / ".config" / "medseg" / "key"
