"""Chats with a checkpoint: python -m launch.chat --checkpoint=runs/tiny/pretrain [--prompt="One day"]

A base model continues the prompt; a chat model answers it. Without --prompt, it reads one turn per line from standard
input; /help lists the commands.
"""

from dataclasses import dataclass
from typing import Literal

from jaxchat import command_line, launcher
from jaxchat.decode.sampling import Truncation


@dataclass(frozen=True, kw_only=True)
class Chat(Truncation):
    """Options of launch.chat."""

    checkpoint: str  # A stage such as runs/tiny/pretrain (its latest step), or runs/tiny/pretrain@300.
    prompt: str | None = None  # The text to continue or to answer.
    score: str | None = None  # Print the probability of each token of this text instead of answering.
    explain: bool = False  # Print the candidates for each token of the answer, with their probabilities.
    style: Literal["auto", "chat", "text"] = "auto"
    """Chat in turns, or continue a text; auto decides by the stage of the checkpoint."""
    sampling: Literal["greedy", "plain", "course"] | None = None
    """Preset that replaces --temperature, --top_k and --top_p: greedy; plain (temperature 1); or course (temperature 1,
    top-k 50, top-p 0.95)."""
    temperature: float = 0.8  # 0 is greedy decoding: always the most likely token.
    top_k: int = 50  # Keep the k most likely tokens; 0 keeps all.
    top_p: float = 0.95  # Keep the smallest set of tokens with at least this probability; 1 keeps all.
    repetition_penalty: float = 1.0  # Above 1, makes tokens of the prompt and the answer less likely.
    stop: tuple[str, ...] = ()  # Texts at which the answer ends.
    max_tokens: int = 128  # Length limit of an answer.
    seed: int = 0  # Of the sampled tokens.
    num_samples: int = 1  # Number of answers to --prompt.
    beams: int = 0  # Beam search for the best answer to --prompt with this many beams, instead of sampling.
    speculative: bool = False
    """Guess tokens that repeat earlier text; faster for repetitive text, and does not change the tokens."""
    draft: str = ""
    """Checkpoint of a smaller model with the same tokenizer, which guesses tokens for speculative decoding."""
    tools: tuple[str, ...] | None = None
    """Tools that the model may call; by default a chat model has all (calculator), and `--tools` alone means none."""


def main(argv: list[str]) -> dict[str, object] | None:
    chat = command_line.parse(Chat, argv, description=__doc__)
    from jaxchat import terminal

    return terminal.run(chat)


if __name__ == "__main__":
    launcher.run(main)
