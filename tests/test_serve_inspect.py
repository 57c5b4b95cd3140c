"""The microscope's routes give the numbers of jaxchat.inspection and of launch.chat --explain, within their limits."""

import base64
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from exports import tokenizer
from serving import Live, checkpoint, serving

from jaxchat.decode.explain import explain
from jaxchat.decode.sampling import SamplingParams
from jaxchat.inspection import tables, text, tokens
from jaxchat.serve import inspect
from jaxchat.serve.inspect import VIEWS
from jaxchat.serve.models import find_models
from jaxchat.tokenizer import chat

pytestmark = pytest.mark.filterwarnings("default")
TEXT = "small birds sang \uc548\ub155 \U0001f642 \0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stage with a checkpoint and two snapshots of it."""
    stage = Path(checkpoint(tmp_path_factory.mktemp("run"), depth=2))
    for step in ("10", "20"):
        shutil.copytree(stage / "checkpoints/0", stage / "snapshots/checkpoints" / step)
    return str(stage)


@pytest.fixture(scope="module")
def live(run: str) -> Iterator[Live]:
    with serving(run) as server:
        yield server


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [tokenizer().bos, *tokenizer().encode(TEXT)]


def ask(live: Live, view: str, **body: Any) -> Any:
    answer = live.http.post(f"/inspect/{view}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(live: Live, view: str, status: int, **body: Any) -> str:
    answer = live.http.post(f"/inspect/{view}", json=body)
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return str(answer.json()["error"]["message"])


def test_tokens_of_a_text_and_of_a_conversation(live: Live, ids: list[int]) -> None:
    assert ask(live, "tokens", prompt=TEXT)["tokens"] == tokens.tokens(tokenizer(), ids)
    talk = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "small"}]
    whole = chat.render(talk, tokenizer()).ids
    assert [one["id"] for one in ask(live, "tokens", messages=talk)["tokens"]] == whole
    asked = chat.render(talk[:1], tokenizer(), complete=True).ids
    assert [one["id"] for one in ask(live, "tokens", messages=talk[:1])["tokens"]] == asked
    assert "give one of" in refusal(live, "tokens", 400) and "give one of" in refusal(
        live, "tokens", 400, prompt="", ids=[]
    )


def test_losses_and_candidates_are_those_of_explain(live: Live, ids: list[int]) -> None:
    found, expected = ask(live, "losses", ids=ids)["tokens"], text.losses(live.engine, ids)
    assert [one["token"] for one in found] == [one["token"] for one in expected]
    np.testing.assert_allclose([one["loss"] for one in found], [one["loss"] for one in expected], atol=1e-4)
    steps = explain(live.engine, ids[:3], ids[3:], SamplingParams(), count=8)
    for position, candidates in enumerate(steps, start=3):
        said = ask(live, "candidates", ids=ids, position=position, count=8)
        assert [(c["token"], c["chosen"]) for c in said["candidates"]] == [(c.token, c.chosen) for c in candidates]
        np.testing.assert_allclose([c["logit"] for c in said["candidates"]], [c.logit for c in candidates], atol=1e-4)
        shares = np.exp([c["logit"] - said["log_normaliser"] for c in said["candidates"]])
        np.testing.assert_allclose(shares, [c.probabilities["model"] for c in candidates], atol=1e-5)
    logits = np.frombuffer(base64.b64decode(said["logits"]), "<f4")
    assert all(logits[c["token"]] == np.float32(c["logit"]) for c in said["candidates"])
    last = ask(live, "candidates", ids=ids)
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(last["logits"]), "<f4"), live.engine.forward(ids)[-1], atol=1e-4
    )
    assert last["position"] == len(ids) and not any(c["chosen"] for c in last["candidates"])
    whole = (ids * 40)[:256]
    assert ask(live, "candidates", ids=whole)["position"] == 256, "a text as long as the context"


def test_attention_and_lens_are_those_of_the_trace(live: Live, ids: list[int]) -> None:
    view, about = text.look(live.engine, ids), ask(live, "about")
    assert about["heads"] == [4, 4] and about["length"] == about["most_tokens"] == 256
    for layer in range(2):
        for head in range(4):
            rows = ask(live, "attention", ids=ids, layer=layer, head=head)["weights"]
            for row, expected in zip(rows, text.attention(view, layer, head), strict=True):
                np.testing.assert_allclose(row, expected, atol=1e-5)
    part, expected = ask(live, "lens", ids=ids, start=2, places=3, count=4), text.lens(view, count=4)
    for row, wanted in zip(part["rows"], expected, strict=True):
        for one, other in zip(row, wanted[2:5], strict=True):
            assert [c["token"] for c in one["candidates"]] == [c["token"] for c in other["candidates"]]
            assert one["next"] == pytest.approx(other["next"], rel=1e-3)
            assert one["entropy"] == pytest.approx(other["entropy"], rel=1e-3)


