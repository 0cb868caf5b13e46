from __future__ import annotations

import getpass
import json
import logging
import math
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from medseg import tracking
from medseg.tracking.operations import clean_key, content_digest, shorten


def ask(folder: Path, query: str, *values: object) -> list[tuple]:
    """Read the database without MLflow: an independent witness."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return database.execute(query, values).fetchall()


def run_row(folder: Path, run_id: str) -> tuple:
    return ask(folder, "select status, end_time, name, user_id, source_name from runs where run_uuid = ?", run_id)[0]


def artifacts(folder: Path, run_id: str) -> Path:
    return folder / "mlartifacts" / run_id / "artifacts"


def begin(folder: Path, **options) -> tracking.Tracker:
    return tracking.start(folder, experiment="hippocampus", run_name="fold 0", **options)


def test_importing_does_not_import_mlflow():
    code = "import sys, medseg.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_is_recorded(folder, tmp_path, bundle):
    picture = tmp_path / "curves.png"
    picture.write_bytes(b"\x89PNG")
    with begin(folder) as run:
        run.params({"epochs": 3, "plan": {"patch": [64, 64, 64], "network": {"name": "unet"}}, "empty": ""})
        for epoch in range(3):
            run.metrics({"loss/train": 1 / (epoch + 1), "dice/anterior": epoch / 10}, step=epoch)
        run.tags({"device": "cpu"})
        run.dataset("hippocampus", "ab" * 32, "training")
        run.table("test_dice", [{"case": "case_1", "dice": np.float32(0.5)}, {"case": "case_2", "volume": math.nan}])
        run.artifact(picture, "plots")
        run.artifact(bundle, "extra")
        run.text("patch: [64, 64, 64]\n", "plan.yaml")
        run.text("inside", "../a//outside.txt")
    run_id = run.run_id

    params = dict(ask(folder, "select key, value from params where run_uuid = ?", run_id))
    assert params == {"epochs": "3", "plan.patch": "[64, 64, 64]", "plan.network.name": "unet", "empty": ""}
    losses = ask(folder, "select step, value from metrics where key = 'loss/train' order by step")
    assert losses == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert ask(folder, "select name, digest, dataset_source from datasets") == [
        ("hippocampus", ("ab" * 32)[:36], json.dumps({"sha256": "ab" * 32}))
    ]
    assert ("mlflow.data.context", "training") in ask(folder, "select name, value from input_tags")
    table = json.loads((artifacts(folder, run_id) / "test_dice.json").read_text())
    assert table == {"columns": ["case", "dice", "volume"], "data": [["case_1", 0.5, None], ["case_2", None, None]]}
    assert (artifacts(folder, run_id) / "plots" / "curves.png").read_bytes() == b"\x89PNG"
    assert (artifacts(folder, run_id) / "extra" / "6_model" / "fold_0" / "weights.safetensors").stat().st_size == 10240
    assert (artifacts(folder, run_id) / "plan.yaml").read_text() == "patch: [64, 64, 64]\n"
    assert (artifacts(folder, run_id) / "a" / "outside.txt").read_text() == "inside"
    assert run_row(folder, run_id)[0] == "FINISHED"


def test_mlflow_itself_reads_the_table(folder, monkeypatch):
    from medseg.tracking.door import connect, tracking_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(folder))  # load_table asks the store of the environment

    rows = [{"case": f"case_{i}", "dice": i / 8} for i in range(5)]
    with begin(folder) as run:
        run.table("dice", [{"case": "old", "dice": 0.0}])
        run.table("dice", rows)
    client = connect(folder)
    table = client.load_table(client.get_run(run.run_id).info.experiment_id, "dice.json", [run.run_id])
    assert table.to_dict("records") == rows


def test_nothing_names_the_user_or_the_script(folder, monkeypatch):
    monkeypatch.setenv("LOGNAME", "canary_user")
    assert getpass.getuser() == "canary_user"
    monkeypatch.setattr(sys, "argv", ["/home/canary_user/canary_script.py"])
    with begin(folder) as run:
        run.params({"epochs": 1})
    tags = dict(ask(folder, "select key, value from tags where run_uuid = ?", run.run_id))
    assert set(tags) == {"medseg.run", "mlflow.runName"}
    assert b"canary" not in (folder / "mlflow.db").read_bytes()


@pytest.mark.parametrize("name", ["a b", "größe", "no #1", "it's"])
def test_unusual_folders_and_a_foreign_working_directory(tmp_path, empty_store, name, monkeypatch, bundle):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    place = Path(name)
    place.mkdir()
    (place / "mlflow.db").write_bytes(empty_store.read_bytes())
    with begin(place) as run:
        run.text("x", "note.txt")
        assert run.register("m", bundle, alias="champion") == 1
    assert (artifacts(place, run.run_id) / "note.txt").read_text() == "x"
    fetched = tracking.fetch(place, "models:/m@champion", tmp_path / "cache")
    assert content_digest(fetched) == content_digest(bundle)
    assert not list(elsewhere.iterdir())
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("name", ["50%25", "what?"])
def test_a_folder_that_mlflow_cannot_use(tmp_path, name, caplog):
    with begin(tmp_path / name) as run:
        run.metrics({"a": 1}, step=0)
    assert "rename it" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_limits_of_mlflow_are_kept(folder):
    long, wide = "ü" * 10_000, {f"p{i}": "ü" * 6000 for i in range(120)}
    with begin(folder) as run:
        run.params({"long": long, **wide})
        run.tags({"long": long})
        run.metrics({f"m{i}": i for i in range(1200)}, step=0)
        run.metrics({"nan": math.nan, "inf": -math.inf, "good": 1}, step=1)
        run.metrics({"hd95[max-directed]": 3.0, "nsd@2mm[surfel]": 0.5, "../up": 1.0, "x" * 400: 2.0}, step=2)
        run.metrics({}, step=3)
    params = dict(ask(folder, "select key, value from params"))
    assert len(params) == 121
    assert params["long"] == "ü" * 5999 + "…"
    assert len(dict(ask(folder, "select key, value from tags"))["long"]) == 8000
    assert ask(folder, "select count(*) from metrics where step = 0") == [(1200,)]
    assert ask(folder, "select key from metrics where step = 1") == [("good",)]
    named = {key for (key,) in ask(folder, "select key from metrics where step = 2")}
    assert named == {"hd95_max-directed_", "nsd_2mm_surfel_", "up", "x" * 250}


@pytest.mark.parametrize(
    ("key", "clean"), [("a/b", "a/b"), ("", "_"), ("/", "_"), ("a//b/", "a/b"), ("..", "_"), ("a:b", "a_b")]
)
def test_keys_are_made_fit(key, clean):
    assert clean_key(key) == clean


def test_shorten_keeps_what_fits():
    assert shorten("abc", 3) == "abc"
    assert shorten("abcd", 3) == "ab…"


def test_a_resumed_run_keeps_first_parameters_and_adds_new_ones(folder, caplog):
    first = begin(folder)
    first.params({"epochs": 3, "same": 1})
    first.metrics({"loss": 1.0}, step=0)
    with begin(folder, run_id=first.run_id) as again:
        again.params({"epochs": 5, "same": 1, "new": 2})
        again.metrics({"loss": 0.5}, step=1)
    assert again.run_id == first.run_id
    assert dict(ask(folder, "select key, value from params")) == {"epochs": "3", "same": "1", "new": "2"}
    assert len(ask(folder, "select * from metrics")) == 2
    assert ask(folder, "select count(*) from runs") == [(1,)]
    assert "1 parameters that changed: epochs" in caplog.text


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_exception_passes_and_marks_the_run(folder, error, status):
    with pytest.raises(error), begin(folder) as run:
        raise error
    assert run_row(folder, run.run_id)[0] == status
    again = begin(folder, run_id=run.run_id)
    assert run_row(folder, run.run_id)[0] == "RUNNING"
    again.finish()
    assert run_row(folder, run.run_id)[0] == "FINISHED"


def test_results_added_later_leave_status_and_times(folder):
    with begin(folder) as run:
        pass
    before = run_row(folder, run.run_id)
    again = begin(folder, run_id=run.run_id)
    again.table("test", [{"case": "a", "dice": 1.0}])
    with pytest.raises(ValueError, match="evaluation"), again:
        raise ValueError("evaluation")
    assert run_row(folder, run.run_id) == before
    assert (artifacts(folder, run.run_id) / "test.json").exists()


def test_an_unknown_run_becomes_a_new_one(folder, caplog):
    with begin(folder, run_id="0" * 32) as run:
        run.metrics({"a": 1}, step=0)
    assert run.run_id != "0" * 32
    assert "has no run 000" in caplog.text
    assert ask(folder, "select count(*) from metrics") == [(1,)]


def test_a_deleted_experiment_is_taken_back(folder):
    from medseg.tracking.door import connect

    with begin(folder):
        pass
    client = connect(folder)
    client.delete_experiment(client.get_experiment_by_name("hippocampus").experiment_id)
    with begin(folder) as run:
        run.metrics({"a": 1}, step=0)
    assert run_row(folder, run.run_id)[0] == "FINISHED"


def test_disabled_touches_nothing(tmp_path, bundle):
    with begin(tmp_path / "none", enabled=False) as run:
        run.params({"a": 1})
        run.artifact(bundle)
        assert run.register("m", bundle, alias="champion") is None
    assert run.run_id is None
    assert not (tmp_path / "none").exists()


def test_what_mlflow_refuses_is_said_and_the_rest_goes_on(folder, tmp_path, bundle, caplog):
    with begin(folder) as run:
        assert run.register("bad/name", bundle) is None
        run.artifact(tmp_path / "absent.png")
        run.dataset("d" * 600, "ab" * 32, "training")
        run.metrics({"a": 1}, step=0)
    assert "Not tracked (register)" in caplog.text
    assert "absent.png does not exist" in caplog.text
    assert "Not tracked (dataset)" in caplog.text
    assert ask(folder, "select count(*) from metrics") == [(1,)]
    assert not (folder / "mlflow-spool.jsonl").exists()


def test_threads_share_a_run(folder):
    with begin(folder) as run:
        threads = [
            threading.Thread(target=lambda n=n: [run.metrics({f"m{n}": i}, step=i) for i in range(10)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ask(folder, "select count(*) from metrics") == [(40,)]


def test_processes_that_begin_together_in_a_new_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from medseg import tracking\n"
        "with tracking.start(Path(sys.argv[1]), experiment='e', run_name='r') as run: run.metrics({'a': 1}, step=0)"
    )
    place = tmp_path / "new"
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(place)], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [worker.communicate()[1] for worker in workers] == ["", "", ""]
    assert ask(place, "select status, count(*) from runs") == [("FINISHED", 3)]
    assert not (place / "mlflow-spool.jsonl").exists()
    assert not list(place.glob(".partial*"))


def test_a_new_store_is_made_quietly(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)
    with begin(tmp_path / "new" / "deep") as run:
        run.metrics({"a": 1}, step=0)
    assert (tmp_path / "new" / "deep" / "mlflow.db").is_file()
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith(("mlflow", "alembic"))]
