"""nanochat's own checkpoints and tokenizers come in with their logits and ids, or are refused and write nothing."""

import base64
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from lines import RARE, lines
from outside import GOLDEN, read_arrays
from weights import checksum, nanochat_weight

import launch.chat
import launch.convert
from configs import recipe
from jaxchat.errors import UserError
from jaxchat.export import families, nanochat
from jaxchat.export.families.nanochat_own import July2026, October2025
from jaxchat.export.pickled import read_pickled
from jaxchat.loading import load_checkpoint
from jaxchat.tokenizer import chat, load_tokenizer
from jaxchat.tokenizer.outside import Outside

pytest.importorskip("tokenizers")
TOKENS: dict[str, Any] = json.loads((GOLDEN / "nanochat_tokens.json").read_text(encoding="utf-8"))
MODELS = read_arrays("nanochat_checkpoints")
State = dict[str, np.ndarray]
NAMES, VOCAB = ("october2025", "july2026"), 700


def saved(name: str) -> tuple[dict[str, Any], State]:
    """Content of meta_STEP.json and model_STEP.pt of a golden model, with nanochat's types."""
    check, shapes, meta = json.loads(str(MODELS[f"{name}/about"]))
    weights = {key: nanochat_weight(key, tuple(shape)) for key, shape in shapes.items()}
    assert checksum(weights) == check
    kinds = {key: ml_dtypes.bfloat16 if "wte" in key or "embeds" in key else np.float32 for key in weights}
    return meta, {key: value.astype(kinds[key]) for key, value in weights.items()}


def write(place: Path, name: str, step: int = 10) -> Path:
    """A base directory of nanochat with a checkpoint; its weights are those of `state_files`."""
    directory = place / "base_checkpoints/d5"
    directory.mkdir(parents=True, exist_ok=True)
    (place / "tokenizer").mkdir(exist_ok=True)
    (place / "tokenizer/tokenizer.pkl").write_bytes(base64.b64decode(TOKENS["pickle"]))
    (directory / f"meta_{step:06d}.json").write_text(json.dumps(saved(name)[0]))
    (directory / f"model_{step:06d}.pt").write_text(name)
    return directory


@pytest.fixture
def state_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[State], None]:
    """Replaces the reader of .pt files, which needs torch: a file holds the name of a golden model."""

    def replace(changes: State) -> None:
        def reader(path: Path) -> Any:
            state = saved(path.read_text())[1] | changes
            return {f"_orig_mod.{key}": lambda value=value: value for key, value in state.items()}

        monkeypatch.setattr(nanochat, "open_torch", reader)

    replace({})
    return replace


def convert(directory: Path | str, out: Path, *more: str) -> dict[str, Any]:
    return launch.convert.main([f"--checkpoint={directory}", "--from=nanochat", f"--out={out}/run/sft", *more])


