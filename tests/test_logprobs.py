"""Chunked log-probabilities beside the plain ones: values, gradients, memory, and what the compiled programs hold."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import recipe
from jaxchat import compilation, sharding
from jaxchat.objectives.logprobs import weighted_nll

VOCAB, PADDED, WIDTH, ROWS, LENGTH = 60, 64, 8, 8, 12


def plain(hidden_BTM: Any, head_MV: Any, targets_BT: Any, weights_BT: Any, *, vocab: int, softcap: float | None) -> Any:
    """The same sum from jax.nn.log_softmax over whole logits."""
    z_BTV = jnp.einsum("BTM,MV->BTV", hidden_BTM, head_MV[:, :vocab])
    z_BTV = z_BTV if softcap is None else softcap * jnp.tanh(z_BTV / softcap)
    logprobs_BTV = jax.nn.log_softmax(z_BTV, axis=-1)
    return -jnp.sum(jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)[..., 0] * weights_BT)


def inputs(softcap: float | None, vocab: int) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(0 if softcap is None else 1)
    hidden = generator.standard_normal((ROWS, LENGTH, WIDTH))
    head = 4 * generator.standard_normal((WIDTH, PADDED))
    targets = generator.integers(0, vocab, (ROWS, LENGTH)).astype(np.int32)
    return hidden, head, targets, generator.choice([0.0, 0.25, 1.0], (ROWS, LENGTH))


def squared(nll: Any, columns: Any, **static: Any) -> Any:
    """Value, and gradients of its square by hidden and head, so that what flows back is not 1."""
    square = jax.value_and_grad(lambda h, w: jnp.square(nll(h, w, *columns, **static)), argnums=(0, 1))
    return jax.jit(lambda h, w: (nll(h, w, *columns, **static), *square(h, w)))


def assert_equal(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-13)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-12)
    for mine, other in zip(ours[2], theirs[2], strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-12 * np.abs(other).max())


@pytest.mark.parametrize("vocab", [VOCAB, PADDED])
@pytest.mark.parametrize("softcap", [6.0, None])
def test_every_chunking_equals_log_softmax(softcap: float | None, vocab: int) -> None:
    hidden, head, *columns = inputs(softcap, vocab)
    static = {"vocab": vocab, "softcap": softcap}
    with jax.enable_x64(True):
        expected = squared(plain, columns, **static)(hidden, head)
        for tokens in (1, 16, 24, 40, 95, 96, 10_000):  # 1, 2, 3, 4 (5 does not divide 12), 6, 12, 12 a row
            ours = squared(weighted_nll, columns, **static, chunk_tokens=tokens)(hidden, head)
            assert_equal(ours, expected)


MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_same(name: str) -> None:
    hidden, head, *columns = inputs(6.0, VOCAB)
    mesh = sharding.make_mesh(sharding.Mesh(*MESHES[name]), rows=ROWS)
    placed = NamedSharding(mesh, sharding.spec(("embed", "vocab")))
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    static = {"vocab": VOCAB, "softcap": 6.0}
    with jax.enable_x64(True):
        expected = squared(plain, columns, **static)(hidden, head)
        with jax.set_mesh(mesh):
            columns = [jax.device_put(column, rows) for column in columns]
            ours = squared(weighted_nll, columns, **static, chunk_tokens=4)
            ours = ours(jax.device_put(hidden, rows), jax.device_put(head, placed))
        assert_equal(ours, expected)


def test_weights_of_zero_hide_any_target() -> None:
    """What a row's padding says does not matter, and gets no gradient."""
    hidden, head, targets, weights = inputs(6.0, VOCAB)
    other = np.where(weights == 0, (targets + 1) % VOCAB, targets)
    assert np.any(other != targets)
    static = {"vocab": VOCAB, "softcap": 6.0}
    with jax.enable_x64(True):
        first, second = (squared(weighted_nll, (t, weights), **static)(hidden, head) for t in (targets, other))
    assert_equal(first, second)
    assert not np.any(np.asarray(first[2][0])[weights == 0])


