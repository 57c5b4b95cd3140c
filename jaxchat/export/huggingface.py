"""Exports models to transformers, and imports them; `FAMILIES` lists the families of models that both sides have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.errors import UserError, first_line
from jaxchat.export import nanochat
from jaxchat.export.files import DTYPES, read_json, read_weights, whole, write_json, write_weights
from jaxchat.export.places import Family, to_params, to_state
from jaxchat.export.tokens import read_tokenizer, write_tokenizer
from jaxchat.model import Model
from jaxchat.model.transformer import Params
from jaxchat.tokenizer import Tokenizer

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (nanochat.FAMILY,)}


def family_of(model: Model) -> Family:
    """The family of a model; raises `UserError` with all features that the closest family lacks."""
    family = min(FAMILIES.values(), key=lambda family: len(family.lacking(model)))
    if used := family.lacking(model):
        listed = ", ".join(used[:-1]) + " and " * (len(used) > 1) + used[-1]
        raise UserError(
            f"transformers' {family.architecture} does not support {listed}, which this model uses: evaluate the "
            "checkpoint with python -m launch.harness, or export it with --to=stablehlo"
        )
    return family


def write(
    directory: Path, model: Model, params: Params, tokenizer: Tokenizer, *, length: int, dtype: str = "float32"
) -> int:
    """Writes weights, configuration, tokenizer and chat template to a new directory; returns the number of parameters.

    `length` is the row length of training, `dtype` the type of the weights.

    Raises:
        UserError: the model has a feature that transformers lacks, or the directory is not empty.
    """
    places = family_of(model).places
    with whole(directory) as place:
        write_json(place / "config.json", config_json(model, tokenizer, length=length, dtype=dtype))
        bos, ends = tokenizer.bos, sorted(tokenizer.ends - {tokenizer.end})  # BOS too: it begins another document.
        generation = {"bos_token_id": bos, "eos_token_id": [tokenizer.end, *ends], "pad_token_id": bos}
        write_json(place / "generation_config.json", generation)
        write_tokenizer(place, tokenizer, length=length)
        return write_weights(place, {name: np.asarray(w, DTYPES[dtype]) for name, w in to_state(model, params, places)})


def read(directory: Path, tokenizer: Tokenizer | None = None) -> tuple[Model, int, Params, Tokenizer]:
    """Reads a model of transformers: the model, maximum number of positions, float32 parameters and tokenizer.

    Raises:
        UserError: files are missing, describe another architecture or do not match each other.
    """
    config = read_json(directory / "config.json")
    model, length = read_config(config)
    places = FAMILIES[config["model_type"]].places
    tokenizer = tokenizer or read_tokenizer(directory)
    if tokenizer.vocab_size != model.vocab:
        raise UserError(
            f"{directory} has vocab_size={model.vocab} in config.json but its tokenizer has {tokenizer.vocab_size} "
            "ids: name the tokenizer of its training with --tokenizer=DIR"
        )
    weights = read_weights(directory)
    if model.tied:
        embed, head = (places[(name,)].name for name in ("embed", "head"))
        if head in weights and not np.array_equal(weights.pop(head), weights.get(embed, ())):
            raise UserError(f"{directory} has tie_word_embeddings=true in config.json, but {head} differs from {embed}")
    try:
        params = to_params(model, weights, places)
    except ValueError as error:
        raise UserError(f"the weights in {directory} do not match its config.json: {first_line(error)}") from None
    return model, length, params, tokenizer


def config_json(model: Model, tokenizer: Tokenizer, *, length: int, dtype: str) -> dict[str, Any]:
    """Content of config.json. There is no padding id, because torch would zero the gradient of its embedding."""
    family = family_of(model)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write_config(model),
        "max_position_embeddings": length,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.end,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
    }


def read_config(config: Mapping[str, Any]) -> tuple[Model, int]:
    """The model of a config.json and its maximum number of positions.

    Raises:
        UserError: the family is unknown, or a key is not one that the family reads or ignores; the message names it.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or (family := FAMILIES.get(name)) is None:
        known = ", ".join(f"{name!r} ({family.architecture})" for name, family in FAMILIES.items())
        raise UserError(f"config.json has model_type={name!r}: only {known} can be imported")
    return family.read_config(config)
