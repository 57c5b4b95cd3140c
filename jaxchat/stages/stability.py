"""Recognises unstable training in the losses and gradient norms of a run."""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW = 50  # Steps that define what is usual, and calm steps that end an episode.
FIRST = 10  # Steps at the start that may be worse than guessing, by less than half.
ENOUGH = 20  # Steps before anything can be called unusual.
SPIKE = 8.0  # Rise of the loss, in median absolute changes from step to step.
GRADIENT = 10.0  # Gradient norm, in medians.
CONFIRM = 5  # Steps after the first unusual one that decide on the likely reason.

RATES = "the learning rates are probably too high: lower --optimizer.scale"
BATCH = "probably a batch unlike the others: --optimizer.clip limits the step that such a batch takes"


class Stability:
    """Follows a run step by step.

    A step is unusual if it is not finite, if its loss is above ln(vocab) (worse than uniform guessing) or far above the
    losses before it, or if its gradient norm is far above the median. Unusual steps close to each other are one
    episode. An episode is reported once, a few steps after its first; a second time only if it looked like a single
    batch and was not. `vocab` is None where the loss is no likelihood, as in RL: then the loss is not judged.

    Attributes:
        unstable_steps: how many steps were unusual.
        reports: a sentence for each report: first step, what was seen, likely reason.
    """

    def __init__(self, vocab: int | None) -> None:
        self.unstable_steps = 0
        self.reports: list[str] = []
        self._guessing = math.inf if vocab is None else math.log(vocab)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._episode: list[tuple[int, str, bool]] = []  # Unusual steps: what was seen, whether it blames the rates.
        self._reason = ""  # That was reported for this episode.

    def __call__(self, record: Mapping[str, Any]) -> str | None:
        """Reads the `step`, `loss` and `grad_norm` of a record; returns a report when there is one."""
        step = record["step"]
        if self._episode and step > self._episode[-1][0] + WINDOW:
            self._episode, self._reason = [], ""
        seen, rates = self._unusual(step, record["loss"], record["grad_norm"])
        if seen:
            self.unstable_steps += 1
            self._episode.append((step, seen, rates))
        return self.finish() if self._episode and step >= self._episode[0][0] + CONFIRM else None

    def finish(self) -> str | None:
        """The report of an episode, if it has none; for the last steps of a run."""
        reason = RATES if len(self._episode) > 2 or any(rates for _, _, rates in self._episode) else BATCH
        if not self._episode or self._reason in (RATES, reason):
            return None
        self._reason, others = reason, len(self._episode) - 1
        after = f"{others} of the steps after it are unusual too" if others else "the next steps are not"
        self.reports.append(f"step {self._episode[0][0]}: {self._episode[0][1]}; {after}; {reason}")
        return self.reports[-1]

    def _unusual(self, step: int, loss: float | None, norm: float | None) -> tuple[str, bool]:
        """What is unusual about a step, "" where nothing is, and whether it blames the rates."""
        if loss is None or norm is None or not (math.isfinite(loss) and math.isfinite(norm)):
            return "loss or gradient are not finite", True
        losses, norms, seen = list(self._losses), list(self._norms), ""
        self._losses.append(loss)  # Only finite steps say what is usual.
        self._norms.append(norm)
        if loss > self._guessing * (1 if step > FIRST else 1.5):
            limit = f"ln({math.exp(self._guessing):.0f}) = {self._guessing:.3f}"
            return f"the loss {loss:.3f} is above {limit}, worse than uniform guessing", True
        if len(losses) >= ENOUGH:
            before, usual_norm = statistics.median(losses[-10:]), max(statistics.median(norms), 1e-12)
            change = statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))
            if self._guessing < math.inf and loss - before > SPIKE * max(change, 1e-6):
                seen = f"the loss rose from {before:.3f} to {loss:.3f}"
            elif norm > GRADIENT * usual_norm:
                seen = f"the gradient norm {norm:.3g} is {norm / usual_norm:.0f} times its median"
        return seen, False
