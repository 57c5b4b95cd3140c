"""The dial, and families of architectures as functions of it; `FAMILIES` has a row for each.

Families other than nanochat's have the width, heads and vocabulary of the dial, and as many training FLOPs per token as
the depth's default: hidden units of the feed-forwards are what is left after attention. Their details are those of the
models they are named after, so that they can be exported as such; the initial distributions are those of our parts.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from configs.rates import JULY2026, NOVEMBER2026, OCTOBER2025, Rates
from jaxchat.model import (
    GELU,
    GQA,
    MLA,
    Backout,
    GeGLU,
    Layer,
    LayerNorm,
    Learned,
    Model,
    MoE,
    ReluSquared,
    ResidualScales,
    RMSNorm,
    RoPE,
    Smear,
    SwiGLU,
    ValueEmbedding,
)
from jaxchat.model.counts import flops_per_token

REFERENCE_DEPTH = 12
EXPERTS, ACTIVE, SHARED = 32, 6, 2  # Of deepseek; each has an eighth of the hidden units that a token uses.


@dataclass(frozen=True)
class Family:
    """An architecture for a dial, and rates of its own.

    Without `rates`, a family has the batch, steps and optimizer of the depth's default (`rates.fitted` to it).
    """

    model: "Callable[[Dial], Model]"
    rates: Rates | None = None


def default(depth: int) -> str:
    """The family that a dial of this depth has unless it names one."""
    return "november2026" if depth < REFERENCE_DEPTH else "july2026"


def _july2026(dial: "Dial", value_embedding_every: int = 2) -> Model:
    """nanochat's, with a value embedding in every other layer, or as set for November (docs/small_models.md)."""

    def layer(i: int) -> Layer:
        local = dial.windows == "SSSL" and i % 4 != 3 and i != dial.depth - 1
        mixer = GQA(
            heads=dial.heads,
            kv_heads=dial.heads,
            head_dim=dial.head_dim,
            window=dial.short_window if local else None,
            positions=RoPE(100_000.0),
            qk_norm=RMSNorm(),
            qk_scale=1.2,
            value_embedding=ValueEmbedding() if (dial.depth - 1 - i) % value_embedding_every == 0 else None,
        )
        return Layer(mixer, ReluSquared(4 * dial.width))

    return Model(
        vocab=dial.vocab,
        width=dial.width,
        depth=dial.depth,
        **_repeated([layer(i) for i in range(dial.depth)], period=4),
        residual_scales=ResidualScales(),
        smear=Smear(),
        backout=Backout(),
        layer_loop=_loop(dial.depth),
    )


def _october2025(dial: "Dial") -> Model:
    mixer = GQA(heads=dial.heads, kv_heads=dial.heads, head_dim=dial.head_dim, init="normal")
    return Model(
        vocab=dial.vocab,
        width=dial.width,
        depth=dial.depth,
        pattern=(Layer(mixer, ReluSquared(4 * dial.width, init="normal", init_scale=1.0)),),
        embed_std=1.0,
        head_std=0.0,
        isolate_documents=False,
        layer_loop=_loop(dial.depth),
    )


def _gpt2(dial: "Dial") -> Model:
    """Learned positions, LayerNorm before each part, GELU, biases, tied (Radford et al. 2019)."""
    mixer = GQA(
        heads=dial.heads,
        kv_heads=dial.heads,
        head_dim=dial.head_dim,
        positions=Learned(dial.row_length),
        qk_norm=None,
        qkv_bias=True,
        o_bias=True,
    )
    norm = LayerNorm()
    return _matched(dial, lambda hidden: [Layer(mixer, GELU(hidden, bias=True), norm)], norm, tied=True, embed_std=0.02)


def _llama(dial: "Dial") -> Model:
    """RMSNorm with gains before each part, SwiGLU, grouped queries, rotary positions (Llama 3, arXiv:2407.21783)."""
    norm = RMSNorm(eps=1e-5, gain="w")
    mixer = _grouped(dial, positions=RoPE(500_000.0, 1), qk_norm=None)
    return _matched(dial, lambda hidden: [Layer(mixer, SwiGLU(hidden), norm)], norm)


