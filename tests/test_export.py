"""What leaves jaxchat means the same elsewhere, and comes back as it was."""

import dataclasses
import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small
from documents import texts
from exports import VOCAB, model, read_export, tokenizer, write_run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from outside import read

import launch.chat
import launch.convert
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.export import families, huggingface, stablehlo
from jaxchat.export.places import State, to_params
from jaxchat.export.tokens import tokenizer_json
from jaxchat.model import GQA, Model, ReluSquared, RMSNorm, RoPE, SwiGLU, Transformer
from jaxchat.model.positions import POSITIONS
from jaxchat.tokenizer import TokenizerConfig, chat, load_tokenizer, train_tokenizer
from jaxchat.tokenizer.chat_format import NANOCHAT

PLACES = families.FAMILIES["nanochat"].places
KINDS = {
    "plain": model(),
    "grouped": model(pattern=(GQA(heads=4, kv_heads=2, head_dim=8, positions=RoPE(5_000.0)),), depth=3),
    "tied": model(tied=True, softcap=None),
    "pattern": model(pattern=(GQA(heads=2, kv_heads=2, head_dim=8),) * 2),
}
TOKENS = np.random.default_rng(7).integers(0, VOCAB, (2, 24)).astype(np.int32)


def logits(config: Model, params: Any) -> np.ndarray:
    transformer = Transformer(config)
    return np.asarray(transformer.logits(params, transformer.apply(params, TOKENS)[0]))


