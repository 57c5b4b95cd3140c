"""Evaluates a checkpoint on tasks: questions by likelihood, problems by generation, texts by bits per byte."""

import contextlib
import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxchat import launcher
from jaxchat.data import sources
from jaxchat.data.cache import read_json, write_json
from jaxchat.data.downloads import unpacked
from jaxchat.data.source import Reading
from jaxchat.decode.engine import Engine
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.evaluation.core import CORE, CoreRows, Mode, centered
from jaxchat.evaluation.likelihoods import Item, Scorer
from jaxchat.evaluation.multiple_choice import QUESTIONS
from jaxchat.evaluation.questions import Question, ask_together
from jaxchat.evaluation.records import Records
from jaxchat.evaluation.solve import Record, Style, judge, solve, warn_of_errors
from jaxchat.evaluation.statistics import wilson
from jaxchat.paths import user_path
from jaxchat.processes import gather, share_out
from jaxchat.serialization import json_line, to_json
from jaxchat.tasks import TASKS, Problem, Task, code_of, load_task, problems_of
from jaxchat.tasks.limit import take
from jaxchat.tokenizer import Tokenizer

BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # The files that nanochat reads.
TOGETHER = 256  # Number of problems solved before their records are written.
OWN = ("core", "bpb", *QUESTIONS)  # Tasks that parse_tasks() knows in addition to load_task's.
CHATCORE = {"arc_easy": 0.25, "arc_challenge": 0.25, "mmlu": 0.25, "gsm8k": 0.0, "humaneval": 0.0}


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation.

    Attributes:
        style: prompt format: chat turns, or plain text for base models.
        limit: number of questions, problems or documents per task, a stratified sample; None for all.
        samples: answers sampled per problem.
        max_tokens: maximum length of an answer.
        mode: prompt format of CORE, see `evaluation.core`.
    """

    style: Style
    limit: int | None = None
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0
    mode: Mode = "nanochat"

    def __post_init__(self) -> None:
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"--samples={self.samples} are equal at temperature 0: leave it out, or raise --temperature"
            )


@dataclass(frozen=True)
class Asked:
    """A task of likelihood questions. `baselines` are the accuracies of guessing by name, such as "chance" or "v1"."""

    name: str
    questions: Callable[[Any, int | None], Sequence[Question]]
    baselines: Mapping[str, float]


@dataclass(frozen=True)
class Solving:
    """A task whose problems are answered by generation."""

    name: str
    task: Task


@dataclass(frozen=True)
class Texts:
    """Documents whose bits per byte are measured."""

    name: str
    spec: str


EvaluationTask = Asked | Solving | Texts
Inputs = dict[str, Sequence[Any]]
"""What each task asks, by its name: questions, problems, or the texts of bpb."""
Log = Callable[[str], None]
Opened = Callable[[str, Iterable[Any]], contextlib.AbstractContextManager[Records]]


def parse_tasks(specs: Sequence[str], settings: Settings, downloads: Path) -> list[EvaluationTask]:
    """Parses specs: core:DIR, core/LABEL:DIR, arc_easy:DIR, arc_challenge:DIR, mmlu:DIR, bpb:FILES, and every task of
    `load_task`. Benchmarks without a directory are downloaded.

    Raises:
        UserError: a task is unknown or named twice, or a file is missing.
    """
    parsed: list[EvaluationTask] = []
    for spec in specs:
        name, _, place = spec.partition(":")
        if name == "core" or name.startswith("core/"):
            parsed += _core_tasks(name, place, settings.mode, downloads)
        elif name in QUESTIONS:
            parsed.append(Asked(name, partial(QUESTIONS[name], place, downloads, settings.style), {"chance": 0.25}))
        elif name == "bpb":
            texts = place or "tinyworld:val"
            try:
                sources.find(texts, "val")
            except UserError as error:
                raise UserError(str(error).replace("--data.val ", "bpb:")) from None
            parsed.append(Texts("bpb", texts))
        else:
            if not name.endswith(".py") and (near := difflib.get_close_matches(name, OWN, n=1)) and name not in TASKS:
                raise UserError(f"unknown task {name!r}: did you mean {near[0]}?")
            task = load_task(spec, downloads)
            parsed.append(Solving(task.name, task))
    names = [job.name for job in parsed]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the task {twice[0]} is named twice: name it once")
    return parsed


def _core_tasks(name: str, place: str, mode: Mode, downloads: Path) -> list[EvaluationTask]:
    wanted = [task for task in CORE if name == "core" or task.label == name.partition("/")[2]]
    if not wanted:
        raise UserError(f"CORE has no task {name[5:]!r}: choose one of {', '.join(task.label for task in CORE)}")
    directory = user_path(place) if place else unpacked(BUNDLE, downloads / "core", log=launcher.log) / "eval_bundle"
    rows = [CoreRows(task, directory, mode) for task in wanted]
    available = [one for one in rows if one.file is not None]
    if not available:
        raise UserError(f"no file of CORE in {directory / 'eval_data'}: is this the CORE bundle?")
    return [Asked(f"core/{one.task.label}", one.questions, one.task.baselines) for one in available]


def read(found: Sequence[EvaluationTask], tokenizer: Tokenizer, limit: int | None) -> Inputs:
    """Reads all files of the tasks, so that a mistake in any is found before something is compiled: `UserError`."""
    inputs: Inputs = {}
    for job in found:
        if isinstance(job, Asked):
            inputs[job.name] = job.questions(tokenizer, limit)
        elif isinstance(job, Solving):
            inputs[job.name] = problems_of(job.task, "test", limit)
        else:
            inputs[job.name] = tuple(_texts(job.spec)) if limit is None else _some_texts(job.spec, limit)
            if not any(inputs[job.name]):
                raise UserError(f"bpb:{job.spec} has no text: name files with documents")
    return inputs


def evaluate(
    engine: Engine,
    found: Sequence[EvaluationTask],
    inputs: Inputs,
    settings: Settings,
    out: Path,
    about: Mapping[str, Any],
    *,
    log: Log,
) -> dict[str, dict[str, Any]]:
    """Runs all tasks on their `inputs`; returns results by task name, with CORE and ChatCORE if their tasks are there.

    Answers are recorded in `out`; those already recorded are not computed again. Raises `UserError` if `out` holds
    another evaluation.
    """
    records = partial(_records, out, {**about, "settings": to_json(settings)})
    scorer = Scorer(engine.transformer, engine.params, mesh=engine.mesh, length=engine.shape.length)
    results: dict[str, dict[str, Any]] = {}
    if asked := [job for job in found if isinstance(job, Asked)]:
        results |= _ask(scorer, asked, inputs, records, log)
    for job in found:
        if isinstance(job, Solving):
            results[job.name] = _solve(engine, job, inputs[job.name], settings, records, log)
        elif isinstance(job, Texts):
            results[job.name] = bits_per_byte(scorer, engine.tokenizer, inputs[job.name])
        if not isinstance(job, Asked):
            log(f"{job.name}: {summary(results[job.name])}")
    return results | summaries(results)


@contextlib.contextmanager
def _records(out: Path, about: Mapping[str, Any], name: str, questions: Iterable[Any]) -> Iterator[Records]:
    """Opens the records of a task: process 0 reads and writes the file, and shares what was in it with the others.

    A hash of `questions` in the first line tells whether the records belong to them.
    """
    digest = hashlib.blake2b(digest_size=8)
    for question in questions:
        digest.update(repr(question).encode(errors="replace"))
    path = out / f"{name.replace('/', '-')}.jsonl" if jax.process_index() == 0 else None
    with contextlib.closing(Records(path, {**about, "task": name, "questions": digest.hexdigest()})) as records:
        records.done = gather(records.done)[0]
        yield records


def _ask(
    scorer: Scorer, asked: Sequence[Asked], inputs: Inputs, records_of: Opened, log: Log
) -> dict[str, dict[str, Any]]:
    """Answers the questions of all tasks together, so that their items share batches."""
    questions, owners, records = [], [], {}
    with contextlib.ExitStack() as files:
        for job in asked:
            own = inputs[job.name]
            records[job.name] = kept = files.enter_context(records_of(job.name, own))
            log(f"{job.name}: {len(own)} questions" + (f", {len(kept.done)} already answered" if kept.done else ""))
            for index, question in enumerate(own):
                if index not in kept.done:
                    questions.append(question)
                    owners.append((job.name, index))
        for count, (number, answer) in enumerate(ask_together(scorer, questions), 1):
            name, index = owners[number]
            records[name].add(index, {"gold": questions[number].gold, **answer._asdict()})
            if count % max(len(questions) // 20, 1) == 0:
                log(f"{count:,} of {len(questions):,} questions")
    results = {job.name: share(list(records[job.name].done.values()), job.baselines) for job in asked}
    for name, result in results.items():
        log(f"{name}: {summary(result)}")
    return results


def share(records: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> dict[str, Any]:
    """Accuracy of a task, of at least one record, with its 95 percent interval, and centred with each baseline."""
    right, count = sum(record["right"] for record in records), len(records)
    low, high = wilson(right, count)
    accuracy = right / count
    result = {"accuracy": accuracy, "low": low, "high": high, "count": count}
    result |= {f"centered_{name}": centered(accuracy, baseline) for name, baseline in baselines.items()}
    return result | {"truncated": sum(record["truncated"] > 0 for record in records)}


def _solve(
    engine: Engine, job: Solving, problems: Sequence[Problem], s: Settings, records_of: Opened, log: Log
) -> dict[str, Any]:
    """Solves the test problems in batches of `TOGETHER` and scores the answers."""
    code, asked_with = code_of(job.task), (tuple(job.task.tools), tuple(getattr(job.task, "stop", ())))
    questions = [asked_with, *((problem.messages, problem.answer) for problem in problems)]
    with records_of(job.name, questions) as records:
        _judge_again(job.task, problems, records, code, log)
        for start in range(len(records.done), len(problems), TOGETHER):  # Records are written in order.
            batch = problems[start : start + TOGETHER]
            # Problem i is sampled with seed + i, so a resumed evaluation gives the same answers.
            sampling = SamplingParams(s.temperature, max_tokens=s.max_tokens, seed=s.seed + start)
            solved = solve(engine, job.task, batch, n=s.samples, sampling=sampling, style=s.style, log=log)
            for i, answers in enumerate(solved.records, start):
                records.add(i, _recorded(answers, code))
            log(f"{job.name}: {start + len(batch):,} of {len(problems):,} problems")
        done = [records.done[i] for i in range(len(problems))]
    strict, lenient = ([answer for record in done for answer in record[how]] for how in ("strict", "lenient"))
    low, high = wilson(sum(strict), len(strict)) if s.samples == 1 else (None, None)
    return {
        "accuracy": sum(strict) / len(strict),
        "low": low,
        "high": high,
        "lenient": sum(lenient) / len(lenient),
        "count": len(done),
        "errors": sum(len(record["errors"]) for record in done),
    }


def bits_per_byte(scorer: Scorer, tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Bits per byte of texts, not all empty. They are cut into chunks of `scorer.length` tokens, and every token is
    scored once, given the tokens before it in its chunk and one more."""
    items, size = [], 0
    length = scorer.length
    for text in texts:
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        size += len(text.encode("utf-8", errors="replace"))
        items += [Item(ids[i : i + 1], ids[i + 1 : i + 1 + length]) for i in range(0, len(ids) - 1, length)]
    nats = -sum(float(scored.logprobs.astype("float64").sum()) for scored in scorer(items))
    return {"bpb": nats / math.log(2) / size, "bytes": size, "tokens": sum(len(item.continuation) for item in items)}


