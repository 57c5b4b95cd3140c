"""The command line over dataclasses, and their JSON."""

import dataclasses
import functools
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import launch.bench
import launch.chat
import launch.compare
import launch.convert
import launch.evaluate
import launch.harness
import launch.inspect
import launch.plan
import launch.plot
import launch.prepare
import launch.serve
import launch.speedrun
import launch.tokenizer
import launch.train
from jaxchat import checkpoint, command_line, serialization
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.model import Learned

ROOT = Path(__file__).parent.parent
CONFIGS = ("tiny", "d4", "d12", "d20", "d24", "d32")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@functools.cache
def load(*argv, name="tiny"):
    return command_line.load([f"--config=configs/{name}.py", *argv])


FLOAT32 = "must be 0, or from 1.2e-38 to 3.4e+38 in size, as in float32"


def mistake(*argv, name="tiny"):
    with pytest.raises(UserError) as caught:
        load(*argv, name=name)
    return str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_json_reads_back_what_was_written(name):
    experiment = load("--model.pattern.0.mixer.window=5", "--data.train", "a", "b", "--seed=7", name=name)
    text = json.dumps(serialization.to_json(experiment))
    assert serialization.from_json(Experiment, json.loads(text)) == experiment
    assert '"window": 5' in text


def test_rows_longer_than_the_learned_positions_are_refused():
    experiment = load()
    layer = experiment.model.pattern[0]
    layer = dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, positions=Learned(100)))
    model = dataclasses.replace(experiment.model, pattern=(layer, *experiment.model.pattern[1:]))
    message = "data.row_length=256 is more than the 100 positions that the model learns: set --data.row_length=100"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(experiment, model=model)


def test_an_unknown_key_in_json_is_named():
    value = serialization.to_json(load())
    value["model"]["pattern"][0]["mlp"]["gelu"] = 1
    with pytest.raises(UserError, match=r"config\.model\.pattern\.0\.mlp\.gelu is not a field of ReluSquared"):
        serialization.from_json(Experiment, value)


@pytest.mark.parametrize(
    "place, wrong, said",
    [
        ("steps", "many", r"config\.steps='many' is not of type int"),
        ("steps", True, r"config\.steps=True is not of type int"),
        ("dtype", "float8", r"config\.dtype='float8' must be one of 'auto'"),
        ("prompts", "one", r"config\.prompts='one' is not a list"),
        ("mesh", 3, r"config\.mesh=3 is not an object of Mesh"),
        ("micro_rows", "few", r"config\.micro_rows='few' is of none of the allowed types"),
        ("batch_tokens", 5, r"config: batch_tokens=5 is not a multiple"),
    ],
)
def test_a_wrong_value_in_json_is_named(place, wrong, said):
    with pytest.raises(UserError, match=said):
        serialization.from_json(Experiment, serialization.to_json(load()) | {place: wrong})


def test_a_missing_key_in_json_is_named():
    value = serialization.to_json(load())
    del value["depth"]
    with pytest.raises(UserError, match="depth"):
        serialization.from_json(Experiment, value)


def test_json_knows_which_of_a_union_it_holds():
    @dataclass(frozen=True)
    class Circle:
        radius: float = 1.0

    @dataclass(frozen=True)
    class Square:
        side: float = 1.0

    shape = Circle | Square | None
    for value in (Circle(2.0), Square(3.0), None):
        assert serialization.from_json(shape, json.loads(json.dumps(serialization.to_json(value)))) == value
    with pytest.raises(UserError, match="'Line', which must be one of Circle, Square"):
        serialization.from_json(shape, {"type": "Line"})


def test_the_dial_given_what_it_says_already_changes_nothing():
    assert load(f"--steps={load().steps}", f"--data.vocab={load().data.vocab}") == load()


@pytest.mark.parametrize("flags", [["--depth=5"], ["--depth", "5"]])
def test_the_dial_decides_what_is_derived(flags):
    before, after = load(name="d12"), load(*flags, name="d12")
    assert (after.depth, after.model.depth, after.model.width) == (5, 5, 384)
    assert after.batch_tokens < before.batch_tokens and after.steps < before.steps
    assert after.optimizer.head.learning_rate != before.optimizer.head.learning_rate


