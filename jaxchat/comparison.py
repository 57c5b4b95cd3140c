"""Compares variants of an experiment: trains them with the same seeds on the same rows and tabulates differences.

With a ladder, every variant is trained at several depths, and compared at equal FLOPs too (`jaxchat.ladder`).
"""

import dataclasses
import functools
import itertools
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from jaxchat import checkpoint, ladder, processes, signals, stages
from jaxchat.data.cache import Log, read_json, write_json
from jaxchat.errors import UserError
from jaxchat.evaluation.curves import draw_groups, read_run
from jaxchat.evaluation.statistics import paired_means
from jaxchat.experiment import RESUMABLE, Experiment
from jaxchat.model.counts import flops_per_token, parameter_counts
from jaxchat.planning.plan import cache_bytes
from jaxchat.stages.running import run_lock
from jaxchat.stages.stage import inherited
from jaxchat.train import Diverged

RESULTS = "compare.json"
TIMED_STEPS = 48  # Steps of the trial that measures a variant's speed.
LOWER_IS_BETTER = ("val_bpb", "val_loss", "loss", "bpb", "compile_seconds", "peak_memory_bytes", "unstable_steps")
HIGHER_IS_BETTER = ("core", "chatcore", "tokens_per_second", "mfu", "_strict", "_lenient", "_accuracy")  # Suffixes.
OWN = ("name", "directory", "seed")  # Fields that the comparison sets for every run.
# Fields that may change when a run is resumed, but on which scores, speed or memory depend.
MEASURED = ("steps", "eval_problems", "micro_rows", "attention", "xla", "mesh.", "model.layer_loop", "model.remat")
Load = Callable[[Sequence[str]], Experiment]


class Row(NamedTuple):
    """A variant's row of the table: its measure for each seed, and the paired difference to the first variant.

    `values` has None for runs that diverged. `difference` is None for the first variant and without pairs of finite
    values; `interval` (95 percent) also with fewer than two pairs.
    """

    name: str
    values: list[float | None]
    mean: float | None
    difference: float | None
    interval: tuple[float, float] | None
    verdict: str


def read_variants(given: Sequence[str], load: Load, depths: Sequence[int] = ()) -> dict[str, list[str]]:
    """Parses variants "NAME: --field=value ..." to flags by name; raises `UserError` for flags that `load` refuses, at
    any of the `depths` of a ladder."""
    if len(given) < 2:
        raise UserError('give at least two variants: --variants "base:" "fast: --optimizer.muon.learning_rate=0.04"')
    load([])  # So that a mistake outside the variants is not reported as the first variant's.
    variants: dict[str, list[str]] = {}
    for text in given:
        name, colon, flags = text.partition(":")
        if not colon or not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f'variant {text!r} has no name: write "fast: --optimizer.muon.learning_rate=0.04"')
        if name in variants:
            raise UserError(f"two variants are named {name!r}: give each its own name")
        try:
            variants[name] = shlex.split(flags)
            for flag in variants[name]:
                own = (*OWN, "depth") if depths else OWN
                if flag.removeprefix("--").partition("=")[0] in (*own, "help") or flag == "-h":
                    raise UserError(f"{flag} cannot differ between variants: leave it out")
            for at in [_at(depth, load) for depth in depths] or [load]:
                at(variants[name])
        except (UserError, ValueError) as error:
            raise UserError(f"variant {name!r}: {error}") from None
    return variants


