"""d4: the smallest model for real text; it trains on two CPU cores.

The November 2026 family at depth 4: width 256, 4 heads of 64, full windows, vocabulary 10,240, rows of 512
tokens; 18.9 million parameters, 1,200 steps of 8,192 tokens. To train on local text:

    python -m launch.train --config=configs/d4.py \\
        --data.train BOOKS/train-*.jsonl.gz --data.val BOOKS/val.jsonl.gz
"""

from configs.recipe import Dial, dials, pipeline
from jaxchat.experiment import Experiment

DIAL = Dial(depth=4, steps=1200, batch_tokens=8_192, vocab=10_240, row_length=512, ratio=12.0, head_dim=64, windows="L")
DIALS = dials(DIAL, sft_batch_tokens=16_384, rl_steps=100)


def get_config(stage: str = "pretrain", dial: Dial = DIAL) -> Experiment:
    return pipeline(stage, dial, name="d4", train=("hub:fineweb-edu:1",), eval_every=100, save_every=100, micro_rows=8)
