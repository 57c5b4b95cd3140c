"""Scores a checkpoint: python -m launch.evaluate --checkpoint=runs/d4/pretrain --tasks core:BUNDLE mmlu:FILES

Tasks: core:DIRECTORY (the DCLM CORE bundle) or one of it, core/piqa:DIRECTORY; arc_easy:DIRECTORY,
arc_challenge:DIRECTORY, mmlu:DIRECTORY; gsm8k:DIRECTORY; humaneval:DIRECTORY; arithmetic, spelling and facts of the
built-in village; FILE.py:CLASS of one's own; bpb:FILES.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxchat import command_line, errors, launcher, serialization
from jaxchat.sharding import Mesh


@dataclass(frozen=True)
class Evaluate:
    """Which checkpoint (its latest step, or runs/tiny/sft@300), and what it is asked."""

    checkpoint: str = ""
    tasks: tuple[str, ...] = ("bpb",)
    limit: int = 0
    """Questions of each task; 0 asks all."""
    style: Literal["auto", "chat", "text"] = "auto"
    """Ask in turns, or by texts to go on with; auto: by the stage that the checkpoint comes from."""
    samples: int = 1
    """Answers to each problem."""
    temperature: float = 0.0
    """0 is greedy."""
    max_tokens: int = 512
    """Longest answer."""
    seed: int = 0
    mode: Literal["nanochat", "dclm"] = "nanochat"
    """How CORE's prompts are written."""
    slots: int = 64
    """Answers decoded at once."""
    mesh: Mesh = Mesh()
    """How devices share the work; all of them unless told otherwise."""
    out: str = ""
    """Where results and records go; by default eval/ in the checkpoint's directory."""
    compare: tuple[str, ...] = ()
    """Instead of asking: two directories of results, compared question by question."""
    sandbox_check: str = ""
    """Instead of asking: reports what protects this machine from the programs of HumanEval, whose reference solutions
    in this directory are judged."""


def main(argv: list[str]) -> Mapping[str, object] | None:
    options = command_line.parse(Evaluate, argv, description=__doc__)
    if options.compare:
        from jaxchat.evaluation.compare import compare

        if len(options.compare) != 2:
            raise errors.UserError("--compare takes two directories of results, such as runs/a/sft/eval/500-... twice")
        return compare(Path(options.compare[0]), Path(options.compare[1]))
    if options.sandbox_check:
        from jaxchat.tasks.humaneval import check_sandbox

        return check_sandbox(options.sandbox_check)
    if not options.checkpoint:
        raise errors.UserError("which checkpoint? --checkpoint=runs/tiny/pretrain")
    for name in ("limit", "max_tokens", "samples", "slots"):
        if getattr(options, name) < (0 if name == "limit" else 1):
            raise errors.UserError(f"--{name}={getattr(options, name)} is too small")
    from jaxchat import processes

    with processes.joined():
        return processes.from_first(_evaluate(options))


def _evaluate(options: Evaluate) -> Mapping[str, object]:
    import jax

    from jaxchat import checkpoint, processes
    from jaxchat.data.cache import locked
    from jaxchat.evaluation import evaluate
    from jaxchat.evaluation.published import report
    from jaxchat.evaluation.table import score_table
    from jaxchat.experiment import Experiment
    from jaxchat.loading import load_engine
    from jaxchat.sharding import decoding_mesh

    directory, step = checkpoint.locate(options.checkpoint)
    runs = directory.parent.parent
    jax.config.update("jax_compilation_cache_dir", str((runs / "cache" / "xla").absolute()))
    mesh = decoding_mesh(options.mesh)
    chats = checkpoint.read_experiment(directory, Experiment).chats
    style = options.style if options.style != "auto" else ("chat" if chats else "text")
    if style == "chat" and not chats:
        launcher.log(f"warning: {directory} never saw a conversation: --style=text asks it in the words of a text")
    settings = evaluate.Settings(
        style=style,  # type: ignore[arg-type]
        limit=options.limit or None,
        samples=options.samples,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        seed=options.seed,
        mode=options.mode,
    )
    processes.check_same("what is asked", (options, step), "start all with the same command")
    found = evaluate.jobs(options.tasks, settings, runs / "cache" / "downloads")
    engine = load_engine(f"{directory}@{step}", mesh=mesh, slots=options.slots, prefill_batch=min(8, options.slots))
    about = {"checkpoint": str(directory), "step": step, "length": engine.shape.length}
    mark = hashlib.sha256(json.dumps(serialization.to_json(settings), sort_keys=True).encode()).hexdigest()[:8]
    out = Path(options.out) if options.out else directory / "eval" / f"{step}-{mark}"
    if jax.process_index():
        return evaluate.evaluate(engine, found, settings, out, about, log=lambda _: None)
    refusal = f"another process evaluates into {out}: wait for its end, or give this one its own --out"
    new = not out.exists()
    try:
        with locked(out, launcher.log, refusal=refusal):
            results = evaluate.evaluate(engine, found, settings, out, about, log=launcher.log)
    finally:
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()  # Where nothing was written.
    everything = evaluate.keep(out / "results.json", {**about, "settings": serialization.to_json(settings)}, results)
    score_table(results, sys.stderr)
    if options.mode == "nanochat":  # As those that are published were asked.
        report(out, everything, launcher.log)
    return {"out": str(out), **results}


if __name__ == "__main__":
    launcher.run(main)
