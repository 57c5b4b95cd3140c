"""The engine: greedy text beside the full forward, the same tokens alone and in company, ends, and compilation."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import small
from letters import Letters

from jaxchat.decode import programs
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.explain import explain
from jaxchat.decode.prompts import common
from jaxchat.decode.requests import Completion, Request
from jaxchat.decode.sampling import SamplingParams, noise, pack, truncate
from jaxchat.errors import UserError
from jaxchat.model import GELU, GQA, ALiBi, GeGLU, Layer, LayerNorm, Learned, Model, RMSNorm, Transformer
from jaxchat.sharding import Mesh, make_mesh, placements

LENGTH = 320
SHAPE = EngineConfig(length=LENGTH, slots=4, steps=8, prefill_chunk=32, adapt=False)
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
WARM = SamplingParams(temperature=1.0, max_tokens=20)

Prompt = tuple[int, ...]


def prompt(size: int, seed: int = 0) -> Prompt:
    return (0, *np.random.default_rng([size, seed]).integers(1, 60, size - 1).tolist())


def july2026() -> Any:
    """A windowed layer and one with value embeddings, once: what decoding costs to compile grows with depth."""
    return small.july2026(depth=2, layer_loop="scan")


def others() -> Any:
    """Positions that are learned, exactly as many as the engine has, a bias by distance, and changed scores."""
    gain = RMSNorm(gain="1+w")
    layers = (
        Layer(
            GQA(4, 2, 4, positions=Learned(LENGTH), qk_norm=None, qkv_bias=True, o_bias=True, sinks=True, dropout=0.1),
            GELU(24, bias=True),
            LayerNorm(),
        ),
        Layer(GQA(4, 2, 4, positions=ALiBi(), window=40, softcap=5.0), GeGLU(24), gain, placement="sandwich"),
    )
    return Model(60, 16, 2, layers, norm=gain, embed_norm=False, dropout=0.1)


def make(config: Any, shape: EngineConfig = SHAPE, tokenizer: Any = None, **kwargs: Any) -> Engine:
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    return Engine(Transformer(config), params, tokenizer or Letters(), shape, **kwargs)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine that reads prompts in pieces of 32 and has room for 4 samples; each test leaves it idle."""
    yield make(july2026())


def ask(engine: Engine, tokens: Sequence[int], params: SamplingParams = GREEDY, **about: Any) -> Completion:
    """One answer."""
    return engine.generate([Request(tokens, params, **about)])[0][0]


@functools.cache
def forward(config: Any) -> Any:
    """The log-probabilities of a whole text at once, (1, T) to (T, V)."""
    model, params = Transformer(config), jax.tree.map(jnp.asarray, small.parameters(config))
    forward = jax.jit(lambda params, ids: jax.nn.log_softmax(model.logits(params, model.apply(params, ids)[0])[0]))
    return functools.partial(forward, params)


def assert_most_likely(config: Any, tokens: Sequence[int], answer: Completion) -> None:
    """Each token of a greedy answer is the full forward's, whose log-probabilities it also has."""
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, : len(tokens) + len(answer.tokens)] = [*tokens, *answer.tokens]
    logprobs_TV = np.asarray(forward(config)(ids))[len(tokens) - 1 :][: len(answer.tokens)]
    np.testing.assert_array_equal(answer.tokens, logprobs_TV.argmax(axis=1))
    np.testing.assert_allclose(answer.logprobs, logprobs_TV.max(axis=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "adapt"),
    [
        *((july2026, False), (july2026, True), (small.october2025, False), (small.mixed, True), (others, True)),
        (small.latent, False),
    ],
    ids=lambda value: getattr(value, "__name__", f"adapt={value}"),
)
def test_greedy_answers_are_the_full_forwards_over_256_steps(family: Any, adapt: bool) -> None:
    config = family()
    engine = make(config, dataclasses.replace(SHAPE, adapt=adapt))
    prompts = [prompt(3), prompt(32), prompt(45), prompt(64, 1), prompt(1), prompt(63)]
    params = [SamplingParams(0.0, max_tokens=count, ignore_end=True) for count in (256, 90, 256, 3, 40, 256)]
    answers = engine.generate([Request(*asked) for asked in zip(prompts, params)])
    for tokens, asked, (answer,) in zip(prompts, params, answers):
        assert (len(answer.tokens), answer.finish_reason) == (asked.max_tokens, "length")
        assert_most_likely(config, tokens, answer)
    assert len(set(answers[0][0].tokens)) > 3, "a text of one token tells little"


