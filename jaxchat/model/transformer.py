"""The transformer: one forward for training and decoding, built from parts that the configuration names."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat import sharding
from jaxchat.model.attention import GATE_INIT, GQA, MIXERS, Context, rotation
from jaxchat.model.cache import KVCache
from jaxchat.model.layers import RMSNorm, look_up, param, rms_norm, uniform_between
from jaxchat.model.mlp import MLPS, ReluSquared, SwiGLU
from jaxchat.model.quantized import Matmul

EMBED = ("vocab", "embed")  # Axes of the embedding.
VOCAB_MULTIPLE = 64  # The vocabulary is padded to it; padded logits are never seen.

Params = dict[str, Any]


@dataclass(frozen=True)
class ResidualScales:
    """Before each layer x = resid * x + x0 * embedding, a learned pair a layer, starting on a line over depth."""

    resid_first: float = 1.15
    resid_last: float = 1.05
    x0_first: float = 0.20
    x0_last: float = 0.05


@dataclass(frozen=True)
class Smear:
    """Adds scale * sigmoid(gate of the first channels) times the previous token's embedding to each embedding."""

    channels: int = 24


@dataclass(frozen=True)
class Backout:
    """Subtracts scale times the residual stream after the middle layer from the last one."""

    init: float = 0.2


@dataclass(frozen=True)
class Model:
    """The architecture. Layer i uses `pattern[i % len(pattern)]`."""

    vocab: int
    width: int
    depth: int
    pattern: tuple[GQA, ...]
    mlp: ReluSquared | SwiGLU
    norm: RMSNorm = RMSNorm()
    embed_std: float = 0.8
    head_std: float = 0.001
    tied: bool = False
    softcap: float | None = 15.0
    residual_scales: ResidualScales | None = None
    smear: Smear | None = None
    backout: Backout | None = None
    isolate_documents: bool = True
    layer_loop: Literal["scan", "unroll"] = "unroll"
    remat: Literal["none", "full", "dots", "attention"] = "none"

    def __post_init__(self) -> None:
        if min(self.vocab, self.width, self.depth) < 1:
            raise ValueError(f"vocab={self.vocab}, width={self.width} and depth={self.depth} must be positive")
        if not self.pattern or self.depth % len(self.pattern):
            raise ValueError(f"depth={self.depth} is not a multiple of the pattern's {len(self.pattern)} layers")
        if self.smear is not None and self.smear.channels > self.width:
            raise ValueError(f"smear.channels={self.smear.channels} is more than width={self.width}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap} must be positive, or None")

    @property
    def repeats(self) -> int:
        return self.depth // len(self.pattern)

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Cache(NamedTuple):
    """A cache by layer, how many positions of each row are written, and the token at the last of them.

    Smear needs the last token. A row is taken back to an earlier position by writing there again, with `last_B` set to
    the token before.
    """

    layers: tuple[KVCache, ...]
    length_B: jax.Array
    last_B: jax.Array