def _qwen3(dial: "Dial") -> Model:
    """Llama's parts with a norm of each head before positions (Qwen 3, arXiv:2505.09388)."""
    norm = RMSNorm(gain="w")
    mixer = _grouped(dial, positions=RoPE(1_000_000.0, 1), qk_norm=norm, qk_norm_first=True)
    return _matched(dial, lambda hidden: [Layer(mixer, SwiGLU(hidden), norm)], norm)


def _olmo2(dial: "Dial") -> Model:
    """Norms after each part inside the residual, and of all heads at once (OLMo 2, arXiv:2501.00656)."""
    norm = RMSNorm(gain="w")
    mixer = GQA(
        heads=dial.heads,
        kv_heads=dial.heads,
        head_dim=dial.head_dim,
        positions=RoPE(500_000.0, 1),
        qk_norm=norm,
        qk_norm_first=True,
        qk_norm_whole=True,
    )
    return _matched(dial, lambda hidden: [Layer(mixer, SwiGLU(hidden), norm, placement="inside")], norm)


def _gemma3(dial: "Dial") -> Model:
    """Norms (1 + w) on both sides of each part, GeGLU, five local layers for each global one, embeddings times
    sqrt(width), tied (Gemma 3, arXiv:2503.19786)."""
    norm = RMSNorm(gain="1+w")

    def mixer(i: int) -> GQA:
        local = i % 6 != 5 and i != dial.depth - 1
        window, base = (dial.short_window, 10_000.0) if local else (None, 1_000_000.0)
        return _grouped(dial, window=window, positions=RoPE(base, 1), qk_norm=norm, qk_norm_first=True)

    def layers(hidden: int) -> list[Layer]:
        return [Layer(mixer(i), GeGLU(hidden), norm, placement="sandwich") for i in range(dial.depth)]

    scale = math.sqrt(dial.width)
    return _matched(dial, layers, norm, period=6, tied=True, embed_std=0.02, embed_scale=scale)


def _deepseek(dial: "Dial") -> Model:
    """Latent attention with the proportions of DeepSeek-V2-Lite (arXiv:2405.04434), and fine-grained experts with the
    router of DeepSeek-V3 (arXiv:2412.19437); the first layer is dense, so the layers are not a repeated pattern."""
    norm = RMSNorm(gain="w")
    mixer = MLA(
        heads=dial.heads,
        head_dim=dial.head_dim,
        rope_dim=dial.head_dim // 4 * 2,
        value_dim=dial.head_dim,
        kv_rank=dial.width // 4,
        positions=RoPE(10_000.0, 1),
        norm=norm,
    )

    def layers(hidden: int) -> list[Layer]:
        one = hidden // (ACTIVE + SHARED)
        experts = MoE(EXPERTS, ACTIVE, one, shared=SHARED * one, scale=2.5)
        return [Layer(mixer, SwiGLU(hidden), norm), *[Layer(mixer, experts, norm)] * (dial.depth - 1)]

    return _matched(dial, layers, norm, period=dial.depth, layer_loop="unroll")


