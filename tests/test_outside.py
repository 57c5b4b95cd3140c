"""Tokenizers of other projects give the ids of their libraries, and their bytes come back one by one."""

import codecs
import importlib.util
import itertools
import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
from lines import RARE, lines
from makers import byte_level, metaspace, pieces, write

from jaxchat.errors import UserError
from jaxchat.export.read_tokens import read_outside
from jaxchat.export.tokens import read_tokenizer, write_tokenizer
from jaxchat.tokenizer import TokenizerConfig, chat, load_tokenizer, train_tokenizer
from jaxchat.tokenizer.outside import GUARD, Outside
from jaxchat.tokenizer.sentencepiece import SentencePiece

tokenizers = pytest.importorskip("tokenizers")

LOSSLESS = ("gpt2", "llama3")
KINDS = (*LOSSLESS, "qwen", "normalizer", "first", "pieces", "gemma")


def made(kind: str, directory: Path) -> Outside:
    if kind in ("pieces", "gemma"):
        return read_outside(write(directory, "tokenizer.model", pieces(prefix=kind == "pieces"), bos_token="<s>"))
    content = byte_level(kind) if kind in (*LOSSLESS, "qwen") else metaspace(pieces(prefix=True), scheme=kind)
    return read_outside(write(directory, "tokenizer.json", content, bos_token="<bos>" if "<bos>" in content else "<s>"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_ids_are_those_of_the_library_and_come_back_byte_by_byte(kind: str, count: int, tmp_path: Path) -> None:
    ours, lossy = made(kind, tmp_path), 0
    if kind in ("pieces", "gemma"):
        theirs = sentencepiece.SentencePieceProcessor(model_proto=ours.model).encode
    else:
        plain = tokenizers.Tokenizer.from_str(ours.model.decode())
        plain.encode_special_tokens = True
        theirs = lambda text: plain.encode(text, add_special_tokens=False).ids  # noqa: E731
    front = "" if kind in (*LOSSLESS, "qwen", "gemma") else " "
    for line in [*lines(count), *RARE]:
        ids = ours.encode(line)
        assert ids == theirs(line), line
        assert not set(ids) & set(ours.specials.values()) or kind == "gemma"
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        streamed = "".join(decoder.decode(ours.decode_bytes([i])) for i in ids) + decoder.decode(b"", final=True)
        assert streamed == ours.decode(ids)
        assert sum(ours.bytes_per_token[i] for i in ids) == len(ours.decode_bytes(ids))
        lossy += streamed != front + line
        assert streamed == front + line or kind not in LOSSLESS, line
    assert (lossy > 0) == (kind not in LOSSLESS) or kind in ("normalizer", "first")
    assert (ours.losses() is None) == (kind in LOSSLESS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("pieces", "gemma")])
def test_named_special_tokens_are_those_of_the_library_but_in_texts_they_are_letters(kind: str, tmp_path: Path) -> None:
    ours = made(kind, tmp_path)
    value = json.loads(ours.model)
    if kind in (*LOSSLESS, "qwen"):
        value["added_tokens"][1] |= {"rstrip": True}
        value["added_tokens"][2] |= {"lstrip": True}
    ours = read_outside(write(tmp_path, "tokenizer.json", json.dumps(value), bos_token=ours.about.bos))
    theirs = tokenizers.Tokenizer.from_str(ours.model.decode())
    names = list(ours.specials)
    for i, line in enumerate(lines(200, seed=3)):
        text = f"{names[i % 5]}{line}{names[1 + i % 2]}\n a{line} {names[2]}{names[i % 3]}{line}"
        found = list(ours.encode_named(text))
        assert [token.id for token in found] == theirs.encode(text, add_special_tokens=False).ids, text
        assert all(a.start <= b.start for a, b in itertools.pairwise(found))
        assert not set(ours.encode(text)) & set(ours.specials.values())
    guarded = list(ours.encode_named(f"a<{GUARD}/s>"))
    assert not {token.id for token in guarded} & set(ours.specials.values())
    assert ours.decode([token.id for token in guarded]).replace(" ", "") == "a</s>"


def test_names_that_a_sentencepiece_model_reads_itself_are_letters_in_texts(tmp_path: Path) -> None:
    decoder = {"3": {"content": "<start_of_turn>", "special": True}, "4": {"content": "<end_of_turn>", "special": True}}
    content = pieces(prefix=False)
    ours = read_outside(
        write(tmp_path, "tokenizer.model", content, bos_token="<s>", added_tokens_decoder=decoder, unk_token="<unk>")
    )
    turn = ours.specials["<start_of_turn>"]
    text = "a <start_of_turn>user"
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content).encode(text)
    assert turn in theirs == [token.id for token in ours.encode_named(text)]
    assert turn not in ours.encode(text) and ours.decode(ours.encode(text)) == text
    assert [token.start for token in ours.encode_named("<s>뷀a<start_of_turn>")][:2] == [0, 3]
    assert [token.start for token in ours.encode_named("<s>뷀a<start_of_turn>")][-2:] == [4, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_begins_where_its_text_does(kind: str, tmp_path: Path) -> None:
    ours = made(kind, tmp_path)
    for line in lines(100, seed=5):
        if {"▁", "\u0301", "\u1112"} & set(line):
            continue  # Changed by some.
        text = f"{ours.about.bos}{line}"
        for token in ours.encode_named(text):
            piece = ours.decode([token.id], keep_specials=True)
            if "\ufffd" not in piece and piece.strip(" "):
                assert text[token.start :].lstrip(" ").startswith(piece.lstrip(" ")), (text, token)


@pytest.mark.parametrize("kind", ["qwen", "pieces"])
def test_a_tokenizer_is_stored_with_its_checkpoint_and_loaded_with_the_same_ids(kind: str, tmp_path: Path) -> None:
    ours = made(kind, tmp_path)
    ours.save(tmp_path / "saved")
    for copy in (load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(ours))):
        assert isinstance(copy, Outside) and copy.about == ours.about
        assert (copy.hash, copy.bos, copy.end, copy.ends) == (ours.hash, ours.bos, ours.end, ours.ends)
        assert all(copy.encode(line) == ours.encode(line) for line in lines(20))
        assert (copy.bytes_per_token == ours.bytes_per_token).all()
    changed = json.loads((tmp_path / "saved/tokenizer.json").read_text()) | {"last": ours.about.bos}
    (tmp_path / "saved/tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="is damaged or of another format"):
        load_tokenizer(tmp_path / "saved")


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_our_tokenizer_gives_its_ids_in_the_library_of_others_and_what_came_in_goes_out(
    count: int, tmp_path: Path
) -> None:
    ours = train_tokenizer(lines(400, seed=1), vocab=700, config=TokenizerConfig())
    (tmp_path / "ours").mkdir()
    write_tokenizer(tmp_path / "ours", ours)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "ours/tokenizer.json"))
    theirs.encode_special_tokens = True
    for line in [*lines(count), *RARE]:
        ids = theirs.encode(line, add_special_tokens=False).ids
        assert ids == ours.encode(line), line
        assert theirs.decode(ids) == line
    assert isinstance(read_tokenizer(tmp_path / "ours"), SentencePiece)
    (tmp_path / "ours/tokenizer.model").unlink()
    config = tmp_path / "ours/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "<|user_end|>"}))
    again = read_tokenizer(tmp_path / "ours")  # Only tokenizer.json and chat template.
    assert isinstance(again, Outside) and again.losses() is None
    assert all(again.encode(line) == ours.encode(line) for line in lines(50))
    talk = [{"role": "user", "content": "a <|user_end|>"}, {"role": "assistant", "content": "나 b"}]
    assert chat.render(talk, again) == chat.render(talk, ours)
    assert chat.render(talk[:1], again, complete=True).ids == chat.render(talk[:1], ours, complete=True).ids
    (tmp_path / "again").mkdir()
    write_tokenizer(tmp_path / "again", again, length=64)
    assert read_outside(tmp_path / "again").about == again.about


