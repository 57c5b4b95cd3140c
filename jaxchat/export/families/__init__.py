"""Families of models in transformers, one file each; `FAMILIES` lists them by model type."""

from collections.abc import Mapping
from typing import Any

from jaxchat.errors import UserError
from jaxchat.export.families.deepseek import DeepSeekV2, DeepSeekV3
from jaxchat.export.families.family import Family
from jaxchat.export.families.gemma3 import Gemma3
from jaxchat.export.families.gpt2 import GPT2
from jaxchat.export.families.llama import Llama, Mistral, OLMo2, Qwen2, Qwen3
from jaxchat.export.families.mixtral import Mixtral, Qwen3MoE
from jaxchat.export.families.nanochat import NanoChat
from jaxchat.model import Model

# A model that several families have is exported as the first.
DENSE = (NanoChat, Llama, GPT2, Mistral, Qwen2, Qwen3, OLMo2, Gemma3)
ROWS: tuple[type[Family], ...] = (*DENSE, Mixtral, Qwen3MoE, DeepSeekV3, DeepSeekV2)
FAMILIES: Mapping[str, Family] = {row.model_type: row() for row in ROWS}


def family_of(model: Model) -> Family:
    """The family of a model; raises `UserError` with all features that the closest family lacks."""
    lacking = {family: (len(family.foreign(model)), family.lacking(model)) for family in FAMILIES.values()}
    family = min(lacking, key=lambda family: (lacking[family][0], len(lacking[family][1])))
    if used := lacking[family][1]:
        listed = ", ".join(used[:-1]) + " and " * (len(used) > 1) + used[-1]
        raise UserError(
            f"transformers' {family.architecture} does not support {listed}, which this model uses: evaluate "
            "the checkpoint with python -m launch.harness, or export it with --to=stablehlo"
        )
    return family


def read_config(config: Mapping[str, Any]) -> tuple[Model, int]:
    """The model of a config.json and its maximum number of positions.

    Raises:
        UserError: the family is unknown, or a key is not one that the family reads or ignores; the message names it.
    """
    return named(config).read_config(config)


def named(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names; raises `UserError` for an unknown one."""
    name = config.get("model_type")
    if not isinstance(name, str) or (family := FAMILIES.get(name)) is None:
        known = ", ".join(FAMILIES)
        raise UserError(f"config.json has model_type={name!r}: only {known} can be imported")
    return family
