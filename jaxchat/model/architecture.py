"""The configuration of a whole model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxchat.model.layer import Layer
from jaxchat.model.layers import check_dropout
from jaxchat.model.mlp import MLPS
from jaxchat.model.norms import Norm, RMSNorm
from jaxchat.model.positions import POSITIONS

VOCAB_MULTIPLE = 64  # The vocabulary is padded to a multiple of it; padded logits are never used.


@dataclass(frozen=True)
class ResidualScales:
    """x = resid * x + x0 * embedding before each layer; two learned scalars per layer, initially linear in depth."""

    resid_first: float = 1.15  # Initial weight of the residual stream in the first layer.
    resid_last: float = 1.05  # The same in the last layer.
    x0_first: float = 0.20  # Initial weight of the embedding in the first layer.
    x0_last: float = 0.05  # The same in the last layer.


@dataclass(frozen=True)
class Smear:
    """Adds scale * sigmoid(x[:channels] W) times the previous token's embedding to each embedding x."""

    channels: int = 24  # Channels of the embedding that the gate reads.


@dataclass(frozen=True)
class Backout:
    """Subtracts scale times the residual stream after the middle layer from the one after the last layer."""

    init: float = 0.2  # Initial scale.


@dataclass(frozen=True)
class Model:
    """The architecture: `depth` layers, first `pattern` repeated, then `tail`; `norm` for embedding and output."""

    vocab: int  # Number of token ids.
    width: int  # Channels of the residual stream.
    depth: int  # Number of layers.
    pattern: tuple[Layer, ...]
    tail: tuple[Layer, ...] = ()
    norm: Norm = RMSNorm()
    embed_norm: bool = True  # Normalise the embedding.
    final_norm: bool = True  # Normalise the output of the last layer.
    embed_scale: float = 1.0  # Factor of the embedding, rounded to the compute type.
    dropout: float = 0.0  # Share of the embedding's channels that training drops.
    embed_std: float = 0.8  # Standard deviation of the initial embedding.
    head_std: float = 0.001  # Standard deviation of the initial output matrix.
    tied: bool = False  # Use the embedding as the output matrix.
    softcap: float | None = 15.0  # Logits are softcap * tanh(logits / softcap); None leaves them.
    residual_scales: ResidualScales | None = None
    smear: Smear | None = None
    backout: Backout | None = None
    isolate_documents: bool = True  # Compute every document of a row as if it were alone.
    layer_loop: Literal["scan", "unroll"] = "unroll"  # Scan over the layers, which compiles faster, or unroll them.
    remat: Literal["none", "full", "dots", "attention"] = "none"  # What the backward pass recomputes.

    def __post_init__(self) -> None:
        if min(self.vocab, self.width, self.depth) < 1:
            raise ValueError(f"vocab={self.vocab}, width={self.width} and depth={self.depth} must be positive")
        if not self.pattern or self.depth < len(self.tail) or (self.depth - len(self.tail)) % len(self.pattern):
            less = f" less the tail's {len(self.tail)}" if self.tail else ""
            raise ValueError(f"depth={self.depth}{less} is not a multiple of the pattern's {len(self.pattern)} layers")
        if self.smear is not None and self.smear.channels > self.width:
            raise ValueError(f"smear.channels={self.smear.channels} is more than width={self.width}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap} must be positive, or None")
        check_dropout(self.dropout)

    @property
    def repeats(self) -> int:
        """How often the pattern is repeated."""
        return (self.depth - len(self.tail)) // len(self.pattern)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, in their order."""
        return self.pattern * self.repeats + self.tail

    @property
    def stacks(self) -> tuple[range, ...]:
        """The layers whose parameters are stacked, by position of the pattern; a layer of the tail is its own stack."""
        P, end = len(self.pattern), self.depth - len(self.tail)
        return (*(range(j, end, P) for j in range(P)), *(range(i, i + 1) for i in range(end, self.depth)))

    @property
    def mixers(self) -> tuple[Any, ...]:
        return tuple(layer.mixer for layer in self.layers)

    @property
    def most_positions(self) -> int | None:
        """The longest row that the position encodings know; None for any."""
        codes = {getattr(mixer, "positions", None) for mixer in self.mixers}
        limits = [POSITIONS[type(code)].most_positions(code) for code in codes]
        return min((limit for limit in limits if limit is not None), default=None)

    def check_length(self, length: int) -> None:
        """Raises ValueError if rows of `length` tokens have more positions than there are."""
        if self.most_positions is not None and length > self.most_positions:
            raise ValueError(f"{length} tokens are more than the {self.most_positions} positions that the model learns")

    def sizes_of(self, kind: Any, old: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields `given` for a part of another `kind` in place of `old`, and the sizes that it needs besides.

        A kind may name them in `beside(old, width)`. A feed-forward gets as many hidden units as give a token the FLOPs
        of the old one, rounded to a multiple of 8.
        """
        fields = (kind.beside(old, self.width) if hasattr(kind, "beside") else {}) | dict(given)
        if kind in MLPS and type(old) in MLPS and "hidden" not in fields:
            wanted = MLPS[type(old)].matmul_parameters(old, self.width)
            one, two = (MLPS[kind].matmul_parameters(kind(**fields, hidden=h), self.width) for h in (8, 16))
            fields["hidden"] = 8 * max(1, 1 + round((wanted - one) / (two - one)))
        return fields

    @property
    def padded_vocab(self) -> int:
        """`vocab` rounded up to a multiple of VOCAB_MULTIPLE, the size of embedding and head."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
