"""Sections, the most valuable first, within a budget of seconds; whatever happens, what was measured is kept."""

import difflib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxchat.benchmarks.accelerator import decoding, kernels, peers, rollouts, training
from jaxchat.benchmarks.accelerator.options import Bench, Make
from jaxchat.benchmarks.accelerator.report import Clock, Report, Rows, facts, free_place, one_line
from jaxchat.errors import UserError
from jaxchat.launcher import log
from jaxchat.serialization import json_line
from jaxchat.signals import raised

GRACE = 20.0  # Seconds after the budget until what still runs is cut off.


class Section(NamedTuple):
    """What measures it, its share of the budget, the seconds it must have to begin a row, its rows told in short."""

    measure: Callable[[Bench, Make, Rows], None]
    share: float
    least: float
    key: tuple[str, ...]
    told: tuple[str, ...]


SECTIONS: Mapping[str, Section] = {
    "train": Section(training.train, 0.4, 20, ("depth",), ("tokens_per_second", "mfu", "micro_rows")),
    "attention": Section(
        kernels.attention, 0.12, 8, ("backend", "window", "documents"), ("forward_tflops_per_second", "both_ms")
    ),
    "loss": Section(kernels.loss, 0.1, 8, ("loss", "chunk_tokens"), ("both_ms", "temporary_bytes")),
    "decode": Section(
        decoding.decode, 0.25, 15, ("rows", "decoding"), ("tokens_per_second", "share_of_peak_bandwidth")
    ),
    "rl": Section(rollouts.rl, 0.2, 30, ("depth",), ("sample_seconds", "score_seconds", "train_seconds")),
    "peer": Section(peers.peer, 0.3, 30, ("peer",), ("tokens_per_second", "ratio")),
    "sweep": Section(
        training.sweep,
        1.0,
        20,
        ("depth", "family", "layer_loop", "remat", "isolate_documents", "attention"),
        ("tokens_per_second", "mfu"),
    ),
}


def chosen(only: Sequence[str], sections: Mapping[str, Section] = SECTIONS) -> list[str]:
    """The sections to measure, in their order.

    Raises:
        UserError: one does not exist.
    """
    for name in only:
        if name not in sections:
            near = difflib.get_close_matches(name, sections, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sections)}"
            raise UserError(f"there is no section {name!r} to measure: {hint}")
    return [name for name in sections if not only or name in only]


def check_device(kind: str, *, anyway: bool) -> None:
    """Raises UserError where JAX finds no such accelerator."""
    found = jax.default_backend()
    if found != kind and not anyway:
        extra = "cuda" if kind == "gpu" else kind
        raise UserError(
            f"there is no {kind.upper()} here, JAX computes on {found}: install '.[{extra}]' where there is one, or "
            "measure what is here with --anyway"
        )


def run(
    bench: Bench,
    make: Make,
    *,
    command: str,
    sections: Mapping[str, Section] = SECTIONS,
    end: Callable[[int], None] = os._exit,
) -> dict[str, Any]:
    """Measures section after section and returns the headline; the file has everything.

    Shortly after the budget what still runs is cut off: the file is finished, the headline printed, and `end` called.

    Raises:
        UserError: nothing was measured.
    """
    names = chosen(bench.only, sections)
    clock = Clock(bench.budget_s)
    report = Report(free_place(Path(bench.out)), facts(command, bench.budget_s))

    def cut() -> None:
        report.stop("the budget was over")
        print(json_line(headline(report, sections, bench.out)), flush=True)
        end(0 if measured(report) else 2)

    timer = threading.Timer(bench.budget_s + GRACE, cut)
    timer.daemon = True
    timer.start()
    try:
        with raised() as signalled:
            for name in names:
                _section(name, sections[name], bench, make, report, clock)
                if signalled():  # A library may have taken the signal for an error of its own.
                    break
    except KeyboardInterrupt:
        log("stopped by a signal: what was measured is kept")
        report.stop("a signal stopped it")
    finally:
        timer.cancel()
    if not measured(report):
        raise UserError(f"nothing was measured: every section's reason is in {bench.out}")
    return headline(report, sections, bench.out)


def _section(name: str, section: Section, bench: Bench, make: Make, report: Report, clock: Clock) -> None:
    """One section: its rows, or the reason why there are none."""
    report.begin(name)
    if clock.left() < section.least:
        told = f"{max(0.0, clock.left()):.0f} s of the budget are left, it needs {section.least:.0f}"
        log(f"{name}: skipped, {told}")
        report.end(name, "skipped", told)
        return
    log(f"{name}: {clock.left():.0f} s of the budget are left")
    rows = Rows(report, name, clock, share=section.share * bench.budget_s, least=section.least)
    try:
        section.measure(bench, make, rows)
    except Exception as error:  # A section that fails must not lose the others.
        log(f"{name}: {one_line(error)}")
        report.end(name, "failed", one_line(error))
    else:
        report.end(name, "done" if report.good(name) else "failed")
    jax.clear_caches()  # Compiled programs hold memory of the device.


def measured(report: Report) -> list[str]:
    """The sections that gave a number."""
    return [name for name in report.content["sections"] if report.good(name)]


def headline(report: Report, sections: Mapping[str, Section], out: str) -> dict[str, Any]:
    """A few numbers of every section, and where the rest is."""
    content = report.content
    told: dict[str, Any] = {"out": out, "device": content["hardware"]["device"], "seconds": content["seconds"]}
    for name, found in content["sections"].items():
        section, rows = sections[name], report.good(name)
        values = {label(row, section.key): [row.get(column) for column in section.told] for row in rows}
        told[name] = {"columns": section.told, **values} if rows else reason(found)
    return told


def label(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return " ".join(f"{name}={row[name]}" for name in names if name in row)


def reason(found: Mapping[str, Any]) -> str:
    """Why a section has no number: its own error, or that of its first row."""
    errors = [found["error"]] if "error" in found else [row["error"] for row in found["rows"]]
    return f"{found['status']}: {errors[0] if errors else 'no row'}"
