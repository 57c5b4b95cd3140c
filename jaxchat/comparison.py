"""Variants of an experiment, trained with the same seeds on the same rows, and the table of their differences."""

import dataclasses
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from jaxchat import checkpoint, processes, signals, stages
from jaxchat.config import UserError
from jaxchat.data.cache import read_json, write_json
from jaxchat.evaluation.curves import draw_groups, read_metrics
from jaxchat.evaluation.statistics import paired_means
from jaxchat.experiment import RESUMABLE, Experiment
from jaxchat.train import Diverged

RESULTS = "compare.json"
TIMED_STEPS = 24  # Of each of two trials that measure a variant's speed.
LOWER_IS_BETTER = ("val_bpb", "val_loss", "loss")
Load = Callable[[Sequence[str]], Experiment]
Say = Callable[[str], None]


class Row(NamedTuple):
    """A variant's line of the table: the measure of each seed, and its difference to the first variant.

    `values` has None where a run diverged; `difference` and `interval` are None for the first variant, and where
    there are too few pairs.
    """

    name: str
    values: list[float | None]
    mean: float | None
    difference: float | None
    interval: tuple[float, float] | None
    verdict: str


def read_variants(given: Sequence[str], load: Load) -> dict[str, list[str]]:
    """Flags by name, out of "NAME: --field=value ..."; raises `UserError` for what `load` refuses, before any run."""
    if len(given) < 2:
        raise UserError('name at least two variants: --variants "base:" "fast: --optimizer.scale=2"')
    variants: dict[str, list[str]] = {}
    for text in given:
        name, colon, flags = text.partition(":")
        if not colon or not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f'variant {text!r} has no name: write "fast: --optimizer.scale=2"')
        if name in variants:
            raise UserError(f"two variants are named {name!r}")
        try:
            variants[name] = shlex.split(flags)
            load(variants[name])
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
    stopped: Callable[[], bool],
    say: Say,
) -> dict[str, Any]:
    """Trains every variant with every seed, unless compare.json has its result; writes compare.md and its picture.

    Raises:
        UserError: what a stage refuses, except a run that diverged: that is a row of the table.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={tuple(seeds)} must name at least one seed, and none twice")
    base = load(next(iter(variants.values())))
    place = base.run_directory
    say = say if jax.process_index() == 0 else lambda _: None
    planned = _planned(variants, load, equal, stopped, say)
    for seed in seeds:  # All variants of a seed before the next seed, so that an early end leaves whole pairs.
        for name, e in planned.items():
            e = _placed(dataclasses.replace(e, seed=seed), base, f"{name}/seed{seed}")
            key = f"{name}/seed{seed}"
            checkpoint.check_same(e.stage_directory, e, tuple(field for field in RESUMABLE if field != "steps"))
            if key in _agreed(place).get("runs", {}):
                say(f"== {name}, seed {seed}: finished")
                continue
            say(f"== {name}, seed {seed}")
            result = _trained(e, stopped)
            _note(place, {"runs": _agreed(place).get("runs", {}) | {key: result}})
            _value(result, measure)
            if any(processes.gather(stopped())):
                raise signals.Interrupted(f"{key} is finished")
    results = _agreed(place)["runs"]
    values = {name: [_value(results[f"{name}/seed{seed}"], measure) for seed in seeds] for name in variants}
    table = rows(values, measure)
    if jax.process_index():
        return {}
    report = _write(place, table, planned, variants, results, seeds, measure, say)
    found = {row.name: row._asdict() | _about(planned[row.name], results, row.name, seeds) for row in table}
    for row in found.values():
        del row["name"]
    return {"measure": measure, "seeds": list(seeds), "variants": found, "report": str(report)}


def rows(values: Mapping[str, Sequence[float | None]], measure: str) -> list[Row]:
    """The table: the first variant, then each other beside it, by the seeds with which both have a finite measure."""
    base = next(iter(values.values()))
    table = []
    for name, found in values.items():
        finite = [x for x in found if x is not None]
        mean = statistics.fmean(finite) if finite else None
        pairs = [(x, y) for x, y in zip(base, found) if x is not None and y is not None]
        diverged = len(found) - len(finite)
        if diverged:
            verdict = f"diverged with {diverged} of {len(found)} seeds"
        elif found is base:
            verdict = "baseline"
        else:
            verdict = ""
        difference = interval = None
        if found is not base and pairs:
            _, difference, interval = paired_means(*zip(*pairs))
            if not verdict:
                verdict = _verdict(interval, lower=measure in LOWER_IS_BETTER)
        table.append(Row(name, list(found), mean, difference, interval, verdict or "undecided"))
    return table


def _verdict(interval: tuple[float, float] | None, *, lower: bool) -> str:
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "undecided"
    return "better" if (interval[1] < 0) == lower else "worse"


def _planned(
    variants: Mapping[str, list[str]],
    load: Load,
    equal: Literal["tokens", "time"],
    stopped: Callable[[], bool],
    say: Say,
) -> dict[str, Experiment]:
    """The variants' experiments, with the steps that make them equal to the first one."""
    planned = {name: load(flags) for name, flags in variants.items()}
    base = next(iter(planned.values()))
    speeds = {name: 1.0 for name in variants}
    if equal == "time":
        speeds = _speeds(planned, stopped, say)
    seconds = base.steps * base.batch_tokens / speeds[next(iter(variants))]
    for name, e in planned.items():
        steps = max(1, round(seconds * speeds[name] / e.batch_tokens))
        named = any(flag.partition("=")[0] == "--steps" for flag in variants[name])
        if e.rl is None and e.steps and steps != e.steps and not named:
            planned[name] = load([*variants[name], f"--steps={steps}"])
    return planned


