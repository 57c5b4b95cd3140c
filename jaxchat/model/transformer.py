"""The transformer: one forward for training and decoding, built from parts that the configuration names."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat import sharding
from jaxchat.model.attention import GATE_INIT, MIXERS
from jaxchat.model.layer import Block, Layer
from jaxchat.model.layers import look_up, uniform_between
from jaxchat.model.norms import NORMS, Norm, RMSNorm, normalise
from jaxchat.model.part import Aux, Context, Spec, Static, Weighted, add_aux, is_boxed, param, stacked
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
    """The architecture. Layer i is `pattern[i % len(pattern)]`; `norm` is that of the embedding and of the output."""

    vocab: int
    width: int
    depth: int
    pattern: tuple[Layer, ...]
    norm: Norm = RMSNorm()
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
    def layers(self) -> tuple[Layer, ...]:
        """Every layer, in order."""
        return self.pattern * self.repeats

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Cache(NamedTuple):
    """A cache by layer, how many positions of each row are written, and the token at the last of them.

    Smear needs the last token. A row is taken back to an earlier position by writing there again, with `last_B` set to
    the token before.
    """

    layers: tuple[Any, ...]
    length_B: jax.Array
    last_B: jax.Array


class Forward(NamedTuple):
    """Final hidden states (B, T, M); the cache, if there was one; losses and statistics of all parts, by name."""

    hidden: jax.Array
    cache: Cache | None
    losses: Mapping[str, Weighted] = {}
    statistics: Mapping[str, Weighted] = {}


class Ends(nn.Module):
    """What stands before and after the layers: embedding, head, and the scalars of the residual stream."""

    config: Model
    static: Static

    @nn.compact
    def __call__(self) -> None:
        c, V, M = self.config, self.static.vocab, self.static.width
        param(self, "embed", EMBED, (V, M), nn.initializers.normal(c.embed_std), group="embed")
        if not c.tied:
            param(self, "head", ("embed", "vocab"), (M, V), nn.initializers.normal(c.head_std), group="head")
        if c.residual_scales is not None:
            r, axes, shape = c.residual_scales, ("layers",), (c.depth,)
            param(self, "resid_scale", axes, shape, _line(r.resid_first, r.resid_last), group="resid_scale")
            param(self, "x0_scale", axes, shape, _line(r.x0_first, r.x0_last), group="x0_scale")
        if c.smear is not None:
            gate = uniform_between(*GATE_INIT)
            param(self, "smear_gate", ("gate",), (c.smear.channels,), gate, group="scalars")
            param(self, "smear_scale", (), (), nn.initializers.zeros_init(), group="scalars")
        if c.backout is not None:
            param(self, "backout_scale", (), (), nn.initializers.constant(c.backout.init), group="scalars")
        for name in ("embed_norm", "final_norm"):
            NORMS[type(c.norm)](c.norm, self.static, name=name)(jnp.zeros((1, 1, M)))


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

    def __hash__(self) -> int:  # Computed once: a transformer is an argument of every compiled call of decoding.
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        own = (self.config, jnp.dtype(self.dtype), self.attention, self.decoding, self.matmul)
        return hash(own)

    def init(self, key: jax.Array) -> Params:
        """Float32 parameters; the same for every sharding and every layer loop."""
        return jax.tree.map(lambda box: box.value, self._boxed(key), is_leaf=is_boxed)

    def shapes(self) -> Any:
        """Shapes and types of the parameters. Starts no backend."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    @property
    def static(self) -> Static:
        c = self.config
        return Static(c.width, c.padded_vocab, self.attention, self.decoding, self.matmul)

    def specs(self) -> Any:
        """The Spec of every parameter: the tree of `init` with Specs for leaves. Starts no backend."""
        boxed = jax.eval_shape(lambda: self._boxed(jax.random.key(0)))
        return jax.tree.map(lambda box: box.spec, boxed, is_leaf=is_boxed)

    def axes(self) -> Any:
        """The logical axes of every parameter: the tree of `init` with tuples of names for leaves."""
        return jax.tree.map(lambda spec: spec.axes, self.specs(), is_leaf=lambda x: isinstance(x, Spec))

    def _boxed(self, key: jax.Array) -> Params:
        c, static = self.config, Static(self.config.width, self.config.padded_vocab)
        keys = jax.random.split(key, 1 + c.depth)
        x_BTM, tokens_BT = jnp.zeros((1, 1, c.width)), jnp.zeros((1, 1), jnp.int32)
        context, layers = self._share(Context(tokens_BT, tokens_BT, None)), []
        for i, layer in enumerate(c.pattern):
            start = functools.partial(Block(layer, static).init, x_BTM=x_BTM, context=context, cache=None)
            repeats = jax.vmap(start)(keys[1 + i :: len(c.pattern)])["params"]
            layers.append(jax.tree.map(stacked, repeats, is_leaf=is_boxed))
        return {"ends": Ends(c, static).init(keys[0])["params"], "layers": tuple(layers)}

    def apply(
        self,
        params: Params,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> Forward:
        """Tokens (B, T) to final hidden states (B, T, M), for `logits` or a chunked objective.

        Without positions, those within each segment (or row) are counted. With a cache, `positions_BT` are the tokens'
        positions, and -1 marks padding, which is neither written nor seen. `key` is for parts that are random in
        training.
        """
        c, ends = self.config, params["ends"]
        if not c.isolate_documents:
            segments_BT = None
        if positions_BT is None:
            positions_BT = positions_within(tokens_BT, segments_BT)
        length_B = None if cache is None else _length(positions_BT, cache)
        context = self._share(Context(tokens_BT, positions_BT, segments_BT, length_B=length_B, key=key))
        x_BTM = self._embed(ends, context, None if cache is None else cache.last_B)
        x_BTM = sharding.constrain(x_BTM, ("batch", "length", "width"))
        if cache is None and c.layer_loop == "scan" and "layers" in params:
            x_BTM, middle_BTM, aux = self._scan(params, x_BTM, context)
            layers: tuple[Any, ...] = ()
        else:
            x_BTM, middle_BTM, layers, aux = self._unroll(params, x_BTM, context, cache)
        if c.backout is not None:
            x_BTM = x_BTM - ends["backout_scale"].astype(x_BTM.dtype) * middle_BTM
        if cache is not None:
            cache = Cache(layers, _length(positions_BT, cache), _last_token(context, cache.last_B))
        return Forward(self._normalise(ends, "final_norm", x_BTM), cache, aux.losses, aux.statistics)

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
        mixers = [layer.mixer for layer in self.config.layers]
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
        for j, repeats in enumerate(params["layers"]):
            leaves, tree = jax.tree.flatten(repeats)
            parts = [jax.lax.split(leaf, [1] * c.repeats, axis=0) for leaf in leaves]
            for g in range(c.repeats):
                layers[g * len(c.pattern) + j] = jax.tree.unflatten(tree, [part[g][0] for part in parts])
        return layers

    def _normalise(self, ends: Params, name: str, x_BTM: jax.Array) -> jax.Array:
        return normalise(self.config.norm, self.static, ends.get(name, {}), x_BTM)

    def _embed(self, ends: Params, context: Context, last_B: jax.Array | None) -> jax.Array:
        def embed(tokens_BT: jax.Array) -> jax.Array:
            return self._normalise(ends, "embed_norm", look_up(ends["embed"], tokens_BT, EMBED, self.dtype))

        c, x_BTM = self.config, embed(context.tokens_BT)
        if c.smear is None:
            return x_BTM
        first_B1M = jnp.zeros_like(x_BTM[:, :1]) if last_B is None else embed(last_B[:, None])
        previous_BTM = jnp.concatenate([first_B1M, x_BTM[:, :-1]], axis=1)
        gate_BT = jax.nn.sigmoid(x_BTM[..., : c.smear.channels] @ ends["smear_gate"].astype(self.dtype))
        gate_BT = jnp.where(context.positions_BT > 0, gate_BT * ends["smear_scale"].astype(self.dtype), 0)
        return x_BTM + gate_BT[..., None] * previous_BTM

    def _share(self, context: Context) -> Context:
        """The context with what equal parts of all layers compute once."""
        shared: dict[Any, Any] = {}
        for layer in dict.fromkeys(self.config.pattern):
            shared |= MIXERS[type(layer.mixer)].share(layer.mixer, context, self.dtype)
        return context._replace(shared=shared)

    def _layer(
        self, i: Any, j: int, p: Any, x_BTM: jax.Array, x0_BTM: jax.Array, scales: Any, context: Context, cache: Any
    ) -> tuple[jax.Array, Any, Aux]:
        """Layer i, which is layer j of the pattern, on the residual stream; i may be traced."""
        c = self.config
        if scales is not None:
            resid, x0 = (s.astype(x_BTM.dtype) for s in scales)
            x_BTM = resid * x_BTM + x0 * x0_BTM
        if context.key is not None:
            context = context._replace(key=jax.random.fold_in(context.key, i))
        block = Block(c.pattern[j], self.static)

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
    ) -> tuple[jax.Array, jax.Array, tuple[Any, ...], Aux]:
        c, x0_BTM, middle_BTM, caches, found = self.config, x_BTM, x_BTM, [], []
        scales = self._scales(params)
        for i, p in enumerate(self._layers(params)):
            own = None if scales is None else (scales[0][i], scales[1][i])
            before = None if cache is None else cache.layers[i]
            x_BTM, after, aux = self._layer(i, i % len(c.pattern), p, x_BTM, x0_BTM, own, context, before)
            caches.append(after)
            found.append(aux)
            if i == c.depth // 2:
                middle_BTM = x_BTM
        return x_BTM, middle_BTM, tuple(caches), add_aux(found)

    def _scan(self, params: Params, x_BTM: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, Aux]:
        """The same layers as a scan over repeats of the pattern: compiles in constant time, in any depth."""
        c, P, x0_BTM = self.config, len(self.config.pattern), x_BTM
        scales = self._scales(params)
        rows = None if scales is None else tuple(s.reshape(c.repeats, P) for s in scales)

        def turn(carry: Any, xs: Any) -> Any:
            x_BTM, middle_BTM = carry
            turn_index, layers, rows = xs
            found = []
            for j in range(P):
                own = None if rows is None else (rows[0][j], rows[1][j])
                x_BTM, _, aux = self._layer(turn_index * P + j, j, layers[j], x_BTM, x0_BTM, own, context, None)
                found.append(aux)
                if c.backout is not None and j == (c.depth // 2) % P:
                    middle_BTM = jnp.where(turn_index == (c.depth // 2) // P, x_BTM, middle_BTM)
            return (x_BTM, middle_BTM), add_aux(found)

        turns = (jnp.arange(c.repeats), params["layers"], rows)
        (x_BTM, middle_BTM), repeats = jax.lax.scan(turn, (x_BTM, x0_BTM), turns)
        return x_BTM, middle_BTM, jax.tree.map(lambda x: x.sum(axis=0), repeats)


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


_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}
