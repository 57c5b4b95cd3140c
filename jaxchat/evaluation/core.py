"""CORE: the mean of centred accuracies over 22 tasks (DCLM, arXiv:2406.11794, section 3.5 and appendix G).

Two ways of writing the prompts. "nanochat" is that of karpathy/nanochat's core_eval: tasks shuffled with seed 1337, the
examples of row i drawn with seed 1234 + i, the prompt tokenized whole. "dclm" is that of llm-foundry, which DCLM's own
numbers come from: rows in the file's order, all examples of a task drawn from one generator of seed 1234, texts
stripped, and the answer tokenized apart from the prompt. Scores under the two differ, SQuAD's most.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jaxchat.data.files import Reading, Source, objects, place
from jaxchat.errors import UserError
from jaxchat.evaluation.likelihoods import Item
from jaxchat.evaluation.questions import Question, choices, common, schema
from jaxchat.tokenizer import Tokenizer

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Mode = Literal["nanochat", "dclm"]
Row = dict[str, Any]

SHUFFLE_SEED, EXAMPLE_SEED = 1337, 1234
FIELDS: Mapping[str, Mapping[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


@dataclass(frozen=True)
class CoreTask:
    """One of the tasks: its file below eval_data/, how many examples a prompt has, and what stands before an answer.

    `baseline` is the accuracy of guessing, by the first version of DCLM's table, which published scores are centred
    with; `baseline_v2` is that of September 2025, where it differs.
    """

    label: str
    path: str
    kind: Kind
    shots: int
    baseline: float = 0.0
    baseline_v2: float | None = None
    delimiter: str = " "

    @property
    def baselines(self) -> dict[str, float]:
        return {"v1": self.baseline, "v2": self.baseline if self.baseline_v2 is None else self.baseline_v2}


_C, _U, _R, _S, _W = (
    "commonsense_reasoning",
    "language_understanding",
    "reading_comprehension",
    "symbolic_problem_solving",
    "world_knowledge",
)
_MC: Kind = "multiple_choice"
_LM: Kind = "language_modeling"
_ANSWER = "\nAnswer: "

CORE: tuple[CoreTask, ...] = (
    CoreTask("hellaswag_zeroshot", f"{_U}/hellaswag.jsonl", _MC, 0, 0.25),
    CoreTask("jeopardy", f"{_W}/jeopardy_all.jsonl", _LM, 10, delimiter=_ANSWER),
    CoreTask("bigbench_qa_wikidata", f"{_W}/bigbench_qa_wikidata.jsonl", _LM, 10),
    CoreTask("arc_easy", f"{_W}/arc_easy.jsonl", _MC, 10, 0.25, delimiter=_ANSWER),
    CoreTask("arc_challenge", f"{_W}/arc_challenge.jsonl", _MC, 10, 0.25, delimiter=_ANSWER),
    CoreTask("copa", f"{_C}/copa.jsonl", _MC, 0, 0.5),
    CoreTask("commonsense_qa", f"{_C}/commonsense_qa.jsonl", _MC, 10, 0.2, 0.403),
    CoreTask("piqa", f"{_C}/piqa.jsonl", _MC, 10, 0.5, delimiter=_ANSWER),
    CoreTask("openbook_qa", f"{_C}/openbook_qa.jsonl", _MC, 0, 0.25),
    CoreTask("lambada_openai", f"{_U}/lambada_openai.jsonl", _LM, 0),
    CoreTask("hellaswag", f"{_U}/hellaswag.jsonl", _MC, 10, 0.25),
    CoreTask("winograd", f"{_U}/winograd_wsc.jsonl", "schema", 0, 0.5),
    CoreTask("winogrande", f"{_U}/winogrande.jsonl", "schema", 0, 0.5),
    CoreTask("bigbench_dyck_languages", f"{_S}/bigbench_dyck_languages.jsonl", _LM, 10),
    CoreTask("agi_eval_lsat_ar", f"{_S}/agi_eval_lsat_ar.jsonl", _MC, 3, 0.2, 0.25),
    CoreTask("bigbench_cs_algorithms", f"{_S}/bigbench_cs_algorithms.jsonl", _LM, 10),
    CoreTask("bigbench_operators", f"{_S}/bigbench_operators.jsonl", _LM, 10),
    CoreTask("bigbench_repeat_copy_logic", f"{_S}/bigbench_repeat_copy_logic.jsonl", _LM, 10),
    CoreTask("squad", f"{_R}/squad.jsonl", _LM, 10),
    CoreTask("coqa", f"{_R}/coqa.jsonl", _LM, 0),
    CoreTask("boolq", f"{_R}/boolq.jsonl", _MC, 10, 0.62, delimiter=_ANSWER),
    CoreTask("bigbench_language_identification", f"{_U}/bigbench_language_identification.jsonl", _MC, 10, 0.091, 0.25),
)


def centered(accuracy: float, baseline: float) -> float:
    """0 for guessing, 1 for all right."""
    return (accuracy - baseline) / (1 - baseline)


@dataclass(frozen=True)
class CoreRows:
    """The rows of one task in a bundle's directory, and the questions they make."""

    task: CoreTask
    directory: Path
    mode: Mode = "nanochat"

    @property
    def file(self) -> Path | None:
        """Where the task's rows lie, if they do."""
        base = self.directory / "eval_data" / self.task.path
        return next((path for path in (base, base.with_name(base.name + ".gz")) if path.is_file()), None)

    @cached_property
    def rows(self) -> list[Row]:
        """Every row in the order in which it is asked.

        Raises:
            UserError: there is no file, or a row in it is not of the task's kind.
        """
        if self.file is None:
            raise UserError(f"no {self.task.path}[.gz] in {self.directory / 'eval_data'}: is this the CORE bundle?")
        kind = "jsonl.gz" if self.file.suffix == ".gz" else "jsonl"
        source = Source(kind, str(self.file), self.file.stat().st_size)
        reading, rows = Reading(), []
        for number, row in objects(source, reading):
            if wrong := _mistake(self.task.kind, row):
                raise UserError(f"{place(source, reading, number)} is no row of {self.task.label}: {wrong}")
            rows.append(row)
        if not rows:
            raise UserError(f"{self.file} has no rows: fetch it again")
        if self.mode == "nanochat":
            random.Random(SHUFFLE_SEED).shuffle(rows)
            return rows
        return [
            {name: value.strip() if isinstance(value, str) else value for name, value in row.items()} for row in rows
        ]

    def questions(self, tokenizer: Tokenizer, limit: int | None = None) -> list[Question]:
        """The questions of the first `limit` rows. As in nanochat, a limit also limits where examples come from.

        Raises:
            UserError: a row's choices are the same tokens, or there are too few rows for the examples.
        """
        rows = self.rows if limit is None else self.rows[:limit]
        if len(rows) <= self.task.shots:
            raise UserError(
                f"{self.task.label} shows {self.task.shots} examples before each question, of other rows: "
                f"{len(rows)} rows are too few, raise --limit"
            )
        shown = examples(self.mode, len(rows), self.task.shots)
        found = []
        for i, row in enumerate(rows):
            try:
                found.append(question(self.mode, self.task, row, [rows[j] for j in shown[i]], tokenizer))
            except ValueError as error:
                raise UserError(f"{self.task.label}: question {i + 1} cannot be asked: {error}") from None
        return found


