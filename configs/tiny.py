"""tiny: a complete chat model in minutes on two CPU cores, from built-in text, with no download.

The November 2026 family at depth 3: width 192, 3 heads of 64, vocabulary 2,048, rows of 256 tokens; 3.3 million
parameters, 450 steps of 2,048 tokens. The corpus is about the village of Pebble Bay (jaxchat/data/tinyworld): stories,
facts, small sums, spelling. SFT trains on conversations about it and on sums, some answered directly and some with a
calculator, mixed with some pretraining text. RL trains on sums with new numbers, directly or with the calculator.

    python -m launch.train --config=configs/tiny.py
    python -m launch.train --config=configs/tiny.py:sft
    python -m launch.train --config=configs/tiny.py:rl
    python -m launch.chat --checkpoint=runs/tiny/rl --prompt="What is 7 + 5?"
"""

from configs.recipe import Dial, chosen, dials, pretrain, rates, rl, sft
from jaxchat.experiment import Experiment
from jaxchat.rl.settings import RL

DIAL = Dial(depth=3, steps=450, batch_tokens=2_048, vocab=2_048, row_length=256, head_dim=64, windows="L")
DIALS = dials(DIAL, sft_batch_tokens=2_048, rl_steps=20)
QUESTIONS = ("Where does Mia live?", "What is 7 + 5?", "Tom has 9 apples. He gives Mia 4. How many are left?")


def get_config(stage: str = "pretrain", dial: Dial = DIAL) -> Experiment:
    base = pretrain(
        dial,
        name="tiny",
        train=("tinyworld:train",),
        val=("tinyworld:val",),
        eval_every=75,
        eval_rows=64,
        save_every=150,
        keep_params=10,
        micro_rows=8,
        prompts=("One morning", "On Saturday", "Where does Mia live?", "What is 7 + 5?"),
    )
    return chosen(
        stage,
        pretrain=lambda: base,
        sft=lambda: sft(
            base,
            dial,
            train=("tinyworld:chat", "text:tinyworld:train"),
            epochs=(1.0, 0.04),
            val=("tinyworld:chat",),
            scale=rates(dial).sft_scale,
            eval_every=0,
            steps=dial.steps,
            prompts=QUESTIONS,
            tasks=("arithmetic",),
            eval_problems=512,
            eval_tokens=48,
        ),
        rl=lambda: rl(
            base,
            RL(tasks=("arithmetic",), prompts=16, samples=16, max_tokens=48),
            scale=rates(dial).rl_scale,
            steps=dial.steps,
            prompts=QUESTIONS,
            tasks=("arithmetic",),
            eval_problems=512,
            eval_tokens=48,
            eval_every=20,
            save_every=20,
        ),
    )
