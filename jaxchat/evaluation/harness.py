"""Adapter that runs tasks of lm-evaluation-harness on a checkpoint: likelihoods, perplexities and generation.

Contexts begin with the first token of a document, as every text did in training. Like lm-eval's adapter for
transformers, it truncates what does not fit the context from the left; it also counts the truncated tokens.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import FILTERS, SamplingParams
from jaxchat.errors import UserError, missing
from jaxchat.evaluation.likelihoods import Item, Scorer
from jaxchat.loading import Loaded, load_checkpoint
from jaxchat.paths import user_path
from jaxchat.tokenizer import chat

ANSWER_TOKENS = 256  # lm-eval's own default.
SLOTS = 16
READ = frozenset({"until", "do_sample", "max_gen_toks"})
CHOOSING = frozenset({"temperature", *FILTERS, "repetition_penalty", "seed"})


def load(path: str, *, length: int | None = None) -> Any:
    """Loads a checkpoint such as runs/d4/sft as an `lm_eval.api.model.LM` with a context of `length` tokens, by default
    the row length of its training.

    Raises:
        UserError: lm-eval is not installed, or there is no such checkpoint.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise missing("this needs lm-evaluation-harness", "harness") from None

    class Jaxchat(Adapter, TemplateLM):
        """Derives from lm-eval's base class, which is importable only with lm-eval."""

        def __init__(self, loaded: Loaded, length: int) -> None:
            TemplateLM.__init__(self)
            Adapter.__init__(self, loaded, length)

    loaded = load_checkpoint(path)
    return Jaxchat(loaded, length or loaded.experiment.data.row_length)


class Adapter:
    """Implements lm-eval's model interface; `load` adds lm-eval's base class.

    Attributes:
        truncated: number of context tokens truncated so far.
    """

    cache_hook: Any

    def __init__(self, loaded: Loaded, length: int) -> None:
        if length < 2:
            raise UserError(f"length={length} is too short: use at least 2 tokens")
        self.loaded, self.length, self.truncated = loaded, length, 0
        self._tokenizer, self._format = loaded.tokenizer, loaded.tokenizer.chat_format
        self._transformer = loaded.transformer()
        self._scorer = Scorer(self._transformer, loaded.params(), length=length)
        self._engine: Engine | None = None

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        return f"jaxchat-{self._tokenizer.hash}"

    @property
    def max_length(self) -> int:
        return self.length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encodes a text as a document, without its first token if `add_special_tokens` is False.

        Names of special tokens become special tokens only if the text begins with that of the first, as rendered chats
        do.
        """
        return chat.encode(string, self._tokenizer, begin=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return chat.template(self._format) if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation as text with names of special tokens; the last turn has no end token unless
        `add_generation_prompt` is set.

        Raises:
            UserError: the order of turns does not occur in training.
        """
        text = chat.written(self._format).text(chat_history, prompt=add_generation_prompt)
        head, end, after = text.rpartition(self._format.end)
        return text if add_generation_prompt or not end or after.strip() else head

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context without the spaces at its end, and of these and the continuation.

        Both are parts of the tokens of the whole text, unless a token spans the border: then each is encoded by itself,
        where lm-eval would leave out the beginning of the continuation, or all of it.
        """
        before = context.rstrip()
        after = context[len(before) :] + continuation
        first, whole = self.tok_encode(before), self.tok_encode(before + after)
        shared = whole[: len(first)] == first
        return first, whole[len(first) :] if shared else self.tok_encode(after, add_special_tokens=False)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats. Every token is scored once, see `windows`."""
        texts = [request.args[0] for request in requests]
        owner, items = [], []
        for i, text in enumerate(texts):
            for item in windows(self.tok_encode(text, add_special_tokens=False), self._tokenizer.bos, self.length):
                owner.append(i)
                items.append(item)
        totals = [0.0] * len(texts)
        for i, scored in zip(owner, self._scorer(items), strict=True):
            totals[i] += float(scored.logprobs.sum(dtype="float64"))
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **more: Any
    ) -> list[tuple[float, bool]]:
        answers = []
        if empty := [texts for texts, _, continuation in requests if not continuation]:
            raise UserError(f"a task requests the likelihood of an empty continuation after {empty[0][0]!r}")
        items = [Item(context, continuation) for _, context, continuation in requests]
        for (texts, _, _), scored in zip(requests, self._scorer(items), strict=True):
            self.truncated += scored.truncated
            answers.append((float(scored.logprobs.sum(dtype="float64")), bool(scored.greedy)))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates all answers in one batch; prompts are truncated to leave room for the task's longest answer."""
        if self._engine is None:
            shape = EngineConfig(self.length, slots=SLOTS, prefill_batch=4, prefill_chunk=min(self.length, 512))
            self._engine = Engine(self._transformer, self._scorer.params, self._tokenizer, shape)
        engine_requests = [self._request(*request.args) for request in requests]
        answers = []
        for request, (answer,) in zip(requests, self._engine.generate(engine_requests), strict=True):
            if answer.error:
                raise UserError(answer.error)
            answers.append(answer.text)
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return answers

    def _request(self, context: str, settings: Mapping[str, Any]) -> Request:
        from lm_eval.models.utils import normalize_gen_kwargs

        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), ANSWER_TOKENS))
        if unknown := [name for name in options if name not in READ | CHOOSING]:
            supported = ", ".join(sorted(READ | CHOOSING))
            raise UserError(f"unsupported generation option {unknown[0]} in a task; supported: {supported}")
        room = options["max_gen_toks"]
        if not 0 < room < self.length:
            raise UserError(
                f"a task requests answers of {room} tokens but the context is {self.length}: set --max_tokens"
            )
        prompt = self.tok_encode(context)
        excess = max(0, len(prompt) - (self.length - room))
        self.truncated += excess
        sampling = {"temperature": 0.0} | {name: value for name, value in options.items() if name not in READ}
        stop = tuple(text for text in options["until"] if text)
        return Request(prompt[excess:], SamplingParams(**sampling, max_tokens=room, stop=stop))

    def get_model_info(self) -> dict[str, Any]:
        """Model description that lm-eval writes next to its results."""
        checkpoint = f"{self.loaded.directory}@{self.loaded.step}"
        return {"checkpoint": checkpoint, "length": self.length, "tokenizer": self.tokenizer_name}