def examples(mode: Mode, rows: int, shots: int) -> list[list[int]]:
    """For each row, which others are shown before it."""
    if mode == "nanochat":
        return [
            random.Random(EXAMPLE_SEED + i).sample([j for j in range(rows) if j != i], shots) if shots else []
            for i in range(rows)
        ]
    generator, shown = random.Random(EXAMPLE_SEED), []
    for i in range(rows if shots else 0):
        drawn = set(generator.sample(range(rows), shots))
        if i in drawn:
            drawn.remove(i)
            other = generator.choice(range(rows))
            while other == i or other in drawn:
                other = generator.choice(range(rows))
            drawn.add(other)
        shown.append(list(drawn))
    return shown or [[] for _ in range(rows)]


def question(mode: Mode, task: CoreTask, row: Row, shown: Sequence[Row], tokenizer: Tokenizer) -> Question:
    """A row as a question; raises ValueError where its choices cannot be told apart."""
    gold = int(row.get("gold", 0))
    if mode == "dclm":
        return _apart(task, row, shown, gold, tokenizer)
    before = "".join(f"{_left(task, one)}{task.delimiter}{_right(task, one)}\n\n" for one in shown)
    encode = lambda text: [tokenizer.bos, *tokenizer.encode(text)]  # noqa: E731
    if task.kind == "multiple_choice":
        return choices([encode(f"{before}{row['query']}{task.delimiter}{c}") for c in row["choices"]], gold)
    if task.kind == "schema":
        end = task.delimiter + row["continuation"]
        return schema([encode(f"{before}{context}{end}") for context in row["context_options"]], gold)
    asked = before + row["context"].strip() + task.delimiter
    # A space at the end of the prompt belongs to the answer's first token.
    prompt, whole = encode(asked.strip()), encode(asked + row["continuation"])
    if whole[: len(prompt)] != prompt:  # nanochat stops here; the tokens that both share are the context.
        prompt = whole[: min(common([prompt, whole]), len(whole) - 1)]
    return Question((Item(prompt, whole[len(prompt) :]),), 0, "greedy")