def export(directory: Path, config: Model, params: Any, **options: Any) -> Path:
    huggingface.write(directory, config, params, tokenizer(), length=64, **options)
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_models_logits_equal_transformers(kind: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    params = small.parameters(KINDS[kind])
    path = export(tmp_path / "out", KINDS[kind], params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    with torch.no_grad():
        found = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    assert np.abs(found - logits(KINDS[kind], params)).max() < 1e-4
    assert np.abs(found).max() > 1


def test_a_model_of_transformers_has_the_same_logits_here(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.NanoChatConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    theirs = transformers.NanoChatForCausalLM(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=0.4)
        expected = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    found, length, params, _ = read_export(tmp_path, tokenizer())
    assert length == 40
    assert np.abs(logits(found, params) - expected).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_exported_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    params = small.parameters(KINDS[kind])
    read, length, back, words = read_export(export(tmp_path / "out", KINDS[kind], params))
    assert length == 64 and words.hash == tokenizer().hash
    assert (read.width, read.depth, read.tied, read.softcap) == (
        KINDS[kind].width,
        KINDS[kind].depth,
        KINDS[kind].tied,
        KINDS[kind].softcap,
    )
    for (name, mine), (other, theirs) in zip(
        sorted(State(KINDS[kind], params, PLACES).items()),
        sorted(State(read, back, PLACES).items()),
        strict=True,
    ):
        assert name == other
        np.testing.assert_array_equal(mine, theirs)


def test_weights_go_out_under_the_names_and_in_the_layout_of_transformers() -> None:
    golden = read("nanochat_v1_gqa")
    config, _ = families.read_config(golden.config)
    params = to_params(config, golden.weights, PLACES)
    state = dict(State(config, params, PLACES))
    assert state.keys() == golden.weights.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value, golden.weights[name], err_msg=name)


def test_bfloat16_weights_are_the_rounded_ones(tmp_path: Path) -> None:
    params = small.parameters(model())
    path = export(tmp_path / "out", model(), params, dtype="bfloat16")
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    _, _, back, _ = read_export(path)
    rounded = jax.tree.map(lambda w: np.asarray(w, jax.numpy.bfloat16).astype(np.float32), params)
    head = back["ends"]["head"][:, :VOCAB]
    np.testing.assert_array_equal(head, rounded["ends"]["head"][:, :VOCAB])
    assert np.any(head != params["ends"]["head"][:, :VOCAB])
    assert (path / "model.safetensors").stat().st_size < 0.6 * sum(x.nbytes for x in jax.tree.leaves(params))


REFUSED = {
    "residual_scales=ResidualScales, smear=Smear, backout=Backout, .*mixer.window=3": small.july2026(),
    "Chat.* does not support mixer.window=3, which": model(pattern=(GQA(heads=4, kv_heads=4, head_dim=4, window=3),)),
    "norm.gain=none, embed_norm=True, softcap=15.0, .*direction=-1": model(mlp=SwiGLU(24)),
    "mixer.qk_scale=1.2": model(pattern=(GQA(heads=4, kv_heads=4, head_dim=4, qk_scale=1.2),)),
    "mixer.qk_norm.eps=1e-06": model(norm=RMSNorm(1e-5)),
    "norm.gain=w": model(norm=RMSNorm(gain="w")),
    "embed_norm=False": model(embed_norm=False),
    "embed_scale=4.0": model(embed_scale=4.0),
    "mixer.qkv_bias=True and mixer.softcap=50.0": model(
        pattern=(GQA(heads=4, kv_heads=4, head_dim=4, qkv_bias=True, softcap=50.0),)
    ),
    "mlp.bias=True": model(mlp=ReluSquared(24, bias=True)),
    "mixer.positions.direction=1": model(pattern=(GQA(heads=4, kv_heads=4, head_dim=4, positions=RoPE(direction=1)),)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_transformers_lacks_is_refused_by_name(words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        export(tmp_path / "out", REFUSED[words], None)
    assert "launch.harness" in str(caught.value) and not (tmp_path / "out").exists()


def test_parts_that_resemble_those_of_a_family_are_lacking_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherNorm(RMSNorm):
        pass

    class OtherRoPE(RoPE):
        pass

    monkeypatch.setitem(POSITIONS, OtherRoPE, POSITIONS[RoPE])
    norm = OtherNorm()
    mixer = GQA(heads=4, kv_heads=4, head_dim=4, positions=OtherRoPE(), qk_norm=norm)
    config = model(pattern=(mixer,), norm=norm)
    config = dataclasses.replace(config, pattern=tuple(dataclasses.replace(x, norm=norm) for x in config.pattern))
    wanted = ["norm=OtherNorm", "positions=OtherRoPE"]
    assert families.FAMILIES["nanochat"].lacking(config) == wanted


AWKWARD = [
    "\u2581",
    "\0",
    "\t",
    "\r\n",
    " ",
    "   ",
    "        ",
    "<0x41>",
    "<unk>",
    "⁇",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "🇰🇷",
    "-----",
    "1867",
]
HANGUL = "나는 학교에 갔다. "
parts = st.sampled_from(
    [*AWKWARD, *NANOCHAT.specials, HANGUL, unicodedata.normalize("NFD", HANGUL), "fox", " bear", "a", "=", "\n"]
)
any_text = st.lists(st.one_of(parts, st.text(max_size=8))).map("".join)


@settings(deadline=None, max_examples=400)
@given(text=any_text)
@example(text="")
@example(text=" " * 61 + "\n" + "-" * 43)
def test_the_tokenizers_library_gives_the_same_ids_for_every_text(text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer())))
    theirs.encode_special_tokens = True
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer().encode(text)
    assert theirs.decode(ids, skip_special_tokens=False) == text


def test_a_tokenizer_that_cannot_be_the_same_elsewhere_is_refused() -> None:
    with pytest.raises(UserError, match="only BPE tokenizers are exported"):
        tokenizer_json(tokenizer("unigram"))


def test_transformers_tokenizer_begins_texts_and_renders_conversations_as_here(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path, ours = export(tmp_path / "out", model(), small.parameters(model())), tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    text = "The fox  saw 17 bears.\n나는 <|user_end|> \u2581 👩‍👩‍👧"
    plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert plain == ours.encode(text)
    assert theirs("fox")["input_ids"] == [ours.bos, *ours.encode("fox")]
    assert theirs.decode(plain) == text
    assert theirs("fox<|user_end|>", add_special_tokens=False)["input_ids"][-1] == ours.specials["<|user_end|>"]
    answer = [
        {"type": "python", "text": "7 + 5"},
        {"type": "python_output", "text": "12"},
        {"type": "text", "text": "12"},
    ]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 7 + 5?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": " And\n2?"},
    ]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert rendered == chat.render(messages, ours, complete=True).ids
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.specials["<|assistant_end|>"])
    ends = transformers.GenerationConfig.from_pretrained(path).eos_token_id
    assert set(ends) == {ours.bos, ours.specials["<|assistant_end|>"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_run(tmp_path_factory.mktemp("run"), model())


def test_a_checkpoint_goes_out_and_comes_back_by_the_command_line(run: str, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "runs/back/sft"
    told = launch.convert.main([f"--checkpoint={run}", "--to=huggingface", f"--out={out}"])
    assert told["out"] == str(out) and told["parameters"] > 0
    found = launch.convert.main([f"--checkpoint={run}", "--to=tokenizer", f"--out={tmp_path / 'words'}"])
    assert (found["vocab"], found["to"]) == (VOCAB, "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"):
        assert (tmp_path / "words" / name).read_bytes() == (out / name).read_bytes()
    told = launch.convert.main([f"--checkpoint={out}", "--from=huggingface", f"--out={back}"])
    assert told["checkpoint"] == f"{back}@0"
    asked = ["--prompt=the fox", "--temperature=0", "--max_tokens=8"]
    before, after = (launch.chat.main([f"--checkpoint={path}", *asked]) for path in (run, back))
    assert before is not None and after is not None
    assert before["text"] == after["text"]


@pytest.mark.parametrize("family", [small.july2026(vocab=VOCAB), model()], ids=["july2026", "october2025"])
def test_the_stablehlo_readmes_code_gives_the_engines_tokens(family: Model, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("flatbuffers")
    params, transformer, words = small.parameters(family), Transformer(family), tokenizer()
    stablehlo.write(tmp_path / "out", transformer, params, words, rows=2, length=48, prefill_chunk=8)
    code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    about = (tmp_path / "out/README.md").read_text()
    packages = {name.split(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", code, re.MULTILINE)}
    needed = packages - {"json", "pathlib", "numpy"} | {"flatbuffers"}  # jax.export reads programs with flatbuffers.
    assert needed == set(re.search(r"`pip install (.*)`", about)[1].split())
    space: dict[str, Any] = {}
    exec(code.replace('Path(".")', f"Path({str(tmp_path / 'out')!r})"), space)
    prompt = [words.bos, *words.encode("the fox saw a bear near old trees")]
    engine = Engine(transformer, params, words, EngineConfig(48, slots=2, steps=4, prefill_chunk=8))
    count = 48 - len(prompt)
    ((answer,),) = engine.generate([Request(prompt, SamplingParams(temperature=0, max_tokens=count))])
    assert len(answer.tokens) > 3
    assert space["greedy"](prompt, count)[: len(answer.tokens)] == list(answer.tokens)


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        launch.convert.main(list(map(str, arguments)))
    return str(caught.value)


def test_bad_input_is_one_sentence(run: str, tmp_path: Path) -> None:
    out = f"--out={tmp_path / 'new'}"
    there = export(tmp_path / "there", model(), small.parameters(model()))
    stage = f"--out={tmp_path / 'runs/x/sft'}"
    source = "--from=huggingface"
    assert "set exactly one of --to" in refusal(f"--checkpoint={run}", out)
    assert "no checkpoint in" in refusal(f"--checkpoint={tmp_path}/none", out, "--to=huggingface")
    assert "already exists" in refusal(f"--checkpoint={run}", f"--out={there}", "--to=huggingface")
    assert "--rows is only for" in refusal(f"--checkpoint={run}", out, "--to=huggingface", "--rows=2")
    assert "--rows is only for" in refusal(f"--checkpoint={run}", out, "--to=tokenizer", "--rows=2")
    assert "--dtype is the type of" in refusal(f"--checkpoint={run}", out, "--to=tokenizer", "--dtype=bfloat16")
    assert "must be at least 1" in refusal(f"--checkpoint={run}", out, "--to=stablehlo", "--rows=-2")
    assert "must end in a stage" in refusal(f"--checkpoint={there}", source, out)
    assert "no directory" in refusal(f"--checkpoint={tmp_path}/none", source, stage)
    assert "config.json cannot be read" in refusal(f"--checkpoint={tmp_path}", source, stage)
    broken = shutil.copytree(there, tmp_path / "broken")
    for name in ("tokenizer.model", "tokenizer.json"):
        (broken / name).unlink()
    assert "--tokenizer=DIR" in refusal(f"--checkpoint={broken}", source, stage)
    shutil.copy(there / "tokenizer.model", broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-9])
    assert "model.safetensors cannot be read" in refusal(f"--checkpoint={broken}", source, stage)
    (broken / "model.safetensors").unlink()
    assert "only safetensors files and pytorch_model.bin" in refusal(f"--checkpoint={broken}", source, stage)
    (broken / "model.safetensors").write_bytes(weights)
    for change, words in (
        ({"model_type": "bert"}, "only nanochat, llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"vocab_size": 300}, "vocab_size=300"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing: check num_hidden_layers"),
        ({"num_hidden_layers": 1}, "unexpected parameters: model.layers.1"),
        ({"intermediate_size": 32}, ", expected ("),
        ({"hidden_size": None}, "hidden_size=None"),
    ):
        config = json.loads((there / "config.json").read_text()) | change
        (broken / "config.json").write_text(json.dumps(config))
        assert words in refusal(f"--checkpoint={broken}", source, stage)
    assert not (tmp_path / "new").exists() and not (tmp_path / "runs/x/sft").exists()


def test_another_chat_template_is_that_of_the_model_unless_it_writes_no_conversations(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    there = export(tmp_path / "there", model(), small.parameters(model()))
    template, config = there / "chat_template.jinja", there / "tokenizer_config.json"
    ours, configured = template.read_text(), json.loads(config.read_text())
    tokenizer().save(tmp_path / "own")

    def asked(name: str, *more: str) -> list[str]:
        return [f"--checkpoint={there}", "--from=huggingface", f"--out={tmp_path / name}/sft", *more]

    for number, (file, older, words) in enumerate(
        [
            (b"\xff", None, f"{template} is not text"),
            (None, "x", "does not write a question and its answer: correct chat_template.jinja, or remove"),
            (None, 5, f"{config} has a chat_template that is no text: put it in chat_template.jinja"),
        ]
    ):
        template.unlink(missing_ok=True) if file is None else template.write_bytes(file)
        config.write_text(json.dumps(configured if older is None else configured | {"chat_template": older}))
        assert words in refusal(*asked(f"{number}"))
        launch.convert.main(asked(f"{number}", f"--tokenizer={tmp_path / 'own'}"))
    config.write_text(json.dumps(configured | {"chat_template": ours + "\n"}))
    launch.convert.main(asked("older"))
    assert load_tokenizer(tmp_path / "older/tokenizer").hash == tokenizer().hash
    template.write_text("edited " + ours)
    launch.convert.main(asked("edited"))
    edited, talk = load_tokenizer(tmp_path / "edited/tokenizer"), [{"role": "user", "content": "the fox"}]
    ids = chat.render(talk, edited, complete=True).ids
    assert ids == [*tokenizer().encode("edited"), *chat.render(talk, tokenizer(), complete=True).ids]


def test_an_import_succeeds_once_its_place_or_tokenizer_is_set_as_the_message_says(tmp_path: Path) -> None:
    there = export(tmp_path / "there", model(), small.parameters(model()))

    def asked(directory: Path, out: str, *more: str) -> list[str]:
        return [f"--checkpoint={directory}", "--from=huggingface", f"--out={tmp_path / out}", *more]

    launch.convert.main(asked(there, "a/pretrain"))
    assert "already exists: set --out to a new or empty directory" in refusal(*asked(there, "a/pretrain"))
    (tmp_path / "empty/pretrain").mkdir(parents=True)
    launch.convert.main(asked(there, "empty/pretrain"))
    other = train_tokenizer(texts(80), vocab=VOCAB - 20, config=TokenizerConfig())
    other.save(tmp_path / "a/tokenizer")
    assert "contains another tokenizer: set --out to a new run" in refusal(*asked(there, "a/sft"))
    launch.convert.main(asked(there, "new/sft"))
    tokenizer().save(tmp_path / "own")
    (there / "tokenizer.json").unlink()
    for number, content in enumerate((other.model, b"x", None)):
        place = there / "tokenizer.model"
        place.unlink() if content is None else place.write_bytes(content)
        assert "--tokenizer=DIR" in refusal(*asked(there, f"{number}/sft"))
        launch.convert.main(asked(there, f"{number}/sft", f"--tokenizer={tmp_path / 'own'}"))
