"""d24: the size at which nanochat reaches about the CORE score of GPT-2.

nanochat's July 2026 family at depth 24: width 1,536, 12 heads of 128, three layers of four with a window of 512, value
embeddings on every other layer, vocabulary 32,768, rows of 2,048 tokens; 1,384,122,122 parameters. 5,568 steps of
1,048,576 tokens (8 tokens per scaling parameter) = 5.84 billion tokens, 2.8e19 FLOPs. At 45 percent of the H100's 989
TFLOP/s that is 17 hours on one H100 or 2.2 hours on eight (calculated, not measured). The score was not measured;
nanochat's own runs reached 0.718 bits per byte and CORE 0.2626 (mean of five) in 1.65 hours on eight H100, in fp8.

    python -m launch.train --config=configs/d24.py

downloads 125 shards of ClimbMix (about 100 MB each) to runs/cache; --data.train and --data.val select other text.
"""

from configs.recipe import Dial, dials, pipeline
from jaxchat.experiment import Experiment

DIAL = Dial(depth=24, ratio=8.0)
DIALS = dials(DIAL)


def get_config(stage: str = "pretrain", dial: Dial = DIAL) -> Experiment:
    return pipeline(stage, dial, name="d24", train=("hub:climbmix:125",), val=("hub:climbmix",))
