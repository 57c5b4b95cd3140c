"""Exports models to transformers, and imports them, by the families of `families.FAMILIES`."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxchat.errors import UserError, first_line
from jaxchat.export import verify
from jaxchat.export.families import family_of, named
from jaxchat.export.families.family import Family
from jaxchat.export.files import DTYPES, Weights, read_json, whole, write_json, write_weights
from jaxchat.export.places import State, to_params
from jaxchat.export.tokens import read_tokenizer, write_tokenizer
from jaxchat.launcher import log
from jaxchat.model import Model, Transformer
from jaxchat.model.transformer import Params
from jaxchat.paths import user_path
from jaxchat.tokenizer import Tokenizer


def write(
    directory: Path, model: Model, params: Params, tokenizer: Tokenizer, *, length: int, dtype: str = "float32"
) -> int:
    """Writes weights, configuration, tokenizer and chat template to a new directory; returns the number of parameters.

    `length` is the row length of training, `dtype` the type of the weights.

    Raises:
        UserError: the model has a feature that transformers lacks, the directory is not empty, or what was written has
            other weights or other logits.
    """
    family = family_of(model)
    with whole(directory) as place:
        write_json(place / "config.json", config_json(model, tokenizer, length=length, dtype=dtype))
        bos, ends = tokenizer.bos, sorted(tokenizer.ends - {tokenizer.end})  # BOS too: it begins another document.
        generation = {"bos_token_id": bos, "eos_token_id": [tokenizer.end, *ends], "pad_token_id": bos}
        write_json(place / "generation_config.json", generation)
        write_tokenizer(place, tokenizer, length=length)
        state = State(model, params, family.places, DTYPES[dtype])
        count = write_weights(place, state)
        verify.same_tensors(state, Weights(place), str(directory))
        if (theirs := verify.run_theirs(place, model, length)) is not None:
            verify.same_logits(verify.run_ours(model, _rounded(model, params, dtype), length), theirs, "transformers")
        return count


def _rounded(model: Model, params: Params, dtype: str) -> Params:
    """Parameters as they are written."""
    specs = Transformer(model).specs()
    return jax.tree.map(lambda w, spec: w if spec.exact else np.asarray(w, DTYPES[dtype]), params, specs)


class Source(NamedTuple):
    """A model to import: our model, its maximum number of positions, its tokenizer, its unread weights, and the name of
    the file that describes it."""

    directory: Path
    model: Model
    length: int
    tokenizer: Tokenizer
    family: Family
    weights: Weights
    dtype: Any
    described: str = "config.json"

    def params(self) -> Params:
        """Reads the parameters one tensor at a time; raises `UserError` if they do not match the model."""
        try:
            return to_params(self.model, self.weights, self.family.places, self.dtype)
        except ValueError as error:
            raise UserError(
                f"the weights in {self.directory} do not match its {self.described}: {first_line(error)}"
            ) from None


def open_source(
    checkpoint: str | os.PathLike[str], tokenizer: Tokenizer | None = None, dtype: str = "float32"
) -> Source:
    """Reads configuration and tokenizer of a directory of transformers, whose parameters will be of `dtype`.

    Raises:
        UserError: files are missing, describe another architecture or do not match each other.
    """
    directory = user_path(checkpoint)
    config = read_json(directory / "config.json")
    family = named(config)
    model, length = family.read_config(config)
    tokenizer = tokenizer or read_tokenizer(directory)
    check_vocab(f"config.json in {directory}", model, tokenizer)
    weights = read_weights(directory, model, family)
    return Source(directory, model, length, tokenizer, family, weights, DTYPES[dtype])


def check_vocab(where: str, model: Model, tokenizer: Tokenizer) -> None:
    """Raises `UserError` if a tokenizer has another number of ids than the model."""
    if tokenizer.vocab_size != model.vocab:
        raise UserError(
            f"{where} has vocab_size={model.vocab} but its tokenizer has {tokenizer.vocab_size} ids: "
            "name the tokenizer of its training with --tokenizer=DIR"
        )


def read_weights(directory: Path, model: Model, family: Family) -> Weights:
    """The weights of a directory by the names of `family`, without those that hold nothing of the model."""
    weights = Weights(directory)
    embed, head = (family.places[(name,)].name for name in ("embed", "head"))
    weights.add_prefix(embed.partition(".")[0] + ".")
    for pattern in family.dropped:
        if dropped := weights.drop(pattern):
            log(f"left out {len(dropped)} tensors that are no parameters, such as {dropped[0]}")
    if model.tied and head in weights:
        if embed in weights and not np.array_equal(weights[head], weights[embed]):
            raise UserError(f"{directory} has tie_word_embeddings=true in config.json, but {head} differs from {embed}")
        weights.drop(re.escape(head))
    return weights


def config_json(model: Model, tokenizer: Tokenizer, *, length: int, dtype: str) -> dict[str, Any]:
    """Content of config.json. There is no padding id, because torch would zero the gradient of its embedding."""
    family = family_of(model)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write(model, length),
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.end,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
    }