@pytest.mark.parametrize("family", [july2026, small.october2025, small.latent], ids=lambda make: make.__name__)
def test_a_remembered_prefix_changes_nothing(family: Any) -> None:
    config = family()
    engine, first = make(config), prompt(40)
    answer = ask(engine, first, store=True)
    longer = (*first, *answer.tokens, 5, 17, 3)
    again = ask(engine, longer, store=True)
    assert engine.prompt_stats.reused == len(first) + 19
    assert_most_likely(config, longer, again)
    parted = (*first[:35], 9, 9, 9)  # windowed layers have forgotten what lies before the parting
    third = ask(engine, parted)
    assert engine.prompt_stats.reused == len(first) + 19 + (0 if family is july2026 else 35)
    assert_most_likely(config, parted, third)
    assert len(engine.prefixes) == 1, "the longer text replaces what it continues"
    engine.load(jax.tree.map(jnp.asarray, small.parameters(config, seed=4)))
    assert len(engine.prefixes) == 0


def test_a_short_prompt_takes_its_share_of_a_long_remembered_text() -> None:
    """The text lies in a longer row than the prompt gets."""
    config = small.october2025()
    engine = make(config)
    ask(engine, prompt(280), store=True)
    short = (*prompt(280)[:40], 5, 9, 2)
    answer = ask(engine, short)
    assert engine.prompt_stats.reused == 40
    assert_most_likely(config, short, answer)


def test_memory_for_prefixes_is_bounded() -> None:
    engine = make(small.october2025(depth=1), dataclasses.replace(SHAPE, prefix_cache_bytes=75_000))
    for seed in range(4):
        ask(engine, prompt(20, seed), store=True)
    assert 0 < engine.prefixes.size <= 75_000
    assert len(engine.prefixes) < 4
    before = engine.prompt_stats.reused
    ask(engine, (*prompt(20, 3), 1), store=True)
    assert engine.prompt_stats.reused == before + 20, "the newest is kept"


def test_a_fork_reads_its_prompt_once_and_its_greedy_samples_agree(engine: Engine) -> None:
    before = engine.prompt_stats.computed
    answers = engine.generate([Request(prompt(50), GREEDY, n=7)])[0]
    assert engine.prompt_stats.computed == before + 50
    assert {answer.tokens for answer in answers} == {answers[0].tokens}
    assert_most_likely(july2026(), prompt(50), answers[0])


def test_samples_of_one_request_differ(engine: Engine) -> None:
    answers = engine.generate([Request(prompt(30), WARM, n=3)])[0]
    assert len({answer.tokens for answer in answers}) == 3
    assert len({answer.tokens[0] for answer in engine.generate([Request(prompt(30), WARM, n=30)])[0]}) > 3


SEEDED = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, max_tokens=33, seed=2**33 + 5)


def company(count: int) -> list[Request]:
    """Ragged prompts with parameters of every kind."""
    kinds = (GREEDY, WARM, SEEDED, SamplingParams(1.5, frequency_penalty=1.0, max_tokens=25, seed=3))
    changed = [dataclasses.replace(kinds[i % 4], max_tokens=5 + 7 * i % 60) for i in range(count)]
    return [Request(prompt(1 + 11 * i % 100, seed=i), params) for i, params in enumerate(changed)]


