"""HumanEval: programs judged apart from the judge. Right ones pass; nothing else does, and nothing is left of it."""

import errno
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from attacks import ATTACKS, INSTEAD, THROUGH, answer, left, ours
from letters import Letters

import launch.evaluate
from jaxchat.decode.requests import Completion
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.evaluation.solve import solve
from jaxchat.sandbox import filter as calls_filter
from jaxchat.sandbox import landlock, run
from jaxchat.sandbox.run import WALLS, Job, Limits, SandboxError, find_protection, judge, judge_many
from jaxchat.tasks import load_task
from jaxchat.tasks.humaneval import HumanEval, program

SHARED = Path(os.environ.get("JAXCHAT_DATA", Path(__file__).parents[2] / "shared/data")) / "humaneval"
BRIEF = Limits(cpu_seconds=1)
ROWS = [
    {
        "task_id": "Own/0",
        "prompt": 'import math\n\n\ndef area(radius: float) -> float:\n    """The area of a circle."""\n',
        "entry_point": "area",
        "canonical_solution": "    return math.pi * radius**2\n",
        "test": "def check(candidate):\n    assert abs(candidate(1.0) - 3.14159) < 1e-4\n"
        "    assert candidate(0) == 0\n",
    },
    {
        "task_id": "Own/1",
        "prompt": 'def shift(word):\n    return word[1:] + word[:1]\n\n\ndef back(word):\n    """Undoes shift."""\n',
        "entry_point": "back",
        "canonical_solution": "    return word[-1:] + word[:-1]\n",
        "test": "import random\ndef check(candidate):\n    for _ in range(5):\n"
        "        word = ''.join(random.choices('abc', k=4))\n        assert back(shift(word)) == word\n",
    },
    {
        "task_id": "Own/2",
        "prompt": "def pairs(words):\n",
        "entry_point": "pairs",
        "canonical_solution": "    words.sort()\n    return {word: (i, {i}) for i, word in enumerate(words)}\n",
        "test": "def check(candidate):\n    words = ['b', 'a']\n"
        "    assert candidate(words) == {'a': (0, {0}), 'b': (1, {1})}, str(1)\n"
        "    assert words == ['b', 'a'] and candidate(words=[]) == {}\n    print('told')\n",
    },
]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    directory = tmp_path_factory.mktemp("humaneval")
    with gzip.open(directory / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    found = load_task(f"humaneval:{directory}")
    assert isinstance(found, HumanEval)
    return found


def told(code: str, test: str, **changes) -> str:
    """The reason that the judge gives for a program with a function f; empty where it is right."""
    found = judge(Job(code, "f", f"def check(candidate):\n    {test}\n"), changes.pop("limits", BRIEF), **changes)
    assert found.verdict != "broken"
    return found.reason


def test_solutions_pass_with_prompts_helpers_random_arguments_and_changed_ones(task):
    problems = task.problems("test")
    answers = [(problem, row["canonical_solution"]) for problem, row in zip(problems, ROWS)]
    answers += [(problem, problem.answer) for problem in problems]
    answers += [(problem, f"Like this:\n```python\n{problem.answer}```\nDone.") for problem in problems]
    assert task.score_many(answers) == [(True, True)] * 9
    assert task.score(problems[0], "    return 3") == (False, False)
    with pytest.raises(UserError, match="no training problems"):
        task.problems("train")


def test_files_that_are_none_are_refused_by_name(tmp_path):
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"prompt": 3}\n')
    with pytest.raises(UserError, match=r"HumanEval\.jsonl line 2: not an object with task_id, prompt"):
        load_task(f"humaneval:{tmp_path}").problems("test")
    (tmp_path / "HumanEval.jsonl").write_text("".join(json.dumps(ROWS[i]) + "\n" for i in (0, 1, 0)))
    with pytest.raises(UserError, match=r"3: Own/0 has the prompt of Own/0: remove one of them"):
        HumanEval(str(tmp_path)).problems("test")
    (tmp_path / "HumanEval.jsonl").rename(tmp_path / "HumanEval.jsonl.bak")
    with pytest.raises(UserError, match=r"no HumanEval\.jsonl or HumanEval\.jsonl\.gz in"):
        load_task(f"humaneval:{tmp_path}").problems("test")
    with pytest.raises(UserError, match=r"no HumanEval\.jsonl or HumanEval\.jsonl\.gz in"):
        load_task(f"humaneval:{tmp_path}/nowhere").problems("test")
    with pytest.raises(UserError, match="needs files"):
        load_task("humaneval").problems("test")