def test_what_the_library_of_others_would_read_otherwise_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = train_tokenizer(lines(100, seed=1), vocab=500, config=TokenizerConfig())
    monkeypatch.setattr("jaxchat.export.tokens.merges", lambda scores: [])
    with pytest.raises(UserError, match=r"tokenizer\.json gives other ids for '.*' than the tokenizer"):
        write_tokenizer(tmp_path, ours)


def test_ids_of_the_model_that_its_tokenizer_lacks_are_silent_and_special_tokens_beyond_it_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "tokenizer.json", byte_level("gpt2"), bos_token=None)
    settings = {"eos_token_id": [4, 2, 900], "bos_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 800}))
    ours = read_outside(tmp_path)
    assert (ours.vocab_size, ours.bos, ours.end, ours.ends) == (800, 3, 4, {2, 3, 4})
    assert ours.decode_bytes([701, 799]) == b"" and ours.decode_bytes([3], keep_specials=True) == b"<bos>"
    with pytest.raises(ValueError, match="id 800 is not in"):
        ours.decode([800])
    added = json.loads(byte_level("gpt2"))
    added["added_tokens"].append(added["added_tokens"][0] | {"id": 701, "content": "<pad>"})
    write(tmp_path, "tokenizer.json", json.dumps(added))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 701}))
    capsys.readouterr()
    ours = read_outside(tmp_path)
    assert ours.vocab_size == 701 and "<pad>" not in ours.specials
    assert "no embedding for are left out: <pad>" in capsys.readouterr().err


BROKEN = {
    "neither tokenizer.json nor tokenizer.model": ("x.txt", b"", {}),
    "cannot be read": ("tokenizer.json", b"{", {}),
    "tokenizer.json cannot be read by tokenizers": ("tokenizer.json", b"{}", {}),
    "is not a sentencepiece model": ("tokenizer.model", b"x", {}),
    "no bos_token or eos_token that is a special token": ("tokenizer.model", pieces(prefix=True), {"eos_token": None}),
    "the decoder WordPiece, which is not supported": (
        "tokenizer.json",
        json.dumps(json.loads(byte_level("gpt2")) | {"decoder": {"type": "WordPiece", "prefix": "#", "cleanup": True}}),
        {},
    ),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_tokenizer_is_one_sentence(words: str, tmp_path: Path) -> None:
    file, content, config = BROKEN[words]
    with pytest.raises(UserError, match=words):
        read_tokenizer(write(tmp_path, file, content, bos_token=None, **config))


@pytest.mark.parametrize("module", ["tokenizers", "jinja2"])
def test_a_missing_package_is_named_with_its_extra(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(UserError, match=rf"needs? {module}: pip install -e '\.\[convert\]'"):
        read_outside(write(tmp_path, "tokenizer.json", byte_level("gpt2"), chat_template="x"))