def test_the_vocabulary_of_the_data_is_the_models():
    before, after = (load("--family=july2026", *more) for more in ((), ("--data.vocab=512", "--data.row_length=128")))
    assert (after.data.vocab, after.model.vocab, after.data.row_length) == (512, 512, 128)
    assert after.optimizer.muon.weight_decay != before.optimizer.muon.weight_decay


def test_a_smaller_batch_lowers_nanochats_rates_and_the_decay_of_the_whole_horizon_stays():
    before, after = (load("--family=july2026", "--steps=0", f"--batch_tokens={tokens}") for tokens in (8192, 2048))
    assert after.optimizer.muon.learning_rate == pytest.approx(before.optimizer.muon.learning_rate / 2)
    assert after.steps == pytest.approx(4 * before.steps, abs=4)
    decay = [e.optimizer.muon.weight_decay * e.optimizer.muon.learning_rate * e.steps for e in (before, after)]
    assert decay[1] == pytest.approx(decay[0], rel=0.01)


def test_a_smaller_batch_has_a_smaller_micro_batch():
    experiment = load("--batch_tokens=1024", "--data.row_length=256")
    assert experiment.batch_rows == 4 and experiment.batch_rows % experiment.micro_rows == 0
    assert load("--batch_tokens=1024", "--data.row_length=256", "--micro_rows=2").micro_rows == 2


def test_an_explicit_leaf_wins_over_the_dial():
    flags = ["--optimizer.muon.learning_rate=0.5", "--model.pattern.0.mixer.window=64"]
    for argv in ([*flags, "--depth=3"], ["--depth=3", *flags]):
        experiment = load(*argv)
        assert experiment.model.depth == 3
        assert experiment.optimizer.muon.learning_rate == 0.5
        assert experiment.model.pattern[0].mixer.window == 64
        assert experiment.optimizer.head == load("--depth=3").optimizer.head


