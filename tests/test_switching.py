"""Parts switched on the command line by the name of their type, and names that mean fields of several layers."""

import json
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxchat import command_line, serialization, switching
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.model import GQA, MLA, Learned, MoE, RMSNorm, RoPE, YaRN
from jaxchat.model.attention import MIXERS
from jaxchat.model.counts import flops_per_token
from jaxchat.model.mlp import MLPS
from jaxchat.model.norms import NORMS
from jaxchat.model.positions import POSITIONS

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(*argv, name="tiny"):
    return command_line.load([f"--config=configs/{name}.py", *argv])


BASE = command_line.load([f"--config={ROOT}/configs/tiny.py"])


def switched(*argv, base=BASE):
    """Without the parser: what is left of the arguments comes back too."""
    return switching.apply(base, argv)


@pytest.mark.parametrize(
    "name, table",
    [("mlp", MLPS), ("mixer", MIXERS), ("norm", NORMS), ("mixer.positions", POSITIONS), ("mixer.qk_norm", NORMS)],
)
def test_every_row_of_a_table_is_switched_to_by_its_name_and_read_back(name, table):
    for kind in table:
        word = "None" if kind is type(None) else kind.__name__.lower()
        e, rest = switched(f"--model.pattern.{name}={word}")
        parts = list(e.model.layers)
        for attribute in name.split("."):
            parts = [getattr(part, attribute) for part in parts]
        assert rest == [] and {type(part) for part in parts} == {kind}
        assert serialization.from_json(Experiment, json.loads(json.dumps(serialization.to_json(e)))) == e


@pytest.mark.parametrize("kind", [kind.__name__ for kind in MLPS])
@pytest.mark.parametrize("given", [(), ("--model.mlp.active=1", "--model.mlp.normalise=False")])
def test_a_feed_forward_of_another_kind_takes_as_many_flops(kind, given):
    if given and kind != "MoE":
        pytest.skip("only experts have these fields")
    count = lambda e: flops_per_token(e.model, 256)["mlp"]  # noqa: E731
    assert count(switched(f"--model.mlp={kind}", *given)[0]) == pytest.approx(count(BASE), rel=0.02)
    one, _ = switched("--model.pattern.1.mlp=gelu")
    other, _ = switched(f"--model.pattern.1.mlp={kind}", *given, base=one)
    assert type(other.model.pattern[0].mlp) is type(BASE.model.pattern[0].mlp)
    assert count(other) == pytest.approx(count(BASE), rel=0.02)


def test_fields_given_for_a_new_part_take_precedence_in_any_order():
    flags = ["--model.mlp.experts=16", "--model.mlp=moe", "--model.mlp.hidden=40", "--model.pattern.2.mlp.active=3"]
    e = load(*flags, "--model.mixer.window=64")
    assert [layer.mlp for layer in e.model.layers] == [MoE(16, 2, 40), MoE(16, 2, 40), MoE(16, 3, 40)]
    assert {layer.mixer.window for layer in e.model.layers} == {64}
    assert load("--model.pattern.0.mlp", "swiglu", "--model.pattern.0.mlp.bias", "True").model.layers[0].mlp.bias


def test_sizes_come_from_what_is_around_a_part():
    e, _ = switched("--model.mixer=mla", "--model.mixer.positions=learned", "--model.mixer.norm.gain=w")
    old, new = BASE.model.pattern[0].mixer, e.model.pattern[0].mixer
    assert new == MLA(old.heads, old.head_dim, old.head_dim // 2, old.head_dim, 48, positions=Learned(256))
    back, _ = switched("--model.mixer=gqa", base=switched("--model.mixer=mla")[0])
    assert back.model.pattern[0].mixer == GQA(old.heads, old.heads, old.head_dim, positions=RoPE(100_000.0))
    scaled, _ = switched("--model.mixer.positions.scaling=yarn", "--model.mixer.positions.scaling.factor=4")
    assert scaled.model.pattern[0].mixer.positions.scaling == YaRN(4, 256)
    same, _ = switched("--model.norm=rmsnorm", "--model.mlp=relu_squared")
    assert same == BASE


def test_the_models_own_norm_and_those_of_the_layers_have_different_names():
    own, _ = switched("--model.norm=layernorm")
    layers, _ = switched("--model.pattern.norm=layernorm")
    assert {layer.norm for layer in own.model.layers} == {RMSNorm()} == {layers.model.norm}
    assert own.model.norm == layers.model.pattern[0].norm
    without, _ = switched("--model.smear=None", "--model.backout=none")
    assert (without.model.smear, without.model.backout) == (None, None)


def test_only_the_layers_that_have_a_field_are_meant():
    mixed, _ = switched("--model.pattern.1.mlp=moe")
    assert switched("--model.mlp.experts=4", base=mixed)[1] == ["--model.pattern.1.mlp.experts=4"]
    assert switched("--model.placement=after")[1] == [f"--model.pattern.{i}.placement=after" for i in range(3)]
    assert switched("--data.train", "a", "b", "--seed", "3")[1] == ["--data.train", "a", "b", "--seed", "3"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (
            ["--model.mlp=meo"],
            "--model.mlp=meo is not a kind of part: did you mean MoE? "
            "It is one of ReluSquared, SwiGLU, GELU, GeGLU, MoE",
        ),
        (["--model.mixer=rnn"], "--model.mixer=rnn is not a kind of part: It is one of GQA, MLA"),
        (["--model.mlp.experts=4"], "--model.mlp.experts is a field of MoE: add --model.mlp=MoE"),
        (["--model.mlp=moe", "--model.mlp.experts=many"], "--model.pattern.0.mlp.experts takes INT, not 'many'"),
        (
            ["--model.mlp=moe", "--model.mlp.active=9"],
            "model.pattern.0.mlp: active=9 must lie between 1 and experts=8 less one",
        ),
        (
            ["--model.mixer.positions.scaling=linear"],
            "model.pattern.0.mixer.positions.scaling: Linear needs factor: set it as well",
        ),
    ],
)
def test_a_mistake_is_one_sentence(argv, said):
    with pytest.raises(UserError) as caught:
        load(*argv)
    assert str(caught.value) == said


def test_help_lists_the_kinds(capsys):
    with pytest.raises(SystemExit):
        load("--model.pattern.0.mixer=mla", "--help=model")
    said = " ".join(capsys.readouterr().out.split())
    assert "--model.mlp=ReluSquared|SwiGLU|GELU|GeGLU|MoE (now ReluSquared)" in said
    assert "--model.mixer=GQA|MLA (now MLA)" in said and "--model.pattern.norm=RMSNorm|LayerNorm" in said
    assert "--model.pattern.0.mixer.kv_rank INT" in said


def test_it_knows_no_field_names():
    @dataclass(frozen=True)
    class Round:
        radius: int

    @dataclass(frozen=True)
    class Square:
        side: int = 1

    @dataclass(frozen=True)
    class Box:
        lid: Round | Square | None = None
        parts: tuple[Square, ...] = (Square(), Square(2))

    @dataclass(frozen=True)
    class Shelf:
        box: Box = Box()

    Box.__annotations__["lid"] = typing.Optional[Round | Square]  # noqa: UP045
    shelf, rest = switching.apply(Shelf(), ["--box.lid=round", "--box.lid.radius=3", "--box.side=5"])
    assert shelf.box.lid == Round(3)
    assert rest == ["--box.lid.radius=3", "--box.parts.0.side=5", "--box.parts.1.side=5"]
    assert switching.apply(shelf, ["--box.lid=None"])[0].box.lid is None
