"""Implements launch.convert: exports a checkpoint to another format, or imports one."""

import ctypes
import dataclasses
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import checkpoint
from jaxchat.errors import UserError, require
from jaxchat.experiment import Experiment
from jaxchat.export import huggingface, nanochat, stablehlo, verify
from jaxchat.export.files import DTYPES, whole
from jaxchat.export.pickled import FILE, read_pickled
from jaxchat.export.places import State
from jaxchat.export.tokens import write_tokenizer
from jaxchat.launcher import log
from jaxchat.loading import Loaded, load_checkpoint
from jaxchat.model.architecture import Model
from jaxchat.model.counts import parameter_counts
from jaxchat.model.transformer import Params, Transformer
from jaxchat.paths import split_step, user_path
from jaxchat.tokenizer import Tokenizer, load_tokenizer

NEEDED: Mapping[str, tuple[str, ...]] = {  # The packages that each format needs.
    "huggingface": ("safetensors",),
    "stablehlo": ("safetensors", "flatbuffers"),
    "tokenizer": (),
    "nanochat": ("tokenizers",),
}
SOURCES: Mapping[str, Any] = {"huggingface": huggingface, "nanochat": nanochat}  # Formats to import, by open_source.
STAGES = ("pretrain", "sft")  # Stages of imported checkpoints; files of other programs lack the settings of RL.


class Imported(NamedTuple):
    """Training state of an imported checkpoint, which has no optimizer state."""

    params: Any
    step: Any


def run(options: Any, make_experiment: Callable[[Model, int, str], Experiment]) -> dict[str, object]:
    """Runs launch.convert; returns the result that the launcher prints.

    `make_experiment(model, length, stage)` builds the experiment of an imported model with context length `length`.
    """
    out = user_path(options.out)
    if (options.to is None) == (options.source is None):
        formats = "--to=huggingface, --to=stablehlo, --to=tokenizer, --from=huggingface and --from=nanochat"
        raise UserError(f"set exactly one of {formats}")
    if options.tokenizer is not None and options.source is None:
        raise UserError("--tokenizer requires --from: an export uses the run's own tokenizer")
    for module in NEEDED[options.to or options.source]:
        if options.to == "stablehlo":
            require(module, f"launch.convert needs {module}", "export")
        require(module, f"launch.convert needs {module}", "convert")
    if options.source is not None:
        return _import(out, options, make_experiment)
    sizes = {name: getattr(options, name) for name in ("rows", "length", "prefill_chunk")}
    if options.to != "stablehlo" and (unused := [name for name, value in sizes.items() if value]):
        raise UserError(f"--{unused[0]} is only for --to=stablehlo, whose programs have fixed shapes: remove it")
    if options.to == "tokenizer" and options.dtype != "float32":
        raise UserError("--dtype is the type of weights, which --to=tokenizer does not write: remove it")
    loaded = load_checkpoint(options.checkpoint)
    e = loaded.experiment
    place = f"{loaded.directory}@{loaded.step}"
    if options.to == "tokenizer":
        with whole(out) as directory:
            write_tokenizer(directory, loaded.tokenizer, length=e.data.row_length)
        return {"out": str(out), "vocab": loaded.tokenizer.vocab_size, "checkpoint": place, "to": options.to}
    # Counted before the files are written: a signal after that would leave an export that nobody knows to be whole.
    parameters = parameter_counts(e.model)["total"]
    if options.to == "huggingface":
        huggingface.family_of(e.model)  # Refuses before the parameters are loaded.
        length = e.data.row_length
        huggingface.write(out, e.model, loaded.params(), loaded.tokenizer, length=length, dtype=options.dtype)
    else:
        _to_stablehlo(loaded, out, options.dtype, **sizes)
    return {
        "out": str(out),
        "parameters": parameters,
        "checkpoint": place,
        "to": options.to,
        "dtype": options.dtype,
    }


