"""Exports a tokenizer for transformers and vLLM: tokenizer.json of the `tokenizers` library, and its configuration.

The exported tokenizer gives the same ids for every text. sentencepiece represents spaces as U+2581 and so cannot
distinguish the two; the exported pieces contain real spaces, and U+2581 is encoded as bytes, as in `Tokenizer.encode`.
Names of special tokens in a text become special tokens, as chat templates need; with `split_special_tokens=True` they
are ordinary text, as always in `Tokenizer.encode`. `add_special_tokens=True`, the default, prepends the first token of
every document. These files are for other programs; `read_tokenizer` reads the sentencepiece model beside them.
"""

import importlib.util
import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import sentencepiece

from jaxchat.errors import UserError, missing
from jaxchat.export.files import read_json, write_json
from jaxchat.export.read_tokens import CONFIG_FILE, TEMPLATE_FILE, read_outside
from jaxchat.launcher import log
from jaxchat.tokenizer import Tokenizer, chat
from jaxchat.tokenizer.chat_format import NANOCHAT, ChatFormat
from jaxchat.tokenizer.libraries import CORES
from jaxchat.tokenizer.outside import Outside
from jaxchat.tokenizer.saved import MODEL_FILE
from jaxchat.tokenizer.sentencepiece import PROBES, SPACE_MARK, SentencePiece
from jaxchat.tokenizer.template import JinjaFormat, known

# A word with the spaces before it. No piece has a space after another character (`SentencePiece` refuses such models),
# so splitting there does not change the ids, and repeated words can be cached.
WORDS = " *[^ ]+| +"


def write_tokenizer(directory: Path, tokenizer: Tokenizer, *, length: int | None = None) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, and our sentencepiece model.

    `length` is the maximum number of positions of the model.

    Raises:
        UserError: the `tokenizers` library would give other ids.
    """
    form = tokenizer.chat_format
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": form.bos,
        "eos_token": form.end,
        "pad_token": form.bos,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
    }
    if isinstance(tokenizer, Outside):
        if tokenizer.about.kind != "tokenizers":
            raise UserError("this model has only a sentencepiece model, which tokenizer.json cannot reproduce")
        (directory / "tokenizer.json").write_bytes(tokenizer.model)
        config |= tokenizer.about.names
    elif isinstance(tokenizer, SentencePiece):
        write_json(directory / "tokenizer.json", tokenizer_json(tokenizer))
        _check_ids(directory / "tokenizer.json", tokenizer)
        (directory / MODEL_FILE).write_bytes(tokenizer.model)
    else:
        raise UserError(f"{type(tokenizer).__name__} cannot be exported to transformers: only SentencePiece can")
    write_json(directory / CONFIG_FILE, config | ({} if length is None else {"model_max_length": length}))
    if not isinstance(form, JinjaFormat) or form.source is not None:
        (directory / TEMPLATE_FILE).write_text(chat.template(form), encoding="utf-8")


def _check_ids(path: Path, tokenizer: Tokenizer) -> None:
    """Reads a tokenizer.json again where it will be used; raises `UserError` if it gives other ids."""
    if importlib.util.find_spec("tokenizers") is None:
        log(str(missing(f"{path.name} was not compared with its original, for want of tokenizers", "convert")))
        return
    theirs = CORES["tokenizers"](path.read_bytes())
    if dict(theirs.specials) != tokenizer.specials:
        raise UserError(f"{path.name} has other special tokens than the tokenizer: this cannot be exported")
    rng = random.Random(0)
    texts = [*PROBES, *tokenizer.specials, *("".join(rng.choices(PROBES, k=20)) for _ in range(100))]
    for text in texts:
        if list(theirs.encode(text, first=True)[0]) != tokenizer.encode(text):
            raise UserError(f"{path.name} gives other ids for {text!r} than the tokenizer: this cannot be exported")


def read_tokenizer(directory: Path) -> Tokenizer:
    """Reads the tokenizer of an export: ours, or another project's with its chat template.

    Ours has one of our chat formats as its template, or no template: then nanochat's.

    Raises:
        UserError: there is none, or it is not valid.
    """
    path = directory / MODEL_FILE
    if path.is_file() and (form := _chat_format(directory)):
        with suppress(UserError, RuntimeError):  # It is not one of ours.
            return SentencePiece(path.read_bytes(), form)
    return read_outside(directory)


def _chat_format(directory: Path) -> ChatFormat | None:
    """Our chat format of the template in a directory, which may also stand in its configuration, as it once did."""
    found, config = directory / TEMPLATE_FILE, directory / CONFIG_FILE
    if found.is_file():
        template: Any = found.read_text(encoding="utf-8", errors="replace")
    else:
        template = read_json(config).get("chat_template") if config.is_file() else None
    if template is None:
        return NANOCHAT
    return known(str(template))


def tokenizer_json(tokenizer: SentencePiece) -> dict[str, Any]:
    """Content of tokenizer.json."""
    vocab, pairs = _pieces(sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model))
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    model = {"byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": pairs}
    bos = tokenizer.chat_format.bos
    return bpe_json(tokenizer.specials, bos, pre_tokenizer=split, decoder=decoder, model=model)


def bpe_json(
    specials: Mapping[str, int], bos: str, *, pre_tokenizer: Any, decoder: Any, model: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of tokenizer.json of a BPE model without a normalizer that puts `bos` in front of every text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, begin, second],
            "special_tokens": {bos: {"id": bos, "ids": [specials[bos]], "tokens": [bos]}},
        },
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            **model,
        },
    }


def _pieces(processor: sentencepiece.SentencePieceProcessor) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges of a sentencepiece model."""
    ids = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(i).replace(SPACE_MARK, " ") for i in ids]
    special = (processor.is_control, processor.is_byte, processor.is_unknown)
    scores = {pieces[i]: processor.get_score(i) for i in ids if not any(kind(i) for kind in special)}
    # BPE scores are the order of merges, whole numbers; Unigram scores are log-probabilities.
    if any(score % 1 for score in scores.values()):
        raise UserError(
            "this is a Unigram tokenizer, which transformers would tokenize differently because of rounding: only BPE "
            "tokenizers are exported (--data.tokenizer.algorithm=bpe, the default)"
        )
    return {piece: i for i, piece in enumerate(pieces)}, merges(scores)


def merges(scores: Mapping[str, float]) -> list[list[str]]:
    """Lists every pair of pieces that forms a piece, ordered by the score of that piece, best first.

    sentencepiece and tiktoken merge the pair that forms the best piece, the leftmost of equals. Here every pair has its
    own rank; of two pairs that form the same piece, the one with the shorter left part comes first.
    """
    found = []
    for piece in sorted((piece for piece in scores if len(piece) > 1), key=scores.__getitem__, reverse=True):
        pairs = ([piece[:cut], piece[cut:]] for cut in range(1, len(piece)))
        found += [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
    return found