@pytest.mark.quick
def test_a_program_is_found_in_an_answer():
    prompt, body = "import math\n\n\ndef f(x):\n    '''Twice.'''\n", "    return 2 * x\n"
    whole = f"def f(x):\n{body}"
    assert program(prompt, "f", body) == prompt + body
    assert program(prompt, "f", whole) == f"import math\n\n\n\n{whole}"
    fenced = f"First\n```\nprint(1)\n```\nand\n```python\n{whole}```\n"
    assert program(prompt, "f", fenced) == f"import math\n\n\n\n{whole}", "the block that defines it counts"
    assert program(prompt, "f", f"```py\n{body}```") == prompt + body
    assert program(prompt, "f", f"```python\n{whole}") == f"import math\n\n\n\n{whole}", "an answer that was cut"
    assert program(prompt, "f", "def fg(x):\n    pass\n").startswith(prompt), "another function is not it"


SOLUTION = 'def f(x):\n    """Adds one.\n\n    ```\n    f(1)\n    ```\n    """\n    return x + 1\n'
BODY = "    y = x\n    return y + 1\n"
FENCED = {
    "list": ("1. So:\n\n", "   ```python\n", "   ```\n2. Done.\n", "   "),
    "list without a blank line": ("- So:\n", "  ```python\n", "  ```\n- Done.\n", "  "),
    "list marker": ("", "- ```python\n", "  ```\n", "  "),
    "list of two digits": ("10. So:\n", "    ```python\n", "    ```\n", "    "),
    "tab": ("* So:\n\n", "\t```python\n", "\t```\n", "\t"),
    "four spaces and no list": ("So:\n\n", "    ```python\n", "    ```\n", "    "),
    "quote": ("> So:\n", "> ```python\n", "> ```\n", "> "),
    "tildes": ("So:\n", "~~~python\n", "~~~\nDone.\n", ""),
    "four backticks": ("So:\n", "````python\n", "````\nDone.\n", ""),
    "text before the fence": ("", "Here is `f`: ```python\n", "```\nDone.\n", ""),
    "text before the fence in a list": ("", "1. The code: ```py\n", "   ```\n", "   "),
    "attributes": ("", "```python title='f.py' {1}\n", "```\n", ""),
    "carriage returns": ("So:\r\n", "```python\r\n", "```\r\nDone.\r\n", ""),
    "no end": ("So:\n", "```python\n", "", ""),
}


def run_in_process(code: str) -> bool:
    names: dict = {}
    exec(code, names)
    return names["f"](2) == 3


@pytest.mark.quick
@pytest.mark.parametrize("name", FENCED)
@pytest.mark.parametrize("code", [SOLUTION, BODY], ids=["whole", "body"])
def test_a_program_is_right_however_it_is_fenced(name, code):
    before, opens, closes, indent = FENCED[name]
    if code == SOLUTION and name in ("four spaces and no list",):
        code = "def f(x):\n    return x + 1\n"  # A fence in it ends the block.
    if code == BODY and name == "text before the fence in a list":
        code = "def f(x):\n" + code  # Whose own indentation cannot be known.
    text = before + opens + "".join(f"{indent}{line}" for line in code.splitlines(keepends=True)) + closes
    assert run_in_process(program('def f(x):\n    """Adds one."""\n', "f", text)), text


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{BODY.rstrip()}```",
        f"{BODY}```\n\nThis adds one.\n",
        f"\n{BODY}```\n\nAn example:\n```python\nprint(f(1))\n```\n",
        SOLUTION,
        f"{SOLUTION}\n```python\nprint(f(1))\n```\n",
        f"Use ```f(1)``` then\n```python\n{SOLUTION}```",
        "```python\n    def f(x):\n        return x + 1\n```",
        "```python\ndef f(x):\n    print('```')\n    return x + 1\n```",
        f"1. So:\n   ```python\n{SOLUTION}```\n2. Done.\n",
        f"- So:\n  ~~~\n{SOLUTION}  ~~~\n",
        f"```python\n{SOLUTION}```python\nDone.\n",
        f"~~~\n{SOLUTION}~~~python\nDone.\n",
        "```python def f(x): return x + 1```",
        "So: ```def f(x): return x + 1``` adds one.\n",
    ],
)
def test_a_program_is_right_with_fences_where_they_do_not_belong(text):
    assert run_in_process(program('def f(x):\n    """Adds one."""\n', "f", text)), text


