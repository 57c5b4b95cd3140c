"""Tokenizers of other projects' kinds, trained by their libraries on generated lines."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from lines import lines

# How these tokenizers cut a text before merging, from the tokenizer.json of each.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "</s>"]


@cache
def byte_level(kind: str, vocab: int = 700) -> str:
    """tokenizer.json of a byte-level BPE as GPT-2, Llama 3 or Qwen cut texts."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = Regex(LLAMA3 if kind == "llama3" else QWEN)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, special_tokens=SPECIALS)
    tokenizer.train_from_iterator(lines(500, seed=1), trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return str(tokenizer.to_str())


@cache
def pieces(*, prefix: bool, bytes_too: bool = True) -> bytes:
    """A sentencepiece BPE model; with `prefix` it puts a space in front of every text."""
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines(1500, seed=2) if "\n" not in line and "▁" not in line]),
        model_writer=output,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=bytes_too,
        character_coverage=1.0 if bytes_too else 0.9,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n"],
        minloglevel=2,
    )
    return output.getvalue()


def metaspace(model: bytes, *, scheme: str) -> str:
    """A sentencepiece model with a space in front as tokenizer.json: in front of every part of a text ("normalizer"),
    or of its beginning only ("first")."""
    from jaxchat.export.tokens import merges

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    names = [processor.id_to_piece(i) for i in ids]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    kinds = (processor.is_control, processor.is_byte, processor.is_unknown)
    scores = {names[i]: processor.get_score(i) for i in ids if not any(kind(i) for kind in kinds)}
    added = [i for i in ids if kinds[0](i) or kinds[2](i) or names[i] in ("<start_of_turn>", "<end_of_turn>", "\n")]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    before: dict[str, Any] = {"normalizer": None, "pre_tokenizer": None}
    if scheme == "normalizer":
        before["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    else:
        before["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    value = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": names[i], "special": names[i] != "\n", **special} for i in added],
        **before,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges({name: score for name, score in scores.items() if name != "\n"}),
        },
    }
    return json.dumps(value)


def write(directory: Path, file: str, content: str | bytes, **config: Any) -> Path:
    """A directory with a tokenizer and its tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    (directory / file).write_bytes(data)
    names = {"bos_token": "<bos>", "eos_token": "</s>"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return directory
