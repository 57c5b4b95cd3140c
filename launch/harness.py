"""Scores a checkpoint on tasks of lm-evaluation-harness (extra `harness`).

    python -m launch.harness --checkpoint=runs/d4/pretrain --tasks my_task --include_path=my_tasks

Tasks are lm-eval's names, or those of YAML files in --include_path, which may read local files.
"""

from dataclasses import dataclass

from jaxchat import command_line, launcher


@dataclass(frozen=True)
class Harness:
    """Which checkpoint, which tasks, and how they are asked."""

    checkpoint: str
    """A stage such as runs/tiny/sft (its latest step), or runs/tiny/sft@300."""
    tasks: tuple[str, ...]
    include_path: str | None = None
    """A directory of task files (YAML) beside lm-eval's own."""
    limit: int | None = None
    """Examples of each task; none takes all."""
    num_fewshot: int | None = None
    """Solved examples before each question; none leaves it to the task."""
    chat: bool = False
    """Ask in turns, by the chat template: for models that were fine-tuned."""
    max_tokens: int = 0
    """Longest generated answer; 0 leaves it to the task."""
    length: int = 0
    """The context; 0 is the length that the model was trained at."""
    bootstrap: int = 1000
    """Resamples behind each standard error that has no formula."""
    out: str | None = None
    """Directory for results.json and every example."""


def main(argv: list[str]) -> dict[str, object]:
    options = command_line.parse(Harness, argv, description=__doc__)
    from jaxchat.evaluation import harness

    return harness.run(options)


if __name__ == "__main__":
    launcher.run(main)
