"""Slots: the batch of samples that are decoded together, and their cache on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.decode import compiled
from jaxchat.decode.programs import DecodeState, StepOutputs
from jaxchat.decode.prompts import SHORTEST_ROW, bucket
from jaxchat.decode.sample import Sample
from jaxchat.decode.sampling import LEVELS, History, Level, Rows, SamplingParams, beginning, pack
from jaxchat.decode.speculative import AcceptanceTracker, Speculation, repeats
from jaxchat.model.transformer import Cache, Params, Transformer

_IDLE = (SamplingParams(temperature=0), 0)


class Wanted(NamedTuple):
    """What a dispatch must compute for its samples: the sampling level, and whether any sample reports the most likely
    tokens, returns its support, or has penalties.
    """

    level: Level
    top: bool
    return_support: bool
    penalised: bool


@dataclass(frozen=True)
class EngineConfig:
    """Static sizes of an engine. Changing any of them compiles new programs.

    Attributes:
        length: context length, in positions per cache row.
        slots: maximum number of samples decoded at the same time.
        steps: decoding steps per dispatch.
        prefill_chunk: maximum number of prompt tokens processed in one prefill call.
        prefill_batch: number of prompts prefilled together.
        adapt: shrink the batch and the cache to the smallest power of two that fits the active requests. If false, all
            requests use one compiled shape, so results are identical bit for bit.
        prefix_cache_bytes: memory limit of the prefix cache.
    """

    length: int
    slots: int = 8
    steps: int = 8
    prefill_chunk: int = 512
    prefill_batch: int = 1
    adapt: bool = True
    prefix_cache_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("length", "slots", "steps", "prefill_chunk", "prefill_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class Slots:
    """The samples that are being decoded, with one slot and one cache row each, in the sizes of `shape`."""

    def __init__(
        self,
        transformer: Transformer,
        shape: EngineConfig,
        speculation: Speculation | None,
        draft: tuple[Transformer, Params] | None,
    ) -> None:
        self.samples: list[Sample | None] = []
        self._transformer, self._shape = transformer, shape
        self._speculation, self._draft, self._write, self._most_new = speculation, draft, 1, shape.steps
        self._draft_cache: Cache | None = None
        if speculation is not None:
            self._write = speculation.tokens + 1
            self._most_new = max(shape.steps, speculation.rounds * self._write)
            self._acceptance = AcceptanceTracker(speculation.least)
        if draft is not None:
            self._draft_cache = compiled.empty(draft[0], shape.slots, shape.length, self._write)
        self._length = 0
        self._cache: Cache | None = None
        self._history: History | None = None
        self._rows: Rows | None = None
        """Sampling parameters on the device. They are sent only when samples enter, because sending them at every
        dispatch takes 8 percent of its time at batch 1."""

    @property
    def active(self) -> list[Sample]:
        return [sample for sample in self.samples if sample is not None]

    @property
    def free(self) -> int:
        return self._shape.slots - len(self.active)

    def release(self) -> None:
        """Empties the slots of samples that have ended."""
        self.samples = [None if sample is None or sample.finish_reason else sample for sample in self.samples]

    def fit(self, entering: Sequence[Sample] = ()) -> None:
        """Resizes the batch and the cache to fit the active and entering samples and their next dispatch."""
        samples = [*self.active, *entering]
        slots, length = self._shape.slots, self._shape.length
        if self._shape.adapt:
            need = max((sample.position + 1 + self._most_new for sample in samples), default=1)
            slots = bucket(len(samples), shortest=1, longest=self._shape.slots)
            length = bucket(need, shortest=SHORTEST_ROW, longest=self._shape.length)
        if (slots, length) == (len(self.samples), self._length):
            return
        if entering and self.active:  # More samples may enter before the next dispatch: only grow.
            slots, length = max(slots, len(self.samples)), max(length, self._length)
        if self._cache is None:
            self._cache = compiled.empty(self._transformer, slots, length, self._write)
            self.samples, self._length = [None] * slots, length
        if (slots, length) != (len(self.samples), self._length):
            order = list(range(len(self.samples)))
            if slots < len(order):
                order.sort(key=lambda slot: self.samples[slot] is None)
            take = np.resize(np.array(order, np.int32), slots)  # New slots start as idle copies of others.
            self.samples = ([self.samples[slot] for slot in order] + [None] * slots)[:slots]
            self._cache, self._length = (
                compiled.move(self._transformer, self._cache, take, length=length, write=self._write),
                length,
            )
            if self._history is not None:
                self._history = History(*(column[take] for column in self._history))
        self._rows = None

    def enter(
        self, source: Cache, logits_RV: jax.Array, entering: Sequence[tuple[int, Sample]], draft: Cache | None = None
    ) -> None:
        """Copies prefilled prompts into free slots and samples the first token of each.

        `entering` pairs each sample with the row of `source` and `logits_RV` that holds its prompt. `draft` is the
        draft model's cache of the same prompts.
        """
        assert self._cache is not None
        free = [slot for slot, sample in enumerate(self.samples) if sample is None]
        width, vocab = logits_RV.shape
        for start in range(0, len(entering), width):
            group = entering[start : start + width]
            take, slot = np.zeros(width, np.int32), np.full(width, len(self.samples), np.int32)
            params = [_IDLE] * width
            for i, (row, sample) in enumerate(group):
                take[i], slot[i] = row, free[start + i]
                params[i] = sample.request.sampling, sample.index
                self.samples[slot[i]] = sample
            prompts = None
            if any(sample.request.sampling.penalised for _, sample in group):
                asked = [(sample.prompt, sample.request.sampling) for _, sample in group]
                prompts = beginning(asked, rows=width, vocab=vocab)
                if self._history is None:
                    empty = (jnp.zeros((len(self.samples), vocab), x.dtype) for x in prompts)
                    self._history = History(*empty)
            level, top, return_support, _ = _wanted([sample for _, sample in group])
            self._cache, history, choice, likely = compiled.admit(
                self._cache,
                self._history if prompts is not None else None,
                source,
                logits_RV,
                take,
                slot,
                pack(params),
                prompts,
                level=level,
                top=top,
                return_support=return_support,
            )
            if prompts is not None:
                self._history = history
            if draft is not None:
                self._draft_cache = compiled.seat(self._draft_cache, draft, take, slot)
            one = StepOutputs(choice.token_B, choice.logprob_B, choice.sampling_logprob_B, likely, choice.support_BC)
            steps = jax.tree.map(lambda x: x[None], jax.device_get(one))
            for i, (_, sample) in enumerate(group):
                _append(sample, steps, 0, i)
        self._rows = None

    def decode(self, params: Params) -> None:
        """Runs one dispatch: every active sample gets up to `steps` tokens, or more if guesses are accepted."""
        assert self._cache is not None
        B, K = len(self.samples), self._shape.steps
        position, token, limit = np.full(B, -1, np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
        pauses = [sorted(sample.pauses) if sample else [] for sample in self.samples]
        stops = np.full((B, max(4, *map(len, pauses))), -1, np.int32)
        forced = np.full((K, B), -1, np.int32)
        for slot, sample in enumerate(self.samples):
            if sample is not None:
                position[slot], token[slot], limit[slot] = sample.position, sample.tokens[-1], sample.limit
                stops[slot, : len(pauses[slot])] = pauses[slot]
                queued = list(sample.forced)[:K]
                forced[: len(queued), slot] = queued
        if self._rows is None:
            asked = [(sample.request.sampling, sample.index) if sample else _IDLE for sample in self.samples]
            self._rows = jax.tree.map(jnp.asarray, pack(asked))
        level, top, return_support, penalised = _wanted(self.active)
        running = DecodeState(token, position, limit, stops)
        speculates = not (top or return_support or penalised) and self._speculates()
        if speculates:
            text_BL = np.zeros((B, self._shape.length), np.int32)
            for slot, sample in enumerate(self.samples):
                if sample is not None:
                    text_BL[slot] = sample.text
            draft_params = None if self._draft is None else self._draft[1]
            self._cache, self._draft_cache, steps = compiled.guess_and_verify(
                self._transformer,
                None if self._draft is None else self._draft[0],
                params,
                self._cache,
                self._draft_cache,
                running,
                self._rows,
                text_BL,
                draft_params,
                settings=self._speculation,
                level=level,
            )
        else:
            history = self._history if penalised else None
            options = {"level": level, "top": top, "return_support": return_support}
            arguments = (self._transformer, params, self._cache, history, running, self._rows, forced)
            self._cache, history, steps = compiled.decode(*arguments, **options)
            if penalised:
                self._history = history
        steps = jax.device_get(steps)
        if speculates:  # (rounds, B, tokens) to (rounds * tokens, B)
            count = (steps.token_KB >= 0).sum(axis=2)
            self._acceptance.note(float((count - 1)[count > 0].mean()))
            token_KB, logprob_KB, sampling_KB = (np.moveaxis(x, 2, 1).reshape(-1, B) for x in steps[:3])
            steps = StepOutputs(token_KB, logprob_KB, sampling_KB)
        self._append_all(steps)

    def _speculates(self) -> bool:
        """Whether to speculate: no tool output is queued and, without a draft model, lookups are likely to succeed."""
        if self._speculation is None or any(sample.forced for sample in self.active):
            return False
        if self._draft is not None:
            return True
        ngram = self._speculation.ngram
        return self._acceptance.wants() and any(repeats(s.text[: s.position + 1], ngram) for s in self.active)

    def _append_all(self, steps: StepOutputs) -> None:
        """Appends the decoded tokens to their samples."""
        for k, slot in np.argwhere(steps.token_KB >= 0).tolist():
            sample = self.samples[slot]
            if sample is not None:
                _append(sample, steps, k, slot)

    def snapshot(self, sample: Sample) -> tuple[tuple[int, ...], Cache]:
        """Returns the tokens in the cache of a finished sample that still has its slot, and the cache, one row."""
        assert self._cache is not None
        tokens = (*sample.prompt, *sample.tokens, *sample.surplus)[:-1]
        length = bucket(len(tokens), shortest=SHORTEST_ROW, longest=self._shape.length)
        slot = np.array([self.samples.index(sample)], np.int32)
        return tokens, compiled.move(self._transformer, self._cache, slot, length=length, write=self._write)


def _wanted(samples: Sequence[Sample]) -> Wanted:
    asked = [sample.request.sampling for sample in samples]
    return Wanted(
        level=max((params.level for params in asked), key=LEVELS.index),
        top=any(params.top_logprobs for params in asked),
        return_support=any(sample.returns_support for sample in samples),
        penalised=any(params.penalised for params in asked),
    )


def _append(sample: Sample, steps: StepOutputs, k: int, slot: int) -> None:
    """Appends the output of step k of a slot to its sample."""
    logprob, sampling_logprob = float(steps.logprob_KB[k, slot]), float(steps.sampling_logprob_KB[k, slot])
    likely = [] if steps.top_KBN is None else list(zip(*(column[k, slot].tolist() for column in steps.top_KBN)))
    support_C = None if steps.support_KBC is None else np.asarray(steps.support_KBC[k, slot])
    sample.give(int(steps.token_KB[k, slot]), logprob, sampling_logprob, likely, support_C)
