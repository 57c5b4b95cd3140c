"""Scores a checkpoint: python -m launch.evaluate --checkpoint=runs/d4/pretrain --tasks core:BUNDLE mmlu:FILES

Tasks: core:DIRECTORY (the DCLM CORE bundle) or one task of it, core/piqa:DIRECTORY; arc_easy:DIRECTORY,
arc_challenge:DIRECTORY, mmlu:DIRECTORY; gsm8k:DIRECTORY; humaneval:DIRECTORY; the built-in arithmetic, spelling and
facts; your own FILE.py:CLASS; bits per byte of texts, bpb:FILES.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxchat import command_line, launcher
from jaxchat.sharding import Mesh


@dataclass(frozen=True)
class Evaluate:
    """Options of launch.evaluate."""

    checkpoint: str = ""  # A stage such as runs/tiny/sft (its latest step), or runs/tiny/sft@300.
    tasks: tuple[str, ...] = ("bpb",)  # Names, see above.
    limit: int = 0  # Number of questions per task, a sample stratified by subject; 0 asks all.
    style: Literal["auto", "chat", "text"] = "auto"
    """Prompt in chat turns or in plain text; auto decides by the stage of the checkpoint."""
    samples: int = 1  # Number of answers per problem.
    temperature: float = 0.0  # 0 is greedy decoding.
    max_tokens: int = 512  # Length limit of an answer.
    seed: int = 0  # Of the sampled answers.
    mode: Literal["nanochat", "dclm"] = "nanochat"  # Prompt format of the CORE tasks.
    slots: int = 64  # Number of answers decoded at the same time.
    mesh: Mesh = Mesh()  # Device mesh; all devices by default.
    out: str = ""  # Directory for results and records; by default eval/ in the checkpoint's directory.
    compare: tuple[str, ...] = ()  # Instead of an evaluation: compare two directories of results, question by question.
    sandbox_check: str = ""
    """Instead of an evaluation: report how HumanEval programs are sandboxed on this machine, and judge the reference
    solutions in this directory."""


def main(argv: list[str]) -> Mapping[str, object] | None:
    options = command_line.parse(Evaluate, argv, description=__doc__)
    from jaxchat.evaluation import asking

    return asking.run(options)


if __name__ == "__main__":
    launcher.run(main, resumes=True)
