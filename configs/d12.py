"""d12: the size at which nanochat's learning rates were tuned; about an hour on one GPU.

nanochat's July 2026 family at depth 12: width 768, 6 heads of 128, three layers of four with a window of 512, value
embeddings on every other layer, vocabulary 32,768, rows of 2,048 tokens; 286,261,730 parameters. 2,520 steps of 524,288
tokens (12 tokens per scaling parameter) = 1.32 billion tokens, 1.0e18 FLOPs. At 45 percent of the H100's 989 TFLOP/s
that is 38 minutes on one H100 (calculated, not measured). The score was not measured here; nanochat's own d12 is
reported to reach 0.868 bits per byte after 1.0 billion tokens.

    python -m launch.train --config=configs/d12.py

downloads 28 shards of ClimbMix (about 100 MB each) to runs/cache; --data.train and --data.val select other text.
"""

from configs.recipe import Dial, dials, pipeline
from jaxchat.experiment import Experiment

DIAL = Dial(depth=12, ratio=12.0)
DIALS = dials(DIAL)


def get_config(stage: str = "pretrain", dial: Dial = DIAL) -> Experiment:
    return pipeline(stage, dial, name="d12", train=("hub:climbmix:28",), val=("hub:climbmix",))
