"""An imported model talks, is served and is tuned in its own chat template, or says what to do without one."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import small
from exports import model
from serving import serving
from templates import TALKS, TEMPLATES
from test_templates import made

import launch.chat
import launch.convert
from jaxchat import command_line, stages
from jaxchat.decode.dialogue import Dialogue
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.evaluation.harness import Adapter
from jaxchat.export import huggingface
from jaxchat.loading import load_checkpoint, load_engine
from jaxchat.tokenizer import chat

VOCAB, LENGTH = 272, 160  # The tokenizer has 263 ids.
TALK = [{"role": "system", "content": "Be brief."}, *TALKS["asked"]]


def imported(place: Path, template: str | None) -> str:
    """A random model with a tokenizer of another project, through files of transformers."""
    (place / "there").mkdir()
    config = model(vocab=VOCAB, head_std=0.1)
    (place / "there/config.json").write_text(json.dumps({"vocab_size": VOCAB}))
    tokenizer = made(place / "there", template)
    huggingface.write(place / "out", config, small.parameters(config, scale=0.4), tokenizer, length=LENGTH)
    out = place / "runs/imported/sft"
    launch.convert.main([f"--checkpoint={place / 'out'}", "--from=huggingface", f"--out={out}"])
    return str(out)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return imported(tmp_path_factory.mktemp("imported"), TEMPLATES["chatml"])


def test_chat_and_server_answer_what_the_template_writes(path: str) -> None:
    engine = load_engine(path, slots=1)
    tokenizer = engine.tokenizer
    assert tokenizer.vocab_size == VOCAB and engine.ends == {
        tokenizer.specials[name] for name in ("<s>", "</s>", "<|im_end|>")
    }
    prompt = chat.render(TALKS["asked"], tokenizer, complete=True).ids
    ((expected,),) = engine.generate([Request(prompt, SamplingParams(temperature=0, max_tokens=8))])
    question = TALKS["asked"][0]["content"]
    found = launch.chat.main([f"--checkpoint={path}", f"--prompt={question}", "--temperature=0", "--max_tokens=8"])
    assert found is not None and found["text"] == expected.shown
    with serving(path) as live:
        body: dict[str, Any] = {"messages": TALKS["asked"], "temperature": 0, "max_tokens": 8}
        answer = live.http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == expected.text
        ids = live.http.post("/tokenize", json={"messages": TALK}).json()["tokens"]
        assert ids == chat.render(TALK, tokenizer, complete=True).ids
        info = live.http.get("/tokenizer_info").json()
        assert (info["chat_template"], info["eos_token"]) == (TEMPLATES["chatml"], "<|im_end|>")
        call: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
        refused: httpx.Response = live.http.post("/v1/chat/completions", json=body | {"tools": [call]})
        assert refused.status_code == 400 and "which the chat format lacks" in refused.text


def test_a_conversation_goes_on_in_the_template(path: str) -> None:
    engine = load_engine(path, slots=1)
    dialogue = Dialogue(engine, SamplingParams(temperature=0, max_tokens=6))
    first = "".join(dialogue.answer("Hello"))
    "".join(dialogue.answer("And?"))
    said = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first or "..."},
        {"role": "user", "content": "And?"},
    ]
    assert dialogue.last is not None
    assert list(dialogue.last.prompt) == chat.render(said, engine.tokenizer, complete=True).ids


def test_the_harness_renders_and_encodes_as_here(path: str) -> None:
    adapter = Adapter(load_checkpoint(path), LENGTH)
    text = adapter.apply_chat_template(TALK)
    assert adapter.tok_encode(text) == chat.render(TALK, adapter.loaded.tokenizer, complete=True).ids
    answered = adapter.apply_chat_template(TALKS["answered"], add_generation_prompt=False)
    assert answered.endswith(TALKS["answered"][1]["content"])


def tuned(path: str, place: Path) -> dict[str, Any]:
    talks = [TALKS["answered"], TALKS["several"], TALKS["system"]] * 4
    for name, more_of_them in (("train", talks), ("val", talks[:3])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in more_of_them))
    return stages.run(
        command_line.load(
            [
                "--config=configs/tiny.py:sft",
                f"--start_from={path}",
                f"--directory={place / 'runs'}",
                f"--data.cache={place / 'cache'}",
                f"--data.train={place / 'train.jsonl'}",
                f"--data.val={place / 'val.jsonl'}",
                f"--data.row_length={LENGTH}",
                "--name=tuned",
                "--steps=1",
                f"--batch_tokens={2 * LENGTH}",
                "--micro_rows=2",
                "--mesh.data=2",
                "--data.workers=1",
                "--data.epochs",
                "--tasks",
                "--prompts",
                "What is 나?",
            ]
        )
    )


def test_fine_tuning_trains_on_answers_in_the_template(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert tuned(path, tmp_path)["step"] == 1
    loaded = load_checkpoint(str(tmp_path / "runs/tuned/sft"))
    assert loaded.tokenizer.hash == load_checkpoint(path).tokenizer.hash
    (manifest,) = json.loads((tmp_path / "runs/tuned/rows/sft-train.json").read_text())
    assert manifest["several"] == 4 and manifest["documents"] == 12
    assert (tmp_path / "runs/tuned/sft/samples.md").read_text()


def test_without_a_template_the_model_continues_texts_and_refuses_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    path = imported(tmp_path, None)
    asked = [f"--checkpoint={path}", "--prompt=a", "--temperature=0", "--max_tokens=4"]
    with pytest.raises(UserError, match="so it only continues texts: use --style=text, or put a"):
        launch.chat.main(asked)
    found = launch.chat.main([*asked, "--style=text"])
    assert found is not None and found["tokens"] > 0
    with pytest.raises(UserError, match=r"put a chat_template\.jinja beside its tokenizer_config\.json"):
        tuned(path, tmp_path)
