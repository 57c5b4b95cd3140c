"""Everything worth measuring on a GPU or a TPU, the most valuable first, in a process that ends in time."""

import dataclasses
import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import decoding, options, report, rl, timing, training
from jaxchat import command_line, compilation, devices, errors, launcher, serialization, signals
from jaxchat.experiment import Experiment
from jaxchat.model.backends import PREFERRED, PREFERRED_DECODING, kernel_calls
from jaxchat.model.kernels import BACKENDS
from jaxchat.objectives.logprobs import weighted_nll
from jaxchat.paths import user_path
from jaxchat.sharding import Mesh

GRACE, LEAST_SECONDS = 20.0, 15.0  # Until what runs after the budget is cut off; what a row must have to begin.
QUEUED = 4  # Calls of a kernel that are dispatched before the first is waited for, which hides the dispatch.
LOOPS = "--model.layer_loop=unroll", "--model.layer_loop=scan"
OTHERS = "--model.remat=full", "--model.remat=dots", "--model.isolate_documents=False", "--family=october2025"
Row = dict[str, Any]
Cases = Iterator[tuple[Row, Callable[[], Row]]]  # The settings that identify a row, and a function that measures it.
Section = tuple[Callable[["Run"], Cases], float]  # Cases, and the share of the budget that they may use.


class Run(NamedTuple):
    """The accelerator, options, the arguments that describe experiments, and when the time is over."""

    kind: str
    bench: options.Bench
    arguments: Sequence[str]
    deadline: float

    def experiment(self, depth: int = 0, *flags: str) -> Experiment:
        """The recipe's pretraining of a depth, changed by the arguments and the flags."""
        sizes = "--steps=1000", "--family=july2026", f"--batch_tokens={2 ** (17 if self.kind == 'tpu' else 18)}"
        path, depth = Path(__file__).parent.parent / "configs" / "d20.py", depth or self.bench.depth
        fixed = f"--config={path}", f"--depth={depth}", "--data.train=tinyworld:train"
        return command_line.load([*sizes, *self.arguments, *fixed, *flags])

    def train(self, e: Experiment, peer: Any = "none") -> Row:
        """A row of training, with a smaller micro-batch if memory runs out although the compiler found it to fit."""
        bench = dataclasses.replace(self.bench, peer=peer, blocks=1 if peer == "none" else 3, pause=0.0)
        try:
            return training.measure(e, bench, self.deadline)
        except compilation.OutOfMemory as error:
            if error.smaller is None:
                raise
            e = dataclasses.replace(e, micro_rows=error.smaller)
        gc.collect()  # The frames of the error held memory of the device.
        return self.train(e, peer)


def train(run: Run) -> Cases:
    """Every depth of the newest family, as the recipe makes it."""
    for depth in run.bench.depths:
        yield {"depth": depth}, partial(run.train, run.experiment(depth))


def sweep(run: Run) -> Cases:
    """Settings other than the recipe's."""
    attention = {f"--attention={name}": None for name in ("xla", PREFERRED.get(jax.default_backend(), "xla"))}
    for depth in sorted(run.bench.depths, key=lambda depth: depth != run.bench.depth):
        for flag in (*LOOPS, *attention, *OTHERS) if depth == run.bench.depth else LOOPS:
            if (e := run.experiment(depth, flag)) != run.experiment(depth):
                yield {"depth": depth, "setting": flag}, partial(run.train, e)


def peer(run: Run) -> Cases:
    """Training beside the peer, on one device."""
    if run.bench.peer != "none":
        e = training.adamw_only(run.experiment(0, "--family=october2025"))
        e = dataclasses.replace(e, mesh=Mesh(1), batch_tokens=run.bench.rows * e.data.row_length)
        yield {"peer": run.bench.peer}, partial(run.train, e, run.bench.peer)


