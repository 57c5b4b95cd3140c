"""Derives width, heads, batch, horizon, learning rates and weight decay from depth, for every stage.

Formulas are nanochat's (July 2026): horizon = 12 tokens per scaling parameter (matrices and head); batch after Power
Lines (arXiv:2505.13738), relative to depth 12. Architectures are in `configs.families`, learning rates in
`configs.rates`.
"""

import dataclasses
import math
from collections.abc import Callable

from configs.families import FAMILIES, REFERENCE_DEPTH, Dial, Family, default
from configs.own_data import replaced
from configs.rates import OCTOBER2025, REFERENCE_BATCH, Budget, Rates, fitted
from jaxchat.data.prepare import Data
from jaxchat.experiment import Experiment
from jaxchat.model import Float8, Int8, Model
from jaxchat.model.counts import parameter_counts
from jaxchat.model.quantized import Matmul
from jaxchat.optimizer import Optimizer
from jaxchat.rl.settings import RL

MATMULS: dict[str, Matmul] = {"dtype": None, "int8": Int8(), "float8": Float8()}

QUESTIONS = ("Why is the sky blue?", "Tom has 3 bags of 12 apples. He eats 5. How many apples are left?")


def family(dial: Dial) -> Family:
    """The family that the dial names or, for "auto", the family for its depth."""
    return FAMILIES[default(dial.depth) if dial.family == "auto" else dial.family]


def model(dial: Dial) -> Model:
    """The architecture of a depth."""
    return family(dial).model(dial)


def rates(dial: Dial) -> Rates:
    """The family's learning rates or, without its own, those of the depth's default."""
    own = family(dial).rates or FAMILIES[default(dial.depth)].rates
    assert own is not None
    return own


def scaling_parameters(dial: Dial) -> int:
    """Number of parameters in the matrices of the layers and the head, in which the horizon is measured; for a family
    without its own rates, that of the depth's default."""
    measured = dial if family(dial).rates else dataclasses.replace(dial, family="auto")
    counts = parameter_counts(model(measured))
    return counts["matrices"] + counts["head"]


def batch_tokens(dial: Dial) -> int:
    """2^19 tokens at depth 12, proportional to the horizon to the power 0.383, rounded to a power of two."""
    if dial.batch_tokens:
        return dial.batch_tokens
    growth = scaling_parameters(dial) / scaling_parameters(_reference(dial))
    return 2 ** round(math.log2(REFERENCE_BATCH * growth**0.383))


