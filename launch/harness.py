"""Scores a checkpoint on tasks of lm-evaluation-harness (extra `harness`).

    python -m launch.harness --checkpoint=runs/d4/pretrain --tasks my_task --include_path=my_tasks

Tasks are names of lm-eval's tasks, or of YAML task files in --include_path, which may read local files.
"""

from dataclasses import dataclass

from jaxchat import command_line, launcher


@dataclass(frozen=True)
class Harness:
    """Options of launch.harness."""

    checkpoint: str  # A stage such as runs/tiny/sft (its latest step), or runs/tiny/sft@300.
    tasks: tuple[str, ...]  # Names, see above.
    include_path: str | None = None  # Directory of additional task files (YAML).
    limit: int | None = None  # Number of examples per task, the first ones as lm-eval takes them; None takes all.
    num_fewshot: int | None = None  # Number of few-shot examples in each prompt; None takes the task's own.
    chat: bool = False  # Apply the chat template, for fine-tuned models.
    max_tokens: int = 0  # Length limit of generated answers; 0 takes the task's own.
    length: int = 0  # Context length; 0 is the row length of training.
    bootstrap: int = 1000  # Number of bootstrap resamples for standard errors without a formula.
    out: str | None = None  # Directory for results.json and a record of every example.


def main(argv: list[str]) -> dict[str, object]:
    options = command_line.parse(Harness, argv, description=__doc__)
    from jaxchat.evaluation import harness

    return harness.run(options)


if __name__ == "__main__":
    launcher.run(main)
