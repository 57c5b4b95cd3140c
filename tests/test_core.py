"""CORE: nanochat's prompts character for character, rows that are refused, centred means."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_rows import ROWS, TASKS, bos

from jaxchat.errors import UserError
from jaxchat.evaluation.core import CORE, CoreRows, CoreTask, centered, examples
from jaxchat.evaluation.likelihoods import Item, Scored
from jaxchat.evaluation.questions import Question, answer, choices, fit, schema

GOLDEN = Path(__file__).parent / "golden" / "core_prompts.json"


class OneALetter:
    """A token is a character."""

    bos = bos

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))


def bundle(directory: Path, task: CoreTask, rows: Sequence[Any], *, zipped: bool = False) -> Path:
    """A directory with the file of one task."""
    path = directory / "eval_data" / task.path
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(text))
    else:
        path.write_bytes(text)
    return directory


def read(item: Item) -> list[Any]:
    """A prompt's text, and where its scored part begins."""
    return ["".join(map(chr, [*item.context[1:], *item.continuation])), len(item.context) - 1]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_nanochats_character_for_character(name: str, tmp_path: Path) -> None:
    kind, shots, delimiter = TASKS[name]
    task = CoreTask(name, "a/b.jsonl", kind, shots, delimiter=delimiter)  # type: ignore[arg-type]
    rows = CoreRows(task, bundle(tmp_path, task, ROWS[kind], zipped=shots > 2))
    asked = [[read(item) for item in question.items] for question in rows.questions(OneALetter())]  # type: ignore[arg-type]
    assert asked == json.loads(GOLDEN.read_text())[name]


def test_the_other_mode_stands_apart_in_examples_and_tokens(tmp_path: Path) -> None:
    task = CoreTask("words", "a/b.jsonl", "language_modeling", 2, delimiter="\nAnswer: ")
    bundle(tmp_path, task, ROWS["language_modeling"])
    questions = CoreRows(task, tmp_path, "dclm").questions(OneALetter())  # type: ignore[arg-type]
    for i, (row, question) in enumerate(zip(ROWS["language_modeling"], questions)):
        text, start = read(question.items[0])
        assert (
            text[:start].endswith(f"\n\n{row['context'].strip()}\nAnswer:")
            and text[start:] == f" {row['continuation']}"
        )
        assert text.count("Answer:") == 3 and text[:start].count(row["context"].strip()) == 1, i


def test_no_row_is_its_own_example() -> None:
    for mode in ("nanochat", "dclm"):
        shown = examples(mode, 12, 5)  # type: ignore[arg-type]
        assert all(i not in others and len(set(others)) == 5 for i, others in enumerate(shown))
        assert len({tuple(others) for others in shown}) > 6
        assert examples(mode, 3, 0) == [[], [], []]  # type: ignore[arg-type]


BAD = {
    "[1]": "is an array instead of an object",
    '{"query": "a", "choices": ["b", "c"]}': "field gold is missing",
    '{"query": "a", "choices": ["b", "c"], "gold": true}': "field gold is missing",
    '{"query": "a", "choices": ["b", "c"], "gold": 2}': "gold=2",
    '{"query": "a", "choices": ["b"], "gold": 0}': "two choices",
    '{"query": "a", "choices": ["b", 3], "gold": 0}': "all of them text",
    '{"query": 7, "choices": ["b", "c"], "gold": 0}': "field query is missing or not text",
    '{"query": "a", ': "line 2",
}


@pytest.mark.parametrize("line", BAD)
def test_a_malformed_row_is_named_by_its_line(line: str, tmp_path: Path) -> None:
    task = CoreTask("t", "a/b.jsonl", "multiple_choice", 0)
    bundle(tmp_path, task, [{"query": "a", "choices": ["b", "c"], "gold": 0}])
    path = tmp_path / "eval_data" / task.path
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"b\.jsonl line 2") as error:
        CoreRows(task, tmp_path).rows  # noqa: B018
    assert BAD[line] in str(error.value)


def test_missing_files_and_too_few_rows_are_said(tmp_path: Path) -> None:
    task = CoreTask("t", "a/b.jsonl", "multiple_choice", 10)
    with pytest.raises(UserError, match="is this the CORE bundle"):
        CoreRows(task, tmp_path).rows  # noqa: B018
    bundle(tmp_path, task, [])
    with pytest.raises(UserError, match=r"b\.jsonl is empty"):
        CoreRows(task, tmp_path).rows  # noqa: B018
    bundle(tmp_path, task, ROWS["multiple_choice"])
    with pytest.raises(UserError, match="raise --limit"):
        CoreRows(task, tmp_path).questions(OneALetter())  # type: ignore[arg-type]


def test_the_table_has_22_tasks_and_both_baselines() -> None:
    assert len({task.label for task in CORE}) == 22
    changed = [task.label for task in CORE if task.baselines["v1"] != task.baselines["v2"]]
    assert changed == ["commonsense_qa", "agi_eval_lsat_ar", "bigbench_language_identification"]
    assert centered(0.25, 0.25) == 0 and centered(1, 0.62) == 1


def test_choices_and_contexts_are_cut_where_they_part() -> None:
    question = choices([[0, 1, 2, 3], [0, 1, 4], [0, 1, 2, 3, 5]], 1)
    assert [item.context for item in question.items] == [[0, 1]] * 3
    assert [item.continuation for item in question.items] == [[2, 3], [4], [2, 3, 5]]
    same = choices([[0, 1, 2], [0, 1, 2]], 0)
    assert [item.continuation for item in same.items] == [[2], [2]]
    ends = schema([[0, 7, 1, 2], [0, 8, 9, 1, 2]], 0)
    assert [(item.context, item.continuation) for item in ends.items] == [([0, 7], [1, 2]), ([0, 8, 9], [1, 2])]
    for make in (choices, schema):
        with pytest.raises(ValueError, match="in common"):
            make([[1, 2], [3, 4]] if make is choices else [[1, 2], [1, 3]], 0)


def test_every_choice_is_cut_by_as_much() -> None:
    question = choices([[*range(20), 30], [*range(20), 31, 32, 33]], 0)
    cut, over = fit(question, 15)
    assert over == 23 - 16
    assert [item.context for item in cut.items] == [list(range(7, 20))] * 2
    assert fit(question, 22) == (question, 0)
    assert all(len(item.context) == 1 for item in fit(question, 1)[0].items)


def test_answers_are_read_off_as_said() -> None:
    draw = random.Random(0)
    items = (Item([1], [2]), Item([1], [3, 4, 5]))
    one, other = Scored(np.float32([-1.5]), False, 0), Scored(np.float32([-1, -1, -1]), True, 0)
    assert answer(Question(items, 1, "mean"), [one, other]).right
    assert not answer(Question(items, 1, "sum"), [one, other]).right
    assert answer(Question(items[:1], 0, "greedy"), [other]).right
    assert not answer(Question(items[:1], 0, "greedy"), [one]).right
    tied = [Scored(np.float32([-draw.choice([1, 1])]), False, 0) for _ in range(4)]
    assert answer(Question(items * 2, 0, "mean"), tied).predicted == 0
