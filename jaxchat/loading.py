"""Loads checkpoints of runs as models and engines."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxchat import checkpoint, sharding
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.speculative import Speculation
from jaxchat.devices import compute_dtype
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.model.transformer import Params, Transformer
from jaxchat.tokenizer import Tokenizer, load_tokenizer


class Loaded(NamedTuple):
    """A checkpoint: its directory and step, its experiment, and the tokenizer of its run."""

    directory: Path
    step: int
    experiment: Experiment
    tokenizer: Tokenizer

    def transformer(self) -> Transformer:
        """The model, in the type that training would compute in on this device."""
        return Transformer(self.experiment.model, compute_dtype(self.experiment.dtype, jax.devices()[0]))

    def params(self, mesh: jax.sharding.Mesh | None = None) -> Params:
        """Loads the parameters in the types of the checkpoint, which are float32 unless it was imported in another,
        on the first local device or sharded over a mesh for decoding.

        Raises:
            UserError: an axis of the mesh does not divide a dimension of the model.
        """
        transformer = Transformer(self.experiment.model)
        shapes = transformer.shapes()
        if mesh is None:
            first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            placed = jax.tree.map(lambda _: first, shapes)
        else:
            try:
                placed = sharding.placements(mesh, shapes, transformer.axes(), sharding.DECODE_RULES)
            except ValueError as error:
                raise UserError(str(error)) from None
        abstract = checkpoint.abstract_like(shapes, placed)
        abstract = checkpoint.as_stored(self.directory, self.step, abstract)
        return checkpoint.load_params(self.directory, self.step, abstract)


def load_checkpoint(path: str) -> Loaded:
    """Loads a checkpoint such as runs/tiny/pretrain (latest step) or runs/tiny/pretrain@300, without parameters."""
    directory, step = checkpoint.locate(path)
    experiment = checkpoint.read_experiment(directory, Experiment)
    tokenizer = load_tokenizer(Path(directory).parent / "tokenizer")
    if tokenizer.vocab_size != experiment.model.vocab:
        raise UserError(
            f"the tokenizer in {directory.parent / 'tokenizer'} has {tokenizer.vocab_size} ids, but the model in "
            f"{directory} has {experiment.model.vocab}: restore the tokenizer of that run"
        )
    return Loaded(directory, step, experiment, tokenizer)


def load_engine(
    path: str,
    *,
    mesh: jax.sharding.Mesh | None = None,
    speculation: Speculation | None = None,
    draft: str = "",
    **shape: Any,
) -> Engine:
    """Creates an engine from a checkpoint such as runs/tiny/pretrain or runs/tiny/pretrain@300.

    `shape` has fields of EngineConfig; `length` is the row length of training by default. `draft` is the checkpoint of
    a smaller model with the same tokenizer, which guesses tokens for `speculation`. Without a mesh the engine uses the
    first local device.

    Raises:
        UserError: a checkpoint cannot be loaded, or the draft has another tokenizer.
    """
    loaded = load_checkpoint(path)
    whole = EngineConfig(**{"length": loaded.experiment.data.row_length} | shape)
    drafting = None
    if draft:
        small = load_checkpoint(draft)
        if small.tokenizer.hash != loaded.tokenizer.hash:
            raise UserError(f"{draft} has another tokenizer than {path}: train it with the tokenizer of that run")
        drafting, speculation = (small.transformer(), small.params(mesh)), speculation or Speculation()
        whole = dataclasses.replace(whole, adapt=False)
    params = loaded.params(mesh)
    log(f"loaded {loaded.directory}@{loaded.step}; its programs are compiled when they are first used")
    return Engine(
        loaded.transformer(), params, loaded.tokenizer, whole, mesh=mesh, speculation=speculation, draft=drafting
    )
