"""Variants of an experiment, trained with the same seeds on the same rows, and the table of their differences."""

import contextlib
import dataclasses
import re
import shlex
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from jaxchat import checkpoint, processes, signals, stages
from jaxchat.config import UserError
from jaxchat.data import cache
from jaxchat.data.cache import read_json, write_json
from jaxchat.evaluation.curves import draw_groups, read_metrics
from jaxchat.evaluation.statistics import paired_means
from jaxchat.experiment import RESUMABLE, Experiment
from jaxchat.stages.stage import inherited
from jaxchat.train import Diverged

RESULTS = "compare.json"
TIMED_STEPS = 24  # Of each of two trials that measure a variant's speed.
LOWER_IS_BETTER = ("val_bpb", "val_loss", "loss", "bpb", "compile_seconds", "peak_memory_bytes", "unstable_steps")
HIGHER_IS_BETTER = ("core", "chatcore", "tokens_per_second", "mfu", "_strict", "_lenient", "_accuracy")  # Endings.
OWN = ("name", "directory", "seed")  # What the comparison decides for every run.
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
        raise UserError('name at least two variants: --variants "base:" "fast: --optimizer.muon.learning_rate=0.04"')
    load([])  # A mistake outside the variants is none of the first variant's.
    variants: dict[str, list[str]] = {}
    for text in given:
        name, colon, flags = text.partition(":")
        if not colon or not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f'variant {text!r} has no name: write "fast: --optimizer.muon.learning_rate=0.04"')
        if name in variants:
            raise UserError(f"two variants are named {name!r}")
        try:
            variants[name] = shlex.split(flags)
            for flag in variants[name]:
                if flag.removeprefix("--").partition("=")[0] in (*OWN, "help") or flag == "-h":
                    raise UserError(f"{flag} cannot differ between variants")
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
    lower = lower_is_better(measure)
    place = load([]).run_directory
    say = say if jax.process_index() == 0 else lambda _: None
    with _held(place, say):
        planned = _planned(variants, load, equal, stopped, say)
        try:  # All variants of a seed before the next seed, so that an early end leaves whole pairs.
            runs = {
                f"{name}/seed{seed}": _placed(dataclasses.replace(e, seed=seed), f"{name}/seed{seed}")
                for seed in seeds
                for name, e in planned.items()
            }
        except ValueError as error:
            raise UserError(str(error)) from None
        for key, e in runs.items():
            result = _finished(place, key, e)
            if result is None:
                say(f"== {key}")
                result = _trained(e, stopped)
                _note(place, {"runs": _agreed(place).get("runs", {}) | {key: result}})
                if any(processes.gather(stopped())):
                    raise signals.Interrupted(f"{key} is finished")
            _value(result, measure)
        results = _agreed(place)["runs"]
        found = {name: [results[f"{name}/seed{seed}"] for seed in seeds] for name in variants}
        table = rows({name: [_value(r, measure) for r in results] for name, results in found.items()}, lower=lower)
        if jax.process_index():
            return {}
        about = {name: _about(planned[name], results) for name, results in found.items()}
        curves = {name: [runs[f"{name}/seed{seed}"].stage_directory for seed in seeds] for name in variants}
        report = _write(place, table, about, variants, curves, seeds, measure, say)
    told = {row.name: row._asdict() | about[row.name] for row in table}
    for part in told.values():
        del part["name"]
    return {"measure": measure, "seeds": list(seeds), "variants": told, "report": str(report)}


def lower_is_better(measure: str) -> bool:
    """Whether a smaller value of a measure is the better one; raises `UserError` where that is not known."""
    if measure in LOWER_IS_BETTER:
        return True
    if measure.endswith(HIGHER_IS_BETTER):
        return False
    raise UserError(
        f"--measure={measure}: it is not known which direction is better; choose one of {', '.join(LOWER_IS_BETTER)}, "
        f"or one that ends in {', '.join(HIGHER_IS_BETTER)}"
    )


def rows(values: Mapping[str, Sequence[float | None]], *, lower: bool) -> list[Row]:
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
            difference, interval = paired_means(*zip(*pairs))
            if not verdict:
                verdict = _verdict(interval, lower=lower)
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
        if any(e.rl is not None or not e.steps for e in planned.values()):
            raise UserError("--equal=time needs a fixed number of steps of fixed size: give --steps, not in stage rl")
        speeds = _speeds(planned, variants, stopped, say)
    seconds = base.steps * base.batch_tokens / speeds[next(iter(variants))]
    for name, e in planned.items():
        steps = max(1, round(seconds * speeds[name] / e.batch_tokens))
        named = any(flag.partition("=")[0] == "--steps" for flag in variants[name])
        if e.rl is None and e.steps and steps != e.steps and not named:
            planned[name] = load([*variants[name], f"--steps={steps}"])
    return planned


