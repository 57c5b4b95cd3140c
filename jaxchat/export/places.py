"""Maps parameter trees to state dicts of other projects: the name of each parameter, and its layout.

State dicts hold matrices like torch's Linear, (outputs, inputs); ours are (inputs, outputs) with a separate head axis.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxchat.model import GQA, Model, Transformer
from jaxchat.model.transformer import Params

Array = np.ndarray


class Layout(NamedTuple):
    """Conversions of a matrix from the state dict (`read`) and to it (`write`)."""

    read: Callable[[Array, GQA], Array]
    write: Callable[[Array], Array]


class Place(NamedTuple):
    """Name of a layer's parameter in a state dict, with `{}` for the layer index, and its layout."""

    name: str
    layout: Layout


HEADS_OUT = Layout(
    lambda w_OI, mixer: w_OI.T.reshape(w_OI.shape[1], -1, mixer.head_dim),
    lambda w_MHD: w_MHD.reshape(w_MHD.shape[0], -1).T,
)
HEADS_IN = Layout(
    lambda w_OI, mixer: w_OI.T.reshape(-1, mixer.head_dim, w_OI.shape[0]),
    lambda w_HDM: w_HDM.reshape(-1, w_HDM.shape[-1]).T,
)
TRANSPOSED = Layout(lambda w_OI, _: w_OI.T, lambda w_IO: w_IO.T)

Layers = Mapping[tuple[str, str], Place]
Ends = Mapping[str, str]


def to_params(config: Model, state: Mapping[str, Array], layers: Layers, ends: Ends) -> Params:
    """Converts a state dict (of weights or gradients) to our parameter tree; vocabulary padding is zero.

    Raises:
        ValueError: a parameter is missing, has a wrong shape, or is unknown to the model.
    """
    used = set()

    def take(name: str) -> Array:
        used.add(name)
        if name not in state:
            raise ValueError(f"{name} is missing")
        return np.asarray(state[name])

    def end(path: Any, shape: Any) -> Array:
        name = path[-1].key
        value = take(ends[name])
        value = value.T if name == "head" else value
        # State dicts may hold scalars and gates with extra axes of size one.
        value = value.reshape(()) if shape.ndim == 0 else value[0] if value.ndim > shape.ndim else value
        return _padded(value, shape, config, ends[name])

    def stacked(position: int, path: Any, shape: Any) -> Array:
        place, mixer = layers[tuple(step.key for step in path)], config.pattern[position].mixer
        names = [place.name.format(i) for i in range(position, config.depth, len(config.pattern))]
        try:
            value = np.stack([place.layout.read(take(name), mixer) for name in names])
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from None
        return _padded(value, shape, config, names[0])

    def layer(position: int, tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, shape: stacked(position, path, shape), tree)

    shapes = Transformer(config).shapes()
    params = {
        "ends": jax.tree_util.tree_map_with_path(end, shapes["ends"]),
        "layers": tuple(layer(i, tree) for i, tree in enumerate(shapes["layers"])),
    }
    if left := sorted(set(state) - used):
        others = f" and {len(left) - 1} more" * (left[1:] != [])
        raise ValueError(f"unexpected parameters: {left[0]}{others}")
    return params


def to_state(config: Model, params: Params, layers: Layers, ends: Ends) -> Iterator[tuple[str, Array]]:
    """Yields the entries of a state dict without vocabulary padding; of `ends`, it writes only embedding and head."""
    embed_VM = np.asarray(params["ends"]["embed"])
    yield ends["embed"], embed_VM[: config.vocab]
    if not config.tied:
        head_MV = np.asarray(params["ends"]["head"])
        yield ends["head"], head_MV[:, : config.vocab].T
    for position, stacked in enumerate(params["layers"]):
        for (part, name), place in layers.items():
            arrays = np.asarray(stacked[part][name])
            for repeat, array in enumerate(arrays):
                yield place.name.format(position + repeat * len(config.pattern)), place.layout.write(array)


def _padded(value: Array, shape: Any, config: Model, name: str) -> Array:
    """Pads a value with zeros along the vocabulary axis; raises ValueError if another size differs from `shape`."""
    vocab = (config.vocab, config.padded_vocab)
    pairs = zip(value.shape, shape.shape)
    if value.ndim != len(shape.shape) or any(have != want and (have, want) != vocab for have, want in pairs):
        raise ValueError(f"{name} has shape {value.shape}, expected {shape.shape}")
    out = np.zeros(shape.shape, value.dtype)
    out[tuple(slice(size) for size in value.shape)] = value
    return out
