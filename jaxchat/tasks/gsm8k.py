"""GSM8K (arXiv:2110.14168): grade school word problems with a calculator; the final answer follows ####."""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from jaxchat.data import sources
from jaxchat.errors import UserError
from jaxchat.tasks.files import FromFiles
from jaxchat.tasks.numbers import last_number, read_number, same_number
from jaxchat.tasks.task import Problem, Score, Split

_FINAL = re.compile(r"####\s*(.*)")


class GSM8K(FromFiles):
    """GSM8K, read from train.jsonl[.gz] and test.jsonl[.gz] in a directory, or from the hub if none is given."""

    name = "gsm8k"
    tools = ("calculator",)
    shuffled = True  # Neither the length nor the steps of neighbours in the published files are correlated.

    def problems(self, split: Split) -> list[Problem]:
        return self._train if split == "train" else self._test

    @cached_property
    def _train(self) -> list[Problem]:
        return list(self._problems("train", "train"))

    @cached_property
    def _test(self) -> list[Problem]:
        return list(self._problems("test", "val"))

    def _problems(self, file: str, side: sources.Split) -> Iterator[Problem]:
        for where, row in self._read(f"{file}.jsonl", side):
            try:
                yield _problem(row)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None

    def score(self, problem: Problem, text: str) -> Score:
        """Strict scoring requires the answer after the last ####; lenient also accepts it as the text's last number."""
        finals, value = _FINAL.findall(text), read_number(problem.answer)
        strict = bool(finals) and same_number(finals[-1], problem.answer)
        return Score(strict, strict or (value is not None and last_number(text) == value))


def _problem(row: Any) -> Problem:
    """Parses a row; raises ValueError if it is malformed."""
    try:
        question, finals = row["question"], _FINAL.findall(row["answer"])
        if not isinstance(question, str):
            raise TypeError
    except (KeyError, TypeError):
        raise ValueError("not an object with a question and an answer") from None
    if not finals or read_number(finals[-1]) is None:
        raise ValueError("no number after #### in the answer")
    return Problem.ask(question, finals[-1].strip())