def run(
    variants: Mapping[str, list[str]],
    load: Load,
    *,
    seeds: Sequence[int],
    equal: Literal["tokens", "time"],
    measure: str,
    log: Log,
    depths: Sequence[int] = (),
) -> dict[str, Any]:
    """Trains every variant with every seed, unless compare.json has the result; writes compare.md and compare.png.

    `depths` are those of a ladder; without, variants are trained at the depth that they have.

    Raises:
        UserError: a stage cannot be run, or the measure is unknown. A run that diverges is a row of the table instead.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={tuple(seeds)} must have at least one seed, and none twice")
    try:
        for seed in seeds:
            dataclasses.replace(load([]), seed=seed)
    except ValueError as error:
        raise UserError(str(error)) from None
    lower = lower_is_better(measure)
    place = load([]).run_directory
    log = log if jax.process_index() == 0 else lambda _: None
    trained = functools.partial(_trained, place, log)
    with run_lock(place, "compares", log):
        if (place / RESULTS).exists() and not isinstance(read_json(place / RESULTS), dict):
            raise UserError(f"{place / RESULTS} cannot be read: remove it; finished runs are only scored again")
        rungs = {f"/depth{depth}": _at(depth, load) for depth in depths} or {"": load}
        planned = {rung: _planned(variants, at, equal, trained, rung) for rung, at in rungs.items()}
        results: dict[str, dict[str, list[dict[str, Any]]]] = {rung: {name: [] for name in variants} for rung in rungs}
        # Seed by seed, so that an early end leaves whole pairs.
        runs = {
            (f"{name}{rung}/seed{seed}", rung, name): dataclasses.replace(planned[rung][name], seed=seed)
            for seed, rung, name in itertools.product(seeds, rungs, variants)
        }
        for (key, *_), e in runs.items():  # All of them before the first is trained.
            _named(key, e)
        for (key, rung, name), e in runs.items():
            results[rung][name].append(trained(key, e))
            _value(results[rung][name][-1], measure)
        if jax.process_index():
            return {}
        tables = {rung: _rows(own, measure, lower=lower) for rung, own in results.items()}
        direction = f"{measure}, {'lower' if lower else 'higher'} is better"
        if depths:
            facts = [{name: _model_facts(e) for name, e in own.items()} for own in planned.values()]
            tables_at, facts_at = dict(zip(depths, tables.values())), dict(zip(depths, facts))
            by_variant: Mapping[str, Any] = ladder.joined(tables_at, facts_at, lower=lower)
            lines = [*ladder.table(by_variant, seeds), "", *ladder.notes(by_variant)]
            draw = functools.partial(ladder.draw, by_variant, measure)
        else:
            by_variant = tables[""]
            lines, draw = _table(by_variant, seeds), functools.partial(_draw_curves, place, seeds, by_variant)
        report = _write(place, lines, variants, direction, draw, log)
    return {"measure": measure, "seeds": list(seeds), "variants": by_variant, "report": str(report)}


def _at(depth: int, load: Load) -> Load:
    """Loads experiments at a depth of the dial, trained from scratch."""

    def loaded(flags: Sequence[str]) -> Experiment:
        e = load([*flags, f"--depth={depth}"])
        if e.model.depth != depth or e.start_from:
            problem = "the configuration has no dial" if not e.start_from else "the model is that of a checkpoint"
            raise UserError(
                f"--ladder trains models of several depths, but {problem}: choose one such as configs/d4.py"
            )
        return e

    return loaded


def _rows(results: Mapping[str, list[dict[str, Any]]], measure: str, *, lower: bool) -> dict[str, dict[str, Any]]:
    """The rows of the variants by name, with what else is known of their runs."""
    values = {name: [_value(result, measure) for result in runs] for name, runs in results.items()}
    found = {row.name: row._asdict() | _run_facts(results[row.name]) for row in rows(values, lower=lower)}
    return {name: {key: part for key, part in row.items() if key != "name"} for name, row in found.items()}


def lower_is_better(measure: str) -> bool:
    """Whether a smaller value of a measure is better; raises `UserError` if that is not known."""
    if measure in LOWER_IS_BETTER:
        return True
    if measure.endswith(HIGHER_IS_BETTER):
        return False
    raise UserError(
        f"--measure={measure}: it is not known which direction is better; choose one of {', '.join(LOWER_IS_BETTER)}, "
        f"or one that ends in {', '.join(HIGHER_IS_BETTER)}"
    )


def rows(values: Mapping[str, Sequence[float | None]], *, lower: bool) -> list[Row]:
    """Compares each variant with the first, over the seeds for which both have a value. `values` is by seed."""
    base = next(iter(values.values()))
    table = []
    for name, own in values.items():
        finite = [x for x in own if x is not None]
        mean = statistics.fmean(finite) if finite else None
        pairs = [(x, y) for x, y in zip(base, own) if x is not None and y is not None]
        diverged = len(own) - len(finite)
        difference = interval = None
        if own is not base and pairs:
            difference, interval = paired_means(*zip(*pairs))
        if diverged:
            verdict = f"diverged with {diverged} of {len(own)} seeds"
        else:
            verdict = "baseline" if own is base else _verdict(interval, lower=lower)
        table.append(Row(name, list(own), mean, difference, interval, verdict))
    return table


def _verdict(interval: tuple[float, float] | None, *, lower: bool) -> str:
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "undecided"
    return "better" if (interval[1] < 0) == lower else "worse"


def _planned(
    variants: Mapping[str, list[str]],
    load: Load,
    equal: Literal["tokens", "time"],
    trained: Callable[[str, Experiment], dict[str, Any]],
    rung: str,
) -> dict[str, Experiment]:
    """The variants' experiments, with steps set so that tokens or time equal those of the first. `rung` names the depth
    of a ladder."""
    planned = {name: load(flags) for name, flags in variants.items()}
    first, speeds = next(iter(variants)), dict.fromkeys(variants, 1.0)
    if equal == "time":
        if any(e.rl is not None or not e.steps for e in planned.values()):
            raise UserError("--equal=time needs a fixed number of steps: give --steps; stage rl is not supported")
        for name, e in planned.items():  # A variant that diverges in the trial is given the speed of the first.
            trial = dataclasses.replace(e, steps=TIMED_STEPS, eval_every=0, eval_rows=1)
            found = trained(f"speed/{name}{rung}", trial)
            if name == first and "diverged" in found:
                raise UserError(f"--equal=time needs the speed of {first!r}, which diverged: {found['diverged']}")
            speeds[name] = found.get("tokens_per_second") or speeds[first]
    seconds = planned[first].steps * planned[first].batch_tokens / speeds[first]
    for name, e in planned.items():
        steps = max(1, round(seconds * speeds[name] / e.batch_tokens))
        own_steps = any(flag.partition("=")[0] == "--steps" for flag in variants[name])
        if e.rl is None and e.steps and steps != e.steps and not own_steps:
            planned[name] = load([*variants[name], f"--steps={steps}"])
    return planned


def _trained(place: Path, log: Log, key: str, e: Experiment) -> dict[str, Any]:
    """The result of a run, from compare.json if it is finished; with the reason as "diverged" if it diverged.

    Raises:
        UserError: the run's directory belongs to another experiment.
        Interrupted: a signal came.
    """
    e = _named(key, e)
    results: dict[str, dict[str, Any]] = processes.gather(read_json(place / RESULTS) or {})[0]
    of_this_stage = key in results and results[key].get("stage", e.stage) == e.stage  # They share the key.
    if of_this_stage and (e.stage_directory / checkpoint.EXPERIMENT).is_file():
        return results[key]
    log(f"== {key}")
    try:
        results[key] = stages.run(e)
    except Diverged as error:
        results[key] = {"stage": e.stage, "diverged": str(error)}
    finally:
        jax.clear_caches()  # Otherwise the compiled programs of all runs stay in memory.
    if jax.process_index() == 0:
        write_json(place / RESULTS, results)
    if any(processes.gather(bool(signals.received()))):
        raise signals.Interrupted(f"{key} is finished")
    return results[key]


def _named(key: str, e: Experiment) -> Experiment:
    """The experiment of a run in its own directory; raises `UserError` if that belongs to another experiment."""
    e = dataclasses.replace(e, name=f"{e.name}/{key}", prompts=(), keep_params=0)
    fixed = [field for field in MEASURED if field != "steps" or e.steps]
    resumable = tuple(field for field in RESUMABLE if field not in fixed)
    checkpoint.check_same(e.stage_directory, inherited(e)[0], resumable)
    return e


def _value(result: Mapping[str, Any], measure: str) -> float | None:
    """The measure of a run, None if it diverged; raises `UserError` if the result has no such number."""
    if "diverged" in result:
        return None
    if not isinstance(result.get(measure), int | float):
        known = ", ".join(name for name, value in result.items() if isinstance(value, float))
        raise UserError(f"--measure={measure} is not a number of this stage's result: choose one of {known}")
    return float(result[measure])


def _run_facts(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Steps, tokens, median speed and unstable steps of a variant, and why it diverged if it did."""
    speeds = [run["tokens_per_second"] for run in results if run.get("tokens_per_second")]
    finished: Mapping[str, Any] = next((run for run in results if "step" in run), {})
    unstable = [run["unstable_steps"] for run in results if "unstable_steps" in run]  # Not known of diverged runs.
    return {
        "steps": finished.get("step"),
        "tokens": finished.get("tokens"),
        "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "unstable_steps": sum(unstable) if unstable else None,
        "diverged": next((run["diverged"] for run in results if "diverged" in run), None),
    }


