"""Runs a directory of cases, small inputs that showed faults in similar programs: python tests/cases.py DIRECTORY

Prints a line for each case, and at the end those that failed. Parts can be named: ... DIRECTORY texts export. Each row
below states what is right, as the README of the directory does. The parts with models take some minutes.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

TEXTS: dict[str, int | str] = {
    "null_text.jsonl": 300,
    "null_text.parquet": 300,
    "array.json": 300,
    "utf16le_nobom.jsonl": r"looks like UTF-16-LE text: set --data.encoding=utf-16-le$",
    "array_named.jsonl": r"line 1 .*array.*name it \.json$",
    "pretty.jsonl": r"the object does not end in this line .* name the file \.json",
    "binary_text.parquet": r"in column 'text' but bytes",
    "nested_column.parquet": r"set --data.text_column=meta.text",
    "nul_in_text.txt": r"zero byte at byte [\d,]+, in line \d+.*remove it",
    "huge_int.jsonl": r"limit .4300 digits.*write it as a string",
    "chat_openai_tools_system.jsonl": 300,
    "chat_two_systems.jsonl": 50,
    "chat_weight0.jsonl": 300,
    "chat_null_part.jsonl": 50,
    "chat_timestamp_ns.parquet": 300,
    "chat_timestamp_far.parquet": 300,
    "chat_date_far.parquet": 300,
    "chat_time_ns.parquet": 300,
    "chat_other_column_not_utf8.parquet": 300,
    "chat_union_columns.parquet": 300,
    "chat_function_call_legacy.jsonl": 50,
    "chat_numbers.jsonl": 50,
    "chat_alpaca_input_list.jsonl": 50,
    "chat_starts_with_gpt.jsonl": 50,
    "chat_last_empty.jsonl": 50,
    "chat_ends_with_result.jsonl": 50,
    "chat_all_long.jsonl": r"of more than \d+ tokens left out; --data.row_length=2048 .*fits the longest",
    "chat_same_opening.jsonl": r"begin with the same words.*set --data.val$",
    "one_file.txt": r"one_file.txt is one document, which cannot be divided; set --data.val$",
    "fine/bom.jsonl": 300,
    "fine/bom_middle.jsonl": 300,
    "fine/cr_only.jsonl": r"line 1 is not valid JSON",
    "fine/dotted.parquet": r"set --data.text_column=meta.text",
    "fine/gz_truncated.jsonl.gz": r"not a complete gzip file",
    "fine/gz_trailing_garbage.jsonl.gz": r"not a complete gzip file",
    "fine/plain_named.jsonl.gz": r"not a complete gzip file",
    "fine/latin1.jsonl": r"not utf-8 at byte .*latin-1",
    "fine/nul_tail.jsonl": r"has a zero byte at byte 20,144, in line 301, .* remove it",
    "fine/utf16.jsonl": r"--data.encoding=utf-16$",
    "fine/utf16.txt": r"--data.encoding=utf-16$",
    "fine/tab_in_string.jsonl": r"line 1 is not valid JSON: Invalid control character",
    "fine/zero_rows.parquet": r"no document to use|no text",
    "fine/chat_long.jsonl": r"of more than \d+ tokens left out; --data.row_length=\d+ .*fits the longest",
}
"""By file: how many documents or conversations are read, or the sentence of the refusal. Others in fine/ are read."""
LEARNED: dict[str, tuple[str, str]] = {
    "chat_weight0.jsonl": ("", "WRONG"),
    "chat_null_part.jsonl": ("", "None"),
    "chat_ends_with_result.jsonl": ("<|python_end|>", "<|output_end|><|assistant_end|>"),
}
"""By file: text that the training targets contain, and text that they do not."""
NO_CHOICE = {"chat_same_opening.jsonl": ["--data.val", "--data.val_fraction=0.1"], "one_file.txt": ["--data.vocab=340"]}
WRONG: list[str] = []
Verdict = tuple[str, str | None]
"""A case, and what is wrong with it."""


def report(name: str, problem: str | None) -> None:
    print(f"{name}: {problem or 'right'}", flush=True)
    if problem:
        WRONG.append(name)


def command(*words: str, cwd: Path = ROOT, **environment: str) -> tuple[int, str]:
    """Exit status and both outputs of a Python command."""
    env = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def last(text: str) -> dict:
    """The JSON object at the end of a launcher's standard output."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def prepared(*argv: str) -> tuple[int, str]:
    """Documents that preparation reads, -1 if it refuses, and what it says."""
    import launch.prepare
    from jaxchat.errors import UserError

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            return launch.prepare.main(list(argv))["documents"], said.getvalue()
        except UserError as error:
            return -1, f"{said.getvalue()}{error}"


