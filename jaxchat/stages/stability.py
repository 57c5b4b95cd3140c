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
        self._vocab = vocab
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._first: tuple[int, str] | None = None  # An episode's first step, and what was seen there.
        self._steps, self._last = 0, 0  # How many steps of the episode were unusual; the last of them.
        self._ruined = False  # Whether a step of the episode was worse than guessing, or not finite.
        self._reported = ""  # The reason that was given for this episode.

    def __call__(self, record: Mapping[str, Any]) -> str | None:
        """Reads the `step`, `loss` and `grad_norm` of a record; returns a report when there is one."""
        step, loss, norm = record["step"], record["loss"], record["grad_norm"]
        seen = self._seen(step, loss, norm)
        if seen is not None:
            self.unstable_steps += 1
            self._steps, self._last = self._steps + 1, step
            if self._first is None:
                self._first = step, seen
        if self._first is not None and step > self._last + WINDOW:
            self._first, self._steps, self._ruined, self._reported = None, 0, False, ""
        if self._first is None or step < self._first[0] + CONFIRM:
            return None
        return self._report()

    def finish(self) -> str | None:
        """The report of an episode that began in the last steps of a run."""
        return None if self._first is None else self._report()

    def _report(self) -> str | None:
        assert self._first is not None
        rates = self._ruined or self._steps > 2
        more = (
            f"{self._steps - 1} of the steps after it are unusual too" if self._steps > 1 else "the next steps are not"
        )
        reason = RATES if rates else BATCH
        if self._reported in (RATES, reason):
            return None
        self._reported = reason
        self.reports.append(f"step {self._first[0]}: {self._first[1]}; {more}; {reason}")
        return self.reports[-1]

    def _seen(self, step: int, loss: float | None, norm: float | None) -> str | None:
        """What is unusual about a step, None where nothing is; only finite steps say what is usual."""
        if loss is None or norm is None or not (math.isfinite(loss) and math.isfinite(norm)):
            self._ruined = True
            return "loss or gradient are not finite"
        seen = self._unusual_loss(step, loss) or self._unusual_norm(norm)
        self._losses.append(loss)
        self._norms.append(norm)
        return seen

    def _unusual_loss(self, step: int, loss: float) -> str | None:
        if self._vocab is None:
            return None
        guessing = math.log(self._vocab)
        if loss > guessing * (1 if step > FIRST else 1.5):
            self._ruined = True
            return f"the loss {loss:.3f} is above ln({self._vocab}) = {guessing:.3f}, worse than uniform guessing"
        if len(self._losses) < ENOUGH:
            return None
        recent = list(self._losses)
        before = statistics.median(recent[-10:])
        usual = statistics.median(abs(b - a) for a, b in itertools.pairwise(recent))
        return f"the loss rose from {before:.3f} to {loss:.3f}" if loss - before > SPIKE * max(usual, 1e-6) else None

    def _unusual_norm(self, norm: float) -> str | None:
        if len(self._norms) < ENOUGH:
            return None
        usual = max(statistics.median(self._norms), 1e-12)
        return (
            f"the gradient norm {norm:.3g} is {norm / usual:.0f} times its median" if norm > GRADIENT * usual else None
        )