def _recorded(answers: Sequence[Record], code: str) -> dict[str, Any]:
    """What is recorded of the answers to a problem, which the code with hash `code` judged."""
    verdicts = {"strict": [a.strict for a in answers], "lenient": [a.lenient for a in answers]}
    texts = {"texts": [a.text for a in answers], "errors": [a.error for a in answers if a.error]}
    asked = answers[0].asked
    return {"right": answers[0].strict, **verdicts, **texts, "asked": asked, "code": code if asked else None}


def _judge_again(task: Task, problems: Sequence[Problem], records: Records, code: str, log: Log) -> None:
    """Judges those recorded answers again that could not be judged, or that other code of the task judged."""
    asked = {i: record for i, record in records.done.items() if record.get("asked", True)}
    changed = {i for i, record in asked.items() if not code or record.get("code") != code}
    again = [i for i, record in asked.items() if i in changed or record["errors"]]
    if not again:
        return
    reason = "the task's judge changed" if changed else "they could not be judged before"
    log(f"{task.name}: the recorded answers to {len(again):,} problems are judged again, because {reason}")
    pairs = [(problems[i], text) for i in again for text in records.done[i]["texts"]]
    judged = share_out(pairs, partial(judge, task))
    warn_of_errors(task, judged, log)
    answers = iter(judged)
    for i in again:
        records.add(i, _recorded([next(answers) for _ in records.done[i]["texts"]], code))