def test_a_seeded_request_has_its_tokens_alone_in_company_and_in_any_slot(engine: Engine) -> None:
    asked = Request(prompt(37), SEEDED)
    alone = engine.generate([asked])[0][0]
    assert len(set(alone.tokens)) > 5
    others = company(31)
    for place in (0, 1, 2, 17, 31):
        among = engine.generate([*others[:place], asked, *others[place:]])[place][0]
        assert among.tokens == alone.tokens
        np.testing.assert_allclose(among.sampling_logprobs, alone.sampling_logprobs, atol=1e-5)
    for other in others[:3]:
        engine.submit(other)
    engine.step()
    engine.step()
    (late,) = engine.submit(asked)
    while engine.step():
        pass
    assert tuple(late.tokens) == alone.tokens


def test_a_logit_bias_ends_with_its_request(engine: Engine) -> None:
    """The last request gets the slot of the biased one while penalties of others are still in use."""
    biased = SamplingParams(0.0, logit_bias={3: 1e3}, max_tokens=3)
    penalised = [Request(prompt(5, i), SamplingParams(0.0, frequency_penalty=1.0, max_tokens=40)) for i in range(3)]
    answers = engine.generate([Request(prompt(9), biased), *penalised, Request(prompt(30), GREEDY)])
    assert answers[0][0].tokens == (3, 3, 3)
    assert answers[-1][0].tokens == ask(engine, prompt(30)).tokens


def test_across_compiled_shapes_tokens_differ_only_at_ties(engine: Engine) -> None:
    """A token that differs had a rival within 1e-4, what it was drawn with included; what follows tells nothing."""
    adaptive = make(july2026(), dataclasses.replace(SHAPE, adapt=True, slots=8, steps=5, prefill_batch=3))
    asked = [Request(request.prompt, params) for request in company(14) for params in (GREEDY, WARM)]
    ties = 0
    for request, (here,), (there,) in zip(asked, engine.generate(asked), adaptive.generate(asked)):
        same = common(here.tokens, there.tokens)
        np.testing.assert_allclose(here.logprobs[:same], there.logprobs[:same], rtol=0, atol=1e-4)
        if here.tokens == there.tokens:
            continue
        text = [*request.prompt, *here.tokens[:same]]
        z_V = engine.forward(text)[-1]
        if request.sampling is WARM:
            uniform_V = np.asarray(noise(pack([(WARM, 0)]), jnp.array([len(text) - 1]), len(z_V)))[0]
            z_V = z_V - np.log(-np.log(uniform_V))
        second, first = np.sort(z_V)[-2:]
        assert first - second < 1e-4, f"token {same} of {request}"
        ties += 1
    assert ties <= 2, "more ties than two shapes of a random model meet"


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "warm"])
def test_the_most_likely_tokens_are_those_of_explain_and_change_no_token(engine: Engine, params: Any) -> None:
    tokens = prompt(9)
    (asked,) = engine.submit(Request(tokens, params, top_logprobs=3))
    (other,) = engine.submit(Request(tokens, params))
    while engine.step():
        pass
    assert asked.tokens == other.tokens == list(ask(engine, tokens, params).tokens)
    assert all(token.top == [] for token in other.since(0)) and len(asked.since(4)) == len(asked.tokens) - 4
    for token, candidates in zip(asked.since(0), explain(engine, tokens, asked.tokens, params, count=3), strict=True):
        assert [i for i, _ in token.top] == [c.token for c in candidates[:3]]
        np.testing.assert_allclose(
            np.exp([p for _, p in token.top]), [c.probabilities["model"] for c in candidates[:3]], atol=1e-5
        )
    for token, scored in zip(engine.score([*tokens, *asked.tokens])[len(tokens) - 1 :], asked.since(0), strict=True):
        assert token.id == scored.id
        np.testing.assert_allclose(token.logprob, scored.logprob, atol=1e-4)
    with pytest.raises(UserError, match="top_logprobs=21 must be from 0 to 20"):
        engine.submit(Request(tokens, params, top_logprobs=21))


class Compilations:
    """How many programs were traced or compiled inside."""

    def __enter__(self) -> "Compilations":
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def _note(self, event: str, seconds: float, **about: Any) -> None:
        self.count += "compile" in event or "trace" in event

    def __exit__(self, *error: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)