def texts(cases: Path, scratch: Path) -> Iterator[Verdict]:
    """texts/: documents and conversations, prepared and, if LEARNED says so, decoded."""
    place = cases / "texts"
    (scratch / "symlinked").mkdir()
    shutil.copy(place / "symlinked/real.jsonl", scratch / "symlinked")
    (scratch / "symlinked/sub").symlink_to(place / "elsewhere")
    fine = {f"fine/{path.name}" for path in (place / "fine").iterdir()}
    names = [*TEXTS, *sorted(fine - TEXTS.keys()), str(scratch / "symlinked")]
    for name in names:
        wanted = 300 if "symlinked" in name else TEXTS.get(name, 0)
        argv = ["--config=configs/tiny.py", f"--directory={scratch}/texts", "--data.workers=1"]
        if "chat" in name:
            argv += ["--data.format=chat", "--data.val", "tinyworld:chat:50"]
        if name == "one_file.txt":
            argv[0] = "--config=configs/d4.py"
        if name in NO_CHOICE:
            argv += NO_CHOICE[name]
        elif "chat" not in name:
            argv += ["--data.val=tinyworld:val:20"]
        if name != "one_file.txt":
            argv += [f"--data.tokenizer.path={tokenizer(scratch)}", "--data.vocab=1024"]
        read, said = prepared(*argv, f"--data.train={place / name}")
        if isinstance(wanted, str):
            problem = None if re.search(wanted, said, re.M) else f"read {read}, said {said[-300:]!r}"
        else:
            problem = None if read == wanted or (read > 0 and not wanted) else f"{read} of {wanted}: {said[-300:]!r}"
        if not problem and (advice := re.search(r"left out; (.*) fits the longest", said)):
            read, said = prepared(*argv, f"--data.train={place / name}", *advice.group(1).split())
            problem = f"{advice.group(1)}: {said[-300:]}" if read < 8 or "left out" in said else None
        if not problem and name in LEARNED:
            problem = taught(scratch, *LEARNED[name])
        yield f"texts/{name}", problem
    _, said = command(str(place / "tokenizer_space.py"))
    yield "texts/tokenizer_space.py", said or None
    yield "texts/chinese.jsonl", spaces(place / "chinese.jsonl")


def tokenizer(scratch: Path) -> Path:
    """A tokenizer of 1,024 ids, trained once."""
    place = scratch / "tokenizer"
    if not place.exists():
        from jaxchat.data.prepare import Data, ensure_tokenizer

        ensure_tokenizer(Data(vocab=1024), scratch / "cache", 0, lambda _: None).save(place)
    return place


def taught(scratch: Path, has: str, has_not: str) -> str | None:
    """What is wrong with the training targets of the rows that were made last, as text."""
    from jaxchat.data.batch import batch_of
    from jaxchat.data.streams import Rows
    from jaxchat.tokenizer import load_tokenizer

    made = [path.parent for path in (scratch / "texts/cache/rows").glob("*/manifest.json")]
    newest = max(made, key=lambda path: (path / "manifest.json").stat().st_mtime_ns)
    trained = [path for path in made if "cases" in Rows(path).manifest["spec"]]
    rows, known = Rows(max(trained, key=lambda path: path.stat().st_mtime_ns)), load_tokenizer(tokenizer(scratch))
    batch = batch_of(*rows.read(range(len(rows))))
    learned = known.decode(batch["targets"][batch["weights"] > 0].tolist(), keep_specials=True)
    every = known.decode(batch["targets"].ravel().tolist(), keep_specials=True)
    if has not in learned or has_not in (every if has_not == "None" else learned):
        return f"trained on {learned[:200]!r} ({newest.name})"
    return None


def spaces(path: Path) -> str | None:
    """What is wrong with spaces in a tokenizer of Chinese text."""
    from jaxchat.tokenizer import TokenizerConfig, train_tokenizer

    documents = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    trained = train_tokenizer(documents, vocab=500, config=TokenizerConfig())
    ids = trained.encode("hello you two")
    return None if [trained.decode([i]) for i in ids].count(" ") == 2 else f"{[trained.decode([i]) for i in ids]}"


FENCES = (
    "- first:\n  ```python\n  def f(x):\n      return x + 1\n  ```",
    "~~~\ndef f(x):\n    return x + 1\n~~~",
    "````python\ndef f(x):\n    return x + 1\n````",
    "So: ```python\ndef f(x):\n    return x + 1\n```",
)
"""Answers in the fences that issues describe: humaneval/fences.json has none beside its note."""


