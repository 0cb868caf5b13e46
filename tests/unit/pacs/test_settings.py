"""The YAML of a receiver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medseg.api import listen
from medseg.errors import ConfigError
from medseg.inference.presets import QUALITY
from medseg.pacs import need
from medseg.pacs.settings import load_settings

PLAIN = {"model": "run", "inbox": "in", "out": "results"}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "listen.yaml").write_text(yaml.safe_dump({**PLAIN, **changes}))
    return folder / "listen.yaml"


def test_the_example_is_valid(repository: Path) -> None:
    found = load_settings(repository / "pipelines" / "listen.example.yaml")
    assert (found.host, found.loopback, found.keep_seconds) == ("127.0.0.1", True, 3600)
    assert found.formats == ("seg", "sr")
    assert found.inbox == repository / "pipelines" / "inbox"


def test_defaults_are_safe(tmp_path: Path) -> None:
    found = load_settings(write(tmp_path))
    assert (found.host, found.loopback, found.send) == ("127.0.0.1", True, ())
    assert found.model == str(tmp_path / "run")
    assert load_settings(write(tmp_path, host="0.0.0.0")).loopback is False
    assert load_settings(write(tmp_path, model="models:/a@champion", keep="0")).model == "models:/a@champion"
    assert [load_settings(write(tmp_path, keep=keep)).keep_seconds for keep in ("0", 0, 90, "90")] == [0, 0, 90, 90]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prot": 1}, "did you mean 'port'"),
        ({"port": 0}, "port"),
        ({"ae_title": "TOO LONG A TITLE!"}, "ae_title"),
        ({"ae_title": "A\\B"}, "ae_title"),
        ({"formats": ["segg"]}, "did you mean"),
        ({"keep": "soon"}, "duration"),
        ({"keep": -1}, "duration"),
        ({"allow": ["anything"]}, "allow"),
        ({"quality": "fastest"}, "'exact', 'balanced' or 'fast'"),
        ({"send": [{"host": "a"}]}, "host, port and ae_title"),
        ({"send": [{"url": "dicomweb://a:geheim@h/x"}]}, "MEDSEG_DICOMWEB_USER"),
        ({"send": [{"url": "dicomweb://h/x/studies/1.2"}]}, "as a whole"),
        ({"send": [{"url": "dicomweb://h/x", "port": 1}]}, "not both"),
        ({"send": [{"host": "127.0.0.1", "port": 11112, "ae_title": "ME"}]}, "come back"),
        ({"send": [{"host": "h", "port": 1, "ae_title": "A"}], "formats": ["nifti"]}, "DICOM only"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=r"listen\.yaml:[0-9]+: ") as error:
        load_settings(write(tmp_path, **changes))
    assert told in str(error.value)
    assert "geheim@" not in str(error.value)


@pytest.mark.parametrize("quality", ["exact", "balanced", "fast"])
def test_the_model_is_used_with_the_quality_that_is_asked_for(
    tmp_path: Path, make_spec: Any, make_plan: Any, make_bundle: Any, monkeypatch: pytest.MonkeyPatch, quality: str
) -> None:
    spec = make_spec(labels={"a": 1})
    make_bundle(tmp_path / "run", spec, make_plan(spec))
    used: list[Any] = []
    monkeypatch.setattr("medseg.pacs.listen.listen", lambda settings, model, stop: used.append(model))
    listen(write(tmp_path, **({} if quality == "exact" else {"quality": quality})))
    assert (used[0].bundle.info.preset, used[0].preset) == (quality, QUALITY[quality])


def test_without_the_extra_the_command_that_installs_it_is_told() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'medseg\[pacs\]'"):
        need("pynetdicom_that_is_not_there")
