"""Exports a checkpoint to other formats, or imports one.

    python -m launch.convert --checkpoint=runs/tiny/sft --to=huggingface --out=exported
    python -m launch.convert --checkpoint=runs/tiny/sft --to=stablehlo --out=programs
    python -m launch.convert --checkpoint=runs/tiny/sft --to=tokenizer --out=tokenizer
    python -m launch.convert --checkpoint=exported --from=huggingface --out=runs/imported/sft
    python -m launch.convert --checkpoint=~/.cache/nanochat/base_checkpoints/d20 --from=nanochat --out=runs/d20/pretrain

docs/export.md lists the families of transformers that are imported and exported; other models can be scored by
launch.harness and exported as StableHLO. To train an imported model: launch.train --start_from=runs/imported/sft.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jaxchat import command_line, launcher
from jaxchat.paths import check_local


@dataclass(frozen=True)
class Convert:
    """Options of launch.convert."""

    checkpoint: str
    """A stage such as runs/tiny/sft (its latest step), or runs/tiny/sft@300; with --from, the directory to import."""
    out: str  # Directory to create; with --from, a stage such as runs/imported/pretrain.
    to: Literal["huggingface", "stablehlo", "tokenizer"] | None = None
    """Format to export to; tokenizer: tokenizer.json and chat template without weights."""
    source: Annotated[Literal["huggingface", "nanochat"] | None, tyro.conf.arg(name="from")] = None
    """Format to import from; nanochat: its own directories of model_STEP.pt, the newest or DIR@STEP."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights; with --to=stablehlo also of the matrix products, with --from also of decoding."""
    tokenizer: str | None = None
    """With --from: directory of a jaxchat tokenizer, or of nanochat's tokenizer.pkl, if that of the model has none."""
    rows: int = 0  # With --to=stablehlo: batch size; 0 is 1.
    length: int = 0  # With --to=stablehlo: context length; 0 is the row length of training.
    prefill_chunk: int = 0  # With --to=stablehlo: maximum number of prompt tokens per prefill call; 0 is 128.

    def __post_init__(self) -> None:
        check_local("out", self.out)


def main(argv: list[str]) -> dict[str, object]:
    options = command_line.parse(Convert, argv, description=__doc__)
    from configs.recipe import imported
    from jaxchat.export import convert

    return convert.run(options, imported)


if __name__ == "__main__":
    launcher.run(main)
