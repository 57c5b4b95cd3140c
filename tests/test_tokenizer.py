import dataclasses
import io
import json
import pickle
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxchat.errors import UserError
from jaxchat.export.tokens import read_tokenizer, write_tokenizer
from jaxchat.tokenizer import TokenizerConfig, chat, load_tokenizer, report, train_tokenizer
from jaxchat.tokenizer.chat_format import CHAT_FORMATS, NANOCHAT, Marks
from jaxchat.tokenizer.sentencepiece import SentencePiece

ENGLISH = (
    "The old miller walked to the village with three heavy sacks of flour. It was raining, and the road was long.",
    "\tShe said: “Bring me the lantern!”\r\n\r\nNobody answered; the river was louder than her voice.",
    "def area(width, height):\n    if width < 0:\n        return None\n    return width * height  # 12 345\n",
    "In 1867 the town had 4,512 people. In 1901 it had 23,998, and the bridge was 310 metres long.",
)
KOREAN = "나는 학교에 갔다. 나는 친구를 만났다. 친구는 학교에 없었다. 우리는 바다를 보았다. "


def _invented_words(count):
    generator = random.Random(0)
    syllables = re.findall("..", "babedodufegahikilomaneosperisetaulvewizo")
    return " ".join("".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(count))


TEXTS = [
    "Le café était fermé; café, café. 1867 1867 " * 20,
    *(text * 4 for text in ENGLISH),
    KOREAN * 8,
    unicodedata.normalize("NFD", KOREAN) * 8,
    _invented_words(3000),
]
VOCAB = 520

# Characters with a role in sentencepiece, beside text of every kind.
AWKWARD = [
    "\u2581",
    "\u2585",
    "\0",
    "\t",
    "\r\n",
    " ",
    "   ",
    "<0x41>",
    "<unk>",
    "<s>",
    "⁇",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "🇰🇷",
]
any_text = st.lists(st.one_of(st.sampled_from([*AWKWARD, *NANOCHAT.specials]), st.text(max_size=12))).map("".join)
with_words = st.lists(st.sampled_from([*" ".join(TEXTS).split(" "), *AWKWARD])).map(" ".join)


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def tokenizer(request):
    return train_tokenizer(TEXTS, vocab=VOCAB, config=TokenizerConfig(algorithm=request.param))


@pytest.fixture(scope="session")
def bpe():
    return train_tokenizer(TEXTS, vocab=VOCAB, config=TokenizerConfig())


@settings(deadline=None, max_examples=150)
@given(text=st.one_of(any_text, with_words))
@example(text="")
@example(text=" ")
@example(text="\u2581\u2581 a\u2581 \u2581b ")
@example(text="  two  spaces\t\ttabs\r\nlines\n\n\0")
@example(text=unicodedata.normalize("NFC", KOREAN) + unicodedata.normalize("NFD", KOREAN))
def test_decode_undoes_encode_and_bytes_per_token_adds_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token[np.asarray(ids, int)].sum() == len(text.encode("utf-8"))
    assert not set(ids) & {0, *tokenizer.specials.values()}


@settings(deadline=None, max_examples=100)
@given(text=st.one_of(st.text(), with_words))
@example(text="   indented   words ")
@example(text="café. Le café! (café)")
def test_cutting_texts_changes_no_segmentation(tokenizer, text):
    text = text.replace("\u2581", "")
    whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert tokenizer.encode(text) == whole.encode(text)


CHINESE = "".join(random.Random(0).choices([chr(0x4E00 + i) for i in range(99)], k=9000))
RARE_SPACES = {
    "none": CHINESE,
    "rare": CHINESE + " " + CHINESE,
    "minified": "".join(random.Random(1).choices("abcdefgh(){};=.,01", k=9000)),
    "tabs": CHINESE.replace("\u4e01", "\t"),
}


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("name", RARE_SPACES)
def test_a_space_comes_back_whatever_the_tokenizer_was_trained_on(name, algorithm):
    tokenizer = train_tokenizer([RARE_SPACES[name]], vocab=380, config=TokenizerConfig(algorithm=algorithm))
    for text in ("hello world", " \u4e01  a ", "\u2581 \u2581", "\t \t"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())


