"""Continues a text with a checkpoint: python -m launch.chat --checkpoint=runs/tiny/pretrain --prompt="One day"

Without a prompt it reads one a line from standard input.
"""

import sys
from dataclasses import dataclass

from jaxchat import config


@dataclass(frozen=True)
class Chat:
    """Which checkpoint (its latest step, or runs/tiny/pretrain@300), what to continue, and how to sample."""

    checkpoint: str
    prompt: str | None = None
    temperature: float = 0.8
    """0 is greedy: the most likely token each time."""
    top_k: int = 50
    """0 keeps every token."""
    top_p: float = 0.95
    max_tokens: int = 128
    seed: int = 0


def main(argv: list[str]) -> dict[str, object] | None:
    chat = config.parse(Chat, argv, description=__doc__)
    from jaxchat.decode.engine import load_engine
    from jaxchat.decode.sampling import SamplingParams
    from jaxchat.experiment import Experiment

    sampling = SamplingParams(chat.temperature, chat.top_k, chat.top_p, max_tokens=chat.max_tokens, seed=chat.seed)
    engine = load_engine(chat.checkpoint, Experiment)
    if chat.prompt is None:
        print("type the beginning of a text; an empty line ends", file=sys.stderr)
        for line in iter(lambda: sys.stdin.readline().rstrip("\n"), ""):
            print(line + engine.complete(line, sampling).text, flush=True)
        return None
    answer = engine.complete(chat.prompt, sampling)
    print(chat.prompt + answer.text)
    return {
        "text": answer.text,
        "tokens": len(answer.tokens),
        "tokens_per_second": round(len(answer.tokens) / answer.seconds, 1),
        "finish_reason": answer.finish_reason,
    }


if __name__ == "__main__":
    config.run(main)
