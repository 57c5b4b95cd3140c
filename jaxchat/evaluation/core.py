"""CORE: the mean of centred accuracies over 22 tasks (DCLM, arXiv:2406.11794, section 3.5 and appendix G).

There are two prompt modes. "nanochat" follows karpathy/nanochat's core_eval: rows are shuffled with seed 1337, the
few-shot examples of row i are drawn with seed 1234 + i, and prompt and answer are tokenized as one text. "dclm" follows
llm-foundry, which produced DCLM's own numbers: rows stay in file order, one generator with seed 1234 draws all examples
of a task, texts are stripped, and the answer is tokenized separately. The scores differ, most of all on SQuAD.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jaxchat.data import sources
from jaxchat.decode.prompts import common
from jaxchat.errors import UserError
from jaxchat.evaluation.likelihoods import Item
from jaxchat.evaluation.questions import Question, choices, schema
from jaxchat.tasks.limit import take
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
    """A task of CORE: its file below eval_data/, its number of few-shot examples and the text before an answer.

    `baseline` is the accuracy of guessing in the first version of DCLM's table, used to centre published scores;
    `baseline_v2` is that in the table of September 2025, if it differs.
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
    """Rescales an accuracy so that guessing gives 0 and a perfect score 1."""
    return (accuracy - baseline) / (1 - baseline)


@dataclass(frozen=True)
class CoreRows:
    """Rows of one task, read from the directory of a CORE bundle, and the questions built from them."""

    task: CoreTask
    directory: Path
    mode: Mode = "nanochat"

    @property
    def file(self) -> Path | None:
        """Path of the task's file, plain or gzipped; None if the bundle lacks it."""
        return sources.plain_or_gzipped(self.directory / "eval_data" / self.task.path)

    @cached_property
    def rows(self) -> list[Row]:
        """All rows in evaluation order.

        Raises:
            UserError: the file is missing or empty, or a row is malformed.
        """
        if self.file is None:
            raise UserError(f"no {self.task.path}[.gz] in {self.directory / 'eval_data'}: is this the CORE bundle?")
        rows = []
        for where, row in sources.rows(str(self.file), "val"):
            if reason := _invalid(self.task.kind, row):
                raise UserError(f"{where}: not a valid {self.task.label} row: {reason}")
            rows.append(row)
        if self.mode == "nanochat":
            random.Random(SHUFFLE_SEED).shuffle(rows)
            return rows
        return [
            {name: value.strip() if isinstance(value, str) else value for name, value in row.items()} for row in rows
        ]

    def questions(self, tokenizer: Tokenizer, limit: int | None = None) -> list[Question]:
        """Builds the questions of `limit` rows: the first of the shuffled ones, in mode "dclm" a sample stratified by
        category. As in nanochat, examples come from these rows only.

        Raises:
            UserError: a row's choices share no text, or there are too few rows for the examples.
        """
        if self.mode == "nanochat":
            rows = self.rows[:limit]
        else:
            rows = take(self.rows, limit, lambda row: str(row.get("category")))
        if len(rows) <= self.task.shots:
            raise UserError(
                f"{self.task.label} takes {self.task.shots} examples per question from other rows, so {len(rows)} rows "
                "are too few: raise --limit"
            )
        shown = examples(self.mode, len(rows), self.task.shots)
        questions = []
        for i, row in enumerate(rows):
            try:
                questions.append(question(self.mode, self.task, row, [rows[j] for j in shown[i]], tokenizer))
            except ValueError as error:
                raise UserError(f"{self.task.label}: question {i + 1} cannot be asked: {error}") from None
        return questions


def examples(mode: Mode, rows: int, shots: int) -> list[list[int]]:
    """Draws the few-shot examples of each of `rows` rows: the indices of `shots` other rows."""
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
    """Builds the question of a row with few-shot examples `shown`; raises ValueError if its choices share no tokens."""
    pairs, gold = _pairs(task.kind, row)
    solved = [task.delimiter.join(options[right]) for options, right in (_pairs(task.kind, one) for one in shown)]
    encode = lambda text: [tokenizer.bos, *tokenizer.encode(text)]  # noqa: E731
    if mode == "dclm":  # The answer begins with a space and is tokenized separately.
        start, gap = encode("\n\n".join(solved)), "\n\n" if shown else ""
        items = tuple(
            Item(
                [*start, *tokenizer.encode((gap + left + task.delimiter).rstrip())],
                tokenizer.encode(right if right.startswith(" ") else f" {right}"),
            )
            for left, right in pairs
        )
        return Question(items, gold, "greedy" if task.kind == "language_modeling" else "mean")
    before = "".join(f"{one}\n\n" for one in solved)
    texts = [encode(before + task.delimiter.join(pair)) for pair in pairs]
    if task.kind == "multiple_choice":
        return choices(texts, gold)
    if task.kind == "schema":
        return schema(texts, gold)
    # A space at the end of the prompt belongs to the answer's first token.
    prompt, (whole,) = encode(f"{before}{pairs[0][0]}{task.delimiter}".strip()), texts
    if whole[: len(prompt)] != prompt:  # nanochat raises an error here; we use the shared tokens as the context.
        prompt = whole[: min(common(prompt, whole), len(whole) - 1)]
    return Question((Item(prompt, whole[len(prompt) :]),), 0, "greedy")


def _pairs(kind: Kind, row: Row) -> tuple[list[tuple[str, str]], int]:
    """The texts before and after the delimiter for each choice of a row, and the index of the right choice."""
    if kind == "multiple_choice":
        return [(row["query"], choice) for choice in row["choices"]], row["gold"]
    if kind == "schema":
        return [(context, row["continuation"]) for context in row["context_options"]], row["gold"]
    return [(row["context"].strip(), row["continuation"])], 0


def _invalid(kind: Kind, row: Any) -> str:
    """Returns why a row is invalid; an empty string if it is valid."""
    if not isinstance(row, dict):
        return "it is not an object"
    for name, kind_of in FIELDS[kind].items():
        if not isinstance(row.get(name), kind_of) or isinstance(row.get(name), bool):
            return f"field {name} is missing or not {'text' if kind_of is str else f'of type {kind_of.__name__}'}"
    options = row.get("choices") or row.get("context_options") or []
    if kind == "language_modeling":
        return "" if row["continuation"].strip() else "its continuation is empty"
    if len(options) < 2 or not all(isinstance(option, str) for option in options):
        return "it needs at least two choices, all of them text"
    return (
        "" if 0 <= row["gold"] < len(options) else f"gold={row['gold']} is not an index of its {len(options)} choices"
    )
