"""d20: the size of nanochat's 100 dollar chat model, with its latest architecture.

nanochat's July 2026 family at depth 20: width 1,280, 10 heads of 128, three layers of four with a window of 512, value
embeddings on every other layer, vocabulary 32,768, rows of 2,048 tokens; 896,533,746 parameters. 3,320 steps of
1,048,576 tokens (8 tokens per scaling parameter) = 3.48 billion tokens, 1.0e19 FLOPs. At 45 percent of the H100's 989
TFLOP/s that is 6.3 hours on one H100 or 47 minutes on eight (calculated, not measured). The score was not measured;
nanochat's own run of this recipe reached 0.755 bits per byte and CORE 0.236 in about 5.2 hours on one H100, in fp8.

    python -m launch.train --config=configs/d20.py

downloads 75 shards of ClimbMix (about 100 MB each) to runs/cache; --data.train and --data.val select other text.
"""

from configs.recipe import Dial, dials, pipeline
from jaxchat.experiment import Experiment

DIAL = Dial(depth=20, ratio=8.0)
DIALS = dials(DIAL)


def get_config(stage: str = "pretrain", dial: Dial = DIAL) -> Experiment:
    return pipeline(stage, dial, name="d20", train=("hub:climbmix:75",), val=("hub:climbmix",))
