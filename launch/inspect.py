"""Looks into a model or into a training step, and writes what it finds as JSON and PNG.

    python -m launch.inspect --checkpoint=runs/tiny/pretrain --text="One morning Mia went to the harbour." --out=DIR
    python -m launch.inspect --checkpoint=runs/tiny/rl --prompt="What is 7 + 5?" --out=DIR
    python -m launch.inspect --run=runs/tiny/pretrain --step=100 --out=DIR

A text: tokens, losses, candidates, attention, logit lens, neighbours of embeddings, cache, merges, and the same text at
every kept step of the run. A step: the documents of its batch and their losses, and the step computed again.
"""

from dataclasses import dataclass
from typing import Literal

from jaxchat import command_line, launcher
from jaxchat.decode.sampling import Truncation


@dataclass(frozen=True, kw_only=True)
class Inspect(Truncation):
    """Options of launch.inspect."""

    checkpoint: str = ""  # A stage such as runs/tiny/pretrain (its latest step), or runs/tiny/pretrain@90.
    text: str | None = None  # The text to look into.
    prompt: str | None = None  # Let the model answer (or continue) this, and look into both.
    run: str = ""  # Instead of a checkpoint: the stage directory of a run, one of whose steps is looked at.
    step: int = 0  # The step of --run, as numbered in metrics.jsonl.
    replay: int = 200  # Maximum number of steps to compute again from the checkpoint before --step.
    out: str = ""  # Directory for the files; by default inspect/ in the stage directory.
    token: int = -1  # Token whose candidates and neighbours are drawn, from 0; negative ones count from the end.
    steps: bool = True  # Also look at the text with every checkpoint and snapshot of the stage.
    style: Literal["auto", "chat", "text"] = "auto"
    """Answer --prompt in turns, or continue it; auto decides by the stage of the checkpoint."""
    temperature: float = 0.8  # 0 is greedy decoding.
    top_k: int = 50  # Keep the k most likely tokens; 0 keeps all.
    top_p: float = 0.95  # Keep the smallest set of tokens with at least this probability; 1 keeps all.
    max_tokens: int = 48  # Length limit of an answer.
    seed: int = 0


def main(argv: list[str]) -> dict[str, object]:
    options = command_line.parse(Inspect, argv, description=__doc__)
    from jaxchat.inspection import report

    return report.run(options)


if __name__ == "__main__":
    launcher.run(main)
