"""What a message advises can be done: every remedy is followed, as far as the check that refused and to the next work.

A row has a launcher's arguments, what the refusal says, and the change that this advises. The flags and values of the
change must stand in the message. Every message of the code that names a flag is in a row, or in ELSEWHERE.
"""

import ast
import importlib
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jax
import pytest
from commands import flags
from documents import corpus, texts, write_rows
from exports import model, write_run
from remedies import LAUNCHERS, SETTINGS, TINY
from runs import last_of_each
from small import july2026

from jaxchat import checkpoint, command_line, launcher, processes, stages, terminal
from jaxchat.data.cache import locked
from jaxchat.errors import UserError
from jaxchat.evaluation import asking
from jaxchat.export import huggingface, stablehlo
from jaxchat.planning import ahead
from jaxchat.stages import running

ROOT = Path(__file__).parent.parent


class PassedError(Exception):
    """The check that refused has been passed."""


def passed(*args: Any, **settings: Any) -> Any:
    raise PassedError


@pytest.fixture
def places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: Any) -> dict[str, str]:
    """Files and runs that the rows name, in a place where what takes long is replaced by `passed`."""
    place = corpus(tmp_path_factory.mktemp("remedies"))
    (place / "latin.txt").write_text(" caf\u00e9 ".join(texts(200)), encoding="latin-1", errors="replace")
    for name in ("wide.txt", "wider.txt"):
        (place / name).write_text(f"{name} ".join(texts(200)), encoding="utf-16-le")
    write_rows(place / "body.jsonl", [{"body": text} for text in texts(200)])
    (place / "nul.txt").write_text("some words and a \0 among them " * 100)
    write_rows(place / "empty.jsonl", [{"text": "", "body": text} for text in texts(200)])
    write_rows(place / "list.jsonl", [{"text": ["a"], "body": text} for text in texts(200)])
    write_rows(place / "both.jsonl", [{"text": text, "body": text} for text in texts(9, seed=1)])
    (place / "eval_data/world_knowledge").mkdir(parents=True)
    rows = [{"query": f"{i} + 1?", "choices": ["1", "2"], "gold": 0} for i in range(20)]
    write_rows(place / "eval_data/world_knowledge/arc_easy.jsonl", rows)
    (place / "gsm8k").mkdir()
    for side in ("train", "test"):
        write_rows(place / f"gsm8k/{side}.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    run, july = write_run(place / "a", model()), write_run(place / "b", july2026(vocab=420), stage="pretrain")
    small = [word for word in flags(place) if not word.startswith("--prompts")]
    (place / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(place)
    later = place / "runs/later/pretrain"
    checkpoint.write_experiment(later, command_line.load([*small, "--name=later"]))
    (later / "checkpoints/2").mkdir(parents=True)
    jax.devices()
    (Path(run) / "metrics.jsonl").write_text('{"step":1,"loss":1.0}\n')
    bench = {name: importlib.import_module(f"benchmarks.{name}") for name in ("training", "decoding", "accelerator")}
    for module, names in {
        bench["training"]: ("run",),
        bench["decoding"]: ("run",),
        bench["accelerator"]: ("measure_sections",),
        importlib.import_module("benchmarks.evaluation"): ("load_checkpoint",),
        running: ("compile_step",),
        terminal: ("load_engine",),
        asking: ("load_engine",),
        huggingface: ("write", "read"),
        stablehlo: ("write",),
        ahead: ("fits",),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, passed)
    processors = os.sched_getaffinity(0)  # A benchmark takes some only.
    request.addfinalizer(lambda: os.sched_setaffinity(0, processors))
    rl = f"{TINY}:rl --start_from={run} --directory={place}/runs --steps=1 --mesh.data=1 --micro_rows=8"
    files = {"place": str(place), "text": f"{place}/train.jsonl", "gsm8k": f"{place}/gsm8k"}
    return files | {"small": shlex.join(small), "rl": rl, "run": run, "july": july}


def changed(words: list[str], change: str) -> list[str]:
    """The words with `no WORD` left out, and others put in the place of the same flag, or at the end."""
    if change.startswith("python -m launch."):
        return shlex.split(change.removeprefix("python -m launch."))
    for part in change.split(", "):
        if part.startswith("no "):
            (gone,) = shlex.split(part[3:])
            words = [word for word in words if word.partition("=")[0] != gone and word != gone]
        else:
            first, *rest = shlex.split(part)
            name = first.partition("=")[0]
            at = [i for i, word in enumerate(words) if word.partition("=")[0] == name and name.startswith("--")]
            words = [*words[: at[-1]], first, *words[at[-1] + 1 :]] if at else [*words, first, *rest]
    return words


def refusal(act: Any, words: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        act(words)
    return str(caught.value)


def unsaid(change: str, message: str) -> list[str]:
    """The flags of a change of which the message has neither the name nor the value."""
    flags = re.findall(r"--([\w.]+)=?([\w.-]*)", change)
    return [
        name
        for name, value in flags
        if name not in ("checkpoint", "config", "start_from", "variants")
        and name.rpartition(".")[2] not in message
        and not (value and value in message)
    ]


def load(words: list[str]) -> None:
    stage = words[0] if words and words[0].endswith(":") else ""
    command_line.load([TINY + ":" * bool(stage) + stage[:-1], *words[bool(stage) :]])


def launched(words: list[str]) -> None:
    try:
        with pytest.MonkeyPatch.context() as patch:
            if words[0] in ("speedrun", "compare"):
                patch.setattr(stages, "run", passed)
            importlib.import_module(f"launch.{words[0]}").main(words[1:])
    except (PassedError, SystemExit) as end:
        assert isinstance(end, PassedError) or not end.code
    finally:
        jax.config.update("jax_compilation_cache_dir", CACHE)


CACHE = jax.config.jax_compilation_cache_dir
SEEN: set[str] = set()


@pytest.mark.parametrize("given, said, change", SETTINGS)
def test_settings_are_corrected_as_the_message_says(given: str, said: str, change: str) -> None:
    words = shlex.split(given)
    message = refusal(load, words)
    SEEN.add(message)
    assert said in message and not unsaid(change, message)
    load(changed(words, change))


def test_commands_are_corrected_as_the_message_says(places: dict[str, str]) -> None:
    wrong = []
    with locked(Path(places["place"]) / "runs/locked/pretrain", print):
        for given, said, change in LAUNCHERS:
            words = last_of_each(shlex.split(given.format(**places)))
            try:
                message = refusal(launched, words)
                SEEN.add(message)
                assert said.format(**places) in message, message
                assert unsaid(change, message) in ([], ["batch_tokens"]), message
                launched(changed(words, change.format(**places)))
            except BaseException as error:
                wrong.append(f"{given}: {type(error).__name__} {error}"[:600])
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize(
    "given, said, change",
    [
        ({processes.COUNT: "2"}, "set all three or none", {processes.COUNT: None}),
        ({processes.COUNT: "2"}, "set all three or none", {processes.ADDRESS: "a:1", processes.INDEX: "0"}),
        (dict.fromkeys((processes.ADDRESS, processes.COUNT, processes.INDEX), "2"), "number the processes from 0",
         {processes.INDEX: "1", processes.ADDRESS: "a:1"}),
        ({processes.ADDRESS: "a", processes.COUNT: "2", processes.INDEX: "0"}, "write it as HOST:PORT",
         {processes.ADDRESS: "a:1"}),
    ],
)  # fmt: skip
def test_environments_are_corrected_as_the_message_says(given: Any, said: str, change: Any) -> None:
    assert said in refusal(processes.grouped, given)
    processes.grouped({name: value for name, value in (given | change).items() if value is not None})


@pytest.mark.parametrize("advice", ["unset it", "set JAX_PLATFORMS=cpu"])
def test_a_backend_that_does_not_start_is_replaced_as_the_message_says(advice: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    problem = launcher.sentence(RuntimeError("Unable to initialize backend 'cuda': none (you may need another)"))
    assert problem is not None and advice in problem and "you may" not in problem
    name, _, value = advice.removeprefix("set ").partition("=")
    monkeypatch.delenv("JAX_PLATFORMS") if name == "unset it" else monkeypatch.setenv(name, value)
    assert launcher.sentence(RuntimeError("Unable to initialize backend 'cuda'")) is None or value == "cpu"
    assert jax.devices()


SOURCES = sorted(path for top in ("jaxchat", "launch", "benchmarks") for path in (ROOT / top).rglob("*.py"))

# Messages with a flag that no row has: where their remedy is followed, or why it is not.
ELSEWHERE = {
    "is read in tests/test_serve_launch.py, test_inspect.py and test_inspect_steps.py": (
        "name a checkpoint alone: --checkpoint=runs/tiny/rl",
        "name what to look at: --checkpoint with --text or --prompt, or --run with --step",
        "--step={} must be at least 1: name a step of metrics.jsonl",
        "give --text, a text to look into, or --prompt, to look into the model",
        "step {} is {} steps from {}: allow it with --replay={}",
        "--host={} lets other machines use this server: set --api_key, or --allow_anyone=True",
        "{} port {} cannot be served ({}): set --host and --port",
        "port {} is in use: choose another with --port, or 0 for any free one",
        "but the limit is {}: set --model_bytes={} or more",
    ),
    "is followed by tests/test_advice.py and tests/test_paths.py": (
        "no documents to train on: set --data.train to files, directories or tinywor",
        "{}: give one for each, or --data.{} without a value",
        "{}: {}; set --data.val",
        "no share leaves every entry of --data.train something and holds out somethi",
        "warning: --data.train makes {} rows, each trained on {} times: add data, or",
        "{}: remove {} to start again, or give this run its own --name",
        "--data.vocab={}, or more text",
        "stage {} samples its data, so it has no rows: leave :{} out of --config",
        "stage {} takes the tokenizer of {}: leave :{} out of --config",
    ),
    "needs compilation; tests/test_ahead.py, test_compilation.py, test_kernels.py, test_rollouts.py": (
        "--micro_rows={} --model.remat={}",
        "set {}--mesh.fsdp={} {}",
        "set --depth={} {}, or use more chips",
        "no depth fits; use more chips or a smaller --data.row_length",
        "{}: set --micro_rows={}",
        "{}: set --model.remat=full",
        "{} and remat=full: use more devices with --mesh.fsdp",
        "{}: split it over several with --mesh.fsdp, or take a smaller --depth",
        "{}: set --attention=xla",
        "{} kv heads cannot be split like the heads: set a smaller --mesh.tensor",
        "leave out --warm_optimizer",
        "has no float8 units",
        "leaves room for rl.max_tokens",
        "could be rewarded",
    ),
    "needs several processes; tests/test_processes.py": (
        "the mesh uses {}, but every device must take part: leave out --mesh.data",
        "what --data.train names",
        "start again, with fewer --data.workers if memory is short: finished shards are kept",
    ),
    "needs a finished run or evaluation; tests/test_command_line.py, test_compare.py, test_evaluate.py": (
        "were trained with another tokenizer",
        "are not those that {} was trained on",
        "is not a number of this stage's result",
        "belongs to another evaluation",
        "another process is writing an evaluation",
        "was not trained on conversations",
        "has no single token for some answer letter",
        "the held-out rows have no text",
    ),
    "advises to train otherwise; tests/test_stability.py, test_stages.py, test_report.py": (
        "lower --optimizer.scale",
        "--optimizer.clip limits its effect",
        "steps in a row up to step",
        "the run ended at step",
        "More than 5 percent were lost",
        "correct the fields of --model",
        "No problems were asked",
    ),
    "needs other data; tests/test_hub.py, test_prepare.py, test_prepare_conversations.py, test_tokenizer.py": (
        ", compared with one of {} shards of --data.train",
        "losses on them say little; remove them from --data.train or --data.val",
        "has no parquet file to validate on",
        "only validation and test files in",
        "there is no text to train a tokenizer on",
        "bytes per token (below",
    ),
    "needs files of another program; tests/test_import.py, test_export.py": (
        "{} contains another tokenizer: set --out to a new run",
        "{} already exists: set --out to a new or empty directory",
        "ids: name the tokenizer of its training with --tokenizer=DIR",
        "a jaxchat tokenizer by --tokenizer=DIR",
        "is not a sentencepiece model",
        "this is a Unigram tokenizer",
    ),
    "needs a package that few have; tests/test_harness.py, test_benchmarks.py": (
        "unknown lm-eval task",
        "a task requests answers of",
        "the peer knows the October 2025 family",
        "--peer=transformers: {}",
    ),
    "is no message about a mistake": (
        "# A chat model as two programs",
        "usage: --config",
        "  --config={}  {}",
        "--help={} ({})",
        "The options: python -m launch.bench",
        "--family=october2025 --data.vocab=4096",
        "see --help",
    ),
}


def templates(path: Path) -> list[str]:
    """Every text of a file with a flag or a command in it, but docstrings and what is given to other programs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    within |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            found.append(node.value)
    return [text for text in found if re.search(r"--[a-z{]|pip install|python -m launch", text)]


def test_zz_every_message_with_a_flag_is_followed() -> None:
    if not SEEN:
        pytest.skip("runs after the tests of the rows")
    listed = [text for texts in ELSEWHERE.values() for text in texts]
    lacking = []
    for path in SOURCES:
        for text in templates(path):
            if " " not in text.strip() or any(one in text for one in listed):
                continue
            pattern = ".*".join(map(re.escape, text.split("{}")))
            if not any(re.search(pattern, message, re.DOTALL) for message in SEEN):
                lacking.append(f"{path.relative_to(ROOT)}: {text[:110]}")
    print("\n".join(lacking))
    assert not lacking


def test_extras_that_messages_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    calls = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    name = lambda call: getattr(call.func, "id", getattr(call.func, "attr", ""))  # noqa: E731
    named = [call for call in calls if name(call) in ("missing", "require")]
    constants = {call.args[-1].value for call in named if isinstance(call.args[-1], ast.Constant)}
    assert {"plots", "hub", "export", "harness", "interop"} <= constants <= set(extras) >= {"cuda", "tpu", "wandb"}
    written = "".join(path.read_text() for path in SOURCES)
    assert "jaxchat[" not in written and written.count("pip install -e") == 1