def _apart(task: CoreTask, row: Row, shown: Sequence[Row], gold: int, tokenizer: Tokenizer) -> Question:
    """The question with its answer tokenized apart, after a space."""
    before = "\n\n".join(f"{_left(task, one)}{task.delimiter}{_right(task, one)}" for one in shown)
    gap = "\n\n" if shown else ""

    def item(left: str, right: str) -> Item:
        context = [tokenizer.bos, *tokenizer.encode(before), *tokenizer.encode((gap + left + task.delimiter).rstrip())]
        return Item(context, tokenizer.encode(right if right.startswith(" ") else f" {right}"))

    if task.kind == "multiple_choice":
        return Question(tuple(item(row["query"], c) for c in row["choices"]), gold, "mean")
    if task.kind == "schema":
        return Question(tuple(item(c, row["continuation"]) for c in row["context_options"]), gold, "mean")
    return Question((item(row["context"], row["continuation"]),), 0, "greedy")


def _left(task: CoreTask, row: Row) -> str:
    """What a row shown as an example has before its answer."""
    if task.kind == "multiple_choice":
        return str(row["query"])
    return str(row["context_options"][row["gold"]]) if task.kind == "schema" else str(row["context"]).strip()


def _right(task: CoreTask, row: Row) -> str:
    return str(row["choices"][row["gold"]] if task.kind == "multiple_choice" else row["continuation"])


def _mistake(kind: Kind, row: Any) -> str:
    """What is wrong with a row, or nothing."""
    if not isinstance(row, dict):
        return "it is no object"
    for name, kind_of in FIELDS[kind].items():
        if not isinstance(row.get(name), kind_of) or isinstance(row.get(name), bool):
            return f"it has no {name} that is {'text' if kind_of is str else f'a {kind_of.__name__}'}"
    options = row.get("choices") or row.get("context_options") or []
    if kind == "language_modeling":
        return "" if row["continuation"].strip() else "its continuation is empty"
    if len(options) < 2 or not all(isinstance(option, str) for option in options):
        return "it needs two choices or more, all of them text"
    return "" if 0 <= row["gold"] < len(options) else f"gold={row['gold']} names none of its {len(options)} choices"
