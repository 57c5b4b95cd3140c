"""Recognises unstable training in the losses and gradient norms of a run."""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW = 50  # Steps that define what is usual, and calm steps that end an episode.
FIRST = 10  # Steps at the start that may be worse than guessing.
ENOUGH = 20  # Steps before anything can be called unusual.
SPIKE = 8.0  # Rise of the loss, in median absolute changes from step to step.
GRADIENT = 10.0  # Gradient norm, in medians.
CONFIRM = 5  # Steps after the first unusual one that decide on the likely reason.

RATES = "the learning rates are probably too high: lower --optimizer.scale"
BATCH = "the batch was probably unlike the others; --optimizer.clip limits the step that such a batch takes"


class Stability:
    """Follows a run step by step.

    A step is unusual if its loss is above ln(vocab) (worse than uniform guessing), or far above the losses before it,
    or if its gradient norm is far above the median. Unusual steps close to each other are one episode, which has one
    report. `vocab` is None where the loss is no likelihood, as in RL: then only the gradient norm is judged.

    Attributes:
        unstable_steps: how many steps were unusual.
        reports: one sentence for each finished or confirmed episode: first step, what was seen, likely reason.
    """

    def __init__(self, vocab: int | None) -> None:
        self.unstable_steps = 0
        self.reports: list[str] = []
        self._vocab = vocab
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._first: tuple[int, str] | None = None  # An episode's first step, and what was seen there.
        self._high, self._last = 0, 0  # Steps of the episode with an unusual loss; its last unusual step.

    def __call__(self, record: Mapping[str, Any]) -> str | None:
        """Reads the `step`, `loss` and `grad_norm` of a record; returns the report of an episode once it is confirmed.

        Steps that are not finite are counted elsewhere, as skipped.
        """
        step, loss, norm = record["step"], record["loss"], record["grad_norm"]
        if loss is None or norm is None or not (math.isfinite(loss) and math.isfinite(norm)):
            return None
        seen = self._unusual_loss(step, loss)
        self._high += seen is not None
        seen = seen or self._unusual_norm(norm)
        self._losses.append(loss)
        self._norms.append(norm)
        if seen is not None:
            self.unstable_steps += 1
            self._last = step
            if self._first is None:
                self._first = step, seen
        if self._first is None:
            return None
        start, text = self._first
        if step == start + CONFIRM:
            if self._high > 1:
                reason = f"and the loss stays high; {RATES}"
            else:
                reason = f"and the loss is back to what it was; {BATCH}"
            self.reports.append(f"step {start}: {text}, {reason}")
            return self.reports[-1]
        if step > self._last + WINDOW:
            self._first, self._high = None, 0
        return None

    def _unusual_loss(self, step: int, loss: float) -> str | None:
        if self._vocab is None:
            return None
        guessing = math.log(self._vocab)
        if step > FIRST and loss > guessing:
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
