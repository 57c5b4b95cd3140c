"""The model: pure functions of parameters, tokens and an optional cache.

Arrays are named by their shape:

    B batch   T query (or token of a row)   S key   M width   H heads   K kv heads   G = H / K   D head   F hidden
    V vocabulary (padded)   L layers   N stacked matrices   C gate channels
"""

from jaxchat.model.architecture import Backout, Model, ResidualScales, Smear
from jaxchat.model.attention import GQA, ValueEmbedding
from jaxchat.model.experts import MoE
from jaxchat.model.latent import MLA
from jaxchat.model.layer import Layer
from jaxchat.model.mlp import GELU, GeGLU, ReluSquared, SwiGLU
from jaxchat.model.norms import LayerNorm, RMSNorm
from jaxchat.model.positions import ALiBi, Learned, Linear, Llama3, RoPE, Sinusoidal, T5Buckets, YaRN
from jaxchat.model.quantized import Float8, Int8
from jaxchat.model.transformer import Transformer

__all__ = [
    "GELU",
    "GQA",
    "MLA",
    "ALiBi",
    "Backout",
    "Float8",
    "GeGLU",
    "Int8",
    "Layer",
    "LayerNorm",
    "Learned",
    "Linear",
    "Llama3",
    "MoE",
    "Model",
    "RMSNorm",
    "ReluSquared",
    "ResidualScales",
    "RoPE",
    "Sinusoidal",
    "Smear",
    "SwiGLU",
    "T5Buckets",
    "Transformer",
    "ValueEmbedding",
    "YaRN",
]
