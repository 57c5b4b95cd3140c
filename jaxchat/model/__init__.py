"""The model: pure functions of parameters, tokens and an optional cache.

Arrays are named by their shape:

    B batch   T query (or token of a row)   S key   M width   H heads   K kv heads   G = H / K   D head   F hidden
    V vocabulary (padded)   L layers   N stacked matrices   C gate channels
"""

from jaxchat.model.attention import GQA, ValueEmbedding
from jaxchat.model.layer import Layer
from jaxchat.model.mlp import ReluSquared, SwiGLU
from jaxchat.model.norms import RMSNorm
from jaxchat.model.positions import RoPE
from jaxchat.model.quantized import Float8, Int8
from jaxchat.model.transformer import Backout, Model, ResidualScales, Smear, Transformer

__all__ = [
    "GQA",
    "Backout",
    "Float8",
    "Int8",
    "Layer",
    "Model",
    "RMSNorm",
    "ReluSquared",
    "ResidualScales",
    "RoPE",
    "Smear",
    "SwiGLU",
    "Transformer",
    "ValueEmbedding",
]
