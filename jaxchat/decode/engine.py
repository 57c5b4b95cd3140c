"""The decode engine: answers many requests at once; the answer to a request does not depend on the others.

Requests are queued, prefilled and assigned to slots. The device decodes all slots for a fixed number of steps per
dispatch; between dispatches the host removes finished samples, runs tools and admits new requests.
"""

import dataclasses
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxchat import signals
from jaxchat.decode import programs
from jaxchat.decode.prompts import EngineConfig, Prefixes, bucket, plan_prefill, read
from jaxchat.decode.requests import Completion, Request, Token
from jaxchat.decode.sample import Sample, refused
from jaxchat.decode.sampling import TOP
from jaxchat.decode.slots import PrefilledPrompt, Slots
from jaxchat.decode.speculative import Speculation
from jaxchat.errors import NOT_FINITE, UserError, first_line
from jaxchat.launcher import log
from jaxchat.model.attention import MIXERS
from jaxchat.model.backends import choose_decoding
from jaxchat.model.transformer import Cache, Params, Transformer
from jaxchat.tokenizer import Tokenizer

TOOL_WAIT = 0.01  # Seconds that a step waits for tools if there is nothing else to do.
LOOK_AHEAD = 8  # Times `prefill_batch`: number of queued prompts that are searched for prompts of the same plan.


@dataclass
class PromptStats:
    """Number of prompt tokens computed, and number reused from the prefix cache."""

    computed: int = 0
    reused: int = 0


class PendingPrefill(NamedTuple):
    """Prompts that are being prefilled: the samples of each, and the iterator over their chunks (`prompts.read`)."""

    waiting: list[deque[Sample]]
    chunks: Iterator[tuple[Cache, jax.Array] | None]


