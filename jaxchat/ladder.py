"""Compares variants at equal FLOPs: each is trained at several depths, and read off the baseline's curve.

The curve of a ladder is a measure as a function of training FLOPs, a straight line between neighbouring depths on
logarithmic axes. A variant's compute multiplier is the FLOPs with which the baseline's curve reaches the variant's
value, divided by the variant's own: 2 means that the baseline needs twice as many.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxchat.evaluation.curves import drawing, save
from jaxchat.evaluation.statistics import paired_means

Curve = Sequence[tuple[float, float]]  # FLOPs and value, by depth.


class Multiplier(NamedTuple):
    """The geometric mean of a compute multiplier over seeds, and its 95 percent interval (Student's t of logarithms).

    `extrapolated`: for some seed the variant's value lies beyond the baseline's curve.
    """

    factor: float
    interval: tuple[float, float] | None
    extrapolated: bool

    @property
    def verdict(self) -> str:
        if self.interval is None or self.interval[0] <= 1 <= self.interval[1]:
            return "undecided"
        return "better" if self.interval[0] > 1 else "worse"


def flops_at(curve: Curve, value: float, *, lower: bool = True) -> tuple[float, bool] | None:
    """The FLOPs with which a curve reaches a value, and whether that is extrapolated from its last segment.

    None if the curve has fewer than two points, a value that is not positive, or one that is not better than with fewer
    FLOPs; `lower`: smaller values are better.
    """
    if len(curve) < 2 or min(value, *(v for _, v in curve)) <= 0:
        return None
    points = sorted((math.log(v), math.log(flops)) for flops, v in curve)
    steps = [(v1 - v0, f1 - f0) for (v0, f0), (v1, f1) in itertools.pairwise(points)]
    if not all(dv > 0 and (df < 0 if lower else df > 0) for dv, df in steps):
        return None
    x = math.log(value)
    i = max((i for i, (v, _) in enumerate(points[:-1]) if v <= x), default=0)
    (v0, f0), (dv, df) = points[i], steps[i]
    return math.exp(f0 + (x - v0) / dv * df), not points[0][0] <= x <= points[-1][0]


def multiplier(
    baseline: Sequence[Curve], flops: float, values: Sequence[float | None], *, lower: bool = True
) -> Multiplier | None:
    """The compute multiplier of runs of `flops` with these values by seed, to the baseline's curve of the same seed.

    Seeds without a value, or whose curve has no multiplier, are left out; None if there are no others.
    """
    reached = [flops_at(curve, v, lower=lower) for curve, v in zip(baseline, values, strict=True) if v is not None]
    if not (found := [at for at in reached if at is not None]):
        return None
    logs = [math.log(at / flops) for at, _ in found]
    mean, interval = paired_means([0.0] * len(logs), logs)
    ends = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
    return Multiplier(math.exp(mean), ends, any(beyond for _, beyond in found))


def noise(
    baseline: Sequence[Curve], values: Sequence[float | None], *, lower: bool = True
) -> dict[str, float | None] | None:
    """How much the baseline varies between seeds at one depth: the standard deviation of its values, and that of the
    logarithm of the FLOPs which they are worth on the mean curve, as a factor. None with fewer than two seeds."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    by_flops: dict[float, list[float]] = {}
    for flops, value in itertools.chain(*baseline):
        by_flops.setdefault(flops, []).append(value)
    mean = [(flops, statistics.fmean(own)) for flops, own in by_flops.items()]
    worth = [math.log(at[0]) for value in known if (at := flops_at(mean, value, lower=lower)) is not None]
    factor = math.exp(statistics.stdev(worth)) if len(worth) > 1 else None
    return {"deviation": statistics.stdev(known), "compute": factor}


def joined(
    tables: Mapping[int, Mapping[str, Mapping[str, Any]]],
    facts: Mapping[int, Mapping[str, Mapping[str, Any]]],
    *,
    lower: bool,
) -> dict[str, dict[int, dict[str, Any]]]:
    """By variant and depth: its row of `tables`, its `facts` (with `flops`), and its compute multiplier. The first
    variant is the baseline and has the noise between seeds instead."""
    base = next(iter(next(iter(tables.values()))))
    points = {depth: (facts[depth][base]["flops"], rows[base]["values"]) for depth, rows in tables.items()}
    seeds = range(len(next(iter(points.values()))[1]))
    curves = [[(flops, own[s]) for flops, own in points.values() if own[s] is not None] for s in seeds]

    def row(depth: int, name: str) -> dict[str, Any]:
        own = {**tables[depth][name], **facts[depth][name]}
        found = None if name == base else multiplier(curves, own["flops"], own["values"], lower=lower)
        verdict = "undecided" if found is None else found.verdict
        return own | {
            "multiplier": None if found is None else found.factor,
            "multiplier_interval": None if found is None else found.interval,
            "extrapolated": found is not None and found.extrapolated,
            "verdict_at_equal_flops": own["verdict"] if name == base or None in own["values"] else verdict,
            "noise": noise(curves, own["values"], lower=lower) if name == base else None,
        }

    return {name: {depth: row(depth, name) for depth in tables} for name in tables[next(iter(tables))]}


def cells(row: Mapping[str, Any]) -> list[str]:
    """The values of a row of `comparison.Row` by seed, their mean, the difference and its interval."""
    return [
        *("diverged" if x is None else f"{x:.4f}" for x in row["values"]),
        "" if row["mean"] is None else f"{row['mean']:.4f}",
        "" if row["difference"] is None else f"{row['difference']:+.4f}",
        "" if row["interval"] is None else "{:+.4f} to {:+.4f}".format(*row["interval"]),
    ]


def table(rungs: Mapping[str, Mapping[int, Mapping[str, Any]]], seeds: Sequence[int]) -> list[str]:
    """The lines of a table with a row for each variant and depth, from what `comparison` knows of them."""
    columns = ("variant", "depth", "FLOPs", *(f"seed {seed}" for seed in seeds), "mean", "difference", "95% interval")
    columns = (*columns, "at equal tokens", "compute multiplier", "95% interval", "at equal FLOPs", "parameters")
    columns = (*columns, "cache bytes per token")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, by_depth in rungs.items():
        for depth, row in by_depth.items():
            factor, ends = row["multiplier"], row["multiplier_interval"]
            texts = [name, str(depth), f"{row['flops']:.3g}", *cells(row), row["verdict"]]
            texts.append("" if factor is None else f"{factor:.3g}{'*' if row['extrapolated'] else ''}")
            texts.append("" if ends is None else "{:.3g} to {:.3g}".format(*ends))
            texts += [row["verdict_at_equal_flops"], f"{row['parameters']:,}", f"{row['cache_bytes_per_token']:,}"]
            lines.append(f"| {' | '.join(texts)} |")
    return lines


def notes(rungs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """The explanations below the table."""
    name, rows = next(iter(rungs.items()))
    lines = []
    for depth, row in rows.items():
        if row["noise"] is not None:
            factor = row["noise"]["compute"]
            worth = "" if factor is None else f", worth a factor {factor:.3f} of compute"
            lines.append(f"- noise floor at depth {depth}: {row['noise']['deviation']:.4f} between seeds{worth}")
    if any(row["extrapolated"] for by_depth in rungs.values() for row in by_depth.values()):
        lines.append(f"- *: extrapolated beyond the depths of {name}")
    if any(row["multiplier"] is None for by_depth in list(rungs.values())[1:] for row in by_depth.values()):
        lines.append(f"- no multiplier: the curve of {name} has fewer than two depths, or one that is no better")
    every = [(name, depth, row) for name, by_depth in rungs.items() for depth, row in by_depth.items()]
    return lines + [f"- {n} diverged at depth {depth}: {row['diverged']}" for n, depth, row in every if row["diverged"]]


def draw(rungs: Mapping[str, Mapping[int, Mapping[str, Any]]], measure: str, out: Path) -> None:
    """A line for each variant's means over FLOPs on logarithmic axes, and a point for each run.

    Raises:
        UserError: matplotlib is missing, or `out` cannot be written.
    """
    figure, axis = drawing().subplots(figsize=(7, 5), constrained_layout=True)
    for name, by_depth in rungs.items():
        rows = [row for row in by_depth.values() if row["mean"] is not None]
        (line,) = axis.plot([row["flops"] for row in rows], [row["mean"] for row in rows], label=name)
        runs = [(row["flops"], value) for row in rows for value in row["values"] if value is not None]
        axis.plot(*zip(*runs) if runs else ((), ()), "o", color=line.get_color(), markersize=4)
    axis.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=measure)
    axis.legend(fontsize="small")
    save(figure, out)