def windows(tokens: list[int], first: int, length: int) -> list[Item]:
    """Cuts a text into chunks of `length` tokens so that every token is scored exactly once.

    The context of the first chunk is the token `first`, that of every later chunk as many preceding tokens as fit:
    context and chunk together have at most `length` + 1 tokens.
    """
    items = []
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        before = max(0, stop - length - 1)
        items.append(Item(tokens[before:start] if start else [first], tokens[start:stop]))
    return items


def run(options: Any) -> dict[str, Any]:
    """Runs launch.harness; returns the metrics of every task by name, the truncated tokens and the checkpoint.

    Raises:
        UserError: a task or the checkpoint does not exist.
    """
    model = load(options.checkpoint, length=options.length or None)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(user_path(options.include_path)) if options.include_path else None)
    if unknown := [name for name in options.tasks if not manager.match_tasks([name]) and not user_path(name).is_file()]:
        raise UserError(f"unknown lm-eval task {unknown[0]}: set --include_path to the directory of its YAML file")
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(options.tasks),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat,
        gen_kwargs={"max_gen_toks": options.max_tokens} if options.max_tokens else None,
        task_manager=manager,
        bootstrap_iters=options.bootstrap,
        log_samples=options.out is not None,
    )
    if options.out is not None:
        _write(user_path(options.out), results)
    # lm-eval names metrics "acc,none" (metric, filter); "alias" only repeats the task's name.
    metrics = {
        task: {name.removesuffix(",none"): value for name, value in values.items() if name != "alias"}
        for task, values in results["results"].items()
    }
    return metrics | {"truncated_tokens": model.truncated, "checkpoint": model.get_model_info()["checkpoint"]}


def _write(directory: Path, results: Mapping[str, Any]) -> None:
    """Writes results.json, and the prompts and scores of single examples to samples_TASK.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in results.items() if name != "samples"}
    (directory / "results.json").write_text(json.dumps(rest, indent=1, default=str) + "\n", encoding="utf-8")
    for task, samples in results.get("samples", {}).items():
        lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        (directory / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
