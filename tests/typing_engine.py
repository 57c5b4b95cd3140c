"""An engine that says what a script returns, token by token, for tests of what is shown while an answer comes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from exports import tokenizer

from jaxchat.decode.engine import Engine


class Typing(Engine):
    """Says what `script` returns for the text of a prompt, parts that are names of special tokens as such."""

    script: Callable[[str], list[str]] = staticmethod(lambda prompt: ["Yes."])
    pause = 0.0  # Seconds per step.
    per_step = 2

    def step(self, **options: Any) -> bool:
        time.sleep(self.pause)
        for samples in self._waiting:
            for sample in samples:
                if not hasattr(sample, "script"):
                    sample.script = said(type(self).script(tokenizer().decode(sample.prompt, keep_specials=True)))
                for _ in range(self.per_step):
                    sample.read_output()
                    if not sample.finish_reason and sample.output is None:
                        sample.give(0 if sample.forced else next(sample.script), -0.5, -0.5)
        waiting = [samples for samples in self._waiting if not all(sample.finish_reason for sample in samples)]
        self._waiting.clear()
        self._waiting.extend(waiting)
        return bool(waiting)


def said(parts: list[str]) -> Iterator[int]:
    """Tokens of texts and names of special tokens, and the end."""
    words = tokenizer()
    for part in (*parts, "<|assistant_end|>"):
        yield from [words.specials[part]] if part in words.specials else words.encode(part)
