"""Computes the plan of a run: parameters, tokens, FLOPs, bytes, hours and dollars."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxchat import optim
from jaxchat.experiment import Experiment
from jaxchat.model import Model
from jaxchat.model.counts import flops_per_token, parameter_counts
from jaxchat.model.transformer import Transformer
from jaxchat.planning.chips import CHIPS, Chip, GiB, Topology
from jaxchat.train import init_state

USUAL = (("v5e", 1), ("v5e", 8), ("v6e", 8), ("h100", 1), ("h100", 8), ("h200", 1))
ROWS = "depends on rows"


def derived(e: Experiment, mfu: float, price: float | None, topologies: Sequence[Topology] = ()) -> dict[str, Any]:
    """Computes what needs no compilation. `price` is in dollars per chip and hour; tokens are 0 if rows decide them."""
    flops = flops_per_token(e.model, e.data.row_length)
    # For RL an upper bound, with all answers at maximum length and without prompts.
    tokens = e.steps * (e.batch_tokens if e.rl is None else e.rl.update_samples * e.rl.max_tokens)
    chips = [(there.name, there.chip, there.chips) for there in topologies] or [
        (f"{name} x {count}", CHIPS[name], count) for name, count in USUAL
    ]
    return {
        "parameters": parameter_counts(e.model),
        "batch_tokens": e.batch_tokens,
        "steps": e.steps,
        "tokens": tokens,
        "flops_per_token": flops["total"],
        "flops": flops["total"] * tokens,
        "state_bytes": state_bytes(e),
        "cache_bytes": cache_bytes(e.model, e.data.row_length),
        "mfu": mfu,
        "estimates": {
            name: estimate(flops["total"] * tokens, chip, count, mfu, price) for name, chip, count in chips if tokens
        },
    }


def state_bytes(e: Experiment) -> dict[str, int]:
    """Bytes of the training state over all devices: parameters, optimizer state and one gradient."""
    transformer = Transformer(e.model)
    tx = optim.make(e.optimizer, transformer.specs(), steps=max(e.steps, 1), dtype=transformer.dtype)
    state = jax.eval_shape(lambda: init_state(transformer, tx, jax.random.key(0)))
    parameters = _bytes(state.params)
    return {"parameters": parameters, "optimizer": _bytes(state.optimizer), "gradient": parameters}


def cache_bytes(model: Model, length: int) -> dict[str, int]:
    """Bytes of the cache of one sequence in bfloat16, by mixer and window, and in total."""
    sizes: dict[str, int] = {}
    caches = jax.eval_shape(lambda: Transformer(model, jnp.bfloat16).empty_cache(1, length, write=0)).layers
    for layer, cache in zip(model.layers, caches, strict=True):
        window = getattr(layer.mixer, "window", None)
        name = type(layer.mixer).__name__ + ("" if window is None else f" window {window}")
        sizes[name] = sizes.get(name, 0) + _bytes(cache)
    return sizes | {"total": sum(sizes.values())}


def estimate(flops: float, chip: Chip, count: int, mfu: float, price: float | None) -> dict[str, float]:
    """Hours and dollars for `flops` on `count` chips that reach a share `mfu` of their peak."""
    hours = flops / (chip.peak_flops * count * mfu) / 3600
    return {"hours": round(hours, 4), "dollars": round(hours * count * (chip.dollars if price is None else price), 2)}


def show(plans: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the plans of the stages to stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    first = next(iter(plans.values()))
    counts = dict(first["parameters"])
    total, active = counts.pop("total"), counts.pop("active")
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    console.print(f"{total:,} parameters{f' ({active:,} active for a token)' * (active < total)}: {parts}")
    state = ", ".join(f"{name} {size / GiB:.2f} GiB" for name, size in first["state_bytes"].items())
    console.print(f"training state: {state}, in total over all shards")
    cache = ", ".join(f"{name} {size:,}" for name, size in first["cache_bytes"].items())
    console.print(f"cache of one sequence of row length, bytes in bfloat16: {cache}")
    table = Table(title=f"hours and dollars at {first['mfu']:.0%} of peak, in bfloat16")
    table.add_column("")
    for stage in plans:
        table.add_column(stage, justify="right")
    for name, form in (("steps", ",d"), ("tokens", ",d"), ("flops", ".3g")):
        table.add_row(name, *(format(plan[name], form) if plan["tokens"] else ROWS for plan in plans.values()))
    for chips in first["estimates"] or plans:
        estimates = (plan["estimates"].get(chips) for plan in plans.values())
        table.add_row(
            chips, *("" if one is None else f"{one['hours']:.2f} h  ${one['dollars']:,.2f}" for one in estimates)
        )
    console.print(table)
    if "rl" in plans:
        console.print("rl: upper bound for training on answers of maximum length, without prompts and sampling")


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
