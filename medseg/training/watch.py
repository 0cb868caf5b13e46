"""What a person and the tracking store see of the loop while it runs."""

from __future__ import annotations

from medseg.display import Display, clock
from medseg.tracking import Tracker
from medseg.training.health import flat, learnt_nothing
from medseg.training.loop import Job
from medseg.training.schedule import Schedule
from medseg.training.state import LoopState, mean_dice


class Watch:
    """Shows and tracks what the loop reports."""

    def __init__(self, display: Display, tracker: Tracker, job: Job, number: int, folds: int) -> None:
        self.display, self.tracker, self.job = display, tracker, job
        self.prefix = f"fold_{number}/" if folds > 1 else ""
        self._validated = -1
        self._pace = 0.0
        self._pieces = 1
        self._flat = False

    def __call__(self, state: LoopState, schedule: Schedule, step_seconds: float) -> None:
        """Note a step (or, with 0 seconds, a validation)."""
        if step_seconds:
            self._pace = step_seconds if not self._pace else 0.95 * self._pace + 0.05 * step_seconds
        last = state.validations[-1] if state.validations else None
        recent = state.losses[-20:]
        dice = f" Dice {mean_dice(last['dice']):.3f}" if last else ""
        note = f"step {state.step} loss {sum(recent) / len(recent):.3f}{dice}"
        left = clock(schedule.remaining(state.step, self._pace))
        self.display.show(schedule.progress(state.step), f"{note} left {left}")
        if state.pieces != self._pieces:
            self._pieces = state.pieces
            self.display.say(
                f"  step {state.step:5d}  memory is short: each batch of {self.job.plan.batch_size} is computed in "
                f"{state.pieces} pieces; the result is the same, a step takes about a third longer"
            )
        if last and last["step"] == state.step and state.step != self._validated:
            self._validated = state.step
            self.tracker.metrics(self._metrics(state, last["dice"]), step=state.step)
            labels = ", ".join(f"{name} {value:.3f}" for name, value in last["dice"].items())
            self.display.say(f"  step {state.step:5d}  {clock(state.seconds):>7}  validation Dice: {labels}")
            if not self._flat and (words := flat(state.losses, schedule.progress(state.step))):
                self._flat = True
                self.display.say(f"  {words}")

    def ended(self, state: LoopState) -> LoopState:
        """Say so where nothing was learnt, and return the state."""
        scored = any(row["dice"] for row in state.validations)
        if words := learnt_nothing(state.best_dice, scored):
            self.display.say(f"  {words}")
        return state

    def _metrics(self, state: LoopState, dice: dict[str, float]) -> dict[str, float]:
        since = state.validations[-2]["step"] if len(state.validations) > 1 else 0
        losses = state.losses[since:] or state.losses[-1:]
        rows = {
            "train_loss": sum(losses) / len(losses),
            "learning_rate": self.job.plan.learning_rate * state.factors[-1],
            "data_share": state.pace.data_share,
            "val_dice_mean": mean_dice(dice),
            **{f"val_dice_{name}": value for name, value in dice.items()},
        }
        return {self.prefix + name: value for name, value in rows.items()}
