"""Takes a model to other programs, and from them.

    python -m launch.convert --checkpoint=runs/tiny/sft --to=huggingface --out=exported
    python -m launch.convert --checkpoint=runs/tiny/sft --to=stablehlo --out=programs
    python -m launch.convert --checkpoint=exported --from=huggingface --out=runs/imported/sft

transformers knows the family of October 2025 (--family=october2025); the other can be scored by launch.harness and
exported as StableHLO. What was imported is continued by launch.train with --start_from=runs/imported/sft.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jaxchat import command_line, launcher


@dataclass(frozen=True)
class Convert:
    """Which checkpoint becomes what, and where."""

    checkpoint: str
    """A stage such as runs/tiny/sft, or runs/tiny/sft@300; with --from, the directory to read."""
    out: str
    """A new directory; with --from a stage such as runs/imported/pretrain."""
    to: Literal["huggingface", "stablehlo"] | None = None
    source: Annotated[Literal["huggingface"] | None, tyro.conf.arg(name="from")] = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; with --to=stablehlo of the programs' matrix products as well."""
    tokenizer: str | None = None
    """With --from: the directory of a jaxchat tokenizer, where the one to read has none."""
    rows: int = 0
    """With --to=stablehlo: texts decoded at once; 0 is one."""
    length: int = 0
    """With --to=stablehlo: the context; 0 is the length that the model was trained at."""
    piece: int = 0
    """With --to=stablehlo: tokens that one call of prefill reads; 0 is 128."""


def main(argv: list[str]) -> dict[str, object]:
    options = command_line.parse(Convert, argv, description=__doc__)
    from configs.recipe import imported
    from jaxchat.export import convert

    return convert.run(options, imported)


if __name__ == "__main__":
    launcher.run(main)
