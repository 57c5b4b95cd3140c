"""The modes of launch.chat: answers to a prompt, beam search, an explanation, a score, or a conversation."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxchat import checkpoint, signals
from jaxchat.data.cache import read_json
from jaxchat.decode import explain
from jaxchat.decode.beam import beam_search
from jaxchat.decode.dialogue import HELP, Dialogue, show, talk
from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Completion, Request, Tool
from jaxchat.decode.sampling import PRESETS, SamplingParams
from jaxchat.decode.speculative import Speculation
from jaxchat.decode.tools import named_tools, usable_tools
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.loading import load_engine
from jaxchat.tokenizer import chat

_BEAM_OPTIONS = ("prompt", "beams", "max_tokens", "style")


def run(options: Any) -> dict[str, object] | None:
    """Runs launch.chat; returns the result for the last line of output, None after a conversation read from stdin."""
    sampling = _sampling(options)
    named_tools(options.tools or ())
    _check(options)
    if options.num_samples > 1 and (sampling.temperature == 0 or sampling.top_k == 1):
        raise UserError(
            "greedy decoding gives --num_samples equal answers: leave it out, or raise --temperature or --top_k"
        )
    directory, _ = checkpoint.locate(options.checkpoint)
    trained = checkpoint.read_experiment(directory, Experiment)
    chats = trained.chats if options.style == "auto" else options.style == "chat"
    if chats and options.prompt == "":
        raise UserError("--prompt is empty: give it a text, or leave it out for a conversation")
    if options.tools and not chats:
        raise UserError(f"{directory} continues texts and calls no tools: leave out --tools, or add --style=chat")
    jax.config.update("jax_compilation_cache_dir", str((directory.parent.parent / "cache" / "xla").absolute()))
    engine = load_engine(
        options.checkpoint,
        slots=max(1, min(options.num_samples, 16)),
        speculation=Speculation() if options.speculative else None,
        draft=options.draft,
    )
    if options.score is not None:
        return _score(engine, options.score)
    tools = usable_tools(engine.tokenizer.chat_format) if options.tools is None else named_tools(options.tools)
    if options.prompt is None:
        _talk(engine, sampling, chats, tools, _turns_notice(directory.parent))
        return None
    prompt = chat.asked(options.prompt, engine.tokenizer, in_turns=chats)
    if options.beams:
        return _beams(engine, prompt, options)
    answers, speed = _answer(engine, Request(prompt, sampling, n=options.num_samples, tools=tools if chats else ()))
    for answer in answers:
        print(answer.shown if chats else options.prompt + answer.shown)
    if options.explain:
        _explain(engine, prompt, answers[0], sampling)
    return _report(answers, speed)


def _answer(engine: Engine, request: Request) -> tuple[list[Completion], float | None]:
    """Answers a request; also returns tokens per second over the steps in which nothing was compiled, None without any.

    Raises:
        UserError: the request is invalid, or its first sample ended with an error.
    """
    samples, tokens, seconds, going = engine.submit(request), 0, 0.0, True
    with _compilations() as count:
        while going:
            before = count(), sum(len(sample.tokens) for sample in samples), time.perf_counter()
            going = engine.step(interleave=False)
            if count() == before[0]:
                tokens += sum(len(sample.tokens) for sample in samples) - before[1]
                seconds += time.perf_counter() - before[2]
    answers = [sample.completion() for sample in samples]
    if answers[0].error:
        raise UserError(answers[0].error)
    return answers, tokens / seconds if tokens else None


@contextmanager
def _compilations() -> Iterator[Callable[[], int]]:
    """Context manager: returns a function that counts the programs traced or compiled since it was entered."""
    events: list[str] = []

    def note(event: str, duration_secs: float, **about: Any) -> None:
        if "/compile/" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield lambda: len(events)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def _check(options: Any) -> None:
    """Raises `UserError` for options that are invalid, or that would have no effect beside the others."""
    if options.num_samples < 1 or options.beams < 0:
        raise UserError(f"num_samples={options.num_samples} must be at least 1, beams={options.beams} at least 0")
    plain = type(options)(checkpoint=options.checkpoint)
    given = [name for name, value in vars(options).items() if value != getattr(plain, name)]
    if options.score is not None:
        if not options.score:
            raise UserError("--score needs a text")
        if others := [name for name in given if name != "score"]:
            raise UserError(f"--score only scores a text: leave out --{others[0]}")
    elif options.prompt is None:
        if dependent := [name for name in given if name in ("num_samples", "beams", "explain")]:
            raise UserError(f"--{dependent[0]} needs a --prompt")
    elif options.beams and (others := [name for name in given if name not in _BEAM_OPTIONS]):
        raise UserError(f"--{others[0]} cannot be combined with --beams: leave out --{others[0]}")


def _sampling(options: Any) -> SamplingParams:
    chosen = {"temperature": options.temperature, **options.truncation}
    if options.sampling is not None:
        chosen |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **PRESETS[options.sampling]}
    names = ("repetition_penalty", "stop", "max_tokens", "seed")
    return SamplingParams(**chosen, **{name: getattr(options, name) for name in names})


def _report(answers: Sequence[Completion], speed: float | None) -> dict[str, object]:
    report: dict[str, object] = {
        "text": answers[0].shown,
        "tokens": sum(len(answer.tokens) for answer in answers),
        "tokens_per_second": None if speed is None else round(speed, 1),
        "finish_reason": answers[0].finish_reason,
    }
    return report if len(answers) == 1 else report | {"texts": [answer.shown for answer in answers]}


def _beams(engine: Engine, prompt: list[int], options: Any) -> dict[str, object]:
    beams = beam_search(engine, prompt, beams=options.beams, max_tokens=options.max_tokens)
    for beam in beams:
        print(f"{beam.score:8.4f}  {beam.text}")
    best = beams[0]
    ended = best.tokens[-1] in engine.ends
    return {
        "text": best.text,
        "tokens": len(best.tokens),
        "score": round(best.score, 6),
        "finish_reason": "stop" if ended else "length" if len(best.tokens) == options.max_tokens else "context",
    }


def _explain(engine: Engine, prompt: list[int], answer: Completion, sampling: SamplingParams) -> None:
    console = Console()
    steps = explain.explain(engine, prompt, answer.tokens, sampling)
    for number, (candidates, sampled) in enumerate(zip(steps, answer.sampled), 1):
        console.print(explain.step_table(engine.tokenizer, number, candidates, sampling, sampled=sampled))


def _score(engine: Engine, text: str) -> dict[str, object]:
    ids = chat.asked(text, engine.tokenizer, in_turns=False)
    scored = explain.score(engine, ids)
    Console().print(explain.score_table(engine.tokenizer, scored))
    loss = -sum(token.logprob for token in scored) / len(scored)
    return {"tokens": len(scored), "loss": round(loss, 6), "logprob": round(-loss * len(scored), 6)}


def _turns_notice(run: Path) -> str:
    """A sentence for the second question, if SFT in a run directory trained on no conversation of several answers."""
    manifests = read_json(run / "rows" / "sft-train.json")
    if not isinstance(manifests, list) or any(part.get("several", 1) for part in manifests):
        return ""
    return "note: the model was trained on single questions and may not follow a conversation; /clear starts a new one"


def _read_line() -> str:
    """The next line of stdin with its end; empty at the end of the input. A signal ends the wait."""
    with signals.waiting():
        return sys.stdin.readline()


def _talk(engine: Engine, sampling: SamplingParams, chats: bool, tools: Sequence[Tool], notice: str) -> None:
    """Holds a conversation, or continues texts, one per line of stdin, until an empty line."""
    lines = (line.rstrip("\n") for line in iter(_read_line, ""))
    if chats:
        print(HELP, file=sys.stderr)
        echo = not sys.stdin.isatty()
        talk(Dialogue(engine, sampling, tools), lines, sys.stdout, sys.stderr, echo=echo, notice=notice)
        return
    print("enter the beginning of a text; an empty line ends", file=sys.stderr)
    for line in lines:
        if not line:
            return
        print(line, end="", flush=True)
        try:
            (sample,) = engine.submit(Request(chat.asked(line, engine.tokenizer, in_turns=False), sampling))
            show(engine.follow(sample), sys.stdout, sample.cancel)
        except UserError as error:
            print(f" ({error})", file=sys.stderr)