def _grouped(dial: "Dial", **fields: Any) -> GQA:
    """Attention in which up to four heads, as many as divide their number, share keys and values."""
    shared = next(n for n in (4, 3, 2, 1) if dial.heads % n == 0)
    return GQA(heads=dial.heads, kv_heads=dial.heads // shared, head_dim=dial.head_dim, **fields)


def _matched(
    dial: "Dial", layers: Callable[[int], Sequence[Layer]], norm: Any, *, period: int = 1, **fields: Any
) -> Model:
    """The model of `layers`, a function of the number of hidden units: all layers, or one of a kind.

    Hidden units are a multiple of a power of two of about a sixteenth of the width (at least 8), and at least as many
    as the width: where long rows leave attention more FLOPs than that, the model has more than the depth's default.
    """
    M, D = dial.width, dial.depth

    def build(hidden: int) -> Model:
        made = list(layers(hidden))
        every = made * (D if len(made) == 1 else 1)
        common: dict[str, Any] = {"softcap": None, "embed_norm": False, "layer_loop": _loop(D)}
        parts = _repeated(every, period=period)
        return Model(vocab=dial.vocab, width=M, depth=D, norm=norm, **parts, **common | fields)

    unit = max(8, 2 ** int(math.log2(M / 16)))
    wanted = flops_per_token(FAMILIES[default(D)].model(dial), dial.row_length)["total"]
    none, one = (flops_per_token(build(hidden), dial.row_length)["total"] for hidden in (unit, 2 * unit))
    return build(max(unit * (1 + round((wanted - none) / (one - none))), M // unit * unit))


def _repeated(layers: Sequence[Layer], period: int) -> dict[str, Any]:
    """Pattern and tail of the layers. A scan needs equal repeats; shallower models, which are unrolled, keep parameters
    of one stack per layer unless the period divides their depth."""
    depth = len(layers)
    period = period if depth % period == 0 or _loop(depth) == "scan" else depth
    return {"pattern": tuple(layers[:period]), "tail": tuple(layers[depth - depth % period :])}


def _loop(depth: int) -> Literal["scan", "unroll"]:
    """Deep models scan over the layers, which compiles much faster."""
    return "scan" if depth >= 12 else "unroll"


FAMILIES = {
    "november2026": Family(functools.partial(_july2026, value_embedding_every=1), NOVEMBER2026),
    "july2026": Family(_july2026, JULY2026),
    "october2025": Family(_october2025, OCTOBER2025),
    "gpt2": Family(_gpt2),
    "llama": Family(_llama),
    "qwen3": Family(_qwen3),
    "olmo2": Family(_olmo2),
    "gemma3": Family(_gemma3),
    "deepseek": Family(_deepseek),
}
if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[("auto", *FAMILIES)]


@dataclass(frozen=True)
class Dial:
    """The numbers from which an experiment is derived. `steps` and `batch_tokens` are derived from depth if 0.

    Attributes:
        family: a row of FAMILIES. "july2026" is nanochat's latest architecture and optimizer; "october2025" its
            original, which transformers has as NanoChatForCausalLM; "november2026" July's with a value embedding in
            every layer and an optimizer for small models. "auto" is november2026 below depth 12, otherwise july2026.
            The others are architectures of well-known models, trained for the same budget.
        train: training data instead of the configuration's. Its held-out data, epochs and prompts are dropped too,
            unless all entries of `train` are of the same data sets.
        ratio: training tokens per scaling parameter.
        matmul: number format of the layers' large products in pretraining and SFT; "dtype" is the experiment's
            `dtype`, which RL always uses.
        aspect: channels of width per layer; more makes a model wide, less deep.
        windows: "SSSL" gives three layers of four a window of a quarter row, "L" none, in families with a date.
    """

    depth: int
    family: FamilyName = "auto"
    steps: int = 0
    batch_tokens: int = 0
    train: Annotated[tuple[str, ...], tyro.conf.arg(name="data.train")] = ()
    vocab: Annotated[int, tyro.conf.arg(name="data.vocab")] = 32768
    row_length: Annotated[int, tyro.conf.arg(name="data.row_length")] = 2048
    ratio: float = 12.0
    head_dim: int = 128
    windows: Literal["SSSL", "L"] = "SSSL"
    matmul: Literal["dtype", "int8", "float8"] = "dtype"
    aspect: int = 64

    def __post_init__(self) -> None:
        for name in ("depth", "head_dim", "aspect"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio} must be positive and finite")
        for name in ("steps", "batch_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive, or 0 to derive")

    @property
    def width(self) -> int:
        """`aspect` per layer, rounded up to a multiple of `head_dim`."""
        return math.ceil(self.aspect * self.depth / self.head_dim) * self.head_dim

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def short_window(self) -> int:
        """A quarter of a row, rounded up to a multiple of 128."""
        return math.ceil(self.row_length / 4 / 128) * 128