def logits(path: str) -> np.ndarray:
    loaded = load_checkpoint(path)
    transformer, params = loaded.transformer(), loaded.params()
    hidden = jax.jit(transformer.apply)(params, MODELS["tokens"][None])[0]
    return np.asarray(transformer.logits(params, hidden))[0][MODELS["positions"]][:, MODELS["ids"]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("state_files")
def test_an_imported_model_has_nanochats_logits_and_talks(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = convert(write(tmp_path, name), tmp_path)
    padded = "left out 4 rows without a token" in capsys.readouterr().err
    assert found["from"] == "nanochat" and padded == (name == "july2026")
    np.testing.assert_allclose(logits(found["out"]), MODELS[f"{name}/logits"], atol=1e-4)
    loaded = load_checkpoint(found["out"])
    assert loaded.experiment.data.row_length == 320
    said = launch.chat.main([f"--checkpoint={found['out']}", "--prompt=12 x 7?", "--temperature=0", "--max_tokens=3"])
    assert said is not None and said["tokens"] > 0
    if name == "october2025":
        assert families.family_of(loaded.experiment.model).model_type == "nanochat"  # So it can go on to transformers.


@pytest.mark.parametrize("depth", [1, 4, 5, 6, 12, 26])
def test_windows_and_value_embeddings_are_those_of_the_dial(depth: int) -> None:
    ours = recipe.model(recipe.Dial(depth=depth, family="july2026", row_length=1000))
    heads = ours.layers[0].mixer.heads
    sizes = {"vocab_size": ours.vocab, "n_layer": depth, "n_head": heads, "n_kv_head": heads, "n_embd": ours.width}
    model, length = July2026().read(sizes | {"sequence_len": 1000, "window_pattern": "sssl"})
    norm = dataclasses.replace(ours.norm, eps=2.0**-23)
    assert length == 1000
    for mine, theirs in zip(ours.layers, model.layers, strict=True):
        mixer = dataclasses.replace(mine.mixer, qk_norm=norm)
        assert dataclasses.replace(mine, mixer=mixer, norm=norm) == theirs
    assert (ours.smear, ours.backout, ours.residual_scales) == (model.smear, model.backout, model.residual_scales)


@pytest.mark.usefixtures("state_files")
def test_the_newest_step_comes_in_unless_one_is_named(tmp_path: Path) -> None:
    write(tmp_path, "october2025", step=20)
    directory = write(tmp_path, "july2026", step=3)
    (directory / "optim_000030_rank0.pt").touch()
    assert type(nanochat.open_source(str(directory)).family) is October2025
    assert type(nanochat.open_source(f"{directory}@3").family) is July2026
    for wrong in ("@4", "@x"):
        with pytest.raises(UserError, match=rf"no model {wrong[1:]} in .*: there are 3, 20"):
            nanochat.open_source(f"{directory}{wrong}")


def january(state: State) -> State:
    """The scalars of January 2026 beside October's tensors."""
    return {name: value for name, value in state.items() if name in ("resid_lambdas", "x0_lambdas")}


def test_models_between_the_two_are_refused_by_a_tensor(tmp_path: Path, state_files: Any) -> None:
    july = saved("july2026")[1]
    gate = "transformer.h.0.attn.ve_gate.weight"
    cases = (
        ("october2025", january(july), r"\S+ is missing: check model_config; nanochat's models from 12 January"),
        ("july2026", {gate: np.ones((2, 32), np.float32)}, rf"{gate} has shape \(2, 32\), expected \(2, 12\): check"),
        ("july2026", {"bigram_lambdas": np.ones(5, np.float32)}, "unexpected parameters: bigram_lambdas"),
        ("october2025", {"v0_lambdas": np.ones(5, np.float32)}, "unexpected parameters: v0_lambdas"),
    )
    for name, changes, words in cases:
        state_files(changes)
        with pytest.raises(UserError, match=rf"do not match its meta_000010\.json: {words}"):
            convert(write(tmp_path / "there", name), tmp_path)
        assert not list(tmp_path.glob("run/*"))


CONFIGS: dict[str, dict[str, Any]] = {
    "has rotary_base=1, which jaxchat does not know": {"rotary_base": 1},
    "has window_pattern='SSX', but jaxchat supports only a text of S and L": {"window_pattern": "SSX"},
    "has n_layer=0, but": {"n_layer": 0},
    "has no n_head: check that the file is complete": {"n_head": ...},
    "n_embd is not a multiple of n_head": {"n_head": 3},
    "heads=4 is not a multiple of kv_heads=3": {"n_kv_head": 3},
    r"has vocab_size=701 but its tokenizer has 700 ids: name the tokenizer": {"vocab_size": 701},
    "is missing: check model_config": {"n_layer": 6},
    "expected": {"n_embd": 40},
}


@pytest.mark.parametrize("words", CONFIGS)
@pytest.mark.usefixtures("state_files")
def test_a_configuration_that_is_wrong_is_one_sentence(words: str, tmp_path: Path) -> None:
    directory = write(tmp_path, "july2026")
    meta, _ = saved("july2026")
    config = {key: value for key, value in (meta["model_config"] | CONFIGS[words]).items() if value is not ...}
    (directory / "meta_000010.json").write_text(json.dumps(meta | {"model_config": config}))
    with pytest.raises(UserError, match=words):
        convert(directory, tmp_path)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.usefixtures("state_files")
def test_windows_without_the_tensors_of_their_time_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path, "october2025")
    shutil.copy(write(tmp_path / "other", "july2026") / "meta_000010.json", directory)
    with pytest.raises(UserError, match="window_pattern='SSSL', but jaxchat supports only a text of L"):
        convert(directory, tmp_path)


@pytest.mark.usefixtures("state_files")
def test_missing_files_are_one_sentence_each(tmp_path: Path) -> None:
    directory = write(tmp_path, "july2026")
    pickled, meta = tmp_path / "tokenizer/tokenizer.pkl", directory / "meta_000010.json"
    (tmp_path / "elsewhere").mkdir()
    pickled.rename(tmp_path / "elsewhere/tokenizer.pkl")
    with pytest.raises(UserError, match=r"no tokenizer\.pkl in .*: name its directory with --tokenizer=DIR"):
        convert(directory, tmp_path)
    (directory / "tokenizer.pkl").write_bytes(b"")
    with pytest.raises(UserError, match=r"from the model's project, or name another tokenizer with --tokenizer=DIR"):
        convert(directory, tmp_path)
    found = nanochat.open_source(str(directory), read_pickled(tmp_path / "elsewhere"))
    assert convert(directory, tmp_path, f"--tokenizer={tmp_path / 'elsewhere'}")["out"]
    assert load_checkpoint(f"{tmp_path}/run/sft").tokenizer.hash == found.tokenizer.hash
    for content, words in (("{", "cannot be read"), ("{}", "has no model_config: restore"), (None, "cannot be read")):
        meta.unlink() if content is None else meta.write_text(content)
        with pytest.raises(UserError, match=rf"meta_000010\.json {words}"):
            convert(directory, tmp_path / "new")
    with pytest.raises(UserError, match=r"no model_STEP\.pt in .*: --checkpoint must name one of nanochat"):
        convert(tmp_path, tmp_path / "new")
    with pytest.raises(UserError, match=r"no directory .*: --checkpoint must name one with .* meta_STEP\.json"):
        convert(tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def tokenizer(place: Path) -> Outside:
    (place / "tokenizer.pkl").write_bytes(base64.b64decode(TOKENS["pickle"]))
    return read_pickled(place)


def test_ids_are_those_of_tiktoken(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path)
    ids = [ours.encode(line) for line in [*lines(TOKENS["count"]), *RARE]]
    assert ids[: len(TOKENS["first"])] == TOKENS["first"]
    for at, expected in enumerate(TOKENS["ids"]):
        group = ids[at * TOKENS["group"] : (at + 1) * TOKENS["group"]]
        assert hashlib.sha256(json.dumps(group).encode()).hexdigest()[:16] == expected, f"group {at}"
    assert ours.losses() is None and ours.decode(ids[-1]) == RARE[-1]


def test_conversations_have_nanochats_ids_and_mask_also_after_saving(tmp_path: Path) -> None:
    tokenizer(tmp_path).save(tmp_path / "run/tokenizer")
    ours = load_tokenizer(tmp_path / "run/tokenizer")
    for talk, ids, mask, prompt in TOKENS["talks"]:
        rendered = chat.render(talk, ours)
        assert rendered.ids == ids and rendered.loss_mask == [bool(one) for one in mask]
        assert chat.render(talk[:-1], ours, complete=True).ids == prompt
    assert set(ours.chat_format.parts) == {"python", "python_output"}  # So that tools can be used.


def fields() -> dict[str, Any]:
    """The attributes of nanochat's encoding."""
    ours: dict[str, Any] = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return type(name, (), {"__setstate__": lambda _, state: ours.update(state)})

    Unpickler(io.BytesIO(base64.b64decode(TOKENS["pickle"]))).load()
    return ours


def pickled(monkeypatch: pytest.MonkeyPatch, state: Any) -> bytes:
    """The pickle of an encoding with this state."""
    module = types.ModuleType("tiktoken.core")
    kind = type("Encoding", (), {"__module__": module.__name__})
    vars(module)["Encoding"] = kind
    monkeypatch.setitem(sys.modules, "tiktoken", types.ModuleType("tiktoken"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    value = kind()
    vars(value).update(state)
    return pickle.dumps(value)


def test_damaged_and_other_tokenizers_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, whole = fields(), base64.b64decode(TOKENS["pickle"])
    ranks, specials = good["mergeable_ranks"], good["special_tokens"]
    kinds = "has no pat_str, mergeable_ranks and special_tokens of an encoding: copy it again"
    ids = "has other ids than 0 to [0-9]+, special tokens last, or lacks bytes: copy it again"
    changed = (
        ({"pat_str": 3}, kinds),
        ({"mergeable_ranks": {"a": 0}}, kinds),
        ({"mergeable_ranks": {b"a": "0"}}, kinds),
        ({"special_tokens": {b"<|bos|>": 691}}, kinds),
        ({"special_tokens": None}, kinds),
        ({"special_tokens": specials | {"\ud800": 5}}, kinds),
        ({"pat_str": "\udfff"}, kinds),
        ({"pat_str": "(a"}, r"tokenizer\.json cannot be read by tokenizers: "),
        ({"mergeable_ranks": {key: i for key, i in ranks.items() if i != 300}}, ids),
        ({"mergeable_ranks": {key * 2 if key == b"a" else key: i for key, i in ranks.items()}}, ids),
        ({"special_tokens": specials | {"<|bos|>": 5}}, ids),
        ({"special_tokens": {f"{name}!": i for name, i in specials.items()}}, r"has no special token <\|bos\|>, as"),
    )
    cases = [(pickled(monkeypatch, good | change), words) for change, words in changed]
    cases += [(pickle.dumps(value), kinds) for value in (1, [good], good)]
    cases += [(whole[:size], r"cannot be read as a tiktoken\.Encoding \(") for size in (0, 1, 20, 5000, len(whole) - 1)]
    for content, words in cases:
        (tmp_path / "tokenizer.pkl").write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_pickled(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(pickled(monkeypatch, good))
    assert read_pickled(tmp_path).hash == tokenizer(tmp_path).hash


def test_a_part_of_a_text_that_is_a_token_is_taken_whole_as_in_tiktoken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, new = fields(), VOCAB - 9
    ranks = good["mergeable_ranks"] | {b" qzqzq": new}  # No two tokens form it.
    specials = {name: i + 1 for name, i in good["special_tokens"].items()}
    (tmp_path / "tokenizer.pkl").write_bytes(
        pickled(monkeypatch, good | {"mergeable_ranks": ranks, "special_tokens": specials})
    )
    ours = read_pickled(tmp_path)
    assert ours.encode("a qzqzq") == [*ours.encode("a"), new] and new not in ours.encode("a qzqzqs")


class Bomb:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_tokenizer_executes_nothing(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_files: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = write(tmp_path / "there", "july2026")
    for call, word in ((Path.touch, Path("exploded")), (os.system, "touch exploded"), (eval, "open('exploded', 'w')")):
        for value in (Bomb(call, word), {"pat_str": Bomb(call, word)}, [1, {b"a": Bomb(call, word)}]):
            (tmp_path / "there/tokenizer/tokenizer.pkl").write_bytes(pickle.dumps(value, protocol))
            with pytest.raises(UserError, match=r"cannot be read as a tiktoken\.Encoding \(it names .*: copy it again"):
                convert(directory, tmp_path)
    assert not (tmp_path / "exploded").exists() and not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("content", ["weights", "bomb", "truncated", "list"])
def test_files_of_torch_are_read_without_executing_them(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = write(tmp_path / "there", "july2026")
    file = directory / "model_000010.pt"
    file.write_bytes(pickle.dumps(Bomb(Path.touch, Path("exploded"))))
    words = "only torch can read safely: pip install"
    if importlib.util.find_spec("torch") is not None:
        import torch

        words = (
            "is not a state dict" if content == "list" else "cannot be read without executing code .*: copy it again"
        )
        if content != "bomb":
            state = saved("july2026")[1]
            tensors = {f"_orig_mod.{key}": torch.from_numpy(value.astype(np.float32)) for key, value in state.items()}
            half = {key: value.bfloat16() for key, value in tensors.items() if "wte" in key or "embeds" in key}
            torch.save([1] if content == "list" else tensors | half, file)
        if content == "truncated":
            file.write_bytes(file.read_bytes()[:-1000])
        if content == "weights":
            found = convert(directory, tmp_path)
            np.testing.assert_allclose(logits(found["out"]), MODELS["july2026/logits"], atol=1e-4)
            return
    with pytest.raises(UserError, match=words):
        convert(directory, tmp_path)
    assert not (tmp_path / "exploded").exists() and not list(tmp_path.glob("run/*"))