def test_rows_that_do_not_divide_over_the_mesh_are_refused() -> None:
    hidden, head, *columns = inputs(None, VOCAB)
    mesh = sharding.make_mesh(sharding.Mesh(8), rows=8)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="3 rows do not divide over 8"):
        weighted_nll(hidden[:3], head, columns[0][:3], columns[1][:3], vocab=VOCAB, softcap=None)


def sizes(text: str) -> dict[str, int]:
    """Elements of every array shape that an HLO text names."""
    found = set(re.findall(r"\b(?:pred|bf16|[a-z]\d+)\[([\d,]+)\]", text))
    return {shape: int(np.prod([int(n) for n in shape.split(",")])) for shape in found}


def loss_arguments(tokens: int, vocab: int, width: int) -> list[Any]:
    row = jax.ShapeDtypeStruct((8, tokens // 8), jnp.int32)
    hidden = jax.ShapeDtypeStruct((8, tokens // 8, width), jnp.float32)
    return [
        hidden,
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        row,
        jax.ShapeDtypeStruct(row.shape, jnp.float32),
    ]


def compile_gradient(nll: Any, arguments: list[Any]) -> Any:
    vocab = arguments[1].shape[1]
    loss = lambda *columns: nll(*columns, vocab=vocab, softcap=15.0)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()


def test_the_loss_needs_a_fifth_of_the_plain_ones_memory() -> None:
    arguments = loss_arguments(tokens=8192, vocab=65536, width=32)
    ours, theirs = (
        compile_gradient(nll, arguments).memory_analysis().temp_size_in_bytes for nll in (weighted_nll, plain)
    )
    assert theirs > 4 * 8192 * 65536
    assert 5 * ours < theirs


def compile_train_step(mesh: sharding.Mesh, batches: int = 1, **dial: Any) -> tuple[Any, int]:
    """The compiled training step of a one-layer experiment, and B * T * V of its micro-batch."""
    rows, length, vocab = 128, 32, 8192
    dial = recipe.Dial(1, steps=9, batch_tokens=batches * rows * length, vocab=vocab, row_length=length, head_dim=64)
    experiment = recipe.pretrain(dial, name="hlo", train=("tinyworld:train",), micro_rows=rows, mesh=mesh)
    setup = compilation.make_setup(experiment, print)
    with jax.set_mesh(setup.mesh):
        return compilation.lower_step(setup, rows).compile(), rows * length * vocab


@pytest.mark.parametrize("batches", [1, 2])
def test_the_train_step_holds_no_array_of_all_logits(batches: int) -> None:
    compiled, logits = compile_train_step(sharding.Mesh(1), batches)
    largest = max(sizes(compiled.as_text()).values())
    assert 256 * 8192 <= largest < logits // 8, "the chunk of logits should be the largest array"


def test_the_parser_of_hlo_sees_the_logits_of_the_plain_loss() -> None:
    text = compile_gradient(plain, loss_arguments(tokens=512, vocab=640, width=4)).as_text()
    assert max(sizes(text).values()) >= 512 * 640


COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")


def collectives(text: str) -> tuple[list[str], list[str]]:
    """Collective instructions of an HLO text within the bodies of loops, and outside."""
    computations: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", text):
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", block):
            computations[match[1]] = block
    inside: set[str] = set()
    waiting = re.findall(r"body=%?([\w.\-]+)", text)
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            waiting += re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)", computations[name])
    within: list[str] = []
    outside: list[str] = []
    for name, block in computations.items():
        place = within if name in inside else outside
        place += [line.strip() for line in block.splitlines() if COLLECTIVE.search(line)]
    return within, outside


@pytest.mark.parametrize("mesh", [sharding.Mesh(8), sharding.Mesh(1, 8), sharding.Mesh(4, 2)], ids=str)
def test_the_heads_gradient_is_summed_over_devices_after_the_last_chunk(mesh: sharding.Mesh) -> None:
    compiled, _ = compile_train_step(mesh)
    inside, outside = collectives(compiled.as_text())
    assert "while(" in compiled.as_text(), "no loop over chunks"
    assert outside
    assert not inside
