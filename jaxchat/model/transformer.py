"""The transformer: one forward pass for training and decoding, built from the parts that the configuration names."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxchat import sharding
from jaxchat.model import products
from jaxchat.model.architecture import Model
from jaxchat.model.attention import GATE_INIT, MIXERS
from jaxchat.model.layer import Block
from jaxchat.model.layers import dropout, look_up, uniform_between
from jaxchat.model.norms import NORMS, normalise
from jaxchat.model.part import Aux, Context, Static, Weighted, add_aux, is_boxed, param, stacked
from jaxchat.model.positions import encodings, positions_within
from jaxchat.model.quantized import Matmul

EMBED = ("vocab", "embed")  # Logical axes of the embedding.

Params = dict[str, Any]


class Cache(NamedTuple):
    """The layers' caches, the number of positions written in each row, and the token at the last of them (for Smear).

    To roll a row back, write at an earlier position again, with `last_B` set to the token before it.
    """

    layers: tuple[Any, ...]
    length_B: jax.Array
    last_B: jax.Array


class Forward(NamedTuple):
    """Final hidden states (B, T, M), the new cache if one was given, and losses and statistics of all parts by name."""

    hidden: jax.Array
    cache: Cache | None
    losses: Mapping[str, Weighted] = {}
    statistics: Mapping[str, Weighted] = {}


class Ends(nn.Module):
    """The parameters outside the layers: embedding, head, norms, and scalars of the residual stream."""

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
        for code in encodings(c.mixers, self.static):
            code.embed(jnp.zeros((1, 1, M)), jnp.zeros((1, 1), jnp.int32))
        for name in ("embed_norm", "final_norm"):
            if getattr(c, name):
                NORMS[type(c.norm)](c.norm, self.static, name=name)(jnp.zeros((1, 1, M)))


def _line(first: float, last: float) -> Callable[..., jax.Array]:
    """Initializer with evenly spaced values from `first` to `last`."""
    return lambda key, shape, dtype=jnp.float32: jnp.linspace(first, last, shape[0], dtype=dtype)


@dataclass(frozen=True)
class Transformer:
    """The model as functions of its parameters; `dtype` is the type of activations and matrix products.

    `attention` names the backend in `kernels.BACKENDS` for calls without a cache, `decoding` the one in
    `decoding_kernels.DECODING` for calls with a cache; all compute the same function. `matmul` is the eight-bit format
    of the layers' large products; only training sets it.
    Parameters are a tree {"ends": ..., "layers": (one tree per entry of `Model.stacks`)}, whether layers are scanned or
    unrolled; `unstack` converts it to {"ends": ..., "layer": (one tree per layer)}.
    """

    config: Model
    dtype: Any = jnp.float32
    attention: str = "xla"
    decoding: str = "xla"
    matmul: Matmul = None

    def __hash__(self) -> int:  # Cached, because every compiled decoding call hashes its transformer.
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        own = (self.config, jnp.dtype(self.dtype), self.attention, self.decoding, self.matmul)
        return hash(own)

    def init(self, key: jax.Array) -> Params:
        """Initial float32 parameters; they depend neither on sharding nor on the layer loop."""
        return jax.tree.map(lambda box: box.value, self._boxed(key), is_leaf=is_boxed)

    def shapes(self) -> Any:
        """Shapes and types of the parameters. Does not initialize a JAX backend."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    @property
    def static(self) -> Static:
        c = self.config
        return Static(c.width, c.padded_vocab, self.attention, self.decoding, self.matmul)

    def specs(self) -> Any:
        """The tree of `init` with a Spec for each leaf. Does not initialize a JAX backend."""
        boxed = jax.eval_shape(lambda: self._boxed(jax.random.key(0)))
        return jax.tree.map(lambda box: box.spec, boxed, is_leaf=is_boxed)

    def axes(self) -> Any:
        """The tree of `init` with a tuple of logical axes for each leaf."""
        return jax.tree.map(lambda spec: spec.axes, self.specs())

    def _boxed(self, key: jax.Array) -> Params:
        c, static = self.config, Static(self.config.width, self.config.padded_vocab)
        keys = jax.random.split(key, 1 + c.depth)
        x_BTM, tokens_BT = jnp.zeros((1, 1, c.width)), jnp.zeros((1, 1), jnp.int32)
        context, layers = self._share(Context(tokens_BT, tokens_BT, None)), []
        for stack in c.stacks:
            start = functools.partial(Block(c.layers[stack[0]], static).init, x_BTM=x_BTM, context=context, cache=None)
            repeats = jax.vmap(start)(keys[1 + np.array(stack)])["params"]
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
        """Maps tokens (B, T) to final hidden states (B, T, M), the input of `logits` or a chunked objective.

        `positions_BT` defaults to each token's index within its segment (or row). With a cache, position -1 marks
        padding, which is neither written nor attended to. `key` is the random key for training.
        """
        c, ends = self.config, params["ends"]
        c.check_length(tokens_BT.shape[1])
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
        if cache is not None:
            cache = Cache(layers, _length(positions_BT, cache), _last_token(context, cache.last_B))
        return Forward(self.finish(ends, x_BTM, middle_BTM), cache, aux.losses, aux.statistics)

    def finish(self, ends: Params, x_BTM: jax.Array, middle_BTM: jax.Array) -> jax.Array:
        """Final hidden states from the residual stream after the last layer and after the middle one."""
        if self.config.backout is not None:
            x_BTM = x_BTM - ends["backout_scale"].astype(x_BTM.dtype) * middle_BTM
        return self._normalise(ends, "final_norm", x_BTM)

    def head(self, params: Params) -> jax.Array:
        """The float32 output matrix (M, V): the head, or the transposed embedding if tied."""
        ends = params["ends"]
        return ends["embed"].T if self.config.tied else ends["head"]

    def logits(self, params: Params, hidden_BTM: jax.Array) -> jax.Array:
        """Logits after the softcap, float32 (B, T, vocab). Training computes them in chunks instead: see objectives."""
        w_MV = self.head(params)[:, : self.config.vocab].astype(hidden_BTM.dtype)
        wide = jnp.promote_types(hidden_BTM.dtype, jnp.float32)
        z_BTV = jnp.einsum("BTM,MV->BTV", hidden_BTM, w_MV, preferred_element_type=wide)
        cap = self.config.softcap
        return z_BTV if cap is None else cap * jnp.tanh(z_BTV / cap)

    def empty_cache(self, batch: int, length: int, *, write: int) -> Cache:
        """An empty cache for `length` positions per row; one call of `apply` may add up to `write` tokens."""
        self.config.check_length(length)
        layers = tuple(
            MIXERS[type(m)].empty(m, batch, length, write=write, dtype=self.dtype) for m in self.config.mixers
        )
        return Cache(layers, jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def unstack(self, params: Params) -> Params:
        """Parameters by layer in the compute type, the form that decoding uses; scalars and exact ones as they are."""
        cast = jax.tree.map(
            lambda w, spec: w.astype(self.dtype) if w.ndim and not spec.exact else w, params, self.specs()
        )
        return {"ends": cast["ends"], "layer": tuple(self._layers(cast))}

    def _layers(self, params: Params) -> list[Any]:
        """One parameter tree per layer. Uses `lax.split`, not indexing, because its gradient is one concatenation."""
        if "layer" in params:
            return list(params["layer"])
        c = self.config
        layers: list[Any] = [None] * c.depth
        for stack, repeats in zip(c.stacks, params["layers"], strict=True):
            leaves, tree = jax.tree.flatten(repeats)
            parts = [jax.lax.split(leaf, [1] * len(stack), axis=0) for leaf in leaves]
            for g, i in enumerate(stack):
                layers[i] = jax.tree.unflatten(tree, [part[g][0] for part in parts])
        return layers

    def _normalise(self, ends: Params, name: str, x_BTM: jax.Array) -> jax.Array:
        if not getattr(self.config, name):
            return x_BTM
        return normalise(self.config.norm, self.static, ends.get(name, {}), x_BTM)

    def _embed(self, ends: Params, context: Context, last_B: jax.Array | None) -> jax.Array:
        def embed(tokens_BT: jax.Array) -> jax.Array:
            e_BTM = look_up(ends["embed"], tokens_BT, EMBED, self.dtype)
            e_BTM = e_BTM if c.embed_scale == 1 else e_BTM * jnp.asarray(c.embed_scale, self.dtype)
            return self._normalise(ends, "embed_norm", e_BTM)

        c = self.config
        x_BTM = embed(context.tokens_BT)
        if c.smear is not None:
            first_B1M = jnp.zeros_like(x_BTM[:, :1]) if last_B is None else embed(last_B[:, None])
            previous_BTM = jnp.concatenate([first_B1M, x_BTM[:, :-1]], axis=1)
            gate_BT = jax.nn.sigmoid(x_BTM[..., : c.smear.channels] @ ends["smear_gate"].astype(self.dtype))
            gate_BT = jnp.where(context.positions_BT > 0, gate_BT * ends["smear_scale"].astype(self.dtype), 0)
            x_BTM = x_BTM + gate_BT[..., None] * previous_BTM
        for code in encodings(c.mixers, self.static):
            params = {"params": ends.get(str(code.name), {})}
            encoded: Any = code.apply(params, x_BTM, context.positions_BT, method="embed")
            x_BTM = encoded
        return dropout(x_BTM, c.dropout, None if context.key is None else jax.random.fold_in(context.key, c.depth))

    def _share(self, context: Context) -> Context:
        """Adds the values that equal layers compute once to the context."""
        shared: dict[Any, Any] = {}
        for mixer in dict.fromkeys(self.config.mixers):
            shared |= MIXERS[type(mixer)].share(mixer, context, self.dtype)
        return context._replace(shared=shared)

    def _layer(
        self, i: Any, j: int, p: Any, x_BTM: jax.Array, x0_BTM: jax.Array, ends: Any, context: Context, cache: Any
    ) -> tuple[jax.Array, Any, Aux]:
        """Applies layer i, which is of the kind of layer j, to the residual stream; i may be traced."""
        c = self.config
        if c.residual_scales is not None:
            resid, x0 = (ends[name][i].astype(x_BTM.dtype) for name in ("resid_scale", "x0_scale"))
            x_BTM = resid * x_BTM + x0 * x0_BTM
        if context.key is not None:
            context = context._replace(key=jax.random.fold_in(context.key, i))
        block = Block(c.layers[j], self.static)

        def forward(p: Any, x_BTM: jax.Array, context: Context, cache: Any) -> Any:
            return block.apply({"params": p}, x_BTM, context, cache)

        if c.remat != "none" and cache is None:
            forward = jax.checkpoint(forward, policy=_POLICIES[c.remat], prevent_cse=c.layer_loop == "unroll")
        return forward(p, x_BTM, context, cache)

    def _unroll(
        self, params: Params, x_BTM: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, jax.Array, tuple[Any, ...], Aux]:
        c, x0_BTM, middle_BTM, caches, auxes = self.config, x_BTM, x_BTM, [], []
        for i, p in enumerate(self._layers(params)):
            before = None if cache is None else cache.layers[i]
            x_BTM, after, aux = self._layer(i, i, p, x_BTM, x0_BTM, params["ends"], context, before)
            caches.append(after)
            auxes.append(aux)
            if i == c.depth // 2:
                middle_BTM = x_BTM
        return x_BTM, middle_BTM, tuple(caches), add_aux(auxes)

    def _scan(self, params: Params, x_BTM: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, Aux]:
        """`_unroll` with a scan over the repeats of the pattern, so that compile time does not grow with depth."""
        c, P, x0_BTM, ends = self.config, len(self.config.pattern), x_BTM, params["ends"]

        def repeat(carry: Any, xs: Any) -> Any:
            x_BTM, middle_BTM = carry
            index, layers = xs
            auxes = []
            for j in range(P):
                x_BTM, _, aux = self._layer(index * P + j, j, layers[j], x_BTM, x0_BTM, ends, context, None)
                auxes.append(aux)
                if c.backout is not None and j == (c.depth // 2) % P:
                    middle_BTM = jnp.where(index == (c.depth // 2) // P, x_BTM, middle_BTM)
            return (x_BTM, middle_BTM), add_aux(auxes)

        xs = (jnp.arange(c.repeats), params["layers"][:P])
        (x_BTM, middle_BTM), aux = jax.lax.scan(repeat, (x_BTM, x0_BTM), xs)
        auxes = [jax.tree.map(lambda x: x.sum(axis=0), aux)]
        for (i,), p in zip(c.stacks[P:], params["layers"][P:], strict=True):
            x_BTM, _, aux = self._layer(i, i, jax.tree.map(lambda x: x[0], p), x_BTM, x0_BTM, ends, context, None)
            auxes.append(aux)
            middle_BTM = x_BTM if i == c.depth // 2 else middle_BTM
        return x_BTM, middle_BTM, add_aux(auxes)


def _length(positions_BT: jax.Array, cache: Cache) -> jax.Array:
    """Number of positions written in each row after a call, (B,); a row of padding keeps its length."""
    end_B = positions_BT.max(axis=1) + 1
    return jnp.where(end_B > 0, end_B, cache.length_B)


def _last_token(context: Context, last_B: jax.Array) -> jax.Array:
    """The token at each row's highest position, (B,); `last_B` for a row of padding."""
    index_B1 = jnp.argmax(context.positions_BT, axis=1)[:, None]
    token_B = jnp.take_along_axis(context.tokens_BT, index_B1, axis=1)[:, 0]
    return jnp.where(context.positions_BT.max(axis=1) >= 0, token_B, last_B)


_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(products.NAME),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}
