"""Seconds until MONAI is there: as it is, and as the program medseg imports it.

    python benchmarks/startup.py --rounds 7

A process each, in turn; both import torch first, whose time is not counted. Medians of the clock and of processors.
"""

import argparse
import json
import statistics
import subprocess
import sys

from _common import limited, machine

PROGRAM = """
import sys, time
import torch
if sys.argv[1] == "medseg":
    from medseg.startup import quick_start
    quick_start()
began, used = time.monotonic(), time.process_time()
import monai.transforms, monai.data
print(time.monotonic() - began, time.process_time() - used, len(sys.modules))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    found: dict[str, list[list[float]]] = {"MONAI as it is": [], "medseg": []}
    for _ in range(rounds):
        for name, rows in found.items():
            command = [sys.executable, "-W", "ignore", "-c", PROGRAM, name]
            done = subprocess.run(command, env=limited(), check=True, capture_output=True, text=True)
            rows.append([float(word) for word in done.stdout.split()])
    print(json.dumps(machine()))
    for name, rows in found.items():
        wall, used, modules = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name}: {wall:.2f} s, of processors {used:.2f} s, {modules:.0f} modules")


if __name__ == "__main__":
    main()
