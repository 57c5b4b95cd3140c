"""Tasks: problems of two sides that share nothing, and judges that are not fooled by form."""

import gzip
import json
import os
import re
import shlex
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxchat import command_line
from jaxchat.data import tinyworld
from jaxchat.data.tinyworld.chance import partition
from jaxchat.data.tinyworld.problems import Step
from jaxchat.errors import UserError
from jaxchat.evaluation.evaluate import Settings, parse_tasks
from jaxchat.stages import checks
from jaxchat.tasks import TASKS, Problem, load_task, problems_of
from jaxchat.tasks import task as task_module
from jaxchat.tasks.gsm8k import GSM8K
from jaxchat.tasks.limit import take
from jaxchat.tasks.numbers import read_number
from jaxchat.tasks.rewards import REWARDS
from launch.evaluate import Evaluate

SHARED = Path(os.environ.get("JAXCHAT_DATA", Path(__file__).parents[2] / "shared/data")) / "gsm8k"


def judge(answer, text):
    """GSM8K's strict and lenient verdict."""
    return GSM8K().score(Problem.ask("", answer), text)


@pytest.mark.quick
@pytest.mark.parametrize(
    "text, found",
    [
        ("9 * 2 = <<9*2=18>>18\n#### 18", (True, True)),
        ("#### $18.00", (True, True)),
        ("#### 17\n#### 18", (True, True)),
        ("#### 18\n#### 17", (False, False)),
        ("The answer is 18.", (False, True)),
        ("18 of 20", (False, False)),
        ("####", (False, False)),
        ("#### 18 dollars", (True, True)),
        ("#### 17 and 18", (False, True)),
        ("9 * 2 = 18", (False, True)),
        ("9 * 18", (False, False)),
        ("#### 18 000", (False, False)),
        ("#### 1.8e1", (True, True)),
        ("#### 17 1,000/1,000", (True, True)),
        ("", (False, False)),
    ],
)
def test_gsm8k_tells_form_from_truth(text, found):
    assert judge("18", text) == found