def test_fifty_kinds_of_requests_compile_nothing_new(engine: Engine) -> None:
    engine.generate(company(12))
    engine.generate([Request(prompt(size), GREEDY) for size in (1, 17, 33)])
    generator = np.random.default_rng(0)
    requests = []
    for i in range(50):
        chosen = SamplingParams(
            temperature=float(generator.choice([0, 0.5, 1, 1.7])),
            top_k=int(generator.integers(0, 30)),
            top_p=float(generator.uniform(0.1, 1)),
            min_p=float(generator.uniform(0, 0.2)),
            frequency_penalty=float(generator.choice([0, 0.4])),
            logit_bias={3: 1.0} if i % 7 == 0 else {},
            max_tokens=int(generator.integers(1, 50)),
            seed=i,
        )
        requests.append(Request(prompt(int(generator.integers(1, 97)), i), chosen))
    with Compilations() as compilations:
        engine.generate(requests)
        assert compilations.count == 0
        jax.jit(lambda x: x + 1)(0)
        assert compilations.count, "the listener hears nothing"


def test_an_end_token_ends_the_answer_and_is_not_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ask(engine, prompt(30), dataclasses.replace(GREEDY, max_tokens=40)).tokens
    at = next(i for i, token in enumerate(tokens) if i > 9 and token not in tokens[:i])
    answer = ask(engine, prompt(30), dataclasses.replace(GREEDY, max_tokens=40, stop_tokens=(tokens[at],)))
    assert (answer.tokens, answer.finish_reason) == (tokens[: at + 1], "stop")
    assert answer.text == Letters().decode(tokens[:at])
    assert make(july2026(), tokenizer=Letters(assistant_end=tokens[at])).ends == {0, tokens[at]}
    monkeypatch.setattr(engine, "ends", {0, tokens[at]})
    answer = ask(engine, prompt(30), dataclasses.replace(GREEDY, max_tokens=40))
    assert (answer.tokens, answer.finish_reason) == (tokens[: at + 1], "stop")
    ignoring = ask(engine, prompt(30), dataclasses.replace(GREEDY, max_tokens=40, ignore_end=True))
    assert (ignoring.tokens, ignoring.finish_reason) == (tokens, "length")


def test_a_stop_text_ends_the_answer_across_token_borders(engine: Engine) -> None:
    whole = ask(engine, prompt(30))
    stop = whole.text[10:13]
    at = whole.text.index(stop)
    answer = ask(engine, prompt(30), dataclasses.replace(GREEDY, stop=("never there", stop)), store=True)
    assert (answer.text, answer.finish_reason) == (whole.text[:at], "stop")
    assert answer.tokens == whole.tokens[: at + 3]
    longer = (*prompt(30), *whole.tokens[: at + 3], 7)
    assert_most_likely(july2026(), longer, ask(engine, longer))


def test_a_full_context_ends_the_answer(engine: Engine) -> None:
    answer = ask(engine, prompt(300), SamplingParams(0.0, max_tokens=500))
    assert (len(answer.tokens), answer.finish_reason) == (LENGTH - 300, "context")
    assert_most_likely(july2026(), prompt(300), answer)
    assert len(ask(engine, prompt(LENGTH - 1), WARM).tokens) == 1


def kept_by_teacher(engine: Engine, tokens: Sequence[int], answer: Completion, params: SamplingParams) -> np.ndarray:
    """For each token of an answer, what `truncate` keeps of the full forward's logits, (T, V)."""
    logits_TV = engine.forward([*tokens, *answer.tokens])[len(tokens) - 1 : -1] / params.temperature
    filters = pack([(params, 0)] * len(logits_TV)).filters
    return np.isfinite(jax.jit(truncate)(logits_TV, filters))


