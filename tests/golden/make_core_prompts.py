"""Make core_prompts.json with nanochat's own core_eval: what it asks, character for character.

Run `python tests/golden/make_core_prompts.py CHECKOUT` with a checkout of karpathy/nanochat at 92d63d4, torch and
jinja2 installed. A letter is a token here, so that what is scored can be read.
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), *sys.argv[1:2]]
from core_rows import ROWS, TASKS, bos  # noqa: E402
from nanochat import core_eval  # noqa: E402


class LetterTokenizer:
    """One token a character, after the one that begins a text."""

    def get_bos_token_id(self) -> int:
        return bos

    def __call__(self, prompts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *map(ord, prompt)] for prompt in prompts]


def main() -> None:
    made = {}
    for name, (kind, shots, delimiter) in TASKS.items():
        data = list(ROWS[kind])
        random.Random(1337).shuffle(data)
        short = {"multiple_choice": "mc", "schema": "schema", "language_modeling": "lm"}[kind]
        render = getattr(core_eval, f"render_prompts_{short}")
        batch = getattr(core_eval, f"batch_sequences_{short}")
        asked = []
        for i, item in enumerate(data):
            others = [j for j in range(len(data)) if j != i]
            shown = [data[j] for j in random.Random(1234 + i).sample(others, shots)] if shots else []
            tokens, starts, _ = batch(LetterTokenizer(), render(item, delimiter, shown))
            asked.append([["".join(map(chr, t[1:])), s - 1] for t, s in zip(tokens, starts)])
        made[name] = asked
    text = json.dumps(made, indent=1, ensure_ascii=True) + "\n"
    (HERE / "core_prompts.json").write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