def _to_stablehlo(loaded: Loaded, out: Path, dtype: str, *, rows: int, length: int, prefill_chunk: int) -> None:
    e = loaded.experiment
    rows, length = rows or 1, length or e.data.row_length
    prefill_chunk = min(prefill_chunk or 128, length)
    if min(rows, length, prefill_chunk) < 1:
        raise UserError(f"rows={rows}, length={length} and prefill_chunk={prefill_chunk} must be at least 1")
    transformer = Transformer(e.model, jnp.dtype(DTYPES[dtype]))
    stablehlo.write(
        out, transformer, loaded.params(), loaded.tokenizer, rows=rows, length=length, prefill_chunk=prefill_chunk
    )


def _import(out: Path, options: Any, make_experiment: Callable[[Model, int, str], Experiment]) -> dict[str, object]:
    if out.name not in STAGES:
        raise UserError(f"--out={out} must end in a stage, such as runs/imported/pretrain, or .../sft for a chat model")
    source = user_path(split_step(options.checkpoint)[0])
    if not source.is_dir():
        raise UserError(
            f"no directory {source}: --checkpoint must name one with config.json or meta_STEP.json and weights"
        )
    own = None if options.tokenizer is None else _named_tokenizer(user_path(options.tokenizer))
    found: huggingface.Source = SOURCES[options.source].open_source(options.checkpoint, own, options.dtype)
    try:
        experiment = make_experiment(found.model, found.length, out.name)
    except ValueError as error:
        raise UserError(f"the model in {found.directory} cannot be trained: {error}") from None
    place = out.parent / "tokenizer"
    if place.exists() and load_tokenizer(place).hash != found.tokenizer.hash:
        raise UserError(f"{place} contains another tokenizer: set --out to a new run")
    if options.dtype != "float32":
        experiment = dataclasses.replace(experiment, dtype=options.dtype)  # Without a float32 copy in decoding either.
    parameters = parameter_counts(found.model)["total"]
    theirs = _run_theirs(found)
    with whole(out) as directory:
        write_checkpoint(directory, experiment, found.params())
        _return_memory()
        _check(directory, found, theirs)
        found.tokenizer.save(place)
    return {
        "out": str(out),
        "parameters": parameters,
        "checkpoint": f"{out}@0",
        "from": options.source,
    }


def _named_tokenizer(directory: Path) -> Tokenizer:
    """A tokenizer of jaxchat or of nanochat."""
    return read_pickled(directory) if (directory / FILE).is_file() else load_tokenizer(directory)


def _run_theirs(found: huggingface.Source) -> verify.Run | None:
    """The source's forward pass in transformers; None if that cannot read it. Call it before the parameters are read,
    so that the memory holds them once.
    """
    if not found.family.architecture:
        log("logits were not compared, because transformers cannot read nanochat's own files")
        return None
    try:
        return verify.run_theirs(found.directory, found.model, found.length)
    except UserError as error:
        log(f"logits were not compared: {error}")
        return None


def _return_memory() -> None:
    """Frees what Orbax leaves in cycles of references, and what glibc keeps of what TensorStore freed."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _check(directory: Path, found: huggingface.Source, theirs: verify.Run | None) -> None:
    """Loads a written checkpoint; raises `UserError` if it has other weights or logits than its source."""
    params = checkpoint.load_arrays(directory, 0, Transformer(found.model).shapes())
    ours = State(found.model, params, found.family.places)
    verify.same_tensors(ours, found.weights, str(found.directory))
    if theirs is not None:
        verify.same_logits(verify.run_ours(found.model, params, found.length), theirs, "transformers")


def write_checkpoint(directory: Path, experiment: Experiment, params: Params) -> None:
    """Writes checkpoint 0 of a stage directory: parameters without optimizer state, from which other stages start."""
    checkpoint.write_experiment(directory, experiment)
    checkpoints = checkpoint.Checkpoints(directory, keep=1)
    try:
        arrays = jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=True), params)
        types = [leaf.dtype.name for leaf in jax.tree.leaves(arrays)]
        facts = {} if set(types) == {"float32"} else {checkpoint.DTYPES: types}
        checkpoints.save_by_array(0, Imported(arrays, np.zeros((), np.int32)), facts)
    finally:
        checkpoints.close()