def test_kept_sets_are_those_that_tokens_were_drawn_from(engine: Engine) -> None:
    """In one batch with requests that ask for none, for penalties, and for sets of which everything is kept."""
    kinds = [
        SEEDED,
        SamplingParams(1.3, top_k=7, max_tokens=30),
        SamplingParams(0.7, min_p=0.05, max_tokens=21, seed=4),
    ]
    asking = [Request(prompt(12 + i, i), params, n=2, return_support=True) for i, params in enumerate(kinds)]
    others = [Request(prompt(20), params, return_support=True) for params in (GREEDY, WARM)] + company(4)
    answers = engine.generate([*others[:3], *asking, *others[3:]])
    sizes = set()
    for request, both in zip(asking, answers[3:6]):
        for answer in both:
            assert answer.support is not None
            assert answer.support.dtype == np.uint8
            assert answer.support.shape == (len(answer.tokens), 8)
            kept_TV = np.unpackbits(answer.support, axis=1, count=60, bitorder="little").astype(bool)
            np.testing.assert_array_equal(kept_TV, kept_by_teacher(engine, request.prompt, answer, request.sampling))
            assert kept_TV[np.arange(len(kept_TV)), answer.tokens].all()
            sizes |= set(kept_TV.sum(axis=1))
    assert len(sizes) > 5, "sets of few sizes tell little"
    assert [answer.support for (answer,) in answers[:3] + answers[6:]] == [None] * 6
    plain = engine.generate([dataclasses.replace(request, return_support=False) for request in asking])
    assert [[one.tokens for one in both] for both in plain] == [[one.tokens for one in both] for both in answers[3:6]]


def test_rows_over_data_and_heads_over_tensor_change_nothing(engine: Engine) -> None:
    """From parameters as training on that mesh has them; decoding holds their width whole."""
    mesh = make_mesh(Mesh(data=1, fsdp=2, tensor=2), rows=4, devices=jax.devices()[:4])
    model = engine.transformer
    params = jax.device_put(small.parameters(model.config), placements(mesh, model.shapes(), model.axes()))
    sharded = Engine(model, params, Letters(), SHAPE, mesh=mesh)  # type: ignore[arg-type]
    ends, layer = sharded.params["ends"], sharded.params["layer"][0]
    for name, weight, shape in (
        ("embed", ends["embed"], (32, 16)),
        ("head", ends["head"], (16, 32)),
        ("q", layer["mixer"]["q"], (16, 2, 4)),
        ("in", layer["mlp"]["in"], (16, 12)),
    ):
        assert weight.sharding.shard_shape(weight.shape) == shape, name
    requests = [Request(prompt(17 + i), SEEDED) for i in range(6)]
    for (here,), (there,) in zip(engine.generate(requests), sharded.generate(requests)):
        assert here.tokens == there.tokens
    cache = sharded.slots._cache
    assert cache is not None
    shards = {layer.k_BKSD.sharding.shard_shape(layer.k_BKSD.shape)[:2] for layer in cache.layers}
    assert shards == {(2, 1)}, "4 rows and 2 kv heads, each split in two"


def test_a_second_engine_of_the_same_model_compiles_nothing(engine: Engine) -> None:
    compiled = (
        programs.unstack,
        programs.empty,
        programs.prefill,
        programs.first,
        programs.seat,
        programs.decode,
        programs.move,
    )
    request = Request(prompt(9), GREEDY)
    first = engine.generate([request])
    before = [program._cache_size() for program in compiled]
    again = make(july2026(), SHAPE)
    assert [answers[0].tokens for answers in again.generate([request])] == [answers[0].tokens for answers in first]
    assert [program._cache_size() for program in compiled] == before


def test_any_number_of_stop_tokens_takes_one_program(engine: Engine) -> None:
    free = ask(engine, prompt(25), dataclasses.replace(WARM, ignore_end=True))
    others = [token for token in range(2, 60) if token not in free.tokens]
    engine.generate([Request(prompt(25), WARM)])
    stop = free.tokens[11]
    for count in (0, 3, 7, 8, 40):
        for stops in ((*others[:count], stop), (stop, *others[:count])):
            with Compilations() as compilations:
                answer = ask(engine, prompt(25), dataclasses.replace(WARM, ignore_end=True, stop_tokens=stops))
            first = free.tokens.index(stop)
            assert (answer.tokens, answer.finish_reason) == (free.tokens[: first + 1], "stop")
            assert compilations.count == 0
