"""nnU-Net and MONAI in an environment of their own (scripts/install_peers.sh), on the same cases as medseg."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import HERE, Spent, limited, run

DATASET, CONFIGURATION = "Dataset004_Hippocampus", "3d_fullres"


@dataclass(frozen=True)
class NnUNet:
    """nnU-Net's folders under `work`, and the commands of its environment.

    Attributes
    ----------
    python : of the peers' environment.
    """

    python: Path
    work: Path

    def environment(self, results: str = "results") -> dict[str, str]:
        """Return where its commands find their folders; the results of each training lie apart."""
        names = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": results}
        folders = {key: str(self.work / value) for key, value in names.items()}
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        return {**limited(), **folders, "PATH": path, "nnUNet_compile": "f"}

    def command(self, name: str) -> str:
        return str(self.python.parent / name)

    def prepare(self, data: Path, train: Sequence[str], test: Sequence[str]) -> Spent:
        """Copy the cases to where nnU-Net reads them, plan and preprocess as it does; once: the times are kept."""
        told = self.work / "prepared.json"
        if told.exists():
            kept = json.loads(told.read_text(encoding="utf-8"))
            if kept["train"] != list(train) or kept["test"] != list(test):
                raise SystemExit(f"{self.work}: prepared for other cases; choose another --work")
            return Spent(kept["wall"], kept["cpu"])
        raw = self.work / "raw" / DATASET
        for folder, names in (("imagesTr", train), ("imagesTs", test)):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copy(data / "imagesTr" / f"{name}.nii.gz", raw / folder / f"{name}_0000.nii.gz")
        (raw / "labelsTr").mkdir(exist_ok=True)
        for name in train:
            shutil.copy(data / "labelsTr" / f"{name}.nii.gz", raw / "labelsTr")
        description = {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
            "numTraining": len(train),
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
        words = ["-d", "4", "-c", CONFIGURATION, "-np", "2", "-npfp", "2"]
        command = [self.command("nnUNetv2_plan_and_preprocess"), *words]
        spent = run(command, log=self.work / "prepare.log", environment=self.environment())
        kept = {"train": list(train), "test": list(test), "wall": spent.wall, "cpu": spent.cpu}
        told.write_text(json.dumps(kept), encoding="utf-8")
        return spent

    def configuration(self) -> dict[str, Any]:
        """Return what it planned."""
        plans = json.loads((self.work / "preprocessed" / DATASET / "nnUNetPlans.json").read_text(encoding="utf-8"))
        return dict(plans["configurations"][CONFIGURATION])

    def train(self, name: str, log: Path, **limits: Any) -> tuple[Spent, dict[str, Any]]:
        """Train for `seconds` or `steps` with a `seed`; returns the time and what the trainer told."""
        told = self.work / f"{name}.json"
        words = [word for key, value in limits.items() for word in (f"--{key}", str(value))]
        command = [self.python, HERE / "_nnunet_peer.py", "train", *words, "--out", told]
        spent = run(command, log=log, environment=self.environment(name))
        return spent, json.loads(told.read_text(encoding="utf-8"))

    def predict(self, name: str, masks: Path, log: Path) -> Spent:
        """Predict the test cases as `nnUNetv2_predict` does unless told: mirroring, steps of half a window."""
        images = self.work / "raw" / DATASET / "imagesTs"
        words = ["-i", images, "-o", masks, "-d", "4", "-c", CONFIGURATION, "-f", "all", "-device", "cpu"]
        return run([self.command("nnUNetv2_predict"), *words], log=log, environment=self.environment(name))


@dataclass(frozen=True)
class Monai:
    """A recipe of _monai_peer.py."""

    python: Path
    recipe: str

    def _run(self, what: str, data: Path, cases: Sequence[str], out: Path, **limits: Any) -> Spent:
        out.mkdir(parents=True, exist_ok=True)
        listed = out / f"{what}_cases.json"
        listed.write_text(json.dumps(list(cases)), encoding="utf-8")
        words = [word for key, value in limits.items() for word in (f"--{key}", str(value))]
        command = [self.python, HERE / "_monai_peer.py", what, "--recipe", self.recipe]
        return run([*command, "--data", data, "--cases", listed, "--out", out, *words], log=out / f"{what}.log")

    def train(
        self, data: Path, cases: Sequence[str], out: Path, *, seconds: float, seed: int
    ) -> tuple[Spent, Mapping[str, Any]]:
        spent = self._run("train", data, cases, out, seconds=seconds, seed=seed)
        return spent, json.loads((out / "told.json").read_text(encoding="utf-8"))

    def predict(self, data: Path, cases: Sequence[str], out: Path) -> Spent:
        return self._run("predict", data, cases, out)
