"""tiny: a whole model in minutes on two CPU cores, from an embedded corpus, with no download.

nanochat's July 2026 family at depth 3: width 192, 3 heads of 64, vocabulary 1,024, rows of 256 tokens; 2.1 million
parameters, 450 steps of 2,048 tokens. The corpus is the small village of Pebble Bay (jaxchat/data/tinyworld): stories,
facts, small sums, spelling.

    python -m launch.train --config=configs/tiny.py
    python -m launch.chat --checkpoint=runs/tiny/pretrain --prompt="One morning"
"""

from configs.recipe import Dial, only_pretrain, pretrain
from jaxchat.experiment import Experiment

DIAL = Dial(depth=3, steps=450, batch_tokens=2_048, vocab=1_024, row_length=256, head_dim=64, windows="L")


def get_config(stage: str = "pretrain", dial: Dial = DIAL) -> Experiment:
    only_pretrain(stage)
    return pretrain(
        dial,
        name="tiny",
        train=("tinyworld:train",),
        val=("tinyworld:val",),
        eval_every=150,
        save_every=150,
        micro_rows=8,
        prompts=("One morning", "On Saturday", "Where does Mia live?", "What is 7 + 5?"),
    )
