"""Slots: the batch of samples that are decoded together, and their cache on the device."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.decode import programs
from jaxchat.decode.prompts import SHORTEST_CHUNK, SHORTEST_ROW, EngineConfig, bucket, next_chunk
from jaxchat.decode.sample import Sample
from jaxchat.decode.sampling import LEVELS, Choice, History, Level, SamplingParams, SamplingRows, beginning, pack
from jaxchat.decode.speculative import AcceptanceTracker, Speculation, repeats, speculate
from jaxchat.model.transformer import Cache, Params, Transformer

_IDLE = (SamplingParams(temperature=0), 0)


class PrefilledPrompt(NamedTuple):
    """A prefilled prompt (its row of a cache and of logits) whose samples are waiting for a slot."""

    cache: Cache
    logits_RV: jax.Array
    row: int
    waiting: deque[Sample]


class Slots:
    """The active samples, their cache on the device, and its row of sampling parameters per slot."""

    def __init__(
        self,
        transformer: Transformer,
        shape: EngineConfig,
        *,
        speculation: Speculation | None = None,
        draft: tuple[Transformer, Params] | None = None,
    ) -> None:
        self._transformer, self._shape, self._speculation = transformer, shape, speculation
        self._draft = None if draft is None else draft[0]
        self._draft_params = None if draft is None else draft[1]
        self._write, self._most_new = 1, shape.steps
        if speculation is not None:
            self._write = speculation.tokens + 1
            self._longest_chunk = max(self._write, min(shape.prefill_chunk, shape.length))
            self._most_new = max(shape.steps, speculation.rounds * self._write)
            self._acceptance = AcceptanceTracker(speculation.least)
        self.clear()

    def clear(self) -> None:
        """Drops all samples and frees the caches."""
        self.samples: list[Sample | None] = []
        self._drafted = [0] * self._shape.slots
        """Number of positions of each slot in the draft model's cache."""
        self._length = 0
        self._cache: Cache | None = None
        self._draft_cache: Cache | None = None
        self._history: History | None = None
        self._rows: SamplingRows | None = None
        """Sampling parameters on the device. They are sent only when samples enter, because sending them at every
        dispatch takes 8 percent of its time at batch 1."""

    @property
    def active(self) -> list[Sample]:
        """The samples that have a slot."""
        return [sample for sample in self.samples if sample is not None]

    @property
    def free(self) -> int:
        """Number of slots without a sample."""
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
        if entering and self.active:  # More samples may enter before the next dispatch: only grow.
            slots, length = max(slots, len(self.samples)), max(length, self._length)
        if (slots, length) == (len(self.samples), self._length):
            return
        if self._cache is None:
            self._cache, self.samples = programs.empty(self._transformer, slots, length, self._write), [None] * slots
            if self._draft is not None:
                self._draft_cache = programs.empty(self._draft, slots, length, self._longest_chunk)
        else:
            order = list(range(len(self.samples)))
            if slots < len(order):
                order.sort(key=lambda slot: self.samples[slot] is None)
            take = np.resize(np.array(order, np.int32), slots)  # New slots start as idle copies of others.
            self.samples = ([self.samples[slot] for slot in order] + [None] * slots)[:slots]
            self._cache = programs.move(self._transformer, self._cache, take, length=length, write=self._write)
            if self._history is not None:
                self._history = History(*(column[take] for column in self._history))
        self._length, self._rows = length, None

    def enter(self, prompt: PrefilledPrompt, entering: Sequence[Sample]) -> None:
        """Copies a prefilled prompt into free slots and samples the first token of each sample."""
        assert self._cache is not None
        free = [slot for slot, sample in enumerate(self.samples) if sample is None]
        width, vocab = prompt.logits_RV.shape
        for start in range(0, len(entering), width):
            group = entering[start : start + width]
            take, slot = np.full(width, prompt.row, np.int32), np.full(width, len(self.samples), np.int32)
            params = [_IDLE] * width
            for i, sample in enumerate(group):
                slot[i] = free[start + i]
                params[i] = sample.request.sampling, sample.index
                self.samples[slot[i]], self._drafted[slot[i]] = sample, 0
            prompts = None
            if self._history is not None or any(sample.request.sampling.penalised for sample in group):
                asked = [(sample.prompt, sample.request.sampling) for sample in group]
                prompts = beginning(asked, rows=width, vocab=vocab)
                if self._history is None:
                    self._history = History(*(jnp.zeros((len(self.samples), vocab), x.dtype) for x in prompts))
            lengths = prompt.cache.length_B
            arguments = (self._history, prompt.logits_RV, lengths, take, slot, pack(params), prompts)
            self._history, choice = programs.first(*arguments, **_options(group))
            self._cache = programs.seat(self._cache, prompt.cache, take, slot)
            first = jax.device_get(choice)
            for i, sample in enumerate(group):
                sample.give(*(None if column is None else column[i] for column in first))
        self._rows = None

    def decode(self, params: Params) -> None:
        """Runs one dispatch: every active sample gets up to `steps` tokens, or more if guesses are accepted."""
        assert self._cache is not None
        B, K = len(self.samples), self._shape.steps
        position, token, limit = np.full(B, -1, np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
        pauses = [sample.pauses if sample else [] for sample in self.samples]
        stops = np.full((B, max(programs.STOPS, *map(len, pauses))), -1, np.int32)
        forced = np.full((K, B), -1, np.int32)
        for slot, sample in enumerate(self.samples):
            if sample is not None and sample.output is None:
                position[slot], token[slot], limit[slot] = sample.position, sample.tokens[-1], sample.limit
                stops[slot, : len(pauses[slot])] = pauses[slot]
                queued = list(sample.forced)[:K]
                forced[: len(queued), slot] = queued
        if self._rows is None:
            asked = [(sample.request.sampling, sample.index) if sample else _IDLE for sample in self.samples]
            self._rows = jax.tree.map(jnp.asarray, pack(asked))
        options = _options(self.active)
        penalised = any(sample.request.sampling.penalised for sample in self.active)
        running = programs.DecodeState(token, position, limit, stops)
        if not (options["return_support"] or options["return_top"] or penalised) and self._speculates():
            steps = self._speculate(params, running, options["level"])
        else:
            if not penalised:
                self._history = None
            arguments = (self._transformer, params, self._cache, self._history, running, self._rows, forced)
            self._cache, self._history, choice = programs.decode(*arguments, **options)
            steps = jax.device_get(choice)
        self._append_all(steps)

    def _speculates(self) -> bool:
        """Whether to speculate: no tool output is queued, and guesses are likely to be accepted."""
        if self._speculation is None or any(sample.forced for sample in self.active) or not self._acceptance.wants():
            return False
        ngram = self._speculation.ngram
        return self._draft is not None or any(repeats(s.text[: s.position + 1], ngram) for s in self.active)

    def _speculate(self, params: Params, running: programs.DecodeState, level: Level) -> Choice:
        """Runs one dispatch of guesses and verification; returns its tokens, (rounds * tokens, B)."""
        B = len(self.samples)
        text_BL = np.zeros((B, self._shape.length), np.int32)
        for slot, sample in enumerate(self.samples):
            if sample is not None:
                text_BL[slot] = sample.text
        if self._draft is not None:
            self._prefill_draft(self._draft, text_BL, running.position_B)
        models, caches = (self._transformer, self._draft), (self._cache, self._draft_cache)
        arguments = (*models, params, *caches, running, self._rows, text_BL, self._draft_params)
        settings = {"settings": self._speculation, "level": level}
        self._cache, self._draft_cache, choice = speculate(*arguments, **settings)
        steps = jax.device_get(choice)
        count_RB = (steps.token_B >= 0).sum(axis=2)
        if self._draft is not None:
            after_B = running.position_B + count_RB.sum(axis=0)
            self._drafted = np.where(running.position_B < 0, self._drafted, after_B).tolist()
        self._acceptance.note(float((count_RB - 1)[count_RB > 0].mean()))
        return Choice(*(np.moveaxis(x, 2, 1).reshape(-1, B) for x in steps[:3]))

    def _prefill_draft(self, draft: Transformer, text_BL: np.ndarray, length_B: np.ndarray) -> None:
        """Processes with the draft model what its cache lacks: new prompts, and tokens that were decoded without it."""
        texts = [text_L[: max(length, 0)] for text_L, length in zip(text_BL, length_B)]
        while (missing := max(len(text) - done for text, done in zip(texts, self._drafted))) > 0:
            size = bucket(missing, shortest=SHORTEST_CHUNK, longest=self._longest_chunk)
            chunk = next_chunk(texts, self._drafted, rows=len(texts), size=size)
            logits_BV = jnp.zeros((len(texts), draft.config.vocab), jnp.float32)
            arguments = (draft, self._draft_params, *chunk, self._draft_cache, logits_BV)
            self._draft_cache, _ = programs.prefill(*arguments)

    def _append_all(self, steps: Choice) -> None:
        """Appends the decoded tokens to their samples."""
        for k, slot in np.argwhere(steps.token_B >= 0).tolist():
            if (sample := self.samples[slot]) is not None:
                sample.give(*(None if column is None else column[k, slot] for column in steps))

    def snapshot(self, sample: Sample) -> tuple[tuple[int, ...], Cache]:
        """Returns the tokens in the cache of a finished sample that still has its slot, and the cache, one row."""
        assert self._cache is not None
        tokens = (*sample.prompt, *sample.tokens, *sample.surplus)[:-1]
        length = bucket(len(tokens), shortest=SHORTEST_ROW, longest=self._shape.length)
        slot = np.array([self.samples.index(sample)], np.int32)
        return tokens, programs.move(self._transformer, self._cache, slot, length=length, write=self._write)


def _options(samples: Sequence[Sample]) -> dict[str, Any]:
    """What a dispatch must compute for its samples: the sampling level, and what any of them returns besides."""
    asked = [sample.request.sampling for sample in samples]
    return {
        "level": max((params.level for params in asked), key=LEVELS.index),
        "return_support": any(sample.returns_support for sample in samples),
        "return_top": any(sample.request.top_logprobs for sample in samples),
    }
