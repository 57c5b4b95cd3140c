"""d32: the largest configuration.

nanochat's July 2026 family at depth 32: width 2,048, 16 heads of 128, three layers of four with a window of 512, value
embeddings on every other layer, vocabulary 32,768, rows of 2,048 tokens; 2,818,575,450 parameters. 9,600 steps of
2,097,152 tokens (12 tokens per scaling parameter) = 20.1 billion tokens, 2.2e20 FLOPs. At 45 percent of the H100's 989
TFLOP/s that is 135 hours on one H100 or 17 hours on eight (calculated, not measured). The score is unknown: it was not
measured here, and none is published for this recipe.

    python -m launch.train --config=configs/d32.py

downloads 430 shards of ClimbMix (about 100 MB each) to runs/cache; --data.train and --data.val select other text.
"""

from configs.recipe import Dial, dials, pipeline
from jaxchat.experiment import Experiment

DIAL = Dial(depth=32, ratio=12.0)
DIALS = dials(DIAL)


def get_config(stage: str = "pretrain", dial: Dial = DIAL) -> Experiment:
    return pipeline(stage, dial, name="d32", train=("hub:climbmix:430",), val=("hub:climbmix",))
