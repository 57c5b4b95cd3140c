"""Policy gradients through a model: beside exact enumeration of all sequences, and under every split of a batch."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from jaxchat import sharding
from jaxchat.model import GQA, Layer, Model, ReluSquared, Transformer
from jaxchat.objectives.advantages import group_advantages, kl_to_go, token_weights
from jaxchat.objectives.logprobs import score_tokens
from jaxchat.objectives.policy import OBJECTIVES, Policy, PolicyGradient
from jaxchat.train import State, train_step

# A policy so small that every sequence can be written down: three tokens at most, token 2 ends one, token 3 begins all.
STOP, BEGIN, MOST = 2, 3, 3
TINY = Model(
    vocab=4,
    width=8,
    depth=1,
    pattern=(Layer(GQA(heads=2, kv_heads=2, head_dim=4), ReluSquared(8)),),
    softcap=5.0,
)
SEQUENCES = [
    sequence
    for length in range(1, MOST + 1)
    for sequence in itertools.product(range(3), repeat=length)
    if STOP not in sequence[:-1] and (length == MOST or sequence[-1] == STOP)
]
SETTINGS = {"plain": (1.0, False), "truncated": (0.7, True)}


class Enumeration:
    """Every sequence of the tiny policy as one row, its log-probability, and a reward of it.

    The sampler may have kept a part of the vocabulary only, which depends on what came before; BEGIN is never drawn.
    """

    def __init__(self, temperature: float, truncated: bool) -> None:
        self.temperature, self.transformer = temperature, Transformer(TINY, jnp.float64)
        generator = np.random.default_rng(3)
        N = len(SEQUENCES)
        self.length_N = np.array([len(sequence) for sequence in SEQUENCES])
        self.mask_NT = np.arange(MOST) < self.length_N[:, None]
        self.targets_NT = np.full((N, MOST), BEGIN, np.int32)
        for n, sequence in enumerate(SEQUENCES):
            self.targets_NT[n, : len(sequence)] = sequence
        self.tokens_NT = np.concatenate([np.full((N, 1), BEGIN, np.int32), self.targets_NT[:, :-1]], axis=1)
        self.segments_NT = np.ones((N, MOST), np.int32)
        self.reward_N = generator.standard_normal(N)
        self.kept_NTV = np.ones((N, MOST, 4), bool) & (np.arange(4) != BEGIN)
        if truncated:
            for n, sequence in enumerate(SEQUENCES):
                if sequence[:1] == (0,):
                    self.kept_NTV[n, 1, 1] = False
                if sequence[:1] == (1,):
                    self.kept_NTV[n, 1, STOP] = False
        drawn = np.take_along_axis(self.kept_NTV, self.targets_NT[..., None], axis=-1)[..., 0]
        self.possible_N = np.all(drawn | ~self.mask_NT, axis=1)
        assert np.sum(self.possible_N) == (11 if truncated else 15)
        self.kept = np.packbits(self.kept_NTV, axis=-1, bitorder="little")

    @functools.partial(jax.jit, static_argnums=0)
    def logprobs(self, params: Any) -> Any:
        """log-probability of every token, and of every sequence (-inf where it cannot be drawn), from whole logits."""
        hidden = self.transformer.apply(params, self.tokens_NT, segments_BT=self.segments_NT).hidden
        z = self.transformer.logits(params, hidden) / self.temperature
        logprobs = jax.nn.log_softmax(jnp.where(self.kept_NTV, z, -1e30), axis=-1)
        tokens = jnp.take_along_axis(logprobs, self.targets_NT[..., None], axis=-1)[..., 0]
        tokens = jnp.where(self.mask_NT & self.possible_N[:, None], tokens, 0)
        return tokens, jnp.where(self.possible_N, tokens.sum(axis=1), -jnp.inf)

    def mean(self, params: Any, value_N: Any) -> Any:
        return jnp.sum(jnp.exp(self.logprobs(params)[1]) * value_N)

    def gradient(self, policy: Policy, params: Any, probability_N: Any, advantages_NT: Any) -> Any:
        """The objective's gradient, each sequence weighted with its probability."""
        weight_N, norm_N = token_weights(self.length_N, policy.aggregate, longest=1)
        weights_NT = (probability_N * weight_N)[:, None] * self.mask_NT
        batch = {
            "tokens": self.tokens_NT,
            "targets": self.targets_NT,
            "segments": self.segments_NT,
            "weights": weights_NT,
            "norms": norm_N[:, None] * weights_NT,
            "advantages": np.broadcast_to(advantages_NT, weights_NT.shape),
            "old_logprobs": np.asarray(self.logprobs(params)[0]),
            "support": self.kept,
        }
        objective = functools.partial(PolicyGradient(policy, self.temperature), self.transformer)
        return jax.jit(jax.grad(lambda params: objective(params, batch).total))(params)


