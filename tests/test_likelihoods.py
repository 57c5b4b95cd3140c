"""Scores of continuations: those of the full forward, in any company, batch, order and mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxchat.errors import UserError
from jaxchat.evaluation.likelihoods import Item, Scorer
from jaxchat.model import Transformer
from jaxchat.sharding import Mesh, make_mesh

LENGTH = 80


def questions(vocab: int, count: int = 24) -> list[Item]:
    """Contexts with one continuation, with several, with letters, and some that do not fit."""
    draw = np.random.default_rng(0)
    items = []
    for number in range(count):
        context = draw.integers(0, vocab, (12, 40, 33, 70)[number % 4]).tolist()
        for _ in range((1, 3, 4)[number % 3]):
            size = 1 if number % 5 == 0 else int(draw.integers(1, 16))
            items.append(Item(context, draw.integers(0, vocab, size).tolist()))
    items += [Item(draw.integers(0, vocab, 100).tolist(), [1, 2, 3]), Item([5], draw.integers(0, vocab, 90).tolist())]
    return items


@functools.cache
def forward(config: Any) -> Any:
    """The whole forward pass of one row, in one compiled shape, as log-probabilities."""
    transformer = Transformer(config)
    logits = jax.jit(lambda params, ids: transformer.logits(params, transformer.apply(params, ids)[0])[0])

    def run(params: Any, text: list[int]) -> np.ndarray:
        padded = jnp.asarray([text + [0] * (LENGTH - len(text))])
        return np.asarray(jax.nn.log_softmax(logits(params, padded)))[: len(text)]

    return run


def alone(config: Any, params: Any, item: Item) -> tuple[np.ndarray, bool]:
    """By the whole forward pass of the item alone."""
    whole = [*item.context, *item.continuation][-LENGTH - 1 :]
    answer = whole[max(len(whole) - len(item.continuation), 1) :]
    tail = forward(config)(params, whole[:-1])[-len(answer) :]
    return tail[np.arange(len(answer)), answer], bool((tail.argmax(axis=1) == answer).all())


@pytest.mark.parametrize("config", [small.july2026(), small.october2025()], ids=["july2026", "october2025"])
def test_scores_are_those_of_the_full_forward(config: Any) -> None:
    params, items = jax.tree.map(jnp.asarray, small.parameters(config)), questions(config.vocab)
    for item, scored in zip(items, Scorer(Transformer(config), params, length=LENGTH, batch_tokens=512)(items)):
        logprobs, greedy = alone(config, params, item)
        np.testing.assert_allclose(scored.logprobs, logprobs, atol=1e-4)
        assert scored.greedy == greedy
        assert scored.truncated == max(len(item.context) + len(item.continuation) - LENGTH - 1, 0)


def test_the_most_likely_continuation_is_greedy() -> None:
    config = small.july2026()
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    text = [3, 14, 15, 9, 2, 6]
    for _ in range(30):
        text.append(int(forward(config)(params, text)[-1].argmax()))
    items = [Item(text[:20], text[20:]), Item(text[:20], [*text[20:-1], text[-1] - 1]), Item(text[:20], text[20:21])]
    found = [one.greedy for one in Scorer(Transformer(config), params, length=LENGTH)(items)]
    assert found == [True, False, True]


@pytest.mark.parametrize("mesh", [Mesh(data=4), Mesh(data=2, fsdp=2, tensor=2)], ids=["data", "mixed"])
def test_company_order_batch_and_mesh_change_nothing(mesh: Mesh) -> None:
    config = small.july2026(vocab=64)
    params, items = jax.tree.map(jnp.asarray, small.parameters(config)), questions(64, 12)
    expected = Scorer(Transformer(config), params, length=LENGTH, batch_tokens=1)(items)
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    scorer = Scorer(
        Transformer(config), params, mesh=make_mesh(mesh, rows=8, devices=devices), length=LENGTH, batch_tokens=1000
    )
    order = np.random.default_rng(3).permutation(len(items))
    found = scorer([items[i] for i in order])
    for place, i in enumerate(order):
        np.testing.assert_allclose(found[place].logprobs, expected[i].logprobs, atol=1e-4)
        assert found[place].greedy == expected[i].greedy


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_likelihoods_that_are_not_finite_are_no_scores(value: float) -> None:
    config = small.october2025()
    params = small.parameters(config)
    params["ends"]["head"][:, :3] = value
    with pytest.raises(UserError, match="probabilities are not finite"):
        Scorer(Transformer(config), params, length=LENGTH)([Item([1, 2], [3, 4])])


def test_what_cannot_be_scored_is_refused() -> None:
    config = small.october2025()
    scorer = Scorer(Transformer(config), jax.tree.map(jnp.asarray, small.parameters(config)), length=LENGTH)
    assert scorer([]) == []
    for item in (Item([], [1]), Item([1], [])):
        with pytest.raises(ValueError, match="at least one token"):
            scorer([item])