LOSSY = {
    "no space": ({}, CHINESE, r"is not lossless \(' ' comes back as '\u2581'\)"),
    "normalized": ({"normalization_rule_name": "nfkc"}, " ".join(TEXTS), "is not lossless"),
    "cut": ({"remove_extra_whitespaces": True}, " ".join(TEXTS), "is not lossless"),
    "with a prefix": ({"add_dummy_prefix": True}, " ".join(TEXTS), "is not lossless"),
    "lower case": ({"normalization_rule_name": "nmt_nfkc_cf"}, " ".join(TEXTS), "is not lossless"),
    "no bytes": ({"byte_fallback": False}, " ".join(TEXTS), "needs byte pieces"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_model_that_loses_text_is_refused(name):
    options, text, said = LOSSY[name]
    plain = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    blocks = iter([text[i : i + 500] for i in range(0, len(text), 500)])
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{"sentence_iterator": blocks, "model_writer": output, "model_type": "bpe", "vocab_size": 380, "unk_id": 0}
        | {"control_symbols": list(NANOCHAT.specials), "byte_fallback": True, "minloglevel": 2}
        | {"bos_id": -1, "eos_id": -1, "pad_id": -1, "character_coverage": 1.0, **plain, **options}
    )
    with pytest.raises(UserError, match=said):
        SentencePiece(output.getvalue())


def test_a_saved_tokenizer_that_loses_text_is_named(bpe, tmp_path, monkeypatch):
    bpe.save(tmp_path / "tokenizer")
    monkeypatch.setattr(SentencePiece, "decode_bytes", lambda self, ids, **_: b"-")
    with pytest.raises(UserError, match=r"the tokenizer in .*tokenizer is not lossless .*: delete .* train again"):
        load_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_hangul_is_learned_in_both_normal_forms(bpe, form):
    text = unicodedata.normalize(form, KOREAN)
    assert bpe.decode(bpe.encode(text)) == text
    assert len(bpe.encode(text)) < len(text.encode("utf-8")) / 3


def test_every_id_is_used_by_the_vocabulary_once(tokenizer):
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.bytes_per_token.shape == (VOCAB,)
    pieces = [tokenizer.decode_bytes([i], keep_specials=True) for i in range(VOCAB)]
    assert {piece for piece in pieces if len(piece) == 1} >= {bytes([byte]) for byte in range(256)}
    assert [i for i in range(VOCAB) if tokenizer.bytes_per_token[i] == 0] == [0, *tokenizer.specials.values()]


def test_specials_have_fixed_ids_and_are_never_produced_by_text():
    config = TokenizerConfig(extra_specials=("<|tool|>", "<|image_1|>"))
    tokenizer = train_tokenizer([*TEXTS, " ".join([*NANOCHAT.specials, "<|tool|>"] * 50)], vocab=VOCAB, config=config)
    names = [*NANOCHAT.specials, "<|tool|>", "<|image_1|>"]
    assert tokenizer.specials == {name: 1 + i for i, name in enumerate(names)}
    assert tokenizer.bos == tokenizer.specials["<|bos|>"]
    text = " ".join(names) + "".join(names)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.specials.values())
    assert tokenizer.decode(ids) == text
    framed = [tokenizer.bos, *tokenizer.encode("hi"), tokenizer.specials["<|tool|>"]]
    assert tokenizer.decode(framed) == "hi"
    assert tokenizer.decode(framed, keep_specials=True) == "<|bos|>hi<|tool|>"


def test_every_digit_is_a_token_of_its_own(tokenizer):
    assert len(tokenizer.encode("1867 23,998")) - len(tokenizer.encode(" ,")) >= 9
    assert all(len(re.findall(rb"\d", tokenizer.decode_bytes([i]))) <= 1 for i in range(VOCAB))


def test_training_twice_gives_the_same_bytes(tokenizer):
    config = TokenizerConfig(algorithm="bpe" if _is_bpe(tokenizer) else "unigram")
    again = train_tokenizer(iter(TEXTS), vocab=VOCAB, config=config)
    assert again.model == tokenizer.model
    assert again.hash == tokenizer.hash