@pytest.mark.skipif(not SHARED.is_dir(), reason="the graded answers are not at hand")
def test_the_grader_agrees_with_every_graded_answer():
    with gzip.open(SHARED / "example_model_solutions.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    task, right = GSM8K(str(SHARED)), []
    for row in rows:
        problem = Problem.ask(row["question"], row["ground_truth"].rpartition("A:")[2])
        for name in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            solution, label = row[name]["solution"], row[name]["is_correct"]
            assert task.score(problem, solution) == (False, label), solution
            assert task.score(problem, re.sub("A:(?=.*$)", "####", solution)) == (label, label), solution
            right.append(label)
    assert (len(right), sum(right)) == (5276, 2001)


# The filters of lm-evaluation-harness's task gsm8k: the first match of one, the last of the other, and what its exact
# match leaves out of both sides.
STRICT, FLEXIBLE = re.compile(r"#### (\-?[0-9\.\,]+)"), re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
LEFT_OUT = re.compile(r",|\$|(?s:.*#### )|\.$")


def as_lm_eval(answer, text):
    """Whether lm-eval's strict match, and its flexible extraction, take a text for the answer."""
    strict, flexible = ([match[0] for match in pattern.finditer(text)] for pattern in (STRICT, FLEXIBLE))
    found = strict[0] if strict else "", flexible[-1] if flexible else ""
    return tuple(LEFT_OUT.sub("", one) == LEFT_OUT.sub("", answer) for one in found)


def golden():
    """Worked solutions: some of our own, and the 1,319 of the test side where they are at hand."""
    own = ["9*2=<<9*2=18>>18 eggs\n#### 18", "That is $1,800.\n#### 1,800", "It fell.\n#### -3", "Half\n#### 0.5"]
    path = SHARED / "test.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return own + [json.loads(line)["answer"] for line in lines]


def test_golden_answers_are_judged_as_lm_evals_two_extractions_judge_them():
    solutions = golden()
    assert len(solutions) in (4, 1323)
    for solution in solutions:
        answer = solution.rpartition("#### ")[2]
        for text in (solution, f"So it is {answer}.", f"{solution}1", "So it is 77777."):
            assert judge(answer, text) == as_lm_eval(answer, text), text
        assert judge(answer, solution) == (True, True)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the files are not at hand")
def test_gsm8k_reads_the_real_files():
    task = GSM8K(str(SHARED))
    assert (len(task.problems("train")), len(task.problems("test"))) == (7473, 1319)
    assert all(read_number(problem.answer) is not None for problem in task.problems("test"))


def test_gsm8k_reads_files_and_names_the_line_that_is_wrong(tmp_path):
    rows = [{"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, {"question": "And?", "answer": "five"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(f"gsm8k:{tmp_path}")
    (problem,) = task.problems("train")
    assert (problem.question, problem.answer) == ("Two and two?", "4")
    assert task.score(problem, rows[0]["answer"]) == (True, True)
    with pytest.raises(UserError, match=r"test\.jsonl line 2: no number after ####"):
        task.problems("test")
    (tmp_path / "test.jsonl").write_text('{"question": 5, "answer": "#### 5"}\n')
    with pytest.raises(UserError, match=r"test\.jsonl line 1: not an object with a question"):
        load_task(f"gsm8k:{tmp_path}").problems("test")
    with pytest.raises(UserError, match=r"no train\.jsonl or train\.jsonl\.gz in .*nowhere"):
        load_task(f"gsm8k:{tmp_path}/nowhere").problems("train")
    with pytest.raises(UserError, match="the task gsm8k needs files"):
        load_task("gsm8k").problems("train")


@pytest.fixture(scope="module")
def arithmetic():
    return TASKS["arithmetic"]()


def test_arithmetic_has_a_thousand_test_problems_with_numbers_that_training_never_shows(arithmetic):
    train, test = arithmetic.problems("train"), arithmetic.problems("test")
    assert len(test) >= 1024 and len({problem.question for problem in test}) == len(test)
    assert not {problem.question for problem in train} & {problem.question for problem in test}
    for problem in train[:500]:
        numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
        if problem.kind == "word" and len(numbers) == 2:
            assert any(
                partition(*Step(*pair).key) == "train"
                for pair in ((numbers[0], operation, numbers[1]) for operation in "+-*/")
            )
    assert [p.question for p in TASKS["arithmetic"]().problems("test")] == [p.question for p in test], "the same again"


@pytest.mark.quick
@pytest.mark.parametrize(
    "text, found",
    [
        ("7 + 5 = 12. The answer is 12.", (True, True)),
        ("7 + 512The answer is 12.", (True, True)),  # A call and its answer have no space between them.
        ("16 / 28.0The answer is 8.", (False, False)),
        ("The answer is 12. The answer is 13.", (False, False)),
        ("The answer is 13. The answer is 12.", (True, True)),
        ("It is 12.", (False, True)),
        ("7 + 512", (False, False)),
        ("1 + 12", (False, False)),  # The call 1 + 1 and its answer 2.
        ("The answer is 12 + 7.", (False, False)),
        ("The answer is 12 or 13.", (False, False)),
        ("The answer is 12. \n", (True, True)),
        ("The answer is 12. I think.", (False, True)),
        ("The answer is 112.", (False, False)),
        ("The answer is 12.0.", (False, True)),
        ("The answer is 12", (False, True)),
        ("The answer is twelve.", (False, False)),
    ],
)
def test_arithmetic_wants_the_answer_at_the_end(arithmetic, text, found):
    assert arithmetic.score(Problem.ask("What is 7 + 5?", "12"), text) == found


def test_the_worlds_own_solutions_are_right():
    for name in ("arithmetic", "spelling"):
        kinds = ("word", "steps") if name == "arithmetic" else ("spelling",)
        task = TASKS[name]()
        for problem in tinyworld.problems("test", 60, kinds=kinds):
            asked = Problem.ask(problem.question, problem.answer)
            assert task.score(asked, problem.solution).strict, problem.solution
            assert not task.score(
                asked._replace(answer="z-z-z" if "-" in problem.answer else "91"), problem.solution
            ).strict


def test_spelling_and_facts_have_two_sides():
    for name in ("spelling", "facts"):
        task = TASKS[name]()
        train, test = ({problem.question for problem in task.problems(side)} for side in ("train", "test"))
        assert len(test) > 50 and not train & test


def test_a_fact_is_right_in_every_way_in_which_the_village_tells_it_and_another_is_wrong():
    task, everything = TASKS["facts"](), tinyworld.facts()
    for fact in everything:
        problem = Problem.ask(fact.questions[0], fact.value)
        for form in range(len(fact.forms)):
            told = fact.state(form, pronoun=True)
            assert task.score(problem, told) == (True, True), told
            assert task.score(problem, f"I do not know. {told}") == (False, True)
        for other in everything:
            if other.relation == fact.relation and other.value != fact.value:
                wrong = fact.answer.replace(fact.value, other.value)
                assert task.score(problem, wrong) == (False, False), (fact.value, wrong)
        assert task.score(problem, "I do not know.") == (False, False)


@pytest.mark.quick
def test_rewards_tell_their_parts_apart(arithmetic):
    problem = Problem.ask("What is 7 + 5?", "12")

    def told(text, reason):
        return {name: reward(lambda: arithmetic.score(problem, text), text, reason) for name, reward in REWARDS.items()}

    assert told("The answer is 12.", "stop") == {"correct": 1, "lenient": 1, "ending": 1, "brevity": 1}
    assert told("12", "length") == {"correct": 0, "lenient": 1, "ending": 0, "brevity": 1}
    # The course's reward gives its own example the bonus for brevity, and its text says it would not.
    assert told("John has apples.", "length") == {"correct": 0, "lenient": 0, "ending": 0, "brevity": 1}
    assert told("x" * 500, "stop")["brevity"] == 0


@pytest.mark.quick
def test_a_task_that_is_none_is_refused_with_a_guess(tmp_path):
    with pytest.raises(UserError, match="unknown task 'aritmetic': did you mean arithmetic"):
        load_task("aritmetic")
    with pytest.raises(UserError, match="reads no files: write spelling instead of spelling:here"):
        load_task("spelling:here")
    with pytest.raises(UserError, match=r"task file .*mine\.py does not exist"):
        load_task(f"{tmp_path}/mine.py:Mine")
    (tmp_path / "mine.py").write_text("class Mine:\n    name = 'mine'\n")
    with pytest.raises(UserError, match=r"no task class given for .*mine\.py"):
        load_task(f"{tmp_path}/mine.py")
    with pytest.raises(UserError, match="Mine has no attribute tools"):
        load_task(f"{tmp_path}/mine.py:Mine")
    with pytest.raises(UserError, match="Other cannot be loaded"):
        load_task(f"{tmp_path}/mine.py:Other")


@pytest.mark.quick
@pytest.mark.parametrize(
    "gives, told",
    [
        ("raise OSError('no file')", "failed to load its train problems: no file"),
        ("return []", "has no train problems"),
        ("return ['Two and two?']", "'Two and two.' among its train problems"),
        ("return None", "failed to load its train problems"),
        ("yield from ()", "has no train problems"),
        ("return iter(())", "has no train problems"),
        ("yield Problem.ask('a', 'b'); 1 / 0", "failed to load its train problems: division by zero"),
        ("return {'a': 1}", "'a' among its train problems"),
    ],
)
def test_problems_that_are_none_are_refused(tmp_path, gives, told):
    code = "from jaxchat.tasks import Problem\n"
    code += f"class Own:\n    name, tools, score = 'own', (), None\n    def problems(self, split): {gives}\n"
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(UserError, match=f"the task own .*{told}"):
        problems_of(load_task(f"{tmp_path}/own.py:Own"), "train")


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["generator", "iter", "tuple", "map", "array"])
def test_problems_may_be_any_iterable(kind):
    class Own(SimpleNamespace):
        def problems(self, split):
            every = [Problem.ask(f"{i}?", str(i)) for i in range(20)]
            if kind == "array":  # Its truth is ambiguous.
                found = np.empty(20, object)
                found[:] = every
                return found
            makers = {"generator": lambda: (one for one in every), "map": lambda: map(lambda one: one, every)}
            return makers.get(kind, lambda: {"iter": iter, "tuple": tuple}[kind](every))()

    assert [problem.answer for problem in problems_of(Own(name="own"), "test")] == [str(i) for i in range(20)]


@pytest.mark.quick
@pytest.mark.parametrize("part, gives", [("tools", "'calculator'"), ("tools", "iter(())"), ("stop", "'##'")])
def test_tools_and_stop_texts_that_are_no_tuple_or_list_are_refused(tmp_path, part, gives):
    """A text would be read letter by letter, and a generator only once."""
    code = f"class Own:\n    name, tools, score, problems = 'own', (), None, None\n    {part} = {gives}\n"
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(UserError, match=rf"own\.py:Own: {part} must be a tuple or list of texts, such as \("):
        load_task(f"{tmp_path}/own.py:Own")


@pytest.mark.quick
@pytest.mark.parametrize("limit", [1, 10, 100, 777])
def test_a_limit_draws_a_fair_share_of_every_group(limit):
    sizes = {"algebra": 400, "law": 500, "virology": 100}
    items = [(name, i) for name, size in sizes.items() for i in range(size)]
    drawn = take(items, limit, lambda item: item[0])
    assert len(drawn) == limit == len(set(drawn)) and drawn == sorted(drawn) == take(items, limit, lambda item: item[0])
    for name, size in sizes.items():
        assert abs(sum(item[0] == name for item in drawn) - limit * size / 1000) <= 1
    assert set(drawn) < set(take(items, limit + 100, lambda item: item[0])), "more of the same"
    assert take(items, None) == take(items, 2000) == items


@pytest.mark.quick
def test_a_sample_depends_on_no_place():
    """Every tenth of the items is drawn about equally often over many lists of other lengths."""
    tenths = Counter(item * 10 // size for size in range(200, 400) for item in take(range(size), 10))
    assert len(tenths) == 10 and all(140 < count < 260 for count in tenths.values())


def test_a_limit_takes_the_first_of_shuffled_problems_and_a_sample_of_others():
    for name in ("arithmetic", "spelling"):
        assert problems_of(TASKS[name](), "test", 512) == TASKS[name]().problems("test")[:512]
    facts, kinds = TASKS["facts"](), Counter(problem.kind for problem in TASKS["facts"]().problems("test"))
    drawn = Counter(problem.kind for problem in problems_of(facts, "test", 60))
    assert sum(drawn.values()) == 60
    assert all(abs(drawn[kind] - 60 * count / kinds.total()) <= 1 for kind, count in kinds.items())


def test_a_task_of_ones_own_may_be_a_dataclass(tmp_path):
    code = """
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import ClassVar
        @dataclass
        class Own:
            tools: ClassVar[tuple[str, ...]] = ()
            name: str = "own"
            def problems(self, split): return []
            def score(self, problem, text): return None
    """
    (tmp_path / "own.py").write_text(textwrap.dedent(code))
    assert load_task(f"{tmp_path}/own.py:Own").name == "own"


def test_the_documented_task_of_ones_own_can_be_copied_and_run(tmp_path, monkeypatch):
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", task_module.__doc__ or "", re.MULTILINE)
    code, commands = (textwrap.dedent(block) for block in blocks if block.strip())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doubling.py").write_text(code)
    train, evaluate = (shlex.split(command) for command in commands.strip().splitlines())
    assert (train[:3], evaluate[:3]) == (["python", "-m", "launch.train"], ["python", "-m", "launch.evaluate"])
    root = Path(__file__).parents[1]
    e = command_line.load([word.replace("configs/", f"{root}/configs/") for word in train[3:]])
    assert e.rl is not None and e.rl.tasks == ("doubling.py:Doubling",)
    checks.check_tasks(e)
    (job,) = parse_tasks(command_line.parse(Evaluate, evaluate[3:]).tasks, Settings("chat"), tmp_path)
    own = job.task
    train, test = (problems_of(own, split) for split in ("train", "test"))
    assert not set(p.question for p in train) & set(p.question for p in test)
    assert own.score(train[1], train[1].answer) == (True, True)
    assert own.score(train[1], f"It is {train[1].answer}.") == (False, True) and not own.score(train[1], "40").lenient
