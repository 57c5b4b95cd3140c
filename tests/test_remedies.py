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
from documents import corpus, texts, write_rows
from exports import model, write_run
from runs import last_of_each
from small import july2026
from test_command_line import flags

from jaxchat import checkpoint, command_line, launcher, processes, stages, terminal
from jaxchat.data.cache import locked
from jaxchat.errors import UserError
from jaxchat.evaluation import asking
from jaxchat.export import huggingface, stablehlo
from jaxchat.planning import ahead
from jaxchat.stages import running

ROOT = Path(__file__).parent.parent
TINY = "--config=configs/tiny.py"

# Settings, refused when they are read. Arguments after the configuration; the stage before a colon.
SETTINGS = [
    ("--stps=3", "unknown field --stps: did you mean --steps?", "no --stps, --steps=3"),
    ("--steps=x", "--steps takes INT, not 'x'", "--steps=3"),
    ("word", "unexpected argument 'word': write --field=value", "no word"),
    ("--warm_optimizer", "warm_optimizer needs start_from", "--start_from=runs/a/pretrain"),
    ("--eval_problems=0", "eval_problems=0 must be at least 1", "--eval_problems=1"),
    ("--seed=-1", "must lie between 0 and", "--seed=0"),
    ("--name=", "give another --name", "--name=x"),
    ("--batch_tokens=1000", "set --batch_tokens=768", "--batch_tokens=768"),
    ("--batch_tokens=7", "set --batch_tokens=256", "--batch_tokens=256"),
    ("--micro_rows=3", "set --micro_rows=2", "--micro_rows=2"),
    ("--micro_rows=0", "set --micro_rows=1", "--micro_rows=1"),
    ("--micro_rows=99", "set --micro_rows=8", "--micro_rows=8"),
    ("--xla=fast", "unknown setting 'fast'; expected one of: overlap", "--xla=overlap"),
    ("--model.vocab=100", "set --data.vocab only", "no --model.vocab, --data.vocab=1000"),
    ("--optimizer.clip=0", "must be positive and finite, or None", "--optimizer.clip=None"),
    ("--model.softcap=0", "must be positive, or None", "--model.softcap=None"),
    ("--mesh.fsdp=0", "sizes must be positive", "--mesh.fsdp=1"),
    ("--model.pattern.0.mixer.window=0", "must be at least 1, or None", "--model.pattern.0.mixer.window=None"),
    ("sft: --data.packing=crop", "use best_fit for conversations", "--data.packing=best_fit"),
    ("--data.weights=1 --data.epochs=1", "cannot be combined: set only one of them", "no --data.epochs"),
    ("--data.val_fraction=2 --data.val", "must lie between 0 and 1", "--data.val_fraction=0.1"),
    ("rl: --rl.minibatches=3", "rl.minibatches=3 does not divide 16 prompts x 16", "--rl.minibatches=16"),
    ("rl: --rl.objective=rloo --rl.samples=1", "rl.samples=1 must be at least 2", "--rl.samples=2"),
    ("rl: --rl.rewards=right", "expected one of: correct", "--rl.rewards=correct"),
    ("rl: --rl.overlong_cushion=300", "must lie between 0 and rl.max_tokens", "--rl.overlong_cushion=0"),
    ("rl: --rl.temperature=0", "must be at least 1e-6", "--rl.temperature=1e-6"),
]
LAUNCHERS = [
    ("speedrun", "choose one, such as --config=configs/tiny.py", TINY),
    ("train {small} --config=configs/tinny.py", "did you mean --config=configs/tiny.py?", TINY),
    ("speedrun --config=configs/tiny.py:sft", "such as --config=configs/tiny.py", TINY),
    (f"speedrun {TINY} --dollars_per_hour=-1", "must be finite and not negative", "--dollars_per_hour=1"),
    ("train {small} --data.tokenizer.path={run}/../tokenizer", "set --data.vocab=420", "--data.vocab=420"),
    (
        "train {small} --data.train={place}/latin.txt",
        "set --data.encoding to its encoding, such as latin-1",
        "--data.encoding=latin-1",
    ),
    (
        "train {small} --data.train={place}/wide.txt --data.val={place}/wider.txt",
        "set --data.encoding=utf-16-le",
        "--data.encoding=utf-16-le",
    ),
    ("train {small} --data.train={place}/nul.txt", "if it is text, set --data.encoding", "--data.encoding=latin-1"),
    (
        "train {small} --data.train={place}/empty.jsonl --data.val={place}/both.jsonl",
        "are they in another column than --data.text_column?",
        "--data.text_column=body",
    ),
    (
        "train {small} --data.train={place}/list.jsonl --data.val={place}/both.jsonl",
        "or set --data.text_column to another",
        "--data.text_column=body",
    ),
    ("train {small} --data.train={place}/none*.txt", "no file matches --data.train", "--data.train={text}"),
    (
        "train {small} --data.train={place}/runs/later",
        "file in --data.train",
        "--data.train={place}/gsm8k/../train.jsonl",
    ),
    ("train {small} --data.train=none.txt", "--data.train none.txt does not exist", "--data.train={text}"),
    ("train {small} --data.encoding=latin-x", "use one, such as latin-1", "--data.encoding=latin-1"),
    (
        "train {small} --data.train={place}/body.jsonl --data.val={place}/both.jsonl",
        "set --data.text_column to the text column",
        "--data.text_column=body",
    ),
    (
        "train {small} --data.val --data.val_fraction=1e-9",
        "set --data.val_fraction=0.1, or --data.val",
        "--data.val_fraction=0.1",
    ),
    (
        "train {small} --data.val --data.val_fraction=1e-9",
        "set --data.val_fraction=0.1, or --data.val",
        "--data.val={place}/val.jsonl",
    ),
    (
        "train {small} --data.val={place}/train.jsonl",
        "is in --data.val and, as {place}/train.jsonl, in --data.train; remove it from one",
        "--data.val={place}/val.jsonl",
    ),
    (
        "train {small} --data.vocab=20",
        "--data.vocab=20 is too small: bytes and special tokens alone take",
        "--data.vocab=300",
    ),
    ("train {small} --mesh.data=16", "choose --mesh sizes with the product 8", "--mesh.data=8"),
    (
        "train {small} --mesh.data=3",
        "set micro_rows and batch_tokens to a multiple of 3 rows",
        "--micro_rows=3, --batch_tokens=48",
    ),
    ("train {small} --mesh.tensor=3", "choose another --mesh.tensor", "--mesh.tensor=2"),
    ("train {small} --attention=cudnn", "set --attention=xla", "--attention=xla"),
    ("train {small} --name=later --steps=1", "is already at step 2: give at least --steps=2", "--steps=2"),
    ("train {small} --name=later --seed=1", "give this one its own --name, or remove that directory", "--name=own"),
    ("train {small} --name=locked", "wait until it ends, or give this one its own --name", "--name=own"),
    ("train {small} --directory={place}/latin.txt", "choose another with --directory", "--directory={place}/elsewhere"),
    ("train {small} --wandb=True", "--wandb=True needs wandb: pip install -e '.[wandb]'", "no --wandb"),
    ("train {small} --tasks=arithmetics", "did you mean arithmetic?", "--tasks=arithmetic"),
    ("train {small} --tasks=arithmetic:there", "write arithmetic instead of arithmetic:there", "--tasks=arithmetic"),
    ("train {rl} --rl.max_tokens=300", "lower it, or raise --data.row_length", "--rl.max_tokens=48"),
    (
        "train {rl} --rl.max_tokens=300",
        "lower it, or raise --data.row_length",
        "--data.row_length=512, --batch_tokens=512",
    ),
    ("train {rl} --rl.tasks=gsm8k:{place}/a", "gsm8k:DIRECTORY must name their directory", "--rl.tasks=gsm8k:{gsm8k}"),
    (
        "train {rl} --start_from=sft --data.train=tinyworld:chat:40 --data.val=tinyworld:chat:9 --data.epochs",
        "train that stage first, with --config=...:sft",
        f"{TINY}:sft, --start_from={{run}}",
    ),
    (
        "chat --checkpoint={place}/none --prompt=a",
        "train first: python -m launch.train --config=...",
        "python -m launch.train {small}",
    ),
    ("chat --prompt=a", "give it as --checkpoint=STR", "--checkpoint={run}"),
    ("chat --checkpoint={run}/.. --prompt=a", "did you mean", "--checkpoint={run}"),
    ("chat --checkpoint={run}@9 --prompt=a", "there are 0", "--checkpoint={run}@0"),
    ("chat --checkpoint={run} --prompt=", "give it a text, or leave it out", "--prompt=a"),
    ("chat --checkpoint={run} --prompt=", "--prompt is empty: give it a text, or leave it out", "no --prompt"),
    (
        "chat --checkpoint={run} --prompt=a --num_samples=2 --temperature=0",
        "leave it out, or raise --temperature",
        "--temperature=1",
    ),
    (
        "chat --checkpoint={run} --prompt=a --num_samples=2 --top_k=1",
        "leave it out, or raise --temperature or --top_k",
        "--top_k=2",
    ),
    (
        "chat --checkpoint={run} --prompt=a --num_samples=2 --top_k=1",
        "--num_samples equal answers: leave it out",
        "no --num_samples",
    ),
    ("chat --checkpoint={run} --score=", "--score needs a text", "--score=a"),
    ("chat --checkpoint={run} --score=a --seed=1", "leave out --seed", "no --seed"),
    ("chat --checkpoint={run} --explain", "--explain needs a --prompt", "--prompt=a"),
    (
        "chat --checkpoint={run} --prompt=a --beams=2 --seed=1",
        "cannot be combined with --beams: leave out --seed",
        "no --seed",
    ),
    ("chat --checkpoint={run} --prompt=a --tools=calc", "available tools: calculator", "--tools=calculator"),
    (
        "chat --checkpoint={july} --prompt=a --tools=calculator",
        "leave out --tools, or add --style=chat",
        "no --tools",
    ),
    (
        "chat --checkpoint={run} --style=text --prompt=a --tools=calculator",
        "calls no tools: leave out --tools",
        "no --tools",
    ),
    ("evaluate", "give a checkpoint, such as --checkpoint=runs/tiny/pretrain", "--checkpoint={run}"),
    ("evaluate --checkpoint={run} --limit=-1", "--limit=-1 must be at least 0", "--limit=0"),
    ("evaluate --checkpoint={run} --samples=2", "leave it out, or raise --temperature", "--temperature=1"),
    ("evaluate --checkpoint={run} --samples=2", "--samples=2 are equal at temperature 0: leave it out", "no --samples"),
    ("evaluate --checkpoint={run} --tasks=bbp", "did you mean bpb?", "--tasks=bpb"),
    ("evaluate --compare={run}", "--compare needs two directories of results", "no --compare, --checkpoint={run}"),
    (
        "evaluate --sandbox_check={place}",
        "--sandbox_check=DIRECTORY must name their directory",
        "no --sandbox_check, --checkpoint={run}",
    ),
    (
        "convert --checkpoint={run} --out={place}/new",
        "set exactly one of --to=huggingface, --to=stablehlo",
        "--to=stablehlo",
    ),
    (
        "convert --checkpoint={run} --out={place}/new --to=huggingface --tokenizer={run}",
        "--tokenizer requires --from",
        "no --tokenizer",
    ),
    (
        "convert --checkpoint={run} --out={place}/new --to=huggingface --rows=2",
        "--rows is only for --to=stablehlo",
        "no --rows",
    ),
    (
        "convert --checkpoint={run} --out={place}/new --to=huggingface --rows=2",
        "--rows is only for --to=stablehlo",
        "--to=stablehlo",
    ),
    (
        "convert --checkpoint={july} --out={place}/new --to=huggingface",
        "export it with --to=stablehlo",
        "--to=stablehlo",
    ),
    (
        "convert --checkpoint={gsm8k} --out={place}/new --from=huggingface",
        "--out={place}/new must end in a stage, such as runs/imported/pretrain",
        "--out={place}/imported/pretrain",
    ),
    (
        "convert --checkpoint={place}/none --out={place}/x/sft --from=huggingface",
        "--checkpoint must name one with config.json",
        "--checkpoint={gsm8k}",
    ),
    (
        f"compare {TINY}",
        'give at least two variants: --variants "base:" "fast: --optimizer.muon.learning_rate=0.04"',
        "--variants 'base:' 'fast: --optimizer.muon.learning_rate=0.04'",
    ),
    (
        f"compare {TINY} --variants base fast:",
        'write "fast: --optimizer.muon.learning_rate=0.04"',
        "no --variants, no base, no fast:, --variants 'base:' 'fast: --optimizer.muon.learning_rate=0.04'",
    ),
    (
        f"compare {TINY} --variants a: 'b: --seed=3'",
        "--seed=3 cannot differ between variants: leave it out",
        "no 'b: --seed=3', b:",
    ),
    (f"compare {TINY} --seed=3 --variants a: b:", "leave --seed out", "no --seed=3"),
    (f"compare {TINY} --measure=speed --variants a: b:", "choose one of val_bpb", "--measure=val_bpb"),
    (
        f"compare {TINY}:rl --start_from={{run}} --equal=time --variants a: b:",
        "stage rl is not supported",
        "--equal=tokens",
    ),
    ("plot --runs {run} --out=a.xyz", "use one of the suffixes", "--out={place}/a.png"),
    ("plot --runs {run} --out={text}/a.png", "set another --out", "--out={place}/a.png"),
    ("plot --runs {place}", "name a stage directory such as runs/tiny/pretrain", "no {place}, {run}"),
    (f"train {TINY} --help=optimiser", "choose one of model, optimizer", "--help=optimizer"),
    ("plan --config=configs/d20.py:pretrain --topology=v9-8", "use a name such as v5e-8", "--topology=v5e-8"),
    ("plan --config=configs/d20.py:pretrain --topology=v5e-7", "the sizes of v5e are 1,", "--topology=v5e-1"),
    ("plan --config=configs/d20.py:pretrain --topology=h100x0", "such as h100x8", "--topology=h100x8"),
    ("plan --config=configs/d20.py:pretrain --mfu=0", "--mfu=0.0 must be a positive number", "--mfu=0.4"),
    ("bench speed", "which benchmark? name one of train, decode", "no speed, train"),
    ("bench gpu --out={place}/bench.json", "measure this with --anyway", "--anyway"),
    ("bench gpu --anyway --out={text}/bench.json", "name another --out", "--out={place}/bench.json"),
    (
        "bench evaluate",
        "name a checkpoint and tasks: --checkpoint=runs/d4/pretrain --tasks core:DIRECTORY",
        "--checkpoint={run}, --tasks=arithmetic",
    ),
    ("bench decode --peer=transformers --temperature=1", "leave --temperature=0", "--temperature=0"),
]


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
        "the model {} takes {} bytes, but {}: raise --model_bytes",
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
        "{}: leave out --warm_optimizer",
        "has no float8 units",
        "leaves room for rl.max_tokens",
        "could be rewarded",
    ),
    "needs several processes; tests/test_processes.py": (
        "the mesh uses {}, but every device must take part: leave out --mesh.data",
        "what --data.train names",
        "a worker ended with",
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
        "examples per question from other rows",
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
        "losses on them say little; remove them from --data.train or --data.val",
        "has no parquet file to validate on",
        "rows cannot be stored at",
        "holds out all it has",
        "only validation and test files in",
        "fits the longest",
        "a smaller --data.vocab",
        "--data.vocab={} at most",
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
