"""Scores a checkpoint: python -m launch.evaluate --checkpoint=runs/d4/pretrain --tasks core:BUNDLE mmlu:FILES

Tasks: core:DIRECTORY (the DCLM CORE bundle) or one of it, core/piqa:DIRECTORY; arc_easy:DIRECTORY,
arc_challenge:DIRECTORY, mmlu:DIRECTORY; gsm8k:DIRECTORY; humaneval:DIRECTORY; arithmetic, spelling and facts of the
built-in village; FILE.py:CLASS of one's own; bpb:FILES.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxchat import command_line, errors, launcher
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
    from jaxchat.evaluation import asking

    with processes.joined():
        return processes.from_first(asking.run(options))


if __name__ == "__main__":
    launcher.run(main)
