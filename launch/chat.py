"""Talks with a checkpoint: python -m launch.chat --checkpoint=runs/tiny/pretrain [--prompt="One day"]

A base model continues the prompt; a chat model answers it. Without a prompt the words come from standard input, one
turn a line; /help names the commands.
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from jaxchat import command_line, launcher
from jaxchat.decode.sampling import Truncation


@dataclass(frozen=True, kw_only=True)
class Chat(Truncation):
    """Which checkpoint (its latest step, or runs/tiny/pretrain@300), what to say to it, and how it answers."""

    checkpoint: str
    prompt: str | None = None
    score: str | None = None
    """Print the probability of each token of this text instead of answering."""
    explain: bool = False
    """Print for each token of the answer what it was chosen from."""
    style: Literal["auto", "chat", "text"] = "auto"
    """Speak in turns, or continue a text; auto: by the stage that the checkpoint comes from."""
    sampling: Literal["greedy", "plain", "course"] | None = None
    """greedy; temperature 1; or temperature 1, top-k 50, top-p 0.95: instead of --temperature, --top_k and --top_p."""
    temperature: float = 0.8
    """0 is greedy: the most likely token each time."""
    top_k: int = 50
    """Keep the k most likely tokens; 0 keeps every one."""
    top_p: float = 0.95
    """Keep the smallest set of tokens with at least this probability."""
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts at which the answer ends."""
    max_tokens: int = 128
    seed: int = 0
    num_samples: int = 1
    """How many answers to --prompt."""
    beams: int = 0
    """Search for the best answer to --prompt with so many beams; sampling options change nothing then."""
    speculative: bool = False
    """Guess tokens from the text so far; faster where it repeats itself, and changes no token."""
    draft: str = ""
    """A checkpoint of a smaller model with the same tokenizer: it guesses tokens, which the model verifies."""
    tools: tuple[Literal["calculator"], ...] = field(default_factory=tuple)
    """What a chat model may call."""


def main(argv: list[str]) -> dict[str, object] | None:
    chat = command_line.parse(Chat, argv, description=__doc__)
    from jaxchat import terminal

    return terminal.run(chat, lines=(line.rstrip("\n") for line in sys.stdin))


if __name__ == "__main__":
    launcher.run(main)