def tiny_parameters(seed: int) -> Any:
    return jax.tree.map(jnp.asarray, small.parameters(TINY, np.float64, scale=0.7, seed=seed))


@pytest.mark.parametrize(("name", "setting"), [("reinforce", "truncated"), ("ppo", "truncated"), ("rloo", "plain")])
def test_the_expected_gradient_is_that_of_the_expected_reward(name: str, setting: str) -> None:
    policy = OBJECTIVES[name]
    with jax.enable_x64(True):
        everything, params = Enumeration(*SETTINGS[setting]), tiny_parameters(0)
        p_N = np.asarray(jnp.exp(everything.logprobs(params)[1]))
        np.testing.assert_allclose(p_N.sum(), 1, rtol=1e-12)
        exact = jax.grad(lambda params: -everything.mean(params, everything.reward_N))(params)
        found = everything.gradient(policy, params, p_N, everything.reward_N[:, None])
    small.assert_close(found, exact, 1e-11)


def test_groups_of_two_have_the_gradient_of_the_expected_reward_up_to_their_factor() -> None:
    """Over all pairs: leave-one-out has no bias, the mean baseline has (G - 1) / G of the gradient."""
    with jax.enable_x64(True):
        everything, params = Enumeration(1.0, False), tiny_parameters(1)
        p_N = np.asarray(jnp.exp(everything.logprobs(params)[1]))
        exact = jax.grad(lambda params: -everything.mean(params, everything.reward_N))(params)
        N = len(p_N)
        pairs_PG = np.stack(np.meshgrid(np.arange(N), np.arange(N), indexing="ij"), axis=-1).reshape(-1, 2)
        for rule, factor in (("leave_one_out", 1.0), ("mean", 0.5)):
            advantages = group_advantages(everything.reward_N[pairs_PG], rule)  # type: ignore
            expected_N = np.zeros(N)  # of the first of a pair; the second is its mirror image
            np.add.at(expected_N, pairs_PG[:, 0], p_N[pairs_PG[:, 1]] * advantages[:, 0])
            found = everything.gradient(OBJECTIVES["reinforce"], params, p_N, expected_N[:, None])
            small.assert_close(jax.tree.map(lambda g, f=factor: g / f, found), exact, 1e-11)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_penalty_to_go_has_the_gradient_of_the_kl_of_whole_sequences(setting: str) -> None:
    with jax.enable_x64(True):
        everything, params = Enumeration(*SETTINGS[setting]), tiny_parameters(0)
        tokens_NT, whole_N = everything.logprobs(params)
        reference_NT, reference_N = everything.logprobs(tiny_parameters(2))
        p_N = np.asarray(jnp.exp(whole_N))

        def divergence(params: Any) -> Any:
            own_N = jnp.where(everything.possible_N, everything.logprobs(params)[1], 0)
            return jnp.sum(jnp.where(everything.possible_N, jnp.exp(own_N) * (own_N - reference_N), 0))

        assert divergence(params) > 0.1
        exact = jax.grad(divergence)(params)
        to_go_NT = kl_to_go(np.asarray(tokens_NT), np.asarray(reference_NT), everything.mask_NT)
        found = everything.gradient(OBJECTIVES["ppo"], params, p_N, -to_go_NT)
        small.assert_close(found, exact, 1e-11)
        whole = everything.gradient(OBJECTIVES["ppo"], params, p_N, -to_go_NT[:, :1])
        small.assert_close(whole, exact, 1e-11)  # the past of a token adds noise, no bias


