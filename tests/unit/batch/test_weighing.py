"""A worker is weighed by what is its own: pages of a file go whenever the system needs their place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from medseg.batch.process import Process

MIB = 1 << 20
PROGRAM = """
import sys
import numpy as np
file = np.memmap(sys.argv[1], np.uint8, "w+", shape=(200 << 20,))
own = np.ones(100 << 20, np.uint8)
file[:] = 1
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what is shared")
def test_pages_of_a_file_do_not_weigh(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == b"ready\n"
            process = Process()
            process._process = started
            assert 100 * MIB < process.memory() < 200 * MIB
        finally:
            started.kill()