def test_tables_and_merges(live: Live, ids: list[int]) -> None:
    assert ask(live, "neighbours", token=ids[2], count=3)["neighbours"] == tables.neighbours(
        live.engine, ids[2], count=3
    )
    assert ask(live, "map", tokens=ids) == tables.embedding_map(live.engine)
    assert ask(live, "cache") == tables.cache_bytes(live.engine.transformer, 256)
    assert ask(live, "merges", prompt=TEXT)["parts"] == tokens.merges(tokenizer(), TEXT)


def test_what_is_too_much_or_wrong_is_refused(live: Live, run: str, ids: list[int]) -> None:
    long = [40] * 257
    assert "the text has 257 tokens" in refusal(live, "losses", 400, ids=long)
    assert "the text has 257 tokens" in refusal(live, "attention", 400, ids=long)
    whole = [tokenizer().bos, *tokenizer().encode("small birds " * 300)]
    cut = ask(live, "tokens", prompt="small birds " * 300)
    assert [one["id"] for one in cut["tokens"]] == whole[:256] and cut["count"] == len(whole)
    assert "there is no position 99" in refusal(live, "candidates", 400, ids=ids[:5], position=99)
    assert "there is no layer 2" in refusal(live, "attention", 400, ids=ids, layer=2)
    assert "there is no head 4" in refusal(live, "attention", 400, ids=ids, head=4)
    assert "there is no token" in refusal(live, "neighbours", 400, token=10**6)
    assert "there is no token" in refusal(live, "map", 400, tokens=[10**6])
    assert "the text contains token id" in refusal(live, "lens", 400, ids=[10**6])
    for view, body in (("lens", {"ids": [1], "count": 11}), ("merges", {"prompt": "x" * 201}), ("cache", {"layer": 1})):
        refusal(live, view, 422, **body)
    for view in ("losses", "candidates", "attention", "lens"):
        assert "the text is empty" in refusal(live, view, 400, ids=[])
    assert "does not exist" in refusal(live, "about", 404, model="nobody")
    with serving(run, api_key="key", wait=False) as other:
        assert all(other.http.post(f"/inspect/{view}", json={}).status_code == 401 for view in VIEWS)
    assert live.http.get("/v1/models").json()["views"] == list(VIEWS)
    with serving(run, inspect=False, wait=False) as other:
        assert other.http.get("/v1/models").json()["views"] == []
        assert all(other.http.post(f"/inspect/{view}", json={}).status_code in (404, 405) for view in VIEWS)


def test_every_kept_step_of_a_run_can_be_asked(live: Live, run: str, ids: list[int]) -> None:
    names = ["run/sft@0", "run/sft@10", "run/sft@20", "run/sft"]
    assert [one["id"] for one in live.http.get("/v1/models").json()["data"]] == names
    assert find_models((run,))["run/sft"].step == 0, "the latest is the whole checkpoint"
    assert list(find_models((f"{run}@10",))) == ["run/sft@10"]
    for name in names[:3]:
        assert ask(live, "losses", model=name, ids=ids) == ask(live, "losses", ids=ids)
        body = {"model": name, "prompt": "small", "max_tokens": 3, "temperature": 0}
        assert live.http.post("/v1/completions", json=body).status_code == 200


def test_equal_architectures_are_warmed_once(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[Any] = []
    for name in ("warm", "warm_views"):
        monkeypatch.setattr(f"jaxchat.serve.models.{name}", warmed.append)
    with serving(run, warm=True) as server:
        for step in ("10", "20"):
            assert ask(server, "about", model=f"run/sft@{step}")["model"] == f"run/sft@{step}"
    assert len(warmed) == 2 and warmed[0] is warmed[1]


def test_all_views_share_one_limit(live: Live, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "MOST_RUNNING", 1)
    taken, go = threading.Event(), threading.Event()
    ask(live, "about")  # The model of requests without a name is the last one used, which is `live.model`.
    inbox = live.model.worker._inbox
    inbox.put(lambda: (taken.set(), go.wait()))
    assert taken.wait(10)
    waiting = threading.Thread(target=lambda: ask(live, "losses", ids=ids))
    waiting.start()
    try:
        end = time.monotonic() + 10
        while inbox.empty() and time.monotonic() < end:
            time.sleep(0.01)
        assert "under way" in refusal(live, "tokens", 429, prompt="a")
    finally:
        go.set()
        waiting.join()
    assert ask(live, "tokens", prompt="a")["tokens"]


@pytest.mark.slow
def test_the_microscope_compiles_nothing_after_the_start(tmp_path: Path) -> None:
    with serving(checkpoint(tmp_path, depth=2), warm=True, slots=2) as server:
        events: list[str] = []
        note = lambda event, seconds, **about: events.append(event) if "backend_compile" in event else None  # noqa: E731
        jax.monitoring.register_event_duration_secs_listener(note)
        try:
            for size in (3, 40, 200):
                words = [40 + i % 9 for i in range(size)]
                for head in range(4):
                    ask(server, "attention", ids=words, layer=head % 2, head=head)
                for view in ("losses", "candidates", "lens"):
                    ask(server, view, ids=words)
                ask(server, "candidates", ids=words, position=2)
            ask(server, "map", tokens=[3, 4])
            ask(server, "neighbours", token=50)
            ask(server, "cache")
        finally:
            jax.monitoring.unregister_event_duration_listener(note)
        assert not events
