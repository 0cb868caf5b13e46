from __future__ import annotations

import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from medseg.tracking.door import connect


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An empty MLflow database: making one takes 1.5 s, copying it nothing."""
    folder = tmp_path_factory.mktemp("store")
    connect(folder)
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path, empty_store) -> Path:
    """A working folder with its own store."""
    place = tmp_path / "work"
    place.mkdir()
    shutil.copyfile(empty_store, place / "mlflow.db")
    return place


@pytest.fixture
def dead_server() -> str:
    """A URI where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent_server():
    """A server that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        stop, held = threading.Event(), []

        def accept() -> None:
            listener.settimeout(0.1)
            while not stop.is_set():
                try:
                    held.append(listener.accept()[0])
                except TimeoutError:
                    time.sleep(0)

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        stop.set()
        thread.join()
        for connection in held:
            connection.close()


@pytest.fixture
def bundle(tmp_path) -> Path:
    place = tmp_path / "6_model"
    (place / "fold_0").mkdir(parents=True)
    (place / "plan.yaml").write_text("patch: [64, 64, 64]\n")
    (place / "fold_0" / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    return place
