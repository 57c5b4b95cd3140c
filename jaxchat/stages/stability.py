"""Detects unstable training from the losses and gradient norms of a run."""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW = 50  # Number of steps that define what is usual; so many usual steps end an episode.
FIRST = 10  # Number of first steps whose loss may be up to 1.5 times that of uniform guessing.
ENOUGH = 20  # Number of steps before spikes of loss and gradient norm are judged.
SPIKE = 8.0  # Unusual rise of the loss above the last ten, in median absolute changes between steps,
RISE = 2.5  # and in the largest usual rise: batches of different sources have losses of different sizes.
RISES = 200  # Number of steps among which the largest usual rise is looked for.
GRADIENT = 10.0  # Unusual gradient norm, in medians.
CONFIRM = 5  # Steps after the first unusual one before the likely reason is reported.

RATES = "the learning rates are probably too high: lower --optimizer.scale"
BATCH = "probably an unusual batch: --optimizer.clip limits its effect"


class Stability:
    """Counts unusual steps of a run and reports episodes of them.

    A step is unusual if loss or gradient are not finite, if the loss is above ln(vocab) (uniform guessing) or far above
    the losses before it, or if the gradient norm is far above the median. Unusual steps close to each other form one
    episode. An episode is reported once, a few steps after its first step; a second time only if it was first blamed
    on a single batch and then went on. `vocab` is None if the loss is not a likelihood, as in RL; then only its
    finiteness and the gradient norm are judged.

    Attributes:
        unstable_steps: number of unusual steps.
        reports: one sentence per report: first step, symptom, likely reason.
    """

    def __init__(self, vocab: int | None) -> None:
        self.unstable_steps = 0
        self.reports: list[str] = []
        self._guessing = math.inf if vocab is None else math.log(vocab)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._rises: deque[float] = deque([0.0], maxlen=RISES)  # Those of usual steps.
        self._episode: list[tuple[int, str, bool]] = []  # Unusual steps: number, symptom, whether rates are blamed.
        self._reason = ""  # The reason reported for this episode, if any.

    def __call__(self, record: Mapping[str, Any]) -> str | None:
        """Judges the `step`, `loss` and `grad_norm` of a record; returns a new report if there is one."""
        step = record["step"]
        if self._episode and step > self._episode[-1][0] + WINDOW:
            self._episode, self._reason = [], ""
        symptom, rates = self._symptom(step, record["loss"], record["grad_norm"])
        if symptom:
            self.unstable_steps += 1
            self._episode.append((step, symptom, rates))
        return self.finish() if self._episode and step >= self._episode[0][0] + CONFIRM else None

    def finish(self) -> str | None:
        """Returns the report of the current episode unless it was made before; call it after the last step as well."""
        reason = RATES if len(self._episode) > 2 or any(rates for _, _, rates in self._episode) else BATCH
        if not self._episode or self._reason in (RATES, reason):
            return None
        self._reason, others = reason, len(self._episode) - 1
        after = f"{others} of the steps after it are unusual too" if others else "the next steps are not"
        self.reports.append(f"step {self._episode[0][0]}: {self._episode[0][1]}; {after}; {reason}")
        return self.reports[-1]

    def _symptom(self, step: int, loss: float | None, norm: float | None) -> tuple[str, bool]:
        """Returns what is unusual about a step ("" for nothing), and whether the learning rates are to blame."""
        if loss is None or norm is None or not (math.isfinite(loss) and math.isfinite(norm)):
            return "loss or gradient are not finite", True
        losses, norms, symptom = list(self._losses), list(self._norms), ""
        self._losses.append(loss)  # Only finite steps define what is usual.
        self._norms.append(norm)
        if loss > self._guessing * (1 if step > FIRST else 1.5):
            limit = f"ln({math.exp(self._guessing):.0f}) = {self._guessing:.3f}"
            return f"the loss {loss:.3f} is above {limit}, worse than uniform guessing", True
        if len(losses) < ENOUGH:
            return "", False
        rise = loss - (before := statistics.median(losses[-10:]))
        usual_norm = max(statistics.median(norms), 1e-12)
        change = statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))
        if self._guessing < math.inf and rise > max(SPIKE * change, RISE * max(self._rises), 1e-5):
            symptom = f"the loss rose from {before:.3f} to {loss:.3f}"
        elif norm > GRADIENT * usual_norm:
            symptom = f"the gradient norm {norm:.3g} is {norm / usual_norm:.0f} times its median"
        else:
            self._rises.append(rise)
        return symptom, False
