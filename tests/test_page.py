"""The page in Debian's chromium, driven by Playwright, against a live server whose model says what a script returns."""

import http.client
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from exports import model, tokenizer, write_run
from serving import Live, serving
from typing_engine import Typing

from jaxchat.data import conversations
from jaxchat.decode.sampling import PRESETS
from jaxchat.serve.app import PAGE
from jaxchat.serve.limits import Rates
from jaxchat.tokenizer import chat

# Playwright, uvicorn and websockets are not ours to keep free of warnings.
pytestmark = pytest.mark.filterwarnings("default")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CALL = ["Let me see: ", "<|python_start|>", "9 - 4", "<|python_end|>", " The answer is 5."]
HTML = "<script>window.hacked = 1</script> <img src=x onerror='window.hacked = 1'> <b>no</b>"
MARKDOWN = (
    "# Title\n\n**bold** and *italic*, `a < b`, [safe](https://example.com), [bad](javascript:alert(1))\n\n"
    "1. one\n   - inner\n2. two\n\n```python\nprint('<i>')\n```\n\n> quoted"
)


def program() -> str | None:
    """The path of a browser that Playwright can drive."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    path = tmp_path_factory.mktemp("run")
    stages = [write_run(path, model(head_std=0.1), stage=stage, length=1024) for stage in ("pretrain", "sft")]
    with serving(str(Path(stages[0]).parent), make_engine=Typing, slots=2) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the page is tested with playwright, which is not here"
    )
    if not program():
        pytest.skip("the page is tested in chromium, which is not here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program(), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page, newly opened in a browser that has never seen it. No error may reach its console."""
    monkeypatch.setattr(Typing, "pause", 0.0)
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], reduced_motion="reduce")
    opened, errors = context.new_page(), []
    opened.set_default_timeout(10_000)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: message.type == "error" and errors.append(message.text))
    opened.on("request", lambda request: request.url.startswith((live.url, "blob:")) or errors.append(request.url))
    opened.goto(live.url)
    opened.locator("#presets button").first.wait_for()
    yield opened
    context.close()
    refused = ("status of 429", "status of 503", "WebSocket connection")
    assert [error for error in errors if not any(part in error for part in refused)] == []


def says(monkeypatch: pytest.MonkeyPatch, *parts: str, pause: float = 0.0) -> list[str]:
    """Sets what the model says; returns the list of the prompts that it gets."""
    prompts: list[str] = []

    def script(prompt: str) -> list[str]:
        prompts.append(prompt)
        return list(parts)

    monkeypatch.setattr(Typing, "script", staticmethod(script))
    monkeypatch.setattr(Typing, "pause", pause)
    return prompts


def send(page: Any, text: str, *, wait: bool = True) -> None:
    count = page.locator("article.user").count()
    page.fill("#input", text)
    page.keyboard.press("Enter")
    page.locator("article.user").nth(count).wait_for()
    if wait:
        ended(page)


def ended(page: Any) -> None:
    page.locator("#send[aria-label=Send]").wait_for()


