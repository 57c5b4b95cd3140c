"""Opens nanochat's own checkpoints: model_STEP.pt, meta_STEP.json, and the tokenizer of its base directory."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxchat.errors import UserError
from jaxchat.export.families.family import Family
from jaxchat.export.families.keys import read_keys
from jaxchat.export.families.nanochat_own import July2026, October2025
from jaxchat.export.files import DTYPES, Weights, open_torch, read_json
from jaxchat.export.huggingface import Source, check_vocab
from jaxchat.export.pickled import FILE, read_pickled
from jaxchat.launcher import log
from jaxchat.paths import split_step, user_path
from jaxchat.tokenizer import Tokenizer

COMPILED = "_orig_mod."  # What torch.compile puts in front of names.
TABLES = r"transformer\.wte\.weight|lm_head\.weight|value_embeds\.\d+\.weight"
PADDED = 64  # nanochat pads the vocabulary to a multiple of it.
FAMILIES: dict[bool, Family] = {True: July2026(), False: October2025()}  # By whether there are residual scales.


def open_source(checkpoint: str, tokenizer: Tokenizer | None = None, dtype: str = "float32") -> Source:
    """Reads configuration and tokenizer of DIR, its newest checkpoint, or DIR@STEP, to import it in `dtype`.

    Raises:
        UserError: files are missing or damaged, describe another architecture or do not match each other.
    """
    name, at = split_step(checkpoint)
    directory = user_path(name)
    step = _step(directory, at.removeprefix("@"))
    meta = directory / f"meta_{step}.json"
    config, where = read_json(meta).get("model_config"), f"model_config in {meta}"
    if not isinstance(config, dict):
        raise UserError(f"{meta} has no model_config: restore the file of this checkpoint")
    stored = open_torch(directory / f"model_{step}.pt")
    readers = {name.removeprefix(COMPILED): read for name, read in stored.items()}
    family = FAMILIES["resid_lambdas" in readers]
    c = read_keys(config, family.keys, where)
    try:
        model, length = family.read(c)
    except ValueError as error:
        raise UserError(f"{where} is {config}, which is no model: {error}") from None
    tokenizer = tokenizer or _tokenizer(directory)
    check_vocab(where, model, tokenizer)
    head = readers.get("lm_head.weight")
    if head is not None and len(head()) == model.vocab + (padding := -model.vocab % PADDED) and padding:
        log(f"left out {padding} rows without a token at the end of embeddings and head")
    unpadded = {name: functools.partial(_unpadded, name, read, model.vocab) for name, read in readers.items()}
    weights = Weights(directory, dict(unpadded))
    return Source(directory, model, length, tokenizer, family, weights, DTYPES[dtype], meta.name)


def _step(directory: Path, wanted: str) -> str:
    """The digits of the newest model in a directory, or of the one of a step."""
    found = [match[1] for path in directory.glob("*.pt") if (match := re.fullmatch(r"model_(\d+)\.pt", path.name))]
    if not found:
        example = "~/.cache/nanochat/base_checkpoints/d20"
        raise UserError(f"no model_STEP.pt in {directory}: --checkpoint must name one of nanochat, such as {example}")
    steps = {int(digits): digits for digits in found}
    if wanted and (not wanted.isdecimal() or int(wanted) not in steps):
        raise UserError(f"no model {wanted} in {directory}: there are {', '.join(map(str, sorted(steps)))}")
    return steps[int(wanted) if wanted else max(steps)]


def _tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in the directory of a checkpoint, within it, or in that of all checkpoints."""
    places = (directory, directory / "tokenizer", directory.resolve().parent.parent / "tokenizer")
    place = next((place for place in places if (place / FILE).is_file()), None)
    if place is None:
        raise UserError(f"no {FILE} in {', '.join(map(str, places))}: name its directory with --tokenizer=DIR")
    return read_pickled(place)


def _unpadded(name: str, read: Callable[[], np.ndarray], vocab: int) -> np.ndarray:
    """A tensor, without the rows that pad a table of the vocabulary."""
    value = read()
    padded = re.fullmatch(TABLES, name) and len(value) == vocab + -vocab % PADDED
    return value[:vocab] if padded else value