def _is_bpe(tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    return float(processor.get_score(VOCAB - 1)).is_integer()


def test_training_in_another_process_gives_the_same_bytes(bpe):
    program = (
        "from jaxchat.tokenizer import *; from tests.test_tokenizer import TEXTS, VOCAB;"
        "print(train_tokenizer(TEXTS, vocab=VOCAB, config=TokenizerConfig()).hash)"
    )
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == bpe.hash


def test_another_vocabulary_or_text_has_another_hash(bpe):
    other = train_tokenizer(TEXTS, vocab=VOCAB - 1, config=TokenizerConfig())
    fewer = train_tokenizer(TEXTS[1:], vocab=VOCAB, config=TokenizerConfig())
    assert len({bpe.hash, other.hash, fewer.hash}) == 3


def test_a_saved_tokenizer_and_a_pickled_one_encode_alike(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "tokenizer")
    text = "".join(TEXTS)
    for copy in (load_tokenizer(tmp_path / "deep" / "tokenizer"), pickle.loads(pickle.dumps(tokenizer))):
        assert (copy.hash, copy.specials, copy.chat_format) == (tokenizer.hash, tokenizer.specials, NANOCHAT)
        assert copy.encode(text) == tokenizer.encode(text)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["tokenizer"]


def test_a_tokenizer_saved_without_a_chat_format_has_nanochats(bpe, tmp_path):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    metadata = json.loads(path.read_bytes())
    del metadata["chat_format"]
    path.write_text(json.dumps(metadata))
    old = load_tokenizer(tmp_path)
    assert (old.hash, old.chat_format, old.bos, old.end) == (bpe.hash, NANOCHAT, 1, 5)


def test_another_chat_format_is_stored_and_renders_with_its_own_tokens(tmp_path, monkeypatch):
    names = ("<|shell|>", "<|shell_end|>")
    parts = {"shell": Marks(*names, in_loss=True)}
    monkeypatch.setitem(CHAT_FORMATS, "shell", dataclasses.replace(NANOCHAT, parts=parts))
    given = train_tokenizer(TEXTS, vocab=VOCAB, config=TokenizerConfig(chat_format="shell"))
    given.save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.chat_format == pickle.loads(pickle.dumps(given)).chat_format == given.chat_format != NANOCHAT
    assert tokenizer.hash == given.hash and "<|python_start|>" not in tokenizer.specials
    answer = [{"type": "shell", "text": "ls"}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    ids = chat.render(messages, tokenizer).ids
    assert tokenizer.decode(ids, keep_specials=True).endswith("<|shell|>ls<|shell_end|><|assistant_end|>")
    assert chat.parse(ids, tokenizer) == messages
    assert "part['type'] == 'shell'" in chat.template(tokenizer.chat_format)
    write_tokenizer(tmp_path, tokenizer, length=64)
    assert read_tokenizer(tmp_path).chat_format == given.chat_format


def test_saving_replaces_a_tokenizer_and_nothing_else(bpe, tmp_path):
    other = train_tokenizer(TEXTS, vocab=VOCAB - 1, config=TokenizerConfig())
    bpe.save(tmp_path / "tokenizer")
    other.save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").hash == other.hash
    (tmp_path / "tokenizer" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        bpe.save(tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_kill_while_saving_leaves_no_half_tokenizer(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.rename", _killed)
    with pytest.raises(KeyboardInterrupt):
        bpe.save(tmp_path / "tokenizer")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_one_tokenizer_replaces_another_keeps_the_old(bpe, tmp_path, monkeypatch):
    other, rename = train_tokenizer(TEXTS, vocab=VOCAB - 1, config=TokenizerConfig()), Path.rename
    bpe.save(tmp_path / "tokenizer")
    monkeypatch.setattr("pathlib.Path.rename", lambda old, new: _killed() if old.name == "new" else rename(old, new))
    with pytest.raises(KeyboardInterrupt):
        other.save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").hash == bpe.hash
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def _killed(*_):
    raise KeyboardInterrupt


def test_a_missing_or_damaged_tokenizer_is_named(bpe, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    for name in ("tokenizer.model", "tokenizer.json"):
        directory = tmp_path / name
        bpe.save(directory)
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="damaged"):
            load_tokenizer(directory)
        (directory / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            load_tokenizer(directory)
        bpe.save(directory)
        assert load_tokenizer(directory).hash == bpe.hash


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_too_little_text_is_refused_with_the_remedy(algorithm):
    with pytest.raises(UserError, match=r"vocabulary of 8,192: use --data\.vocab=\d+, or more text"):
        train_tokenizer(TEXTS, vocab=8192, config=TokenizerConfig(algorithm=algorithm))


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("text", [" ".join(TEXTS), "abc", CHINESE[:600], "".join(map(chr, range(0x4E00, 0x5000)))])
def test_the_vocabulary_that_a_refusal_names_works(text, algorithm):
    config = TokenizerConfig(algorithm=algorithm)
    with pytest.raises(UserError) as caught:
        train_tokenizer([text], vocab=8192, config=config)
    possible = int(re.search(r"vocab=(\d+), or more text", str(caught.value)).group(1))
    assert train_tokenizer([text], vocab=possible, config=config).vocab_size == possible


@pytest.mark.parametrize("texts", [[], [""], ["\n\n", "\0"]])
def test_no_text_is_refused(texts):
    with pytest.raises(UserError, match=r"--data\.train"):
        train_tokenizer(texts, vocab=VOCAB, config=TokenizerConfig())


def test_a_vocabulary_smaller_than_bytes_and_specials_is_refused():
    with pytest.raises(UserError, match="266 ids"):
        train_tokenizer(TEXTS, vocab=266, config=TokenizerConfig())


def test_more_different_characters_than_ids_still_train():
    han = "".join(map(chr, range(0x4E00, 0x4E00 + 900)))
    tokenizer = train_tokenizer([han, *TEXTS], vocab=VOCAB, config=TokenizerConfig())
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.decode(tokenizer.encode(han)) == han


@pytest.mark.parametrize("name", ["tool", "<|a b|>", "<|1|>", "a", "<|bos|>"])
def test_extra_specials_that_text_could_contain_or_that_exist_are_refused(name):
    with pytest.raises(ValueError, match="extra_specials"):
        TokenizerConfig(extra_specials=(name,))


def test_ids_outside_the_vocabulary_are_refused(bpe):
    for wrong in (-1, VOCAB):
        with pytest.raises(ValueError, match=rf"{wrong} is not in 0\.\.{VOCAB - 1}"):
            bpe.decode([5, wrong])


def test_half_a_character_decodes_to_a_replacement(bpe):
    ids = bpe.encode("🧶")
    assert len(ids) == 4
    assert bpe.decode(ids[:2]) == "\ufffd"
    assert bpe.decode_bytes(ids[:2]) == "🧶".encode()[:2]


def test_surrogates_from_json_become_text(bpe):
    assert bpe.decode(bpe.encode("a\ud83e\uddf6b")) == "a🧶b"
    assert bpe.decode(bpe.encode("a\ud800 b")) == "a\ufffd b"


def test_long_texts_and_a_full_cache_encode_as_short_ones(bpe, monkeypatch):
    monkeypatch.setattr("jaxchat.tokenizer.sentencepiece._CACHED_ENTRIES", 5)
    small = SentencePiece(bpe.model)
    words = [*" ".join(TEXTS).split(" "), "\u2581", "x" * 300]
    text = " ".join(random.Random(0).choices(words, k=12_000))
    assert len(text) > 60_000
    assert small.encode(text) == bpe.encode(text)
    assert max(len(small._words), len(small._parts)) <= 5
    unbroken = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz.,\n학교에", k=1_000_000))
    assert bpe.decode(bpe.encode(unbroken)) == unbroken


def test_the_report_counts_every_byte_and_token_by_script(bpe):
    text = ENGLISH[0] + " 1867 " + KOREAN + "Привет café 漢字"
    found = report(bpe, [text, text])
    assert found.total.bytes == 2 * len(text.encode("utf-8"))
    assert found.total.tokens == pytest.approx(2 * len(bpe.encode(text)))
    assert found.scripts["digits"].bytes_per_token == pytest.approx(1)
    assert found.scripts["Han"] == (12, pytest.approx(12))
    assert found.scripts["Hangul"].bytes_per_token > 3
    letters = sum(c.isalpha() and c.isascii() for c in text)
    assert found.scripts["Latin"].bytes == 2 * (letters + len("é".encode()))


def test_a_script_that_falls_apart_into_bytes_is_warned_about(bpe):
    warnings = report(bpe, [ENGLISH[0], "Привет, мир"]).warnings()
    assert [warning.split()[0] for warning in warnings] == ["Cyrillic"]
    assert report(bpe, [ENGLISH[0] * 200 + "Ж 12345"]).warnings() == []