def steps(dial: Dial) -> int:
    return dial.steps or max(1, int(dial.ratio * scaling_parameters(dial)) // batch_tokens(dial))


def optimizer(dial: Dial) -> Optimizer:
    """Parameter groups, learning rates and schedule for a depth and batch."""
    parameters = scaling_parameters(dial), scaling_parameters(_reference(dial))
    found = rates(dial).optimizer(Budget(dial.width, batch_tokens(dial), *parameters))
    return found if family(dial).rates else fitted(found, model(dial))


def pretrain(
    dial: Dial, *, name: str, train: tuple[str, ...], val: tuple[str, ...] = (), **fields: object
) -> Experiment:
    """The pretraining experiment of a dial; `fields` sets further fields of Experiment."""
    parts = {"train": train, "val": val} | replaced(dial.train, train, fields)
    data = Data(**parts, vocab=dial.vocab, row_length=dial.row_length)
    experiment = Experiment(
        model=model(dial),
        optimizer=optimizer(dial),
        data=data,
        depth=dial.depth,
        steps=steps(dial),
        batch_tokens=batch_tokens(dial),
        name=name,
        matmul=MATMULS[dial.matmul],
    )
    if isinstance(rows := fields.get("micro_rows"), int):  # A smaller batch needs a smaller micro-batch.
        fields["micro_rows"] = math.gcd(rows, experiment.batch_rows)
    return dataclasses.replace(experiment, **fields)  # type: ignore[arg-type]


def sft(
    base: Experiment,
    dial: Dial,
    *,
    train: tuple[str, ...],
    val: tuple[str, ...] = (),
    epochs: tuple[float, ...] = (),
    scale: float,
    **fields: object,
) -> Experiment:
    """Supervised fine-tuning of a pretraining experiment: its optimizer with another `scale` and no weight decay."""
    parts = {"train": train, "val": val, "epochs": epochs} | replaced(dial.train, train, fields)
    data = dataclasses.replace(base.data, **parts, format="chat", weights=(), packing="best_fit")
    return dataclasses.replace(
        base,
        stage="sft",
        start_from="pretrain",
        data=data,
        optimizer=gentle(base.optimizer, scale, warmdown_fraction=0.5),
        **{"prompts": QUESTIONS} | fields,  # type: ignore[arg-type]
    )


def rl(base: Experiment, settings: RL, *, scale: float, **fields: object) -> Experiment:
    """RL after fine-tuning: the optimizer of pretraining with another `scale`, no weight decay, and decay to 0."""
    return dataclasses.replace(
        base,
        stage="rl",
        start_from="sft",
        rl=settings,
        matmul=None,
        optimizer=gentle(base.optimizer, scale, warmdown_fraction=1.0),
        **fields,  # type: ignore[arg-type]
    )


def gentle(base: Optimizer, scale: float, *, warmdown_fraction: float) -> Optimizer:
    """The optimizer for stages after pretraining: rates times `scale`, no warm-up, decay to 0, no weight decay."""
    groups = {
        field.name: dataclasses.replace(getattr(base, field.name), weight_decay=0.0)
        for field in dataclasses.fields(base)
        if dataclasses.is_dataclass(getattr(base, field.name))
    }
    return dataclasses.replace(
        base,
        **groups,
        scale=scale,
        steps_exponent=0.0,
        warmup_steps=0,
        warmdown_fraction=warmdown_fraction,
        final_fraction=0.0,
    )


def pipeline(
    stage: str, dial: Dial, *, name: str, train: tuple[str, ...], val: tuple[str, ...] = (), **fields: object
) -> Experiment:
    """One stage of the full pipeline: pretraining on text, SFT on nanochat's conversations, RL on GSM8K."""
    base = pretrain(dial, name=name, train=train, val=val, **fields)
    return chosen(
        stage,
        pretrain=lambda: base,
        sft=lambda: sft(
            base,
            dial,
            train=("hub:smoltalk", "hub:mmlu", "hub:gsm8k"),
            epochs=(1.0, 3.0, 4.0),
            scale=rates(dial).sft_scale,
            steps=dial.steps,
            tasks=("gsm8k",),
        ),
        rl=lambda: rl(
            base,
            RL(tasks=("gsm8k",)),
            scale=rates(dial).rl_scale,
            steps=dial.steps,
            tasks=("gsm8k",),
            prompts=QUESTIONS,
        ),
    )


def dials(dial: Dial, *, sft_batch_tokens: int = 2**19, rl_steps: int = 467) -> dict[str, Dial]:
    """The dials of the later stages: SFT takes one pass over the conversations, RL as many steps as nanochat's."""
    return {
        "sft": dataclasses.replace(dial, steps=0, batch_tokens=sft_batch_tokens),
        "rl": dataclasses.replace(dial, steps=rl_steps, batch_tokens=sft_batch_tokens),
    }


def imported(model: Model, length: int, stage: str) -> Experiment:
    """The experiment of imported parameters, with a context of `length` tokens; their training text is unknown."""
    dial = Dial(model.depth, head_dim=model.pattern[0].mixer.head_dim)
    optimizer = OCTOBER2025.optimizer(Budget(dial.width, length))
    data = Data(train=(), vocab=model.vocab, row_length=length)
    return Experiment(model, optimizer, data, model.depth, 1, length, stage=stage, name="imported")


def chosen(stage: str, **stages: Callable[[], Experiment]) -> Experiment:
    """Builds the experiment of a stage; raises `ValueError` for an unknown stage."""
    if stage not in stages:
        raise ValueError(f"unknown stage {stage!r}; expected one of: {', '.join(stages)}")
    return stages[stage]()


def _reference(dial: Dial) -> Dial:
    return dataclasses.replace(dial, depth=REFERENCE_DEPTH)
