"""Training: speed, share of the peak, memory, compilation and host time of the step that launch.train runs."""

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxchat import compilation, devices, sharding
from jaxchat.benchmarks.accelerator import fitting
from jaxchat.benchmarks.accelerator.kernels import DOCUMENT, backends
from jaxchat.benchmarks.accelerator.options import Bench, Family, Make
from jaxchat.benchmarks.accelerator.report import Clock, Rows
from jaxchat.benchmarks.accelerator.timing import quantiles, time_steps
from jaxchat.benchmarks.train import adamw_only
from jaxchat.compilation import Setup
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.model.counts import flops_per_token, parameter_counts
from jaxchat.train import State, init_state

DISTINCT = 2  # Batches that take turns.


@dataclass(frozen=True)
class Variant:
    """One setting; None and "" leave what the recipe chooses."""

    depth: int
    family: Family = "july2026"
    layer_loop: str = ""
    remat: str = ""
    isolated: bool | None = None
    attention: str = ""
    adamw: bool = False

    def experiment(self, make: Make, batch_tokens: int) -> Experiment:
        e = make(self.depth, self.family, batch_tokens)
        model = {"layer_loop": self.layer_loop, "remat": self.remat, "isolate_documents": self.isolated}
        given = {name: value for name, value in model.items() if value not in ("", None)}
        e = dataclasses.replace(e, model=dataclasses.replace(e.model, **given))  # type: ignore[arg-type]
        if self.attention:
            e = dataclasses.replace(e, attention=self.attention)  # type: ignore[arg-type]
        return adamw_only(e) if self.adamw else e

    def label(self) -> dict[str, Any]:
        """What differs from the recipe at this depth."""
        default = dataclasses.asdict(Variant(self.depth))
        asked = dataclasses.asdict(self).items()
        return {name: value for name, value in asked if name in ("depth", "family") or value != default[name]}


def train(bench: Bench, make: Make, rows: Rows) -> None:
    """Every depth of the newest family, as the recipe makes it."""
    for depth in bench.depths:
        attempt(Variant(depth), bench, make, rows)


def sweep(bench: Bench, make: Make, rows: Rows) -> None:
    """What else there is to choose: layer loop, recomputation, attention, documents, family."""
    for variant in variants(bench, make):
        attempt(variant, bench, make, rows)


def variants(bench: Bench, make: Make) -> list[Variant]:
    """Settings beside the recipe's, the most telling first."""
    main = bench.depth
    recipe = make(main, "july2026", bench.batch_tokens)
    other = {"scan": "unroll", "unroll": "scan"}
    found = [Variant(main, layer_loop=other[recipe.model.layer_loop])]
    found += [Variant(main, attention=name) for name in backends()]
    found += [Variant(main, remat="full"), Variant(main, remat="dots"), Variant(main, isolated=False)]
    found.append(Variant(main, family="october2025"))
    rest = [depth for depth in bench.depths if depth != main]
    return found + [
        Variant(d, layer_loop=other[make(d, "july2026", bench.batch_tokens).model.layer_loop]) for d in rest
    ]


def attempt(variant: Variant, bench: Bench, make: Make, rows: Rows) -> None:
    def measured() -> dict[str, Any]:
        return measure(
            variant.experiment(make, bench.batch_tokens), steps=bench.steps, tries=bench.tries, clock=rows.clock
        )

    rows.attempt(variant.label(), measured)


def measure(e: Experiment, *, steps: int, tries: int, clock: Clock) -> dict[str, Any]:
    """Trains for some steps with the largest micro-batch that fits; a smaller one where that runs out of memory."""
    setup = compilation.make_setup(e, log)
    most = 0
    while True:
        try:
            with jax.set_mesh(setup.mesh):
                fitted = fitting.fit(setup, tries=tries, most=most)
                times = run_steps(setup, fitted, steps=steps, clock=clock)
            break
        except jax.errors.JaxRuntimeError as error:
            if not fitting.out_of_memory(error) or fitted.rows == min(compilation.micro_choices(setup)):
                raise
            log(f"micro_rows={fitted.rows} ran out of memory")
            most = fitted.rows - 1
        finally:
            gc.collect()  # What an error's frames held is memory of the device.
    flops, tokens = flops_per_token(e.model, e.data.row_length)["total"], e.batch_tokens
    seconds = quantiles(times.seconds, scale=1.0)
    peak = devices.peak_flops(setup.mesh.devices.flat[0])
    speed = tokens / seconds["median"]
    return {
        "tokens_per_second": round(speed, 1),
        "mfu": None if peak is None else round(speed * flops / (peak * setup.mesh.size), 4),
        "flops_per_token": flops,
        "peak_flops": peak,
        "step_seconds": seconds,
        "dispatch_ms": quantiles(times.dispatch),
        "micro_rows": fitted.rows,
        "batch_rows": e.batch_rows,
        "row_length": e.data.row_length,
        "step_bytes": fitted.bytes,
        "tried_bytes": {str(size): needed for size, needed in fitted.tried.items()},
        "peak_memory_bytes": devices.memory_bytes(),
        "compile_seconds": round(fitted.compiled.seconds, 2),
        "cold_compile_seconds": round(fitted.compiled.cold_seconds, 2),
        "cached": fitted.compiled.cached,
        "layer_loop": e.model.layer_loop,
        "remat": e.model.remat,
        "isolate_documents": e.model.isolate_documents,
        "attention": setup.transformer.attention,
        "dtype": str(setup.transformer.dtype),
        "devices": setup.mesh.size,
        "parameters": parameter_counts(e.model)["total"],
        "loss": times.losses[-1],
    }


def run_steps(setup: Setup, fitted: fitting.Fitted, *, steps: int, clock: Clock) -> Any:
    batches = random_batches(setup, fitted.rows)
    return time_steps(fitted.step, start_state(setup), batches, steps=steps, clock=clock)


def start_state(setup: Setup) -> State:
    """A fresh state in its places."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    start = jax.jit(lambda key: init_state(setup.transformer, setup.tx, key), out_shardings=placed)
    return start(jax.random.key(setup.experiment.seed))


def random_batches(setup: Setup, micro_rows: int) -> Sequence[Any]:
    """Rows of random ids, cut into documents of random lengths, on the device."""
    e = setup.experiment
    generator = np.random.default_rng(e.seed)
    shape = (e.batch_rows // micro_rows, micro_rows, e.data.row_length)
    batches = []
    for _ in range(DISTINCT):
        ids = generator.integers(0, e.model.vocab, (*shape[:2], shape[2] + 1), np.int32)
        columns = {
            "tokens": ids[..., :-1],
            "targets": ids[..., 1:],
            "segments": segments(generator, shape),
            "weights": np.ones(shape, np.float32),
        }
        batches.append(sharding.put_batch(setup.mesh, columns))
    return batches


def segments(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of documents along rows, each of DOCUMENT tokens in the mean."""
    return np.cumsum(generator.random(shape) < 1 / DOCUMENT, axis=-1, dtype=np.int32)