def keep_gradient() -> optax.GradientTransformation:
    """Changes no parameter; its state is the gradient that it was given."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def rollouts(config: Model, rows: int, length: int, dtype: Any, policy: Policy) -> dict[str, np.ndarray]:
    """Rows of several sequences with prompts and gaps, unequal in number, one row without any."""
    generator = np.random.default_rng(5)
    batch = small.batch(rows, length, config.vocab, dtype)
    trained = (generator.random((rows, length)) < 0.6) & (np.arange(rows) != 3)[:, None]
    columns = {name: np.zeros((rows, length)) for name in ("weights", "norms", "advantages")}
    for row in range(rows):
        for segment in np.unique(batch["segments"][row]):
            here = (batch["segments"][row] == segment) & trained[row]
            weight, norm = token_weights(np.array([here.sum()]), policy.aggregate, longest=9)
            columns["weights"][row, here], columns["norms"][row, here] = weight[0], norm[0]
            columns["advantages"][row, here] = generator.standard_normal()
    sets = generator.random((rows, length, config.vocab)) < 0.5
    columns["old_logprobs"] = -3.5 + 0.3 * generator.standard_normal((rows, length))
    batch |= {name: column.astype(dtype) for name, column in columns.items()}
    return batch | {"support": np.packbits(sets, axis=-1, bitorder="little")}


SPLITS = {  # micro-batches, and the mesh
    np.float64: ((1, (1, 1, 1)), (8, (1, 1, 1)), (1, (8, 1, 1)), (4, (2, 2, 2))),
    np.float32: ((1, (1, 1, 1)), (2, (2, 4, 1))),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-5)], ids=["f64", "f32"])
def test_every_split_into_micro_batches_and_devices_has_the_same_gradient(dtype: Any, tolerance: float) -> None:
    """Of the objective whose ratio needs whole sequences, with kept sets."""
    policy = dataclasses.replace(OBJECTIVES["gspo"], clip_low=0.2, clip_high=0.3)
    config = dataclasses.replace(TINY, vocab=21)
    batch = rollouts(config, 16, 12, dtype, policy)
    assert len({float(total) for total in batch["norms"].sum(axis=1)}) > 2
    results = []
    with jax.enable_x64(dtype == np.float64):
        transformer, tx = Transformer(config, dtype), keep_gradient()
        params = jax.tree.map(jnp.asarray, small.parameters(config, dtype, scale=0.7))
        objective = functools.partial(PolicyGradient(policy, 0.8), transformer)
        for micro, mesh in SPLITS[dtype]:
            zero = jnp.zeros((), jnp.int32)
            state = State(zero, params, tx.init(params), zero, zero)
            columns = {key: column.reshape(micro, -1, *column.shape[1:]) for key, column in batch.items()}
            devices = sharding.make_mesh(sharding.Mesh(*mesh), rows=16 // micro)
            with jax.set_mesh(devices):
                columns = sharding.put_batch(devices, columns)
                step = jax.jit(lambda state, batch: train_step(state, batch, loss=objective, tx=tx))
                results.append(jax.device_get(step(state, columns)))
    (one, metrics), *others = results
    assert 0 < metrics["clipped"] < 0.9
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    for state, logged in others:
        gap = flat(state.optimizer) - flat(one.optimizer)
        assert np.linalg.norm(gap) <= tolerance * np.linalg.norm(flat(one.optimizer))
        for key, value in metrics.items():
            np.testing.assert_allclose(logged[key], value, rtol=tolerance, atol=tolerance, err_msg=key)


def test_a_model_scored_by_itself_is_at_ratio_one() -> None:
    """Through the model, with a temperature and kept sets: what `score_tokens` gives is what the step computes."""
    config, policy = dataclasses.replace(TINY, vocab=21), OBJECTIVES["grpo"]
    batch = rollouts(config, 8, 12, np.float32, policy)
    transformer, tx = Transformer(config), keep_gradient()
    params = jax.tree.map(jnp.asarray, small.parameters(config, scale=0.7))

    @jax.jit
    def score(params: Any) -> Any:
        hidden = transformer.apply(params, batch["tokens"], segments_BT=batch["segments"]).hidden
        static = {"vocab": config.vocab, "softcap": config.softcap, "temperature": 0.8, "support_BTC": batch["support"]}
        return score_tokens(hidden, transformer.head(params), batch["targets"], **static)

    batch["old_logprobs"] = np.asarray(score(params)[0])
    zero = jnp.zeros((), jnp.int32)
    state = State(zero, params, tx.init(params), zero, zero)
    objective = functools.partial(PolicyGradient(policy, 0.8), transformer)
    columns = {name: column[None] for name, column in batch.items()}
    _, metrics = jax.jit(lambda s, b: train_step(s, b, loss=objective, tx=tx))(state, columns)
    np.testing.assert_allclose(metrics["ratio"], 1, rtol=1e-6)
    assert metrics["clipped"] == 0 and metrics["kl_old"] < 1e-9
    assert metrics["grad_norm"] > 0


def test_rows_that_do_not_divide_over_the_mesh_are_refused() -> None:
    config, policy = dataclasses.replace(TINY, vocab=21), OBJECTIVES["grpo"]
    batch = rollouts(config, 6, 12, np.float32, policy)
    transformer = Transformer(config)
    with jax.set_mesh(sharding.make_mesh(sharding.Mesh(8), rows=8)), pytest.raises(ValueError, match="6 rows do not"):
        jax.eval_shape(functools.partial(PolicyGradient(policy), transformer), transformer.shapes(), batch)