def decode(run: Run) -> Cases:
    """Greedy answers at every batch size, by every kernel of the device."""
    model, copied = decoding.random_model(run.experiment()), decoding.copy_bandwidth()
    kernels = dict.fromkeys(("xla", PREFERRED_DECODING.get(jax.default_backend(), "xla")))
    for rows, name in itertools.product(run.bench.batch_sizes, kernels):
        bench = dataclasses.replace(run.bench, decoding=name)
        yield {"rows": rows, "decoding": name}, partial(decoding.measure, *model, bench, rows, copied)


def rollouts(run: Run) -> Cases:
    """Rollouts of the smallest model."""
    yield {}, partial(rl.measure, *decoding.random_model(run.experiment(min(run.bench.depths))), run.bench)


def attention(run: Run) -> Cases:
    """Every backend, with and without documents and a window."""
    e, bench = run.experiment(), run.bench
    call = max(kernel_calls(e.model), key=lambda call: call.window or 0)
    B, T, H, D = bench.rows, e.data.row_length, call.heads, call.head_dim
    dtype, keys = devices.compute_dtype(e.dtype, jax.devices()[0], launcher.log), jax.random.split(jax.random.key(0), 4)
    arguments = [jax.random.normal(key, (B, T, H, D), dtype) for key in keys]
    segments_BT = jnp.broadcast_to(jnp.arange(T) // min(training.DOCUMENT, T // 2), (B, T)).astype(jnp.int32)
    names = [name for name in BACKENDS if name in ("xla", "xla_remat", PREFERRED.get(jax.default_backend()))]
    for window, documents, name in itertools.product(dict.fromkeys((None, call.window)), (True, False), names):
        segments, flops = segments_BT if documents else None, attention_flops(B, T, H, D, window=window)
        forward = lambda q, k, v, do, name=name, s=segments, w=window: BACKENDS[name](q, k, v, s, w)  # noqa: E731
        both = jax.value_and_grad(lambda q, k, v, do, f=forward: jnp.sum(f(q, k, v, do) * do), (0, 1, 2))
        programs: Any = {"forward": (forward, flops), "both": (both, 3.5 * flops)}  # Backward has five products.
        case = {"backend": name, "window": window, "documents": documents}
        yield case, partial(measure_kernels, programs, arguments, bench.repeats)


def attention_flops(B: int, T: int, H: int, D: int, *, window: int | None) -> float:
    """FLOPs of q k^T and p v, documents not counted: a query at t sees min(t, window) keys before it, and itself."""
    W = T if window is None else min(window, T)
    return 4.0 * B * H * D * (T * (W + 1) - W * (W + 1) // 2)


def loss(run: Run) -> Cases:
    """The loss in chunks of several sizes, the last of which builds every logit at once; gradients included."""
    e, B, keys = run.experiment(), run.bench.rows, jax.random.split(jax.random.key(1), 3)
    c, T, dtype = e.model, e.data.row_length, devices.compute_dtype(e.dtype, jax.devices()[0], launcher.log)
    head_MV = 0.02 * jax.random.normal(keys[1], (c.width, c.padded_vocab), jnp.float32)
    targets_BT = jax.random.randint(keys[2], (B, T), 0, c.vocab, jnp.int32)
    arguments = [jax.random.normal(keys[0], (B, T, c.width), dtype), head_MV, targets_BT, jnp.ones((B, T))]
    for chunk in (*(size for size in run.bench.loss_chunks if size < B * T), B * T):
        nll = partial(weighted_nll, vocab=c.vocab, softcap=c.softcap, chunk_tokens=chunk)
        programs = {"both": (jax.value_and_grad(nll, (0, 1)), 6.0 * B * T * c.width * c.padded_vocab)}
        yield {"chunk_tokens": chunk}, partial(measure_kernels, programs, arguments, run.bench.repeats)


def measure_kernels(programs: Mapping[str, tuple[Any, float]], arguments: Any, repeats: int) -> Row:
    """Seconds and TFLOP/s of each program, the bytes it needs beside its arguments, and its value if it is a number."""
    row: Row = {"shape": list(arguments[0].shape), "dtype": str(arguments[0].dtype)}
    for name, (program, flops) in programs.items():
        call = jax.jit(program).lower(*arguments).compile()
        several = lambda call=call: jax.block_until_ready([call(*arguments) for _ in range(QUEUED)])  # noqa: E731
        value, memory = jax.tree.leaves(several())[0], call.memory_analysis()
        seconds = timing.spread([timing.timed(several)[1] / QUEUED for _ in range(repeats)])
        row |= {f"{name}_seconds": seconds, f"{name}_tflops_per_second": flops / seconds["median"] / 1e12}
        row |= {"value": float(value)} if value.ndim == 0 else {}
        row[f"{name}_bytes"] = memory and memory.temp_size_in_bytes + memory.output_size_in_bytes
    return row


SECTIONS: Mapping[str, Section] = {
    "train": (train, 0.4),
    "attention": (attention, 0.12),
    "loss": (loss, 0.1),
    "decode": (decode, 0.25),
    "rl": (rollouts, 0.2),
    "peer": (peer, 0.3),
    "sweep": (sweep, 1.0),
}


def start(kind: str, bench: options.Bench, arguments: Sequence[str], command: str) -> Row:
    """Measures on the accelerator; raises UserError if JAX finds none."""
    jax.config.update("jax_compilation_cache_dir", str(user_path(bench.cache).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # A second run finds what a first one kept.
    if (found := jax.default_backend()) != kind and not bench.anyway:
        problem = f"no {kind.upper()} here, JAX computes on {found}: measure this with --anyway, or, where there is one"
        raise errors.missing(problem, "cuda" if kind == "gpu" else kind)
    run = Run(kind, bench, arguments, time.monotonic() + bench.budget_s)
    run.experiment()  # A mistake in the arguments is reported before anything is measured.
    return measure_sections(run, report.Report(user_path(bench.out), report.surroundings(bench, command)))


def measure_sections(
    run: Run, results: report.Report, sections: Mapping[str, Section] = SECTIONS, end: Callable[[int], None] = os._exit
) -> Row:
    """Measures section after section; returns what the file holds, or raises UserError if nothing was measured.

    What still runs GRACE seconds after the budget is cut off: the file is finished and printed, and `end` called.
    """
    name = ""

    def cut_off() -> None:
        results.add({"section": name, "error": "cut off: the budget was over"})
        print(serialization.json_line(results.content), flush=True)
        end(0 if results.measured() else 2)

    timer = threading.Timer(run.deadline + GRACE - time.monotonic(), cut_off)
    timer.start()
    try:
        for name in [name for name in sections if not run.bench.only or name in run.bench.only]:
            measure_section(name, *sections[name], run, results)
    except KeyboardInterrupt:
        results.add({"section": name, "error": "cut off: a signal stopped it"})
        signals.forget()  # The file is finished and printed, which is what a signal asks for here.
    finally:
        timer.cancel()
    if not results.measured():
        raise errors.UserError(f"nothing was measured: every section's reason is in {run.bench.out}")
    return results.content


def measure_section(name: str, make_cases: Any, share: float, run: Run, results: report.Report) -> None:
    """Adds the rows of a section, each with its numbers or the reason why it has none. No error ends other sections."""
    own_end = min(run.deadline, time.monotonic() + share * run.bench.budget_s)
    cases = make_cases(run._replace(deadline=own_end))
    for number in itertools.count():
        signals.check()
        row, start = {"section": name}, time.monotonic()
        if run.deadline - start < LEAST_SECONDS or (number and own_end <= start):
            reason = f"its share of the budget is used up, or all: {max(0.0, run.deadline - start):.0f} s are left"
            return results.add(row | {"error": f"skipped: {reason}"})
        try:
            case, measure = next(cases)
            row |= case
            row |= measure() | {"row_seconds": time.monotonic() - start}
        except StopIteration:
            break
        except Exception as error:  # One setting that does not run must not lose the others.
            row["error"] = f"{type(error).__name__}: {errors.first_line(error)}"
        results.add(row)
        gc.collect()  # The frames of an error hold memory of the device.
    jax.clear_caches()  # Compiled programs hold memory of the device, too.