class Engine:
    """Answers requests with one model: `submit`, then `step` until it returns False; or `generate`, or `follow`.

    Args:
        params: None if `load` is called before the first request.
        mesh: shards rows over `data`, and heads, hidden units and vocabulary over `tensor`.
        speculation: settings of speculative decoding, which does not change the tokens. Guesses are looked up in the
            text, or come from `draft`, a smaller model of the same vocabulary and its parameters.
        decoding: decoding backend, a row of `DECODING`; "auto" selects one for the device.
        tool_pool: runs tools while other samples are decoded, each for at most `sample.TOOL_SECONDS`; None runs each
            when it is called, without a limit.
    """

    def __init__(
        self,
        transformer: Transformer,
        params: Params | None,
        tokenizer: Tokenizer,
        shape: EngineConfig,
        *,
        mesh: jax.sharding.Mesh | None = None,
        speculation: Speculation | None = None,
        draft: tuple[Transformer, Params] | None = None,
        decoding: str = "auto",
        tool_pool: Executor | None = None,
    ) -> None:
        if draft is not None and (draft[0].config.vocab != transformer.config.vocab or shape.adapt or not speculation):
            raise UserError("a draft model needs the vocabulary of the model, `speculation`, and adapt=False")
        device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]

        def with_decoding(model: Transformer) -> Transformer:
            name = choose_decoding(decoding, model.config, dtype=model.dtype, device=device, log=log)
            return dataclasses.replace(model, decoding=name)

        transformer = with_decoding(transformer)
        self.transformer, self.tokenizer, self.shape, self.mesh = transformer, tokenizer, shape, mesh
        mixers = transformer.config.mixers
        windowed = not all(MIXERS[type(mixer)].keeps_all(mixer) for mixer in mixers)
        if speculation and (fixed := [type(m).__name__ for m in mixers if not MIXERS[type(m)].rewinds(m)]):
            raise UserError(f"speculation needs caches that can be rolled back, which {fixed[0]} has not: leave it out")
        self.prefixes = Prefixes(shape.prefix_cache_bytes, windowed=windowed)
        with self.on_mesh():
            if draft is not None:
                small = with_decoding(draft[0])
                draft = small, programs.unstack(small, draft[1])
            self.slots = Slots(transformer, shape, speculation=speculation, draft=draft)
        self.ends, self._tool_pool = set(tokenizer.ends), tool_pool
        self.prompt_stats = PromptStats()
        self._unfinished: list[Sample] = []
        self._waiting: deque[deque[Sample]] = deque()  # The samples of each request.
        self._reading: PendingPrefill | None = None
        self._prefilled: deque[PrefilledPrompt] = deque()
        if params is not None:
            self.load(params)

    def load(self, params: Params) -> None:
        """Replaces the parameters and clears the prefix cache."""
        with self.on_mesh():
            self.params = programs.by_layer(self.transformer, params)
        self.prefixes.clear()

    def reset(self, reason: str = "the engine was reset") -> None:
        """Ends every unfinished sample with an error, and frees all caches; the engine can take new requests."""
        for sample in self._unfinished:
            if not sample.finish_reason:
                sample.fail(reason)
        for queue in (self._unfinished, self._waiting, self._prefilled, self.prefixes, self.slots):
            queue.clear()
        self._reading = None

    def unload(self) -> None:
        """`reset`, and frees the parameters; call `load` before the next request."""
        self.reset()
        self.params = {}

    def on_mesh(self) -> AbstractContextManager[Any]:
        """Context manager that sets the engine's mesh, if it has one."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def submit(self, request: Request) -> list[Sample]:
        """Queues a request and returns its samples, which fill as `step` is called.

        Raises:
            UserError: the prompt is empty or too long, contains ids outside of the vocabulary, a tool needs parts that
                the chat format lacks, or `return_support` is combined with penalties or a logit bias.
        """
        prompt = self.check(request.prompt)
        if not isinstance(request.n, int) or request.n < 1:
            raise UserError(f"n={request.n} must be a whole number, at least 1")
        if request.return_support and request.sampling.penalised:
            raise UserError("return_support cannot be combined with penalties or a logit bias: leave one of them out")
        if not 0 <= request.top_logprobs <= TOP:
            raise UserError(f"top_logprobs={request.top_logprobs} must be from 0 to {TOP}")
        self._check_ids("logit_bias", request.sampling.logit_bias)
        self._check_ids("stop_tokens", request.sampling.stop_tokens)
        for tool in request.tools:
            if missing := {tool.call_part, tool.output_part} - set(self.tokenizer.chat_format.parts):
                name = type(tool).__name__
                raise UserError(f"the tool {name} needs parts of the kind {min(missing)}, which the chat format lacks")
        about: dict[str, Any] = {"context": self.shape.length, "ends": self.ends, "tool_pool": self._tool_pool}
        samples = [Sample(self.tokenizer, request, prompt, index, **about) for index in range(request.n)]
        self._waiting.append(deque(samples))
        self._unfinished += samples
        return samples

    def check(self, prompt: Sequence[int], *, what: str = "the prompt", room: int = 1) -> tuple[int, ...]:
        """Returns the prompt as a tuple; `UserError` if it is invalid or leaves fewer than `room` tokens."""
        try:
            tokens = tuple(map(operator.index, prompt))
        except TypeError:
            raise UserError(f"{what} must be a list of token ids: encode a text with the tokenizer") from None
        if not tokens:
            raise UserError(f"{what} is empty: start it with {self.tokenizer.chat_format.bos}")
        if len(tokens) + room > self.shape.length:
            context = f"{self.shape.length}, {room} of them for the answer" if room else f"{self.shape.length}"
            raise UserError(f"{what} has {len(tokens)} tokens, but the context has {context}: shorten it")
        self._check_ids(what, tokens)
        return tokens

    def _check_ids(self, what: str, ids: Iterable[int]) -> None:
        vocab = self.transformer.config.vocab
        if unknown := [token for token in ids if not 0 <= token < vocab]:
            raise UserError(f"{what} contains token id {unknown[0]}, but the vocabulary has ids 0 to {vocab - 1}")

    def read(self, prompt: Sequence[int]) -> tuple[Cache, jax.Array]:
        """Prefills one prompt; returns its cache (in the first row) and the logits after it, (R, V)."""
        own_plan = plan_prefill(len(prompt), 0, self.shape)
        *_, last = read(self.transformer, self.params, [prompt], [None], own_plan, rows=self.shape.prefill_batch)
        assert last is not None
        return last

    def padded(self, tokens: Sequence[int]) -> tuple[tuple[int, ...], np.ndarray]:
        """A text as `check` returns it, and padded at the end to a length that is compiled once, int32 (1, T)."""
        ids = self.check(tokens, what="the text", room=0)
        padded_1T = np.zeros((1, bucket(len(ids), shortest=16, longest=self.shape.length)), np.int32)
        padded_1T[0, : len(ids)] = ids
        return ids, padded_1T

    def forward(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after every token of a text, (T, V) float32, computed in one call without a cache."""
        ids, padded_1T = self.padded(tokens)
        with self.on_mesh():
            logits_TV = np.asarray(programs.forward(self.transformer, self.params, padded_1T)[: len(ids)])
        if not np.isfinite(logits_TV).all():
            raise UserError(NOT_FINITE)
        return logits_TV

    def score(self, tokens: Sequence[int]) -> list[Token]:
        """Every token of a text but the first, given those before it, with the most likely tokens at its place."""
        ids, padded_1T = self.padded(tokens)
        with self.on_mesh():
            scored = jax.device_get(programs.score(self.transformer, self.params, padded_1T))
        logprobs_T, top_TK, top_logprobs_TK = (column[: len(ids) - 1].tolist() for column in scored)
        if not np.isfinite(logprobs_T).all():
            raise UserError(NOT_FINITE)
        tops = (list(zip(*top)) for top in zip(top_TK, top_logprobs_TK))
        return [Token(*of_token) for of_token in zip(ids[1:], logprobs_T, [False] * len(ids), tops)]

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Answers every request, in order. An invalid request gets one completion that holds its error."""
        submitted: list[list[Sample] | UserError] = []
        for request in requests:
            try:
                submitted.append(self.submit(request))
            except UserError as error:
                submitted.append(error)
        while self.step(interleave=False):
            pass
        return [
            [refused(samples)] if isinstance(samples, UserError) else [sample.completion() for sample in samples]
            for samples in submitted
        ]

    def follow(self, sample: Sample) -> Iterator[str]:
        """Yields the text of a sample as it is decoded; closing the iterator cancels the sample.

        Raises:
            UserError: the sample ended with an error.
        """
        try:
            while True:
                if new := sample.take_text():
                    yield new
                if sample.error:
                    raise UserError(sample.error)
                if sample.finish_reason:
                    return
                self.step()
        finally:
            sample.cancel()

    def step(self, *, interleave: bool = True) -> bool:
        """Admits queued requests, decodes one chunk, and returns whether any work is left.

        While samples are decoded, a prompt of several chunks is prefilled one chunk per step, so that they need not
        wait for all of it. Without `interleave` it is prefilled at once, which takes less time for all requests
        together. An exception ends every unfinished sample with an error (`reset`), because caches were donated.
        """
        signals.check()
        try:
            with self.on_mesh():
                for sample in self.slots.active:
                    sample.read_output()
                self._leave()
                self._enter(interleave)
                outputs = [sample.output for sample in self.slots.active if sample.output is not None]
                if len(outputs) < len(self.slots.active):
                    self.slots.fit()
                    self.slots.decode(self.params)
                    self._leave()
                elif outputs:
                    wait(outputs, TOOL_WAIT, FIRST_COMPLETED)
        except BaseException as error:  # A signal, too, may have left the caches donated. It is raised again.
            self.reset(f"the engine stopped: {first_line(error)}")
            raise
        return bool(self.slots.active or self._waiting or self._reading or self._prefilled)

    def _leave(self) -> None:
        """Removes finished samples, and stores their caches in the prefix cache if their request has `store`."""
        for sample in self.slots.active:
            if sample.request.store and sample.finish_reason in ("stop", "length", "context", "call"):
                self.prefixes.store(*self.slots.snapshot(sample))
        self.slots.release()

        def unfinished(samples: Iterable[Sample]) -> deque[Sample]:
            return deque(sample for sample in samples if not sample.finish_reason)

        self._unfinished = list(unfinished(self._unfinished))
        self._waiting = deque(samples for samples in map(unfinished, self._waiting) if samples)
        if self._reading is not None:
            self._reading = self._reading._replace(waiting=[*map(unfinished, self._reading.waiting)])
        left = (prompt._replace(waiting=unfinished(prompt.waiting)) for prompt in self._prefilled)
        self._prefilled = deque(prompt for prompt in left if prompt.waiting)

    def _enter(self, interleave: bool) -> None:
        """Fills free slots in order of submission; a sample whose first token is its last frees its slot at once."""
        while self.slots.free and (self._prefilled or self._read(interleave)):
            prompt = self._prefilled[0]
            entering = [prompt.waiting.popleft() for _ in range(min(self.slots.free, len(prompt.waiting)))]
            self.slots.fit(entering)
            self.slots.enter(prompt, entering)
            self._leave()

    def _read(self, interleave: bool) -> bool:
        """Prefills the next prompts; returns whether one is ready. With `interleave`, a chunk that is not their last is
        all that a call processes while samples are decoded.
        """
        if self._reading is None or not any(self._reading.waiting):
            self._reading = self._next_prompts() if self._waiting else None
        if self._reading is None:
            return False
        for ready in self._reading.chunks:
            if ready is not None:
                groups, self._reading = self._reading.waiting, None
                self._prefilled.extend(PrefilledPrompt(*ready, row, group) for row, group in enumerate(groups) if group)
                return True
            if interleave and self.slots.active:
                return False
        raise AssertionError("a plan has at least one chunk")

    def _next_prompts(self) -> PendingPrefill:
        """Takes the next prompt, once for all of its samples, together with later prompts of the same plan."""
        rows, chosen, prefixes = self.shape.prefill_batch, list[deque[Sample]](), list[tuple[int, Cache] | None]()
        shared_plan = None
        for samples in islice(self._waiting, LOOK_AHEAD * rows):
            if len(chosen) == rows:
                break
            prompt = samples[0].prompt
            prefix = self.prefixes.find(prompt)
            reused = 0 if prefix is None else prefix[0]
            own_plan = plan_prefill(len(prompt), reused, self.shape)
            if shared_plan not in (None, own_plan):
                continue
            shared_plan = own_plan
            chosen.append(samples)
            prefixes.append(prefix)
            for sample in samples:
                sample.reused = reused
            self.prompt_stats.reused += reused
            self.prompt_stats.computed += len(prompt) - reused
        assert shared_plan is not None
        for samples in chosen:
            self._waiting.remove(samples)
        prompts = [samples[0].prompt for samples in chosen]
        return PendingPrefill(chosen, read(self.transformer, self.params, prompts, prefixes, shared_plan, rows=rows))