def until(condition: Callable[[], Any]) -> None:
    """Waits without the page's help, whose policy forbids code in strings."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def sent(page: Any) -> list[Any]:
    """What the page sends over its WebSockets from now on."""
    frames: list[Any] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda text: frames.append(json.loads(text))))
    return frames


def turns(page: Any) -> list[str]:
    return page.locator("article .body").all_inner_texts()


def prompt(*messages: str) -> str:
    rows = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    return tokenizer().decode(chat.render(rows, tokenizer(), complete=True).ids, keep_specials=True)


def exported(page: Any) -> list[Any]:
    with page.expect_download() as download:
        page.click("#export-all")
    return [json.loads(line) for line in Path(download.value.path()).read_text().strip().split("\n")]


def test_an_answer_streams_and_is_stopped_in_the_middle(page: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "small birds sang in the wood " * 30, pause=0.05)
    frames = sent(page)
    send(page, "Sing", wait=False)
    shown = page.locator("article.assistant .body")
    until(lambda: len(shown.inner_text()) > 5)
    early = shown.inner_text()
    until(lambda: len(shown.inner_text()) > len(early) + 5)
    assert live.engine._waiting, "it is still under way"
    page.keyboard.press("Escape")
    ended(page)
    assert [frame["type"] for frame in frames] == ["chat", "cancel"]
    assert live.idle(1.0), "its slot is free"
    said = shown.inner_text()
    assert said.startswith(early) and len(said) < 600
    assert "tokens/s" in page.locator(".facts").inner_text() and "seed" in page.locator(".facts").inner_text()
    prompts = says(monkeypatch, "Good.")
    send(page, "And now?")
    assert said.strip() in prompts[0]


def test_answer_again_edit_and_copy(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "One.")
    send(page, "First")
    says(monkeypatch, "Two.")
    send(page, "Second")
    prompts = says(monkeypatch, "Three.")
    page.click("article:last-of-type button[title='Answer again']")
    ended(page)
    assert turns(page) == ["First", "One.", "Second", "Three."] and prompts == [prompt("First", "One.", "Second")]
    page.locator("article.assistant").last.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "Three."
    page.locator("article.assistant").first.get_by_role("button", name="Edit").click()
    page.locator(".editing textarea").fill("One, corrected.")
    page.locator(".editing").get_by_role("button", name="Save").click()
    assert turns(page) == ["First", "One, corrected.", "Second", "Three."]
    prompts = says(monkeypatch, "Four.")
    page.locator("article.user").last.get_by_role("button", name="Edit").click()
    page.locator(".editing textarea").fill("Changed")
    page.keyboard.press("Enter")
    ended(page)
    assert turns(page) == ["First", "One, corrected.", "Changed", "Four."]
    assert prompts == [prompt("First", "One, corrected.", "Changed")]


def test_conversations_are_kept_renamed_and_deleted(page: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "Mia lives in the mill.")
    send(page, "Where does Mia live?")
    page.click("#new")
    send(page, "Who bakes?")
    page.reload()
    assert turns(page) == ["Who bakes?", "Mia lives in the mill."]
    names = page.locator("#conversations .name")
    assert names.all_inner_texts() == ["Who bakes?", "Where does Mia live?"]
    names.last.click()
    assert turns(page) == ["Where does Mia live?", "Mia lives in the mill."]
    page.get_by_role("button", name="Rename Where does Mia live?").click()
    page.fill("#reply", "Mia")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Rename Mia", exact=True).wait_for()
    page.reload()
    page.get_by_role("button", name="Delete Mia").click()
    page.click("#agree")
    page.get_by_role("button", name="Delete Mia").wait_for(state="detached")  # The dialog closes after the click.
    assert names.all_inner_texts() == ["Who bakes?"] and turns(page)[0] == "Who bakes?"
    page.reload()
    assert names.all_inner_texts() == ["Who bakes?"]


def test_what_the_model_writes_is_never_html(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, HTML)
    send(page, HTML)
    assert turns(page) == [HTML, HTML]
    says(monkeypatch, MARKDOWN)
    send(page, "markdown")
    answer = page.locator("article.assistant").last
    for selector, text in (
        ("h3", "Title"), ("strong", "bold"), ("em", "italic"), ("p code", "a < b"), ("ol > li > ul > li", "inner"),
        (".code pre", "print('<i>')"), ("blockquote", "quoted"),
    ):  # fmt: skip
        assert answer.locator(selector).inner_text() == text
    answer.get_by_role("button", name="Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "print('<i>')"
    links = answer.locator("a").evaluate_all("links => links.map(({href, rel}) => [href, rel])")
    assert (
        links == [["https://example.com/", "noopener noreferrer"]] and "[bad](javascript:alert(1))" in turns(page)[-1]
    )
    page.reload()
    assert turns(page)[:2] == [HTML, HTML]
    assert page.evaluate("window.hacked") is None
    assert page.locator("article img, article script, article b, article i").count() == 0


def test_calls_are_marked_and_the_export_is_what_training_reads(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page.fill("#system", "Be brief.")
    says(monkeypatch, *CALL)
    send(page, "9 apples less 4?")
    assert page.locator(".tool dd").all_inner_texts() == ["9 - 4", "5"]
    prompts = says(monkeypatch, "Yes.\n\n  \u2028 나는 \U0001f642")
    send(page, "Sure?")
    (line,) = exported(page)
    messages = conversations.read(line)
    parts = [("text", CALL[0]), ("python", "9 - 4"), ("python_output", "5"), ("text", CALL[-1])]
    assert [(part["type"], part["text"]) for part in messages[2]["content"]] == parts
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    ids = chat.render(messages[:-1], tokenizer(), complete=True).ids
    assert tokenizer().decode(ids, keep_specials=True) == prompts[0], "the model is asked what the line says"
    assert messages[-1]["content"] == "Yes.\n\n  \u2028 나는 \U0001f642"


def test_controls_reach_the_request(page: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "Fine.")
    frames = sent(page)
    for name in ("run/pretrain", "run/sft"):
        page.select_option("#model", name)
        assert (" has not learned to answer" in page.locator(".empty").inner_text()) == (name == "run/pretrain")
    for name, preset in PRESETS.items():
        page.click(f"#presets button[value={name}]")
        send(page, name)
        body = frames[-1]
        assert preset.items() <= body.items() and body["model"] == "run/sft", name
    page.select_option("#model", "run/pretrain")
    page.select_option("#step", "run/pretrain@0")
    page.fill("#seed", "7")
    page.fill("#max_tokens", "1")
    send(page, "seeded")
    body = frames[-1]
    assert (body["model"], body["seed"], body["max_tokens"]) == ("run/pretrain@0", 7, 1)
    facts = page.locator(".facts").last.inner_text()
    assert "seed 7" in facts and "1 token" in facts and "length limit" in facts and "run/pretrain@0" in facts


def test_failures_are_sentences_with_a_retry(page: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "At last.")
    failure, state = page.locator(".failure"), live.app.state._state
    monkeypatch.setitem(state, "starting", "the model is being loaded")
    page.reload()
    until(lambda: page.locator("#notice").inner_text() == "The model is being loaded …")
    monkeypatch.setitem(state, "starting", "")
    until(page.locator("#notice").is_hidden)
    monkeypatch.setitem(state, "rates", Rates(1))
    live.app.state.rates.take("127.0.0.1")
    send(page, "Hello?")
    assert failure.inner_text().startswith("Too fast: more than 1 requests per minute from one client.")
    monkeypatch.setitem(state, "rates", Rates(0))
    monkeypatch.setitem(state, "draining", True)
    page.get_by_role("button", name="Try again").click()
    until(lambda: "shutting down" in failure.inner_text())
    monkeypatch.setitem(state, "draining", False)
    cuts = [True]
    page.route_web_socket("**/ws/chat", lambda socket: _cut_after_first_text(socket, cuts))
    page.get_by_role("button", name="Try again").click()
    until(lambda: "connection" in failure.inner_text())
    assert turns(page) == ["Hello?", "A"], "what was said stays"
    page.get_by_role("button", name="Try again").click()
    until(lambda: turns(page) == ["Hello?", "At last."])
    ended(page)
    assert failure.count() == 0


def _cut_after_first_text(socket: Any, cuts: list[bool]) -> None:
    """Passes an answer on, as far as its first text if `cuts` has an entry, which is removed."""
    server = socket.connect_to_server()

    def pass_on(message: str) -> None:
        socket.send(message)
        if '"content": "A' in message and cuts:
            cuts.clear()
            socket.close()
            server.close()

    server.on_message(pass_on)


def test_the_keyboard_alone_is_enough(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "Good.")
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended(page)
    assert turns(page) == ["one\ntwo", "Good."]
    seen: set[str] = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText || ''")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.evaluate("document.activeElement.matches('#input, body, #scroll')"), name
        seen.add(name.strip())
    assert {"New chat", "Copy", "Edit", "Answer again", "Settings", "Conversations"} <= seen, seen


@pytest.mark.parametrize(("size", "scheme"), [((1280, 800), "light"), ((390, 844), "dark")])
def test_axe_finds_no_serious_fault(
    page: Any, size: tuple[int, int], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.emulate_media(color_scheme=scheme)

    def check(state: str) -> None:
        found = Axe().run(page).response["violations"]
        serious = [(v["id"], [n["html"] for n in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")]
        assert serious == [], state
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{state} is too wide"

    check("empty")
    says(monkeypatch, MARKDOWN)
    send(page, "markdown")
    says(monkeypatch, *CALL)
    send(page, "a call")
    check("a conversation")
    says(monkeypatch)
    send(page, "nothing")
    check("a failure")
    if size[0] < 760:
        for side in ("list", "settings"):
            page.click(f"#open-{side}")
            check(side)
            page.keyboard.press("Escape")
        assert page.locator("#settings").is_hidden()


def test_files_of_the_page_and_nothing_else(live: Live) -> None:
    for file in PAGE.iterdir():
        answer = live.http.get(f"/{file.name}".removesuffix("index.html"))
        assert answer.status_code == 200 and answer.content == file.read_bytes()
        policy = answer.headers["content-security-policy"]
        assert (
            "default-src 'self'" in policy and "unsafe" not in policy and answer.headers["cache-control"] == "no-cache"
        )
        words = file.read_text()
        assert "innerHTML" not in words and "://" not in words.replace("http://www.w3.org/", "").replace(r"?:\/\/", "")
    for path in (
        "/../app.py",
        "/%2e%2e/app.py",
        "/..%2fapp.py",
        "/page/app.js",
        "/app.js/..",
        "/.",
        "/app.js%00",
        "/a",
    ):
        connection = http.client.HTTPConnection(live.url.removeprefix("http://"))  # httpx would shorten the path.
        connection.request("GET", path)
        assert connection.getresponse().status == 404, path
        connection.close()
    assert live.http.post("/app.js").status_code == 405 and live.http.get("/v1/completions").status_code == 405


def test_with_a_key_the_page_asks_for_it(tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "Come in.")
    with serving(write_run(tmp_path, model(head_std=0.1)), make_engine=Typing, api_key="secret") as server:
        for file in PAGE.iterdir():
            assert httpx.get(f"{server.url}/{file.name}".removesuffix("index.html")).status_code == 401
        context = browser.new_context(http_credentials={"username": "", "password": "secret"})
        page = context.new_page()
        page.goto(server.url)
        send(page, "Hello")
        assert turns(page) == ["Hello", "Come in."]
        context.close()