def test_steps_of_the_dial_reach_the_experiment():
    assert load("--steps=7").steps == 7


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--save_evry=3"], "unknown field --save_evry: did you mean --save_every?"),
        (
            ["--model.pattern.0.mixer.windw=3"],
            "unknown field --model.pattern.0.mixer.windw: did you mean --model.pattern.0.mixer.window?",
        ),
        (["--data.vocb=3"], "unknown field --data.vocb: did you mean --data.vocab?"),
        (["--model.mlp.hiden=3"], "unknown field --model.mlp.hiden: did you mean --model.pattern.0.mlp.hidden?"),
        (
            ["--model.pattern.1.qk_norm.eps=1e-5"],
            "unknown field --model.pattern.1.qk_norm.eps: did you mean --model.pattern.1.mixer.qk_norm.eps?",
        ),
        (["--vocab=99"], "unknown field --vocab: did you mean --data.vocab or --model.vocab?"),
        (["--xyzzy=3"], "unknown field --xyzzy; see --help"),
        (["--save_every=3", "hello"], "unexpected argument 'hello': write --field=value; see --help"),
        (["--save_every=often"], "--save_every takes INT, not 'often'"),
        (["--optimizer.muon.learning_rate=fast"], "--optimizer.muon.learning_rate takes FLOAT, not 'fast'"),
        (["--steps=many"], "--steps takes INT, not 'many'"),
        (["--micro_rows=few"], "--micro_rows takes INT|{auto}, not 'few'"),
        (
            ["--micro_rows=3", "--batch_tokens=8192", "--data.row_length=256"],
            "micro_rows=3 does not divide the batch of 32 rows: set --micro_rows=2",
        ),
        (
            ["--batch_tokens=1000", "--data.row_length=256"],
            "batch_tokens=1000 is not a multiple of data.row_length=256: set --batch_tokens=768",
        ),
        (["--depth=0"], "depth=0 must be at least 1"),
        (["--head_dim=0"], "head_dim=0 must be at least 1"),
        (["--ratio=inf"], "ratio=inf must be positive and finite"),
        (["--ratio=-1"], "ratio=-1.0 must be positive and finite"),
        (["--seed=-1"], "seed=-1 must lie between 0 and 2147483647"),
        (["--seed=9223372036854775808"], "seed=9223372036854775808 must lie between 0 and 2147483647"),
        (["--steps=2147483648"], "steps=2147483648 must lie between 0 and 2147483647"),
        (["--data.weights", "nan"], "data.weights=(nan,) must be positive and finite"),
        (["--data.weights", "inf"], "data.weights=(inf,) must be positive and finite"),
        (["--data.vocab=100000000000"], "data.vocab=100000000000 must lie between 1 and 16777216"),
        (["--data.vocab=0"], "data.vocab=0 must lie between 1 and 16777216"),
        (["--data.row_length=0"], "data.row_length=0 must be at least 2"),
        (["--name=."], "name='.' is empty or the directory of the data cache: give another --name"),
        (["--name=cache"], "name='cache' is empty or the directory of the data cache: give another --name"),
        (["--data.cache=runs/tiny"], "name='tiny' is empty or the directory of the data cache: give another --name"),
        (["--optimizer.clip=nan"], "optimizer: clip=nan must be positive and finite, or None"),
        (["--optimizer.final_fraction=inf"], "optimizer: final_fraction=inf must be at least 0 and finite"),
        (["--optimizer.muon.learning_rate=nan"], "optimizer.muon: learning_rate=nan must be at least 0 and finite"),
        (["--optimizer.muon.momentum=1"], "optimizer.muon: momentum=1.0 must be at least 0 and below 1"),
        (["--optimizer.head.learning_rate=-1"], "optimizer.head: learning_rate=-1.0 must be at least 0 and finite"),
        (["--optimizer.embed.b2=1.5"], "optimizer.embed: b2=1.5 must be at least 0 and below 1"),
        (["--optimizer.scalars.eps=1e-50"], f"optimizer.scalars.eps=1e-50 {FLOAT32}"),
        (["--optimizer.head.learning_rate=1e39"], f"optimizer.head.learning_rate=1e+39 {FLOAT32}"),
        (["--model.norm.eps=nan"], f"model.norm.eps=nan {FLOAT32}"),
        (["--model.softcap=inf"], f"model.softcap=inf {FLOAT32}"),
        (["--model.pattern.0.mixer.positions.base=1e300"], f"model.pattern.0.mixer.positions.base=1e+300 {FLOAT32}"),
        (["--data.epochs", "1e39"], f"data.epochs=(1e+39,) {FLOAT32}"),
        (["--optimizer.scalars.eps=0"], "optimizer.scalars: eps=0 must be positive: it keeps the first updates finite"),
        (
            ["--data.weights", "1", "2"],
            "data.weights has 2 entries, but data.train has 1: give one for each, or --data.weights without a value",
        ),
        (
            ["--model.pattern.0.mixer.heads=3", "--model.pattern.0.mixer.kv_heads=2"],
            "model.pattern.0.mixer: heads=3 is not a multiple of kv_heads=2",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(argv, said):
    assert mistake(*argv) == said


@pytest.mark.parametrize("words", [["--save_evry=3"], ["--save_every=often"], ["--save_every"], ["--data.packing=x"]])
def test_a_terminal_without_frames_says_the_same(words, monkeypatch):
    said = mistake(*words)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert mistake(*words) == said and "---" not in said


def test_a_choice_that_does_not_exist_lists_those_that_do():
    assert "best_fit" in mistake("--data.packing=worst") and "--data.packing" in mistake("--data.packing=worst")


def test_a_value_that_ends_like_a_switch_is_a_value():
    chat = command_line.parse(launch.chat.Chat, ["--prompt", "myexplain", "--explain", "--checkpoint", "a-explain"])
    assert (chat.prompt, chat.explain, chat.checkpoint) == ("myexplain", True, "a-explain")


def test_a_field_without_its_value_is_named():
    assert "--save_every" in mistake("--save_every") and "\n" not in mistake("--save_every")


def test_a_missing_configuration_suggests_one(tmp_path, monkeypatch):
    def hint(spec):
        with pytest.raises(UserError, match="no configuration file") as caught:
            command_line.load([f"--config={spec}"])
        return str(caught.value).partition(": ")[2]

    for spec in ("configs/tinny.py", "config/tiny.py", "tiny", "tiny.py", "configs/tiny"):
        assert hint(spec) == "did you mean --config=configs/tiny.py?"
        assert hint(f"{spec}:sft") == "did you mean --config=configs/tiny.py:sft?"
    assert hint("qqqq").startswith("choose one of ") and "configs/d4.py" in hint("qqqq")
    there = Path.cwd() / "configs/tiny.py"
    monkeypatch.chdir(tmp_path)  # The wrong directory: the suggestion has a path that works from there.
    for spec in ("configs/tiny.py", "tiny"):
        assert hint(spec) == f"did you mean --config={there}?"
    assert command_line.load([f"--config={there}"]).name == "tiny"
    with pytest.raises(UserError, match="no configuration given"):
        command_line.load(["--steps=3"])


@pytest.mark.parametrize("word", ["--chekpoint=runs/tiny/sft", "--checkpiont", "--check-point=a"])
def test_a_misspelt_field_that_is_required_gets_a_suggestion(word):
    with pytest.raises(UserError, match=rf"unknown field {word.partition('=')[0]}: did you mean --checkpoint\?"):
        command_line.parse(launch.chat.Chat, [word, "--prompt=a"])
    with pytest.raises(UserError, match=r"--checkpoint is missing: give it as --checkpoint=STR"):
        command_line.parse(launch.chat.Chat, ["--prompt=a"])


@pytest.mark.parametrize("field", ["directory", "data.cache", "start_from"])
def test_a_bucket_is_no_directory(field):
    with pytest.raises(UserError, match=rf"^{field}=gs://bucket/runs is not a directory: mount the bucket"):
        load(f"--{field}=gs://bucket/runs")
    with pytest.raises(UserError, match="checkpoint=gs://bucket/runs is not a directory"):
        checkpoint.locate("gs://bucket/runs")


def test_an_unknown_stage_lists_those_there_are():
    with pytest.raises(UserError, match="unknown stage 'dessert'; expected one of: pretrain"):
        command_line.load(["--config=configs/tiny.py:dessert"])


def test_a_config_file_that_is_no_configuration_says_so(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("SIZE = 3\n")
    with pytest.raises(UserError, match=r"mine\.py has no function get_config"):
        command_line.load([f"--config={path}"])
    path.write_text("def get_config(:\n")
    with pytest.raises(UserError, match=r"mine\.py, line 1"):
        command_line.load([f"--config={path}"])
    (tmp_path / "wrong_part.py").write_text("\n1 +\n")
    path.write_text("import wrong_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"wrong_part\.py, line 2"):
        command_line.load([f"--config={path}"])
    for missing in ("import nowhere_at_all", "from jaxchat.model import NoSuchLayer"):
        path.write_text(missing + "\n")
        with pytest.raises(UserError, match=r"mine\.py cannot be imported: .*(nowhere_at_all|NoSuchLayer)"):
            command_line.load([f"--config={path}"])


def test_difference_names_every_leaf():
    before = load()
    after = load("--model.pattern.0.mixer.window=9", "--seed=3")
    assert serialization.difference(before, after) == {"model.pattern.0.mixer.window": (None, 9), "seed": (0, 3)}
    assert serialization.difference(before, before) == {}


def test_parts_that_are_gone_are_a_difference():
    @dataclass(frozen=True)
    class Part:
        size: int = 1

    @dataclass(frozen=True)
    class Whole:
        parts: tuple[Part, ...] = (Part(), Part(2))
        part: Part | None = None
        name: Literal["a", "b"] = "a"

    found = serialization.difference(Whole(), Whole(parts=(Part(),), part=Part()))
    assert found == {
        "parts.1": ("Part", None),
        "part": (None, "Part"),
        "parts.1.size": (2, None),
        "part.size": (None, 1),
    }


def test_a_part_of_another_type_is_a_difference_even_with_the_same_fields():
    @dataclass(frozen=True)
    class Part:
        size: int = 1

    @dataclass(frozen=True)
    class Other(Part):
        pass

    @dataclass(frozen=True)
    class Whole:
        parts: tuple[Part, ...] = (Part(), Part())
        part: Part = Part()

    found = serialization.difference(Whole(), Whole((Part(), Other()), Other(2)))
    assert found == {"parts.1": ("Part", "Other"), "part": ("Part", "Other"), "part.size": (1, 2)}


def test_experiments_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().steps = 3