def _model_facts(e: Experiment) -> dict[str, Any]:
    """Training FLOPs, parameters, and bytes of the cache in bfloat16 per token of a row."""
    length = e.data.row_length
    return {
        "flops": flops_per_token(e.model, length)["total"] * e.steps * e.batch_tokens,
        "parameters": parameter_counts(e.model)["total"],
        "cache_bytes_per_token": round(cache_bytes(e.model, length)["total"] / length),
    }


def _table(rows_by_name: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> list[str]:
    """The lines of the table of variants, and why any diverged."""
    columns = (*(f"seed {seed}" for seed in seeds), "mean", "difference", "95% interval", "verdict")
    columns = ("variant", *columns, "steps", "tokens", "tokens per second", "unstable steps")
    table = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, row in rows_by_name.items():
        numbers = (row[key] for key in ("steps", "tokens", "tokens_per_second", "unstable_steps"))
        cells = [*ladder.cells(row), row["verdict"], *("" if n is None else f"{n:,}" for n in numbers)]
        table.append(f"| {name} | {' | '.join(cells)} |")
    diverged = [f"- {name} diverged: {row['diverged']}" for name, row in rows_by_name.items() if row["diverged"]]
    return [*table, *(["", *diverged] if diverged else [])]


def _draw_curves(place: Path, seeds: Sequence[int], names: Iterable[str], out: Path) -> None:
    """The training curves of all runs, a colour per variant."""
    files = {name: [f for s in seeds for f in place.glob(f"{name}/seed{s}/*/metrics.jsonl")] for name in names}
    draw_groups({name: [read_run(file.parent) for file in own] for name, own in files.items()}, out)


def _write(
    place: Path,
    table: Sequence[str],
    variants: Mapping[str, list[str]],
    measure: str,
    draw: Callable[[Path], None],
    log: Log,
) -> Path:
    """Writes compare.md and compare.png; returns the path of compare.md."""
    notes = [f"- {name}: `{shlex.join(flags)}`" if flags else f"- {name}: no flags" for name, flags in variants.items()]
    heading = f"{measure}. Differences are to {next(iter(variants))}, seed by seed."
    lines = [f"# {place.name}", "", heading, "", *table, "", *notes, ""]
    log("\n".join(lines))
    try:
        draw(place / "compare.png")
        lines.append("![curves of the variants](compare.png)")
    except UserError as error:
        log(f"no picture: {error}")
        lines.append(f"No picture: {error}.")
    path = place / "compare.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
