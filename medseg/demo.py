"""The whole journey on synthetic patients: DICOM in, check, plan, train, predict, evaluate, report, track.

Everything that it makes lies below one folder; the dataset is the same for the same seed.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medseg import api
from medseg.checking.run import check, render
from medseg.display import Display, clock
from medseg.errors import ConfigError
from medseg.evaluation.pictures import case_pictures
from medseg.evaluation.table import MEAN, Evaluation
from medseg.files import write_atomically
from medseg.phantom.baseline import threshold_baseline
from medseg.phantom.dataset import write_dataset
from medseg.spec import load_dataset

STEPS = 550
"""Training steps: by steps and not by the clock, so that the demo repeats itself to the last bit."""
PICTURES = 3


def run_demo(out: Path, *, seed: int, console: Console) -> float:
    """Make patients in OUT/data, and everything that medseg makes of them beside it; returns the mean test Dice.

    Raises
    ------
    ConfigError : `out` holds something that is not a demo.
    """
    began = time.monotonic()
    if out.exists() and any(out.iterdir()) and not (out / "data" / "dataset.yaml").exists():
        raise ConfigError(f"{out}: this folder holds other things; choose an empty or a new one with --out")

    def say(text: str) -> None:
        console.print(f"\n[{clock(time.monotonic() - began)}] {text}", highlight=False, markup=False)

    say("1 of 7  synthetic patients, as DICOM series of several scanners")
    data = write_dataset(out / "data", seed=seed).parent
    say("2 of 7  check: is the dataset fit to learn from?")
    console.print(render(check(data, out=out / "check")))
    say(f"3 of 7  plan and train: {STEPS} steps of a 3-D U-Net")
    run = out / "run"
    result = api.train(data, out=run, steps=STEPS, seed=seed, track=out, model_name="demo", display=Display(console))
    say("4 of 7  predict the patients that were held out")
    masks = out / "masks"
    predicted = api.predict(data, model=run, out=masks, display=Display(console))
    console.print(f"{len(predicted.select('done'))} of {len(predicted.entries)} done", highlight=False)
    say("5 of 7  evaluate")
    evaluation = api.evaluate(masks, data, out=out / "scores", track=out)
    console.print(score_table(evaluation, threshold_baseline(load_dataset(data))))
    say("6 of 7  report and pictures")
    page = api.report(out / "scores", out=out / "report", predictions=masks, reference=data)
    draw(evaluation, masks, data, out / "pictures")
    say("7 of 7  done. Where to look:")
    for what, where in (
        ("check", out / "check" / "check.html"),
        ("plan, with reasons", run / "3_plan.yaml"),
        ("curves", run / "5_folds" / "0" / "curves" / "curves.png"),
        ("model", result.model),
        ("masks", masks),
        ("pictures", out / "pictures"),
        ("report", page),
        ("MLflow", f"mlflow ui --backend-store-uri sqlite:///{(out / 'mlflow.db').resolve()}"),
    ):
        console.print(f"  {what:20}{where}", highlight=False, markup=False, soft_wrap=True)
    mean = evaluation.mean_dice or 0.0
    say(f"Mean Dice on the held-out patients: {mean:.3f}")
    return mean


def score_table(evaluation: Evaluation, baseline: dict[str, float]) -> Table:
    """Return the Dice of each label beside that of the best intensity threshold."""
    table = Table("label", "Dice (median)", "Dice (mean)", "n", "best threshold", title="Held-out patients")
    known = {**baseline, MEAN: sum(baseline.values()) / max(1, len(baseline))}
    for row in evaluation.summary:
        if row.metric == "dice":
            numbers = [("" if v is None else f"{v:.3f}") for v in (row.median, row.mean, known.get(row.label))]
            table.add_row(row.label, numbers[0], numbers[1], str(row.n_used), numbers[2])
    return table


def draw(evaluation: Evaluation, masks: Path, data: Path, folder: Path) -> None:
    """Draw a few cases: the prediction painted, the reference outlined."""
    picture = case_pictures(masks, data)
    for case in evaluation.cases[:PICTURES]:
        content = picture(case)

        def write(path: Path, content: bytes = content) -> None:
            path.write_bytes(content)

        write_atomically(folder / f"{case}.png", write)
