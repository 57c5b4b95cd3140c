"""Reads the tokenizers of other projects: tokenizer.json or a sentencepiece model, with the files beside it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError, first_line
from jaxchat.export.files import read_json
from jaxchat.launcher import log
from jaxchat.tokenizer.chat_format import Malformed
from jaxchat.tokenizer.libraries import CORES
from jaxchat.tokenizer.outside import About, Outside
from jaxchat.tokenizer.template import JinjaFormat

FILES = {"tokenizer.json": "tokenizers", "tokenizer.model": "sentencepiece"}  # The kind of each; the first one counts.
TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
_QUESTION, _ANSWER = "\ufdd3", "\ufdd4"  # Noncharacters, which no template writes by itself.


def read_outside(directory: Path) -> Outside:
    """The tokenizer of a directory of another project; says how it changes texts, if it does.

    Raises:
        UserError: there is none, its files contradict each other, or its chat template writes no conversations.
    """
    file = next((name for name in FILES if (directory / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{directory} has neither {' nor '.join(FILES)}: add that of the model, or name a directory with a jaxchat "
            "tokenizer by --tokenizer=DIR"
        )
    config = _optional(directory / CONFIG_FILE)
    names = _names(_optional(directory / "special_tokens_map.json")) | _names(config)
    kind, model, added = FILES[file], (directory / file).read_bytes(), _added(config)
    if kind == "tokenizers":
        model = _completed(directory / file, model, added)
    core = CORES[kind](model)
    specials = {token["content"]: token["id"] for token in added if token.get("special")} | dict(core.specials)
    size = 1 + max([*core.pieces, *specials.values()])
    about_model = _optional(directory / "config.json")
    vocab = about_model.get("vocab_size") or _mapping(about_model.get("text_config")).get("vocab_size")
    if isinstance(vocab, int) and (beyond := sorted(name for name, i in specials.items() if i >= vocab)):
        log(f"special tokens that the model has no embedding for are left out: {', '.join(beyond)}")
        specials = {name: i for name, i in specials.items() if i < vocab}
        size = 1 + max(i for i, piece in core.pieces.items() if piece or i < vocab)
    configs = (_optional(directory / "generation_config.json"), about_model)
    ends = _chosen(names.get("eos_token"), configs, "eos_token_id", specials)
    begins = _chosen(names.get("bos_token"), configs, "bos_token_id", specials) or ends
    if not begins:
        raise UserError(f"{directory / CONFIG_FILE} has no bos_token or eos_token that is a special token: add one")
    last = (ends or begins)[0]
    template = _template(directory, config)
    if template is None:
        log("the model has no chat template, so it only continues texts")
    else:
        last = _end_of_turn(JinjaFormat(begins[0], {}, {}, template, last, names), specials)
    vocab = max(vocab, size) if isinstance(vocab, int) else size
    tokenizer = Outside(model, About(kind, vocab, specials, begins[0], last, tuple(ends), names, template))
    if sentence := tokenizer.losses():
        log(sentence)
    return tokenizer


def _optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of special tokens by what they are, such as {"eos_token": "</s>"}."""
    values = {key: _mapping(value).get("content", value) for key, value in config.items() if key.endswith("_token")}
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _added(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens that tokenizer_config.json adds to the vocabulary."""
    tokens = _mapping(config.get("added_tokens_decoder")).items()
    return [{"id": int(i), **token} for i, token in tokens if i.isdecimal() and isinstance(token.get("content"), str)]


def _completed(path: Path, model: bytes, added: Sequence[Mapping[str, Any]]) -> bytes:
    """The file with the tokens that it lacks."""
    value = dict(read_json(path))
    known = {token.get("content") for token in value.get("added_tokens") or ()}
    if not (lacking := [token for token in added if token["content"] not in known]):
        return model
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    value["added_tokens"] = [*(value.get("added_tokens") or ()), *({**flags, **token} for token in lacking)]
    return json.dumps(value, ensure_ascii=False).encode()


def _chosen(name: str | None, configs: Sequence[Mapping[str, Any]], key: str, specials: Mapping[str, int]) -> list[str]:
    """The special tokens that a name, or ids in `configs`, refer to; the one of the name comes first."""
    by_id = {i: name for name, i in specials.items()}
    numbers: list[Any] = []
    for config in configs:
        value = config.get(key)
        numbers += value if isinstance(value, list) else [value]
    found = [name, *(by_id.get(number) for number in numbers if isinstance(number, int))]
    return list(dict.fromkeys(one for one in found if one is not None and one in specials))


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template, from its own file or from the configuration, where it may be one of a list."""
    path, value = directory / TEMPLATE_FILE, config.get("chat_template")
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(f"{path} is not text: {first_line(error)}; correct or remove it") from None
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in map(_mapping, value)}
        listed = ", ".join(map(str, named))
        if "default" not in named and len(named) != 1:
            raise UserError(f"{directory / CONFIG_FILE} has the chat templates {listed}: put one in {TEMPLATE_FILE}")
        value = named.get("default", next(iter(named.values())))
        log(f"of the chat templates {listed} the {'default' if 'default' in named else 'only'} one is used")
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"{directory / CONFIG_FILE} has a chat_template that is no text: put it in {TEMPLATE_FILE}")


def _end_of_turn(form: JinjaFormat, specials: Mapping[str, int]) -> str:
    """The special token that a template writes after an answer, or `form.end`."""
    remedy = f"correct {TEMPLATE_FILE}, or remove the template and import a model that continues texts"
    try:
        text = form.text([{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}])
    except Malformed as error:
        raise UserError(f"{error}; {remedy}") from None
    question, _, rest = text.partition(_ANSWER)
    if _QUESTION not in question or _ANSWER not in text:
        raise UserError(f"the chat template does not write a question and its answer: {remedy}")
    names = sorted(specials, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, names)), rest)
    return found[0] if found else form.end