def test_answers_of_every_kind_are_wrong_where_they_are_no_values():
    assert told("def f(): return 1", "assert candidate() == 1") == ""
    assert told("import collections\ndef f(): return collections.Counter('a')", "assert candidate() == {'a': 1}") == ""
    assert told("def f(): return (i for i in [])", "candidate()") == "Raised: NotLiteral"
    assert told("def f(): return 1 / 0", "candidate()") == "Raised: ZeroDivisionError"
    assert told("def f(:", "candidate()") == "Raised: SyntaxError"
    assert told("def g(): pass", "candidate()") == "Raised: KeyError"
    assert told("def f(): return 10**30000", "assert candidate() == 10**30000") == ""
    assert "longer than" in told("def f(): return 'a' * 2_000_000", "candidate()")


def test_time_is_limited_twice():
    assert "closed the pipe" in told("def f():\n    while True: pass", "candidate()")
    waits = "import time\ndef f(): time.sleep(1000)"
    assert told(waits, "candidate()", limits=Limits(wall_seconds=1)) == "Ended: the time limit is exceeded"


def test_a_test_that_calls_nothing_and_a_wall_that_is_none_break_and_are_not_wrong(task, monkeypatch):
    assert judge(Job("def f(): pass", "f", "def check(candidate): pass"), BRIEF).verdict == "broken"
    with pytest.raises(UserError, match="cpu_seconds=0"):
        Limits(cpu_seconds=0)
    gone = find_protection()._replace(wall="bubblewrap")
    monkeypatch.setenv("PATH", "/nowhere")
    if not any(os.path.exists(f"{place}/bwrap") for place in ("/usr/bin", "/usr/local/bin")):
        assert judge(Job("", "f", ""), protection=gone).reason == "bubblewrap: bwrap is not installed"
        monkeypatch.setattr(run, "find_protection", lambda: gone)
        with pytest.raises(SandboxError, match="bwrap is not installed"):
            task.score(task.problems("test")[0], "")


# Landlock does not refuse these to a process of one's own user.
UNHELD = (
    "os.chmod(OUTSIDE, 0o600)",
    "os.fchmod(2, 0o600)",
    "os.utime(OUTSIDE)",
    "os.setxattr(OUTSIDE, 'user.a', b'a')",
    "os.chown(OUTSIDE, os.getuid(), os.getgid())",
    "os.setuid(os.getuid())",
    "os.setgroups([])",
    "os.truncate(OUTSIDE, 0)",
    "os.sched_setaffinity(ME, os.sched_getaffinity(ME))",
    "fcntl.fcntl(0, fcntl.F_SETOWN, ME)",
    "fcntl.fcntl(0, 15, bytes(8))",  # F_SETOWN_EX
)


