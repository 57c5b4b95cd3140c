"""Chunked log-probabilities beside the plain ones: values, gradients, memory, and what the compiled programs hold."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs import recipe
from jaxchat import compilation, sharding
from jaxchat.objectives import logprobs
from jaxchat.objectives.logprobs import score_tokens, token_logprobs, weighted_nll

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


def in_numpy(
    hidden: Any, head: Any, targets: Any, g: Any, *, vocab: int, softcap: Any, temperature: Any, kept: Any
) -> Any:
    """Log-probabilities, entropy, and the gradients of sum(g * log-probability) by hidden and head, in float64."""
    product = np.einsum("btm,mv->btv", hidden, head[:, :vocab])
    bent = 0 * product if softcap is None else np.tanh(product / softcap)
    z = (product if softcap is None else softcap * bent) / temperature
    hit = np.eye(vocab)[targets]
    inside = np.ones(z.shape, bool) if kept is None else (kept | (hit == 1))
    e = np.where(inside, np.exp(z - z.max(axis=-1, keepdims=True, where=inside, initial=-np.inf)), 0)
    p = e / e.sum(axis=-1, keepdims=True)
    logprobs = np.log((p * hit).sum(axis=-1))
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
    slopes = g[..., None] * (hit - p) * (1 - bent**2) / temperature
    dw = np.zeros(head.shape)
    dw[:, :vocab] = np.einsum("btm,btv->mv", hidden, slopes)
    return logprobs, entropy, np.einsum("btv,mv->btm", slopes, head[:, :vocab]), dw


def kept_sets(vocab: int) -> np.ndarray:
    """Random sets of 1 to all tokens, some without the target."""
    generator = np.random.default_rng(2)
    return generator.random((ROWS, LENGTH, vocab)) < generator.choice([0.0, 0.1, 0.8, 1.0], (ROWS, LENGTH, 1))


def scored(g: Any, targets: Any, **static: Any) -> Any:
    """The same as `in_numpy` from the chunked operations."""

    def total(hidden: Any, head: Any) -> Any:
        return jnp.sum(g * token_logprobs(hidden, head, targets, **static))

    def everything(hidden: Any, head: Any) -> Any:
        logprobs = token_logprobs(hidden, head, targets, **static)
        again, entropy, _ = score_tokens(hidden, head, targets, **static)
        return (logprobs, entropy, *jax.grad(total, argnums=(0, 1))(hidden, head)), again

    return jax.jit(everything)


CASES = {
    "plain": (VOCAB, 6.0, 1.0, False),
    "temperature": (PADDED, None, 0.6, False),
    "support": (VOCAB, None, 1.0, True),
    "all": (VOCAB, 6.0, 1.7, True),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 3e-6)], ids=["f64", "f32"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_log_probabilities_and_gradients_equal_numpys(case: str, dtype: Any, tolerance: float) -> None:
    vocab, softcap, temperature, truncated = CASES[case]
    hidden, head, targets, g = inputs(softcap, vocab)
    sets = kept_sets(vocab) if truncated else None
    expected = in_numpy(hidden, head, targets, g, vocab=vocab, softcap=softcap, temperature=temperature, kept=sets)
    with jax.enable_x64(dtype == np.float64):
        static = {"vocab": vocab, "softcap": softcap, "temperature": temperature, "chunk_tokens": 24}
        if sets is not None:
            static["support_BTC"] = jnp.asarray(np.packbits(sets, axis=-1, bitorder="little"))
        ours, again = scored(g.astype(dtype), targets, **static)(hidden.astype(dtype), head.astype(dtype))
    np.testing.assert_array_equal(again, ours[0])
    for mine, other in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance * np.abs(other).max())


def test_a_kept_set_of_every_token_changes_nothing_and_of_none_leaves_the_target() -> None:
    hidden, head, targets, g = inputs(6.0, VOCAB)
    static = {"vocab": VOCAB, "softcap": 6.0, "temperature": 0.5}
    with jax.enable_x64(True):
        free, every, none = (
            scored(g, targets, **static, support_BTC=kept)(hidden, head)[0]
            for kept in (None, *(np.full((ROWS, LENGTH, 8), byte, np.uint8) for byte in (255, 0)))
        )
    for mine, other in zip(every, free, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-13 * np.abs(other).max())
    for values in none:  # certain: log 1, no entropy, no gradient
        np.testing.assert_allclose(values, 0, atol=1e-15)


@pytest.mark.parametrize("name", ["data", "all"])
def test_every_mesh_gives_the_same_log_probabilities(name: str) -> None:
    hidden, head, targets, g = inputs(6.0, VOCAB)
    sets = kept_sets(VOCAB)
    expected = in_numpy(hidden, head, targets, g, vocab=VOCAB, softcap=6.0, temperature=0.8, kept=sets)
    mesh = sharding.make_mesh(sharding.Mesh(*MESHES[name]), rows=ROWS)
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    placed = NamedSharding(mesh, sharding.spec(("embed", "vocab")))
    with jax.enable_x64(True), jax.set_mesh(mesh):
        columns = (g, targets, np.packbits(sets, axis=-1, bitorder="little"))
        g, targets, kept = (jax.device_put(column, rows) for column in columns)
        step = scored(g, targets, vocab=VOCAB, softcap=6.0, temperature=0.8, support_BTC=kept, chunk_tokens=4)
        compiled = step.lower(jax.device_put(hidden, rows), jax.device_put(head, placed)).compile()
        ours, _ = compiled(jax.device_put(hidden, rows), jax.device_put(head, placed))
    for mine, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-12 * np.abs(other).max())
    if name == "data":
        inside, outside = collectives(compiled.as_text())
        assert outside and not inside, "the head's gradient is summed over devices once"


def test_bad_temperatures_and_sets_are_refused() -> None:
    hidden, head, targets, _ = inputs(None, VOCAB)
    call = lambda **static: token_logprobs(hidden, head, targets, vocab=VOCAB, softcap=None, **static)  # noqa: E731
    for temperature in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="must be positive and finite"):
            call(temperature=temperature)
    with pytest.raises(ValueError, match=r"support masks are uint8\[8, 12, 60\], not uint8\[8, 12, 8\]"):
        call(support_BTC=np.zeros((ROWS, LENGTH, VOCAB), np.uint8))
    with pytest.raises(ValueError, match=r"support masks are bool\[8, 12, 8\], not uint8"):
        call(support_BTC=np.zeros((ROWS, LENGTH, 8), bool))


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


@pytest.mark.usefixtures("optimized")
def test_the_loss_needs_a_fifth_of_the_plain_ones_memory() -> None:
    arguments = loss_arguments(tokens=8192, vocab=65536, width=32)
    ours, theirs = (
        compile_gradient(nll, arguments).memory_analysis().temp_size_in_bytes for nll in (weighted_nll, plain)
    )
    assert theirs > 4 * 8192 * 65536
    assert 5 * ours < theirs


@pytest.mark.parametrize("truncated", [False, True])
def test_tokens_log_probabilities_hold_no_array_of_all_logits(truncated: bool) -> None:
    tokens, vocab = 4096, 16384
    hidden, head, row, g = loss_arguments(tokens, vocab, width=8)
    kept = [jax.ShapeDtypeStruct((*row.shape, vocab // 8), jnp.uint8)] if truncated else []

    def total(hidden: Any, head: Any, targets: Any, g: Any, sets: Any = None) -> Any:
        found = token_logprobs(hidden, head, targets, vocab=vocab, softcap=15.0, temperature=0.9, support_BTC=sets)
        return jnp.sum(g * found)

    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(hidden, head, row, g, *kept).compile()
    largest = max(n for n in sizes(compiled.as_text()).values() if n != tokens * vocab // 8)
    assert 256 * vocab <= largest < tokens * vocab // 8, "the chunk of logits should be the largest array"
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab


def compile_train_step(mesh: sharding.Mesh, batches: int = 1, **dial: Any) -> tuple[Any, int]:
    """The compiled training step of a one-layer experiment, and B * T * V of its micro-batch."""
    rows, length, vocab = 128, 32, 8192
    dial = recipe.Dial(1, steps=9, batch_tokens=batches * rows * length, vocab=vocab, row_length=length, head_dim=64)
    experiment = recipe.pretrain(dial, name="hlo", train=("tinyworld:train",), micro_rows=rows, mesh=mesh)
    setup = compilation.make_setup(experiment, print)
    with jax.set_mesh(setup.mesh):
        return compilation.lower_step(setup, rows).compile(), rows * length * vocab


@pytest.mark.usefixtures("optimized")
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


@pytest.mark.parametrize("length", [13, 1021])
def test_a_prime_row_length_is_padded_instead_of_cut_into_single_tokens(length: int) -> None:
    generator = np.random.default_rng(2)
    hidden = generator.standard_normal((2, length, WIDTH))
    head = generator.standard_normal((WIDTH, PADDED))
    targets = generator.integers(0, VOCAB, (2, length)).astype(np.int32)
    weights, support = generator.random((2, length)), generator.integers(0, 256, (2, length, 8)).astype(np.uint8)
    static = {"vocab": VOCAB, "softcap": 6.0}
    most = 10 if length == 13 else 128
    jaxpr = str(jax.make_jaxpr(lambda h: weighted_nll(h, head, targets, weights, **static, chunk_tokens=most))(hidden))
    assert f"length={-(-length // (most // 2))}" in jaxpr, "as few chunks as their size allows"
    with jax.enable_x64(True):
        columns = (targets, weights)
        ours = squared(weighted_nll, columns, **static, chunk_tokens=most)(hidden, head)
        assert_equal(ours, squared(plain, columns, **static)(hidden, head))

        def truncated(tokens: int) -> Any:
            def total(h: Any, w: Any) -> Any:
                found = token_logprobs(h, w, targets, **static, support_BTC=support[..., :8], chunk_tokens=tokens)
                return jnp.sum(found * weights)

            scores = score_tokens(hidden, head, targets, **static, support_BTC=support[..., :8], chunk_tokens=tokens)
            return *jax.value_and_grad(total, argnums=(0, 1))(hidden, head), scores

        for ours, theirs in zip(*map(jax.tree.leaves, (truncated(most), truncated(2 * length))), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_chunks_are_those_of_the_devices_that_the_program_is_for() -> None:
    """launch.plan compiles on a machine without them."""

    def chunks(kind: str, platform: str) -> int:
        device = jax.sharding.AbstractDevice(kind, 1, platform)
        mesh = jax.sharding.AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return logprobs._chunks(jax.ShapeDtypeStruct((16, 2048, 8), jnp.float32), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "shards", lambda mesh: 2)
        assert [chunks("TPU v5 lite", "tpu"), chunks("NVIDIA H100", "gpu"), chunks("cpu", "cpu")] == [4, 4, 64]
    assert sharding.platform() == "cpu"