def _speeds(planned: Mapping[str, Experiment], stopped: Callable[[], bool], say: Say) -> dict[str, float]:
    """Tokens per second of each variant: the better of two short trials, kept in compare.json."""
    base = next(iter(planned.values()))
    place = base.run_directory
    for trial in ("first", "second"):  # In turn, for a machine's speed may drift.
        for name, e in planned.items():
            known = _agreed(place).get("speeds", {})
            if trial in known.get(name, {}):
                continue
            say(f"== {name}: measuring its speed ({trial} of two trials)")
            e = dataclasses.replace(e, steps=TIMED_STEPS, eval_every=0, eval_rows=1)
            e = _placed(e, base, f"speed/{name}/{trial}")
            speed = stages.run(e, stopped)["tokens_per_second"]
            if speed is None:
                raise UserError(f"{e.stage_directory} was finished before it was counted: remove it and start again")
            _note(place, {"speeds": known | {name: known.get(name, {}) | {trial: speed}}})
    return {name: max(trials.values()) for name, trials in _agreed(place)["speeds"].items()}


def _placed(e: Experiment, base: Experiment, name: str) -> Experiment:
    """The experiment as a run within the comparison's directory."""
    return dataclasses.replace(e, directory=base.directory, name=f"{base.name}/{name}", prompts=())


def _trained(e: Experiment, stopped: Callable[[], bool]) -> dict[str, Any]:
    """The result of one run; where it diverged, nothing but the reason."""
    try:
        return stages.run(e, stopped)
    except Diverged as error:
        return {"diverged": str(error)}
    finally:
        jax.clear_caches()  # Dozens of compiled programs would stay otherwise.


def _value(result: Mapping[str, Any], measure: str) -> float | None:
    """The measure of a run, None where it diverged; raises `UserError` where there is no such number."""
    if "diverged" in result:
        return None
    if not isinstance(result.get(measure), int | float):
        known = ", ".join(name for name, value in result.items() if isinstance(value, float))
        raise UserError(f"--measure={measure} is not a number of this stage's result: choose one of {known}")
    return float(result[measure])


def _about(e: Experiment, results: Mapping[str, Any], name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Steps, tokens and speed of a variant."""
    found = [results[f"{name}/seed{seed}"] for seed in seeds]
    speeds = [run["tokens_per_second"] for run in found if run.get("tokens_per_second")]
    finished: Mapping[str, Any] = next((run for run in found if "step" in run), {})
    return {
        "steps": finished.get("step", e.steps),
        "tokens": finished.get("tokens"),
        "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "unstable_steps": sum(run.get("unstable_steps", 0) for run in found),
    }


def _write(
    place: Path,
    table: Sequence[Row],
    planned: Mapping[str, Experiment],
    variants: Mapping[str, list[str]],
    results: Mapping[str, Any],
    seeds: Sequence[int],
    measure: str,
    say: Say,
) -> Path:
    """Writes compare.md and compare.png; returns the first."""
    first, better = table[0].name, "lower" if measure in LOWER_IS_BETTER else "higher"
    lines = [f"# {place.name}", "", f"{measure}, {better} is better. Differences are to {first}, seed by seed.", ""]
    lines += [
        f"| variant | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | difference | 95% interval | verdict |",
        "|---" * (len(seeds) + 5) + "|",
    ]
    for row in table:
        interval = "" if row.interval is None else f"{row.interval[0]:+.4f} to {row.interval[1]:+.4f}"
        cells = ["diverged" if x is None else f"{x:.4f}" for x in row.values]
        mean = "" if row.mean is None else f"{row.mean:.4f}"
        difference = "" if row.difference is None else f"{row.difference:+.4f}"
        lines.append(f"| {row.name} | {' | '.join(cells)} | {mean} | {difference} | {interval} | {row.verdict} |")
    lines += [
        "",
        "| variant | flags | steps | tokens | tokens per second | unstable steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        about = _about(planned[row.name], results, row.name, seeds)
        cells = ["" if about[key] is None else f"{about[key]:,}" for key in ("steps", "tokens", "tokens_per_second")]
        flags = shlex.join(variants[row.name])
        lines.append(f"| {row.name} | {flags and f'`{flags}`'} | {' | '.join(cells)} | {about['unstable_steps']} |")
    say("\n".join(lines))
    picture = place / "compare.png"
    stage = next(iter(planned.values())).stage
    curves: dict[str, list[Any]] = {name: [] for name in variants}
    for name in variants:
        for seed in seeds:
            directory = place / name / f"seed{seed}" / stage
            if (directory / "metrics.jsonl").exists():
                curves[name].append(read_metrics(directory))
    try:
        draw_groups(curves, picture)
        lines += ["", f"![curves of the variants]({picture.name})"]
    except UserError as error:
        say(f"no picture: {error}")
        lines += ["", f"No picture: {error}."]
    path = place / "compare.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _note(place: Path, facts: Mapping[str, Any]) -> None:
    """Changes some entries of compare.json."""
    if jax.process_index() == 0:
        write_json(place / RESULTS, (read_json(place / RESULTS) or {}) | dict(facts))


def _agreed(place: Path) -> dict[str, Any]:
    """What compare.json holds, as the first process reads it."""
    found: dict[str, Any] = processes.gather(read_json(place / RESULTS) or {})[0]
    return found