def _texts(spec: str) -> Iterator[str]:
    return (text for source in sources.find(spec, "val") for text in sources.documents(source, Reading()))


def _some_texts(spec: str, limit: int) -> tuple[str, ...]:
    """`limit` documents, stratified by source; the first if they come in random order. Files are read twice."""
    found = sources.find(spec, "val")
    if all(sources.KINDS[source.kind].shuffled for source in found):
        return tuple(itertools.islice(_texts(spec), limit))
    owners = [n for n, source in enumerate(found) for _ in sources.documents(source, Reading())]
    chosen = set(take(range(len(owners)), limit, owners.__getitem__))
    return tuple(text for number, text in enumerate(_texts(spec)) if number in chosen)


def summaries(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """CORE, averaged over the results of its tasks if there are at least two, and ChatCORE if it has all five tasks."""
    means: dict[str, dict[str, Any]] = {}
    core = {name: result for name, result in results.items() if name.startswith("core/")}
    if len(core) > 1:
        mean = lambda key: sum(result[key] for result in core.values()) / len(core)  # noqa: E731
        averages = {"core": mean("centered_v1"), "core_v2": mean("centered_v2")}
        means["core"] = averages | {"tasks": len(core), "of": len(CORE)}
    if CHATCORE.keys() <= results.keys():
        shares = [centered(results[name]["accuracy"], chance) for name, chance in CHATCORE.items()]
        means["chatcore"] = {"chatcore": sum(shares) / len(shares)}
    return means


def merge_results(
    path: Path, about: Mapping[str, Any], results: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Adds results to the file's, if `about` is the same, else replaces them; returns all results of the file."""
    known = read_json(path)
    free = dict.fromkeys(("results", "checkpoint"))  # The parameters are compared; a run may be moved.
    same = isinstance(known, dict) and {**known, **free} == {**about, **free}
    if known and not same:
        launcher.log(f"{path} held the results of another evaluation, which these replace")
    everything = {**((known.get("results") or {}) if same else {}), **json.loads(json_line(results))}
    everything |= json.loads(json_line(summaries(everything)))
    write_json(path, {**about, "results": everything})
    return everything


def summary(result: Mapping[str, Any]) -> str:
    """Formats a result for the log."""
    if "bpb" in result:
        return f"{result['bpb']:.4f} bits per byte of {result['bytes']:,} bytes"
    interval = "" if result["low"] is None else f" ({100 * result['low']:.2f} to {100 * result['high']:.2f})"
    cut = f", {result['truncated']} truncated" if result.get("truncated") else ""
    return f"{100 * result['accuracy']:.2f}%{interval} of {result['count']:,}{cut}"
