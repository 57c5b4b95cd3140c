"""tiny: a whole model in minutes on two CPU cores, from an embedded corpus, with no download.

nanochat's July 2026 family at depth 4, width 128, vocabulary 1,024, rows of 256 tokens. The corpus is a small village
of people, animals and things (jaxchat/data/tinyworld): stories, facts, small sums, spelling.

    python -m launch.train --config=configs/tiny.py
    python -m launch.chat --checkpoint=runs/tiny/pretrain --prompt="One day"
"""

from configs.recipe import Dial, only_pretrain, pretrain
from jaxchat.experiment import Experiment

DIAL = Dial(depth=2, steps=300, batch_tokens=8_192, vocab=1_024, row_length=256, head_dim=32, windows="L")


def get_config(stage: str = "pretrain", dial: Dial = DIAL) -> Experiment:
    only_pretrain(stage)
    return pretrain(
        dial,
        name="tiny",
        train=("tinyworld:train",),
        val=("tinyworld:val",),
        eval_every=100,
        save_every=100,
        micro_rows=8,
    )
