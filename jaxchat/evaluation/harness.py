"""A checkpoint as a model of lm-evaluation-harness, whose tasks then run on it: likelihoods, perplexities, generation.

Contexts begin with <|bos|>, as every text did in training. What does not fit the context is cut at its beginning, as
lm-eval's own adapter for transformers does it, and counted.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import FILTERS, SamplingParams
from jaxchat.errors import UserError
from jaxchat.evaluation.likelihoods import Item, Scorer
from jaxchat.loading import Loaded, load_checkpoint
from jaxchat.tokenizer.chat import CHAT_TEMPLATE

ANSWER_TOKENS = 256  # lm-eval's own default.
SLOTS = 16
END = "<|assistant_end|>"
READ = frozenset({"until", "do_sample", "max_gen_toks"})
CHOOSING = frozenset({"temperature", *FILTERS, "repetition_penalty", "seed"})


def load(path: str, *, length: int | None = None) -> Any:
    """An `lm_eval.api.model.LM` of a checkpoint such as runs/d4/sft; `length` is the context, by default the row's.

    Raises:
        UserError: lm-eval is not installed, or there is no such checkpoint.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise UserError("this needs lm-evaluation-harness: pip install -e '.[harness]'") from None

    class Jaxchat(Adapter, TemplateLM):
        """lm-eval asks for a class of its own."""

        def __init__(self, loaded: Loaded, length: int) -> None:
            TemplateLM.__init__(self)
            Adapter.__init__(self, loaded, length)

    loaded = load_checkpoint(path)
    return Jaxchat(loaded, length or loaded.experiment.data.row_length)


class Adapter:
    """What lm-eval asks of a model, without lm-eval's base class, which `load` adds.

    Attributes:
        truncated: tokens that were cut from the beginnings of contexts so far.
    """

    cache_hook: Any

    def __init__(self, loaded: Loaded, length: int) -> None:
        if length < 2:
            raise UserError(f"length={length} must be at least 2")
        self.loaded, self.length, self.truncated = loaded, length, 0
        self._words = loaded.tokenizer
        self._names = re.compile("(" + "|".join(map(re.escape, self._words.specials)) + ")")
        self._transformer = loaded.transformer()
        self._params = loaded.params()
        self._scorer = Scorer(self._transformer, self._params, length=length)
        self._engine: Engine | None = None

    @property
    def eot_token_id(self) -> int:
        return self._words.specials[END]

    @property
    def prefix_token_id(self) -> int:
        return self._words.bos

    @property
    def tokenizer_name(self) -> str:
        return f"jaxchat-{self._words.hash}"

    @property
    def max_length(self) -> int:
        return self.length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids, <|bos|> first unless told otherwise.

        The names of special tokens mean them in what the chat template made, which begins with one, and nowhere else.
        """
        if not string.startswith("<|bos|>"):
            return [self._words.bos] * (add_special_tokens is not False) + self._words.encode(string)
        specials = self._words.specials
        ids: list[int] = []
        for part in self._names.split(string):
            ids += [specials[part]] if part in specials else self._words.encode(part)
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return CHAT_TEMPLATE if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as text with the names of special tokens; without a generation prompt its last turn is open.

        Raises:
            UserError: turns in an order that the model was not trained on.
        """
        import jinja2  # Comes with lm-eval.

        def refuse(reason: str) -> None:
            raise UserError(f"the chat template cannot render this conversation: {reason}")

        template = jinja2.Environment().from_string(CHAT_TEMPLATE, {"raise_exception": refuse})
        text = template.render(messages=chat_history, add_generation_prompt=add_generation_prompt)
        return text if add_generation_prompt else text.removesuffix(END)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts: every token once, after <|bos|> or as many tokens as the context holds."""
        texts = [request.args[0] for request in requests]
        owner, items = [], []
        for i, text in enumerate(texts):
            for item in windows(self.tok_encode(text, add_special_tokens=False), self._words.bos, self.length):
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
            raise UserError(f"a task asks for the likelihood of nothing after {empty[0][0]!r}")
        items = [Item(context, continuation) for _, context, continuation in requests]
        for (texts, _, _), scored in zip(requests, self._scorer(items), strict=True):
            self.truncated += scored.truncated
            answers.append((float(scored.logprobs.sum(dtype="float64")), bool(scored.greedy)))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, all in flight together; a prompt leaves room for the longest answer that its task asks for."""
        if self._engine is None:
            shape = EngineConfig(self.length, slots=SLOTS, prefill_batch=4, prefill_chunk=min(self.length, 512))
            self._engine = Engine(self._transformer, self._params, self._words, shape)
        asked = [self._request(*request.args) for request in requests]
        answers = []
        for request, (answer,) in zip(requests, self._engine.generate(asked), strict=True):
            if answer.error:
                raise UserError(answer.error)
            answers.append(answer.text)
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return answers

    def _request(self, context: str, settings: Mapping[str, Any]) -> Request:
        from lm_eval.models.utils import normalize_gen_kwargs

        asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), ANSWER_TOKENS))
        if strange := [name for name in asked if name not in READ | CHOOSING]:
            raise UserError(f"a task asks to generate with {strange[0]}={asked[strange[0]]!r}, which is not known here")
        room = asked["max_gen_toks"]
        if not 0 < room < self.length:
            raise UserError(
                f"a task asks for answers of {room} tokens and the context is {self.length}: give --max_tokens"
            )
        prompt = self.tok_encode(context)
        excess = max(0, len(prompt) - (self.length - room))
        self.truncated += excess
        chosen = {"temperature": 0.0} | {name: value for name, value in asked.items() if name not in READ}
        stop = tuple(text for text in asked["until"] if text)
        return Request(prompt[excess:], SamplingParams(**chosen, max_tokens=room, stop=stop))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        loaded = self.loaded
        return {
            "checkpoint": f"{loaded.directory}@{loaded.step}",
            "length": self.length,
            "tokenizer": self.tokenizer_name,
        }


def windows(tokens: list[int], first: int, length: int) -> list[Item]:
    """The tokens in pieces that a context of `length` can score, each token once, with all the context that fits.

    The first piece comes after the token `first`; every later one scores `length` tokens, or the last few after as
    much of what stands before them as there is room for.
    """
    items = []
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        before = max(0, stop - length - 1)
        items.append(Item(tokens[before:start] if start else [first], tokens[start:stop]))
    return items


def run(options: Any) -> dict[str, Any]:
    """Does what the options of launch.harness say; returns the metrics of every task by its name.

    Raises:
        UserError: no such task, or no such checkpoint.
    """
    model = load(options.checkpoint, length=options.length or None)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=options.include_path)
    if unknown := [name for name in options.tasks if not manager.match_tasks([name]) and not Path(name).is_file()]:
        raise UserError(f"lm-eval knows no task {unknown[0]}: --include_path names a directory of more, in YAML")
    found = lm_eval.simple_evaluate(
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
        _write(Path(options.out), found)
    # lm-eval writes metric and filter as "acc,none"; its own alias repeats the task's name.
    metrics = {
        task: {name.removesuffix(",none"): value for name, value in values.items() if name != "alias"}
        for task, values in found["results"].items()
    }
    return metrics | {"truncated_tokens": model.truncated, "checkpoint": model.get_model_info()["checkpoint"]}


def _write(directory: Path, found: Mapping[str, Any]) -> None:
    """results.json, and what each example of a task was asked and scored in samples_TASK.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in found.items() if name != "samples"}
    (directory / "results.json").write_text(json.dumps(rest, indent=1, default=str) + "\n", encoding="utf-8")
    for task, samples in found.get("samples", {}).items():
        lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        (directory / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