def small(cases: Path, scratch: Path) -> Iterator[Verdict]:
    """numbers/ and humaneval/: answers that are right."""
    from jaxchat.tasks.gsm8k import GSM8K
    from jaxchat.tasks.humaneval import program
    from jaxchat.tasks.task import Problem

    for line in (cases / "numbers/cases.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        score = GSM8K().score(Problem.ask("?", case["answer"]), case["text"])
        found = {key: bool(getattr(score, key)) for key in ("strict", "lenient") if key in case}
        yield f"numbers: {case['text']}", None if found.items() <= case.items() else f"{found}"
    for answer in FENCES:
        names: dict[str, Any] = {}
        exec(program('def f(x):\n    """Adds one."""\n', "f", answer), names)
        yield f"humaneval: {answer.splitlines()[0]}", None if names["f"](1) == 2 else "another program"


def trained(scratch: Path) -> str:
    """A small SFT checkpoint and, beside it, base/pretrain."""
    place = scratch / "runs/base"
    for stage in ("", ":sft"):
        if not (place / (stage[1:] or "pretrain") / "checkpoints").exists():
            flags = [f"--directory={scratch}/runs", "--name=base", "--eval_every=0", "--eval_problems=8", "--steps=20"]
            status, said = command("-m", "launch.train", f"--config=configs/tiny.py{stage}", "--depth=1", *flags)
            assert status == 0, said
    return str(place / "sft")


def judged(cases: Path, scratch: Path) -> Iterator[Verdict]:
    """eval/: a judge that was corrected judges again; problems from a generator; core/: CORE as it is."""
    ask = ["-m", "launch.evaluate", f"--checkpoint={trained(scratch)}", "--max_tokens=8", "--tasks"]
    for name in ("judge", "raises"):
        for version in ("v1", "v2"):
            shutil.copy(cases / f"eval/{name}_{version}.py", scratch / f"{name}.py")
            status, said = command(*ask, f"{scratch}/{name}.py:Letters")
        right = status == 0 and '"accuracy":1.0' in said and not re.search(r'"errors":[1-9]', said)
        yield f"eval/{name}_v2.py", None if right else said[-300:]
    status, said = command(*ask, f"{cases}/eval/generator.py:Gen")
    yield "eval/generator.py", None if status == 0 and re.search(r"\b20\b", said) else said[-300:]
    for mode in ("nanochat", "dclm"):
        tasks = [f"core/{name}:{cases}/core" for name in ("copa", "lambada_openai", "winograd")]
        status, said = command(*ask, *tasks, f"--mode={mode}")
        yield f"core --mode={mode}", None if status == 0 else said[-300:]


DECODING = {
    "top_p": ["--top_p=1e-40"],
    "penalty": ["--repetition_penalty=1e-39", "--temperature=1", "--top_k=0", "--top_p=1"],
}


def decoding(cases: Path, scratch: Path) -> Iterator[Verdict]:
    """decoding/run.sh: refused, or text."""
    chat = ["-m", "launch.chat", f"--checkpoint={trained(scratch)}", "--prompt=One morning", "--max_tokens=8"]
    for name, flags in DECODING.items():
        status, said = command(*chat, *flags)
        yield f"decoding: {name}", None if status == 2 or (not status and last(said)["text"]) else said[-300:]


RL = {
    "generator.py:Gen": (0, r'"step":2'),
    "huge.py:T": (0, r"which is not from -1e\+15 to 1e\+15"),
    "empty_question.py:T": (2, r"problem 3 of the task emptyq cannot be asked: "),
}


def rl(cases: Path, scratch: Path) -> Iterator[Verdict]:
    """rl/: tasks with faults, each trained on for two steps."""
    flags = ["--steps=2", "--rl.prompts=2", "--rl.samples=4", "--rl.max_tokens=8", "--micro_rows=4", "--eval_every=0"]
    flags += [
        "--save_every=1",
        f"--start_from={trained(scratch)}",
        f"--directory={scratch}/runs",
        "--tasks",
        "--prompts",
    ]
    for name, (wanted, sentence) in RL.items():
        own = [f"--name={name.partition('.')[0]}", "--rl.tasks", f"{cases}/rl/{name}"]
        status, said = command("-m", "launch.train", "--config=configs/tiny.py:rl", *flags, *own)
        yield f"rl/{name}", None if status == wanted and re.search(sentence, said) else f"{status}: {said[-400:]}"


EXPORTS: dict[str, float | str] = {
    "rope_theta_at_top": 500_000.0,
    "rope_parameters_null": 500_000.0,
    "rope_scaling_linear": r"rope_scaling",
    "partial_rotary": r"partial_rotary",
    "nan": r"finite",
    "int8": r"int8|I8",
    "shards_without_index": r"index",
    "stale_index": r"model\.safetensors",
}
"""By directory: the base of RoPE after import, or the refusal."""


def export(cases: Path, scratch: Path) -> Iterator[Verdict]:
    """export/: configurations and weights, imported."""
    run, exported, made = scratch / "runs/october/pretrain", scratch / "exported", scratch / "variants"
    small = [
        "--depth=1",
        "--steps=2",
        "--eval_every=0",
        "--name=october",
        f"--directory={scratch}/runs",
        "--data.vocab=1024",
    ]
    convert = ["-m", "launch.convert"]
    for words in (
        ["-m", "launch.train", "--config=configs/tiny.py", "--family=october2025", *small],
        [*convert, f"--checkpoint={run}", "--to=huggingface", f"--out={exported}"],
        [str(cases / "export/variants.py"), str(exported), str(made)],
    ):
        status, said = command(*words)
        assert status == 0, said
    modes = {oct(path.stat().st_mode & 0o777) for path in exported.iterdir()}
    yield "export: modes of files", None if len(modes) == 1 else f"{modes}"
    for name, wanted in EXPORTS.items():
        out = scratch / "imported" / name / "pretrain"
        status, said = command(*convert, "--from=huggingface", f"--checkpoint={made / name}", f"--out={out}")
        if isinstance(wanted, str):
            problem = None if status == 2 and re.search(wanted, said) else f"{status}: {said[-300:]}"
        else:
            text = (out / "experiment.json").read_text() if status == 0 else said
            problem = None if re.search(rf'"base": {wanted}', text) else f"{status}: {said[-300:]}"
        yield f"export/{name}", problem


def shell(scratch: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in which `python` is this Python."""
    python = scratch / "bin/python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def owner(cases: Path, scratch: Path) -> Iterator[Verdict]:
    """texts/unknown_uid.sh: files of a uid without a name. Needs root."""
    if os.getuid() == 0:
        run = str(Path(trained(scratch)).parent)
        done = shell(scratch, "sh", str(cases / "texts/unknown_uid.sh"), RUN=run, TMPDIR=str(scratch))
        right = done.returncode == 0 and "text" in last(done.stdout)
        yield "texts/unknown_uid.sh", None if right else done.stderr[-300:]


def signals(cases: Path, scratch: Path) -> Iterator[Verdict]:
    """signals/: one SIGINT while XLA compiles. An evaluation ends with 75, not 130: it continues when started again."""
    checkpoint = trained(scratch)
    shutil.rmtree(scratch / "runs/cache/xla", ignore_errors=True)
    for kind, wanted in {"train": 75, "evaluate": 75, "chat": 130}.items():
        # Its mark is the line about the rows, whose number has changed; its task is not in the small bundle.
        script = (cases / "signals/interrupt.py").read_text().replace("278 rows", r"[\d,]+ rows, ")
        script = script.replace("hellaswag", "copa").replace("p.wait(30)", "p.wait(600)")  # On a busy machine.
        _, said = command("-c", script, kind, checkpoint, str(cases / "core"))
        yield f"signals: {kind}", None if f"status {wanted}" in said else said[-300:]


def resume(cases: Path, scratch: Path) -> Iterator[Verdict]:
    """resume/: what a run started from, and the records of a step that was trained again. Minutes."""
    told = []
    for line in ("", "(*)"):
        place = scratch / f"kl{len(told)}"
        text = (cases / "resume/kl_reference.sh").read_text().replace("D=runs_kl", f"D={place}")
        text = "\n".join(row for row in text.splitlines() if not line or line not in row)
        shell(scratch, "bash", "-c", text, "kl", f"{cases}/rl/negative.py")
        rows = map(json.loads, (place / "base/rl/metrics.jsonl").read_text().splitlines())
        told.append([row["kl"] for row in rows if "kl" in row])
    yield "resume/kl_reference.sh", None if told[0] == told[1] else f"{told}"
    text = (cases / "resume/stale_records.sh").read_text().replace("runs_stale", f"{scratch}/stale")
    text = text.replace("first.jsonl", f"{scratch}/first.jsonl").replace("=fresh", f"={scratch}/fresh")
    words = ["bash", "-c", text.replace(" fresh/", f" {scratch}/fresh/"), "stale", f"{cases}/core"]
    done = shell(scratch, *words)
    yield "resume/stale_records.sh", None if "the old answers were taken" not in done.stdout else done.stdout[-300:]


PARTS: dict[str, Callable[[Path, Path], Iterator[Verdict]]] = {
    part.__name__: part for part in (texts, small, judged, decoding, rl, export, owner, signals, resume)
}


def main(argv: list[str]) -> int:
    cases = Path(argv[0]).absolute()
    with tempfile.TemporaryDirectory() as scratch:
        for part in argv[1:] or PARTS:
            for name, problem in PARTS[part](cases, Path(scratch)):
                report(name, problem)
    print(f"failed: {', '.join(WRONG) or 'none'}")
    return bool(WRONG)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
