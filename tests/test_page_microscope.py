"""The microscope in a browser: its numbers are those of launch.chat --explain and of jaxchat.inspection."""

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exports import model, tokenizer, write_run
from serving import Live, serving
from test_page import browser  # noqa: F401

import launch.chat
from jaxchat.decode.sampling import SamplingParams
from jaxchat.inspection import tables, text, tokens
from jaxchat.loading import load_engine

# Playwright, uvicorn and websockets are not ours to keep free of warnings.
pytestmark = pytest.mark.filterwarnings("default")
TEXT = "small birds sang \uc548\ub155 \U0001f642"
VIEWS = ("candidates", "tokens", "attention", "lens", "embedding", "merges", "cache", "checkpoints")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stage whose two snapshots have other parameters than its checkpoint."""
    stage, config = "", model(head_std=0.1, depth=2)
    for step, scale in ((10, 0.2), (20, 0.3), (0, 0.4)):
        found = write_run(tmp_path_factory.mktemp("run"), config, scale=scale, length=256)
        stage, snapshots = found if step == 0 else stage, tmp_path_factory.getbasetemp() / "snapshots"
        if step:
            shutil.copytree(Path(found) / "checkpoints/0", snapshots / "checkpoints" / str(step))
    shutil.copytree(snapshots, Path(stage) / "snapshots")
    return stage


@pytest.fixture(scope="module")
def live(run: str) -> Iterator[Live]:
    with serving(run, slots=2) as server:
        yield server


@pytest.fixture(scope="module")
def opened(browser: Any, live: Live) -> Iterator[Any]:  # noqa: F811
    """The page. No error may reach its console, and no request another server."""
    context = browser.new_context(viewport={"width": 1300, "height": 900}, reduced_motion="reduce")
    page, errors = context.new_page(), []
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("request", lambda request: request.url.startswith(live.url) or errors.append(request.url))
    page.goto(f"{live.url}/#scope")
    page.locator("#scope-tokens button").first.wait_for()
    yield page
    context.close()
    assert [error for error in errors if "status of 400" not in error] == []


@pytest.fixture
def page(opened: Any) -> Any:
    """The microscope, looking into TEXT."""
    opened.get_by_role("button", name="Microscope").click()
    look(opened, TEXT)
    return opened


def look(page: Any, said: str) -> None:
    page.fill("#scope-text", said)
    page.get_by_role("button", name="Look", exact=True).click()
    settled(page, "#scope-tokens")


def settled(page: Any, selector: str = "#scope-view") -> None:
    page.locator(f"{selector}[aria-busy=false]").wait_for()


def show(page: Any, view: str, token: int | None = None) -> Any:
    """Opens a view, with a token chosen; returns its element."""
    page.click(f"#scope-tab-{view}")
    if token is not None:
        page.locator("#scope-tokens button").nth(token).click()
    settled(page)
    return page.locator("#scope-view")


def cells(place: Any) -> list[list[str]]:
    """The rows of a table without its heads."""
    return [row.locator("th, td").all_inner_texts() for row in place.locator("tbody tr").all()]


def share(cell: str) -> float:
    """A probability as the page or the terminal shows it."""
    return 0.0 if cell.strip() in ("-", "–", "<0.01 %") else float(cell.rstrip(" %")) / (100 if "%" in cell else 1)


def ids() -> list[int]:
    return [tokenizer().bos, *tokenizer().encode(TEXT)]


def test_candidates_follow_the_sliders_and_are_those_of_explain(
    page: Any, run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = show(page, "candidates", len(ids()))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    monkeypatch.setenv("COLUMNS", "200")
    settings = ("0.7", "0", "1", "1"), ("0.7", "20", "1", "1"), ("1.5", "30", "0.6", "1.3"), ("0", "0", "1", "1")
    for values in settings:
        sampling = dict(zip(("temperature", "top_k", "top_p", "repetition_penalty"), values))
        for name, value in sampling.items():
            page.locator(f"#sliders [type=range][data-name={name}]").fill(value)
        options = [f"--{name}={value}" for name, value in sampling.items()]
        launch.chat.main(
            [f"--checkpoint={run}", f"--prompt={TEXT}", "--style=text", "--explain", "--max_tokens=1", *options]
        )
        printed = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        shown = cells(place)
        assert len(printed) >= 8 and page.locator("#scope-view thead th").count() == len(printed[0]) - 1
        for row in printed:
            (found,) = (
                one for one in shown if abs(float(one[1]) - float(row[1])) < 1e-3 and one[0].strip("␣") in row[0]
            )
            assert [share(cell) for cell in found[2:]] == pytest.approx([share(cell) for cell in row[2:-1]], abs=6e-4)
    assert asked == [], "sliders ask nothing of the server"
    page.click("#open-settings")
    place.get_by_role("slider", name="Temperature").fill("0.5")
    assert "Temperature 0.5" in place.inner_text()
    page.click("#open-settings")
    assert page.locator("#sliders [type=range][data-name=temperature]").input_value() == "0.5", (
        "the sliders of the chat are the same"
    )


def test_tokens_and_losses(page: Any, live: Live) -> None:
    expected, losses = tokens.tokens(tokenizer(), ids()), text.losses(live.engine, ids())
    rows = cells(show(page, "tokens", 3))
    assert [(row[2], row[4]) for row in rows] == [
        (str(t["id"]), bytes(t["bytes"]).hex(" ").replace(" ", "\xa0")) for t in expected
    ]
    assert [float(row[3]) for row in rows[1:]] == pytest.approx([one["loss"] for one in losses], abs=6e-4)
    chips = page.locator("#scope-tokens button")
    assert [chips.nth(i).text_content() for i, t in enumerate(expected) if t["text"] and not t["special"]] == [
        t["text"] for t in expected if t["text"] and not t["special"]
    ]
    heats = [float(chip.evaluate("node => parseFloat(node.style.getPropertyValue('--heat'))")) for chip in chips.all()]
    assert heats[1 : len(expected)] == pytest.approx([min(one["loss"], 8) * 12.5 for one in losses], abs=0.1)
    chips.nth(4).hover()
    described = page.locator("#scope-token").inner_text()
    assert f"id {ids()[4]}" in described and f"loss {losses[3]['loss']:.3f}" in described and "expected" in described
    mean = sum(one["loss"] for one in losses) / len(losses)
    assert f"{mean:.3f}" in page.locator("#scope-mean").inner_text()


def test_attention_lens_embedding_merges_and_cache(page: Any, live: Live) -> None:
    view = text.look(live.engine, ids())
    place = show(page, "attention", 5)
    for layer, head in ((0, 0), (1, 2)):
        place.locator("select[name=layer]").select_option(str(layer))
        place.locator("select[name=head]").select_option(str(head))
        settled(page)
        expected = text.attention(view, layer, head)
        shown = {int(row[0].split()[0]): share(row[1]) for row in cells(place)}
        assert shown == pytest.approx(dict(enumerate(expected[5])), abs=6e-4)
        count = (
            "paths => paths.map((path) => [path.getAttribute('opacity'), path.getAttribute('d').split('M').length - 1])"
        )
        squares = place.locator("figure svg").first.locator("path.solid").evaluate_all(count)
        weights = [w for row in expected for w in row if w >= 0.002]
        assert sum(count for _, count in squares) == len(weights)
        assert sum(float(opacity) * count for opacity, count in squares) == pytest.approx(
            sum(weights), abs=0.05 * len(weights)
        )
    place.locator("figure svg").first.hover(position={"x": 97, "y": 45})
    assert f"takes {100 * expected[2][0]:.0f}"[:8] in place.locator("figure .note").first.inner_text()
    place = show(page, "lens", 3)
    said = text.lens(view)
    for row, wanted in zip(cells(place), reversed(said), strict=True):
        shares = [re.findall(r"[\d.]+ %$", cell)[0] for cell in row[1:]]
        assert [share(one) for one in shares] == pytest.approx(
            [w["candidates"][0]["probability"] for w in wanted[:16]], abs=6e-4
        )
    near = tables.neighbours(live.engine, ids()[3])
    place = show(page, "embedding", 3)
    assert [(int(row[1]), float(row[2])) for row in cells(place)] == [(n["token"], round(n["cosine"], 3)) for n in near]
    assert place.locator("svg path.dot").first.get_attribute("d").count("M") == 420
    replayed = [part["steps"] for part in tokens.merges(tokenizer(), TEXT)]
    place = show(page, "merges")
    for step in (0, 2):
        place.get_by_role("slider").fill(str(step))
        pieces = [steps[min(step, len(steps) - 1)]["pieces"] for steps in replayed]
        assert place.locator(".part > span").all_inner_texts() == [
            p.replace("▁", "␣") for p in itertools.chain(*pieces)
        ]
    grown = tables.cache_bytes(live.engine.transformer, 256)
    rows = cells(show(page, "cache"))
    assert [int(row[0]) for row in rows] == grown["lengths"]
    sizes = [float(row[1].removesuffix(" KiB").replace(",", "")) for row in rows]
    assert sizes == pytest.approx([size / 1024 for size in grown["bytes"]], abs=0.051)


def test_the_lens_of_the_last_token_is_in_view_on_a_phone(page: Any) -> None:
    from playwright.sync_api import expect

    page.set_viewport_size({"width": 390, "height": 1400})
    first = show(page, "lens", len(ids()) - 1).locator("tbody tr").first
    expect(first.locator("td").last).to_be_in_viewport(ratio=0.9)
    expect(first.locator("th")).to_be_in_viewport(ratio=0.9)
    expect(first.locator("td").first).not_to_be_in_viewport()
    page.set_viewport_size({"width": 1300, "height": 900})


def test_the_slider_over_checkpoints_shows_each_ones_answer_and_losses(page: Any, run: str) -> None:
    place = show(page, "checkpoints", len(ids()))
    place.locator("tbody th").get_by_text("20", exact=True).wait_for()
    said: list[str] = []
    for index, step in enumerate((0, 10, 20)):
        place.get_by_role("slider", name="Step of the run").fill(str(index))
        place.get_by_text(f"at step {step}:").wait_for()
        engine = load_engine(f"{run}@{step}", slots=1)
        losses = [one["loss"] for one in text.losses(engine, ids())]
        best = text.candidates(engine, ids(), [], SamplingParams())[0][0]
        shown = cells(place.locator(".detail"))[0]
        assert float(shown[1]) == pytest.approx(best["logit"], abs=1e-3)
        assert page.locator("#scope-mean").inner_text() == f"Mean loss {sum(losses) / len(losses):.3f} nats per token"
        said.append(place.locator("blockquote").inner_text())
    assert len(set(said)) > 1, "other parameters, other answers"


def test_a_message_of_the_conversation_is_looked_into(page: Any) -> None:
    page.get_by_role("button", name="Chat", exact=True).click()
    page.fill("#max_tokens", "12")
    page.fill("#input", "<b>small</b>\nbirds")
    page.keyboard.press("Enter")
    page.locator("article.assistant .facts").get_by_text("seed").wait_for()
    page.locator("article.assistant").get_by_role("button", name="Look inside").click()
    settled(page, "#scope-tokens")
    chips = page.locator("#scope-tokens button")
    names = [chip.get_attribute("aria-label") for chip in chips.all()]
    assert (
        names[:2] == ["<|bos|>", "<|user_start|>"]
        and "<|assistant_start|>" in names
        and names[-2] == "<|assistant_end|>"
    )
    assert page.locator("#scope b").count() == 0
    page.get_by_role("button", name="Chat", exact=True).click()
    page.locator("article.user").get_by_role("button", name="Look inside").click()
    settled(page, "#scope-tokens")
    assert chips.count() < len(names)
    page.click("#scope-tab-candidates")
    for view in (*VIEWS[1:], VIEWS[0]):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.dataset.view") == view
    chips.nth(2).focus()
    page.keyboard.press("ArrowRight")
    assert (
        chips.nth(3).get_attribute("aria-pressed") == "true"
        and page.evaluate("document.activeElement.ariaLabel") == names[3]
    )
    look(page, "small birds " * 300)
    assert chips.count() == 257 and "The context has room for 256 of " in page.locator("#scope-mean").inner_text()


def test_axe_finds_no_serious_fault(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    looks = (({"width": 1300, "height": 900}, "light"), ({"width": 390, "height": 844}, "dark"))
    for view, (size, scheme) in zip((*VIEWS, "cache", *VIEWS[:2]), itertools.cycle(looks)):
        page.set_viewport_size(size)
        page.emulate_media(color_scheme=scheme)
        show(page, view, 4)
        found = Axe().run(page).response["violations"]
        serious = [(v["id"], [n["html"] for n in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")]
        assert serious == [], view
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{view} is too wide"
    page.set_viewport_size(looks[0][0])


def test_a_server_without_inspection_has_a_page_without_a_microscope(run: str, browser: Any) -> None:  # noqa: F811
    with serving(run, inspect=False, wait=False) as server:
        page, errors = browser.new_page(), []
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.goto(server.url)
        page.locator("#presets button").first.wait_for()
        assert page.locator("#panels").is_hidden() and page.locator("#scope").is_hidden()
        assert server.http.post("/inspect/about", json={}).status_code == 404
        assert [error for error in errors if "503" not in error] == []  # Of /ready, while the model is loaded.
        page.close()