class Block(nn.Module):
    """One layer: x + mixer(norm(x)), then x + mlp(norm(x))."""

    config: Model
    mixer: GQA
    attention: str = "xla"
    decoding: str = "xla"
    matmul: Matmul = None

    @nn.compact
    def __call__(self, x_BTM: jax.Array, context: Context, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        c = self.config
        make = MIXERS[type(self.mixer)]
        mixer = make(self.mixer, c.width, c.padded_vocab, self.attention, self.decoding, self.matmul, name="mixer")
        y_BTM, cache = mixer(rms_norm(x_BTM, c.norm.eps), context, cache)
        x_BTM = x_BTM + y_BTM
        mlp = MLPS[type(c.mlp)](c.mlp, c.width, self.matmul, name="mlp")
        x_BTM = x_BTM + mlp(rms_norm(x_BTM, c.norm.eps))
        return sharding.constrain(x_BTM, ("batch", "length", "width")), cache


class Ends(nn.Module):
    """What stands before and after the layers: embedding, head, and the scalars of the residual stream."""

    config: Model

    @nn.compact
    def __call__(self) -> None:
        c, V, M = self.config, self.config.padded_vocab, self.config.width
        param(self, "embed", EMBED, (V, M), nn.initializers.normal(c.embed_std))
        if not c.tied:
            param(self, "head", ("embed", "vocab"), (M, V), nn.initializers.normal(c.head_std))
        if c.residual_scales is not None:
            r = c.residual_scales
            param(self, "resid_scale", ("layers",), (c.depth,), _line(r.resid_first, r.resid_last))
            param(self, "x0_scale", ("layers",), (c.depth,), _line(r.x0_first, r.x0_last))
        if c.smear is not None:
            param(self, "smear_gate", ("gate",), (c.smear.channels,), uniform_between(*GATE_INIT))
            param(self, "smear_scale", (), (), nn.initializers.zeros_init())
        if c.backout is not None:
            param(self, "backout_scale", (), (), nn.initializers.constant(c.backout.init))


def _line(first: float, last: float) -> Callable[..., jax.Array]:
    """Initial values on a straight line from the first to the last."""
    return lambda key, shape, dtype=jnp.float32: jnp.linspace(first, last, shape[0], dtype=dtype)


@dataclass(frozen=True)
class Transformer:
    """The model as functions of its parameters; `dtype` is that of activations and matrix products.

    `attention` names the row of `kernels.BACKENDS` that attends where there is no cache, `decoding` that of
    `decoding_kernels.DECODING` where there is one; all give the same.
    `matmul` makes the layers' large products those of eight-bit numbers; training alone sets it.
    Parameters are a tree {"ends": ..., "layers": (one tree per pattern position, stacked over repeats)}, the same
    whether layers are scanned or unrolled; `unstack` makes {"ends": ..., "layer": (one tree per layer)} of it.
    """

    config: Model
    dtype: Any = jnp.float32
    attention: str = "xla"
    decoding: str = "xla"
    matmul: Matmul = None

    def init(self, key: jax.Array) -> Params:
        """Float32 parameters; the same for every sharding and every layer loop."""
        return nn.meta.unbox(self._boxed(key))

    def shapes(self) -> Any:
        """Shapes and types of the parameters. Starts no backend."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def axes(self) -> Any:
        """The logical axes of every parameter: the tree of `init` with tuples of names for leaves."""
        boxed = jax.eval_shape(lambda: self._boxed(jax.random.key(0)))
        return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))

    def _boxed(self, key: jax.Array) -> Params:
        c = self.config
        keys = jax.random.split(key, 1 + c.depth)
        x_BTM, tokens_BT = jnp.zeros((1, 1, c.width)), jnp.zeros((1, 1), jnp.int32)
        layers = []
        for i, mixer in enumerate(c.pattern):
            start = functools.partial(Block(c, mixer).init, x_BTM=x_BTM, cache=None)
            start = functools.partial(start, context=Context(tokens_BT, tokens_BT, None))
            stacked = jax.vmap(start)(keys[1 + i :: len(c.pattern)])["params"]
            layers.append(jax.tree.map(_stacked_box, stacked, is_leaf=_is_box))
        return {"ends": Ends(c).init(keys[0])["params"], "layers": tuple(layers)}

    def apply(
        self,
        params: Params,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Tokens to final hidden states (B, T, M), ready for `logits` or a chunked objective.

        Without positions, those within each segment (or row) are counted. With a cache, positions say where each token
        stands and -1 marks padding, which is neither written nor seen.
        """
        c, ends = self.config, params["ends"]
        if not c.isolate_documents:
            segments_BT = None
        if positions_BT is None:
            positions_BT = positions_within(tokens_BT, segments_BT)
        length_B = None if cache is None else _length(positions_BT, cache)
        context = Context(tokens_BT, positions_BT, segments_BT, length_B=length_B)
        x_BTM = self._embed(ends, context, None if cache is None else cache.last_B)
        x_BTM = sharding.constrain(x_BTM, ("batch", "length", "width"))
        if cache is None and c.layer_loop == "scan" and "layers" in params:
            x_BTM, middle_BTM, layers = *self._scan(params, x_BTM, context), ()
        else:
            x_BTM, middle_BTM, layers = self._unroll(params, x_BTM, context, cache)
        if c.backout is not None:
            x_BTM = x_BTM - ends["backout_scale"].astype(x_BTM.dtype) * middle_BTM
        if cache is not None:
            cache = Cache(layers, _length(positions_BT, cache), _last_token(context, cache.last_B))
        return rms_norm(x_BTM, c.norm.eps), cache

    def head(self, params: Params) -> jax.Array:
        """The output matrix (M, V), float32."""
        ends = params["ends"]
        return ends["embed"].T if self.config.tied else ends["head"]

    def logits(self, params: Params, hidden_BTM: jax.Array) -> jax.Array:
        """Logits after the softcap, (B, T, vocab) in float32. Training never calls it: see objectives."""
        w_MV = self.head(params)[:, : self.config.vocab].astype(hidden_BTM.dtype)
        wide = jnp.promote_types(hidden_BTM.dtype, jnp.float32)
        z_BTV = jnp.einsum("BTM,MV->BTV", hidden_BTM, w_MV, preferred_element_type=wide)
        cap = self.config.softcap
        return z_BTV if cap is None else cap * jnp.tanh(z_BTV / cap)

    def empty_cache(self, batch: int, length: int, *, write: int) -> Cache:
        """A cache for `length` positions a row; `write` is the most tokens that one call of `apply` adds."""
        c = self.config
        mixers = [c.pattern[i % len(c.pattern)] for i in range(c.depth)]
        layers = tuple(MIXERS[type(m)].empty(m, batch, length, write=write, dtype=self.dtype) for m in mixers)
        return Cache(layers, jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def unstack(self, params: Params) -> Params:
        """Parameters by layer, in the compute type: what decoding reads."""
        cast = jax.tree.map(lambda w: w.astype(self.dtype) if w.ndim else w, params)
        return {"ends": cast["ends"], "layer": tuple(self._layers(cast))}

    def _layers(self, params: Params) -> list[Any]:
        """One parameter tree a layer. `lax.split`, not indexing: its gradient is one concatenation."""
        if "layer" in params:
            return list(params["layer"])
        c = self.config
        layers: list[Any] = [None] * c.depth
        for j, stacked in enumerate(params["layers"]):
            leaves, tree = jax.tree.flatten(stacked)
            parts = [jax.lax.split(leaf, [1] * c.repeats, axis=0) for leaf in leaves]
            for g in range(c.repeats):
                layers[g * len(c.pattern) + j] = jax.tree.unflatten(tree, [part[g][0] for part in parts])
        return layers

    def _embed(self, ends: Params, context: Context, last_B: jax.Array | None) -> jax.Array:
        c = self.config
        x_BTM = rms_norm(look_up(ends["embed"], context.tokens_BT, EMBED, self.dtype), c.norm.eps)
        if c.smear is None:
            return x_BTM
        if last_B is None:
            first_B1M = jnp.zeros_like(x_BTM[:, :1])
        else:
            first_B1M = rms_norm(look_up(ends["embed"], last_B[:, None], EMBED, self.dtype), c.norm.eps)
        previous_BTM = jnp.concatenate([first_B1M, x_BTM[:, :-1]], axis=1)
        gate_BT = jax.nn.sigmoid(x_BTM[..., : c.smear.channels] @ ends["smear_gate"].astype(self.dtype))
        gate_BT = jnp.where(context.positions_BT > 0, gate_BT * ends["smear_scale"].astype(self.dtype), 0)
        return x_BTM + gate_BT[..., None] * previous_BTM

    def _contexts(self, context: Context) -> list[Context]:
        """The context of each layer of the pattern; equal rotary positions share their cosines and sines."""
        made: dict[Any, Any] = {}
        for mixer in self.config.pattern:
            if mixer.rope is not None and (mixer.rope, mixer.head_dim) not in made:
                angles = rotation(context.positions_BT, mixer.rope, mixer.head_dim, self.dtype)
                made[mixer.rope, mixer.head_dim] = angles
        return [context._replace(rotation=made.get((mixer.rope, mixer.head_dim))) for mixer in self.config.pattern]

    def _layer(
        self, i: int, p: Any, x_BTM: jax.Array, x0_BTM: jax.Array, scales: Any, context: Context, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        """Layer i of the pattern on the residual stream."""
        c = self.config
        if scales is not None:
            resid, x0 = (s.astype(x_BTM.dtype) for s in scales)
            x_BTM = resid * x_BTM + x0 * x0_BTM
        block = Block(c, c.pattern[i % len(c.pattern)], self.attention, self.decoding, self.matmul)

        def forward(p: Any, x_BTM: jax.Array, context: Context, cache: Any) -> Any:
            return block.apply({"params": p}, x_BTM, context, cache)

        if c.remat != "none" and cache is None:
            forward = jax.checkpoint(forward, policy=_POLICIES[c.remat], prevent_cse=c.layer_loop == "unroll")
        return forward(p, x_BTM, context, cache)

    def _scales(self, params: Params) -> Any:
        ends = params["ends"]
        return None if self.config.residual_scales is None else (ends["resid_scale"], ends["x0_scale"])

    def _unroll(
        self, params: Params, x_BTM: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, jax.Array, tuple[Any, ...]]:
        c, x0_BTM, middle_BTM, caches = self.config, x_BTM, x_BTM, []
        scales, contexts = self._scales(params), self._contexts(context)
        for i, p in enumerate(self._layers(params)):
            own = None if scales is None else (scales[0][i], scales[1][i])
            before = None if cache is None else cache.layers[i]
            x_BTM, after = self._layer(i, p, x_BTM, x0_BTM, own, contexts[i % len(contexts)], before)
            caches.append(after)
            if i == c.depth // 2:
                middle_BTM = x_BTM
        return x_BTM, middle_BTM, tuple(caches)

    def _scan(self, params: Params, x_BTM: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """The same layers as a scan over repeats of the pattern: compiles in constant time, in any depth."""
        c, P, x0_BTM = self.config, len(self.config.pattern), x_BTM
        scales, contexts = self._scales(params), self._contexts(context)
        rows = None if scales is None else tuple(s.reshape(c.repeats, P) for s in scales)

        def turn(carry: Any, xs: Any) -> Any:
            x_BTM, middle_BTM = carry
            turn_index, layers, rows = xs
            for j in range(P):
                own = None if rows is None else (rows[0][j], rows[1][j])
                x_BTM, _ = self._layer(j, layers[j], x_BTM, x0_BTM, own, contexts[j], None)
                if c.backout is not None and j == (c.depth // 2) % P:
                    middle_BTM = jnp.where(turn_index == (c.depth // 2) // P, x_BTM, middle_BTM)
            return (x_BTM, middle_BTM), None

        turns = (jnp.arange(c.repeats), params["layers"], rows)
        (x_BTM, middle_BTM), _ = jax.lax.scan(turn, (x_BTM, x0_BTM), turns)
        return x_BTM, middle_BTM


def positions_within(tokens_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Each token's index within its segment (within its row without segments), (B, T)."""
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    if segments_BT is None:
        return index_BT
    starts_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts_BT = jnp.pad(starts_BT, ((0, 0), (1, 0)), constant_values=True)
    return index_BT - jax.lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1)


def _length(positions_BT: jax.Array, cache: Cache) -> jax.Array:
    """How many positions of each row are written after a call, (B,): a row of padding stays as long as it is."""
    end_B = positions_BT.max(axis=1) + 1
    return jnp.where(end_B > 0, end_B, cache.length_B)


def _last_token(context: Context, last_B: jax.Array) -> jax.Array:
    """The token at each row's highest position, or the one before where the row is all padding."""
    index_B1 = jnp.argmax(context.positions_BT, axis=1)[:, None]
    token_B = jnp.take_along_axis(context.tokens_BT, index_B1, axis=1)[:, 0]
    return jnp.where(context.positions_BT.max(axis=1) >= 0, token_B, last_B)


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _stacked_box(box: Any) -> Any:
    return nn.LogicallyPartitioned(box.value, ("layers", *box.names))


_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}