@pytest.mark.parametrize("wall", WALLS)
def test_every_wall_that_works_here_holds(wall, tmp_path):
    found = [
        run._probe(run.Protection(wall, user, False, ())) for user in ((True, False) if os.getuid() == 0 else (False,))
    ]
    works = [protection for protection in found if not isinstance(protection, str)]
    if not works:
        pytest.skip(f"{found}")
    shield = works[0]
    assert not shield.holes or wall == "limits", shield.sentence
    seen = "import os\ndef f(): return [sorted(os.environ), [n for n in range(100) if alive(n)]]\n"
    seen += "def alive(n):\n    try: os.fstat(n)\n    except OSError: return False\n    return True\n"
    reason = told(seen, "raise OSError(repr(candidate()))", protection=shield)
    names, descriptors = eval(reason.removeprefix("OSError: "))
    assert set(names) <= {"PYTHONHASHSEED", "PWD", "LC_CTYPE"} and descriptors == [0, 1, 2, 3, 4]
    written = "def f():\n    try: open('a', 'w').write('b')\n    except OSError: return 'refused'\n"
    assert told(written, "assert candidate() == 'refused'", protection=shield) == ""
    if shield.filter:
        (outside := tmp_path / "outside").touch()
        acts = ", ".join(f"lambda: {act}" for act in UNHELD)
        tried = f"import fcntl, os\nME, OUTSIDE = os.getpid(), {str(outside)!r}\n"
        tried += f"def f(): return [able(act) for act in ({acts})]\n"
        tried += "def able(act):\n    try: act()\n    except OSError as error: return error.errno\n"
        reason = told(tried, "raise OSError(repr(candidate()))", protection=shield)
        assert reason == f"OSError: {[errno.EPERM] * len(UNHELD)}"
    assert not ours()


def test_the_protection_is_told_in_one_sentence_with_what_it_does_not_hold():
    weak = run.Protection("limits", False, False, ("reach the network",))
    assert weak.sentence.endswith("NOT protected: a program can reach the network")
    assert find_protection().sentence.startswith("answers run in a sandbox: ")


def test_attacks_fail_and_leave_nothing(task, tmp_path):
    temporary = set(os.listdir(tempfile.gettempdir()))
    (tests := tmp_path / "tests").write_text("the tests")
    problem = task.problems("test")[0]
    shown = [(problem, answer(name, problem, "area", outside=str(tmp_path), tests=str(tests))) for name in ATTACKS]
    assert task.score(problem, answer("open", problem, "area")) == (True, True), "what gets through passes"
    task = HumanEval(task._directory, limits=BRIEF)
    verdicts = dict(zip(ATTACKS, (verdict.verdict for verdict in task.verdicts(shown))))
    assert verdicts == dict.fromkeys(ATTACKS, "wrong")
    assert left(str(tmp_path)) == []
    assert not {name for name in set(os.listdir(tempfile.gettempdir())) - temporary if name.startswith("jaxchat-")}


# Those that hurt nobody where nothing holds them.
@pytest.mark.parametrize(
    "name",
    (
        "a socket of any kind",
        "a file outside by a link",
        "the rights of a file outside",
        "a file of 100 MB",
        "a child",
        "another program",
        "environment variables",
        "other processes",
        "foreign descriptors",
        "what its input says",
    ),
)
def test_an_attack_gets_through_where_nothing_holds_it(task, tmp_path, name):
    problem = task.problems("test")[0]
    (tests := tmp_path / "tests").write_text("the tests")
    text = answer(name, problem, "area", outside=str(tmp_path), tests=str(tests))
    code = text.removeprefix("```python\n").removesuffix("```\n") + "print(won)"
    with open(tests) as file:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, input="told", capture_output=True, text=True,
            pass_fds=[file.fileno()] if file.fileno() > 4 else [], check=True,
        )  # fmt: skip
    assert done.stdout == "True\n"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the problems are not at hand")
def test_some_real_problems_are_told_right_from_wrong():
    task = load_task(f"humaneval:{SHARED}")
    problems = task.problems("test")
    assert len(problems) == 164 == len({problem.question for problem in problems})
    special = [problems[i] for i in (0, 32, 33, 38, 50, 151)]  # Helpers of the prompt, its own name, drawn arguments.
    pairs = [(problem, text) for problem in special for text in (problem.answer, "    return None\n")]
    assert [score.strict for score in task.score_many(pairs)] == [True, False] * 6