def _speeds(
    planned: Mapping[str, Experiment], variants: Mapping[str, list[str]], stopped: Callable[[], bool], say: Say
) -> dict[str, float]:
    """Tokens per second of each variant: the better of two short trials, kept in compare.json by their flags.

    A trial that was killed is repeated from its start. A variant that diverges there counts as the first's speed.
    """
    place = next(iter(planned.values())).run_directory
    keys = {name: shlex.join([f"{name}:", *variants[name]]) for name in planned}
    for trial in ("first", "second"):  # In turn, for a machine's speed may drift.
        for name, e in planned.items():
            known = _agreed(place).get("speeds", {})
            if trial in known.get(keys[name], {}):
                continue
            say(f"== {name}: measuring its speed ({trial} of two trials)")
            e = dataclasses.replace(e, steps=TIMED_STEPS, eval_every=0, eval_rows=1)
            e = _placed(e, f"speed/{name}/{trial}")
            _remove(e.stage_directory)
            result = _trained(e, stopped)
            entry = known.get(keys[name], {}) | {trial: result.get("tokens_per_second")}
            _note(place, {"speeds": known | {keys[name]: entry}})
    known = _agreed(place)["speeds"]
    found = {name: max(filter(None, known[key].values()), default=0.0) for name, key in keys.items()}
    first = next(iter(found.values())) or 1.0
    return {name: speed or first for name, speed in found.items()}


def _placed(e: Experiment, name: str) -> Experiment:
    """The experiment as a run within the comparison's directory."""
    return dataclasses.replace(e, name=f"{e.name}/{name}", prompts=())


def _remove(directory: Path) -> None:
    """Removes a directory of this comparison's own, once for all processes."""
    if jax.process_index() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    processes.meet()


@contextlib.contextmanager
def _held(place: Path, say: Say) -> Iterator[None]:
    """Holds the comparison's directory; raises `UserError` where another process has it, or compare.json is damaged."""
    if jax.process_index():
        yield
        return
    refusal = f"another process compares in {place}: wait for its end, or give this comparison its own --name"
    with cache.locked(place, say, refusal=refusal):
        if (place / RESULTS).exists() and read_json(place / RESULTS) is None:
            raise UserError(f"{place / RESULTS} cannot be read: remove it; runs that are finished are scored again")
        yield


def _finished(place: Path, key: str, e: Experiment) -> dict[str, Any] | None:
    """The result of a run that is finished; raises `UserError` where its directory holds another experiment."""
    resumable = RESUMABLE if e.steps == 0 else tuple(field for field in RESUMABLE if field != "steps")
    checkpoint.check_same(e.stage_directory, inherited(e)[0], resumable)
    there = (e.stage_directory / checkpoint.EXPERIMENT).is_file()
    found: dict[str, Any] | None = _agreed(place).get("runs", {}).get(key)
    return found if there else None


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


def _about(e: Experiment, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Steps, tokens, speed and unstable steps of a variant, and why it diverged, if it did."""
    speeds = [run["tokens_per_second"] for run in results if run.get("tokens_per_second")]
    finished: Mapping[str, Any] = next((run for run in results if "step" in run), {})
    reasons = [run["diverged"] for run in results if "diverged" in run]
    return {
        "steps": finished.get("step", e.steps),
        "tokens": finished.get("tokens"),
        "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "unstable_steps": sum(run.get("unstable_steps", 0) for run in results),
        **({"diverged": reasons[0]} if reasons else {}),
    }


def _write(
    place: Path,
    table: Sequence[Row],
    about: Mapping[str, Mapping[str, Any]],
    variants: Mapping[str, list[str]],
    directories: Mapping[str, Sequence[Path]],
    seeds: Sequence[int],
    measure: str,
    say: Say,
) -> Path:
    """Writes compare.md and compare.png; returns the first."""
    better = "lower" if lower_is_better(measure) else "higher"
    lines = [
        f"# {place.name}",
        "",
        f"{measure}, {better} is better. Differences are to {table[0].name}, seed by seed.",
        "",
    ]
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
    for name, facts in about.items():
        cells = ["" if facts[key] is None else f"{facts[key]:,}" for key in ("steps", "tokens", "tokens_per_second")]
        flags = shlex.join(variants[name]).replace("|", "\\|")
        lines.append(f"| {name} | {flags and f'`{flags}`'} | {' | '.join(cells)} | {facts['unstable_steps']} |")
    lines += ["", *(f"{name} diverged: {facts['diverged']}" for name, facts in about.items() if "diverged" in facts)]
    say("\n".join(lines))
    picture = place / "compare.png"
    try:
        curves = {
            name: [read_metrics(directory) for directory in found if (directory / "metrics.jsonl").exists()]
            for name, found in directories.items()
        }
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