@pytest.mark.nightly
@pytest.mark.skipif(not SHARED.is_dir(), reason="the problems are not at hand")
@pytest.mark.parametrize("name", ["open", *ATTACKS])
def test_no_attack_passes_any_of_the_real_problems(name, tmp_path):
    """All but "open", which has the right solution and attacks nothing."""
    task = HumanEval(str(SHARED), limits=Limits(cpu_seconds=2))
    problems, tests = task.problems("test"), next(SHARED.resolve().glob("HumanEval.jsonl*"))
    tmp_path.chmod(0o777)
    names = [task._rows[problem.question].entry_point for problem in problems]
    places = {"outside": str(tmp_path), "tests": str(tests)}
    shown = [(problem, answer(name, problem, entry, **places)) for problem, entry in zip(problems, names)]
    verdicts = Counter(verdict.verdict for verdict in task.verdicts(shown))
    assert verdicts == {"right" if name == "open" else "wrong": 164}
    assert left(str(tmp_path)) == []


def test_the_sandbox_is_checked_with_the_solutions_of_the_problems(task):
    found = launch.evaluate.main([f"--sandbox_check={task._directory}"])
    assert found == {"protection": find_protection().sentence, "not_held": [], "problems": 3, "right": 3}


@pytest.mark.quick
@pytest.mark.parametrize(
    "content, said", [(None, "--sandbox_check=DIRECTORY must name"), ("", "is empty"), ("\n", "no rows")]
)
def test_the_sandbox_is_not_checked_without_problems(content, said, tmp_path):
    if content is not None:
        (tmp_path / "HumanEval.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        launch.evaluate.main([f"--sandbox_check={tmp_path}"])


def test_problems_asked_of_a_base_model_end_where_the_function_does(task):
    asked, said = [], []

    def generate(requests):
        asked.extend(requests)
        texts = [row["canonical_solution"] for row in ROWS[:1]] + ["    return 0"]
        return [[Completion(text, (1,), (), (), (), finish_reason="stop") for text in texts] for _ in requests]

    problems = task.problems("test")[:1]
    fake = SimpleNamespace(tokenizer=Letters(), generate=generate)
    solved = solve(fake, task, problems, n=2, sampling=SamplingParams(), style="text", log=said.append)
    assert asked[0].sampling.stop == HumanEval.stop and said == [find_protection().sentence]
    assert solved.records[0][0].text.startswith("    "), "indentation is part of a program"
    assert (solved.pass_at[1], solved.pass_at[2]) == ((0.5, 0.5), (1.0, 1.0))


def test_many_are_judged_in_their_order():
    jobs = [Job(f"def f(): return {i % 3}", "f", "def check(candidate): assert candidate() == 1") for i in range(7)]
    assert [found.verdict == "right" for found in judge_many(jobs, workers=3)] == [i % 3 == 1 for i in range(7)]


@pytest.mark.quick
def test_numbers_of_calls_are_those_of_the_machine():
    assert (
        calls_filter.refused_calls("x86_64")["socket"] == 41 and calls_filter.refused_calls("aarch64")["clone"] == 220
    )
    for machine in ("x86_64", "aarch64"):
        numbers = calls_filter.refused_calls(machine).values()
        assert len(set(numbers)) == len(numbers) and len(numbers) < 127


@pytest.mark.quick
def test_installed_packages_are_left_out_of_what_is_shown(tmp_path):
    for path in ("lib/site-packages", "lib/json"):
        (tmp_path / path).mkdir(parents=True)
    root = str(tmp_path)
    shown, between = landlock.without(root, [f"{root}/lib/site-packages"])
    assert (shown, between) == ([f"{root}/lib/json"], [root, f"{root}/lib"])
    assert set(INSTEAD).isdisjoint(THROUGH)


def test_another_system_is_told_that_the_sandbox_needs_linux(monkeypatch):
    find_protection.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match=r"^programs are judged in a sandbox of Linux only: leave out the tasks that "):
        find_protection()
