"""Derives width, heads, batch, horizon, learning rates and weight decay from depth.

Formulas are nanochat's (July 2026): horizon = 12 tokens per scaling parameter (matrices and head); batch after Power
Lines (arXiv:2505.13738); learning rates grow with the square root of the batch; weight decay keeps batch / (rate *
decay * horizon) constant (arXiv:2405.13698). The last three are relative to depth 12. Below depth 12, learning rates
and weight decay are those of `_november2026_optimizer`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from configs.own_data import replaced
from jaxchat.data.prepare import Data
from jaxchat.experiment import Experiment
from jaxchat.model import (
    GQA,
    Backout,
    Float8,
    Int8,
    Layer,
    Model,
    ReluSquared,
    ResidualScales,
    RMSNorm,
    RoPE,
    Smear,
    ValueEmbedding,
)
from jaxchat.model.counts import parameter_counts
from jaxchat.model.quantized import Matmul
from jaxchat.optimizer import AdamW, Muon, Optimizer
from jaxchat.rl.settings import RL

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19
REFERENCE_DECAY = 0.28
SMALL_BATCH = 2**18  # Tokens per step; nanochat's rule for the rates was not fitted below.
BATCH_EXPONENT = 0.1
STEPS_EXPONENT = 0.7
MATMULS: dict[str, Matmul] = {"dtype": None, "int8": Int8(), "float8": Float8()}

QUESTIONS = ("Why is the sky blue?", "Tom has 3 bags of 12 apples. He eats 5. How many apples are left?")


@dataclass(frozen=True)
class Dial:
    """The numbers from which an experiment is derived. `steps` and `batch_tokens` are derived from depth if 0.

    Attributes:
        family: a row of FAMILIES. "july2026" is nanochat's latest architecture and optimizer; "october2025" its
            original, which transformers has as NanoChatForCausalLM; "november2026" July's with a value embedding in
            every layer and an optimizer for small models. "auto" is november2026 below depth 12, otherwise july2026.
        train: training data instead of the configuration's. Its held-out data, epochs and prompts are dropped too,
            unless all entries of `train` are of the same data sets.
        ratio: training tokens per scaling parameter.
        matmul: number format of the layers' large products in pretraining and SFT; "dtype" is the experiment's
            `dtype`, which RL always uses.
        windows: "SSSL" gives three layers of four a window of a quarter row; "L" gives none a window.
    """

    depth: int
    family: Literal["auto", "november2026", "july2026", "october2025"] = "auto"
    steps: int = 0
    batch_tokens: int = 0
    train: Annotated[tuple[str, ...], tyro.conf.arg(name="data.train")] = ()
    vocab: Annotated[int, tyro.conf.arg(name="data.vocab")] = 32768
    row_length: Annotated[int, tyro.conf.arg(name="data.row_length")] = 2048
    ratio: float = 12.0
    head_dim: int = 128
    windows: Literal["SSSL", "L"] = "SSSL"
    matmul: Literal["dtype", "int8", "float8"] = "dtype"

    def __post_init__(self) -> None:
        for name in ("depth", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio} must be positive and finite")
        for name in ("steps", "batch_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive, or 0 to derive")


def width(dial: Dial) -> int:
    """64 per layer, rounded up to a multiple of `head_dim`."""
    return math.ceil(64 * dial.depth / dial.head_dim) * dial.head_dim


def family(dial: Dial) -> "Family":
    """The family that the dial names or, for "auto", the family for its depth."""
    small = "november2026" if dial.depth < REFERENCE_DEPTH else "july2026"
    return FAMILIES[small if dial.family == "auto" else dial.family]


def model(dial: Dial) -> Model:
    """The architecture of a depth."""
    return family(dial).model(dial)


def scaling_parameters(dial: Dial) -> int:
    """Number of parameters in the matrices of the layers and the head, in which the horizon is measured."""
    counts = parameter_counts(model(dial))
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
    return family(dial).optimizer(dial)


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
            scale=family(dial).sft_scale,
            steps=dial.steps,
            tasks=("gsm8k",),
        ),
        rl=lambda: rl(
            base,
            RL(tasks=("gsm8k",)),
            scale=family(dial).rl_scale,
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
    dial = Dial(
        depth=model.depth,
        family="october2025",
        steps=1,
        batch_tokens=length,
        vocab=model.vocab,
        row_length=length,
        head_dim=model.pattern[0].mixer.head_dim,
    )
    data = Data(train=(), vocab=model.vocab, row_length=length)
    return Experiment(model, optimizer(dial), data, model.depth, 1, length, stage=stage, name="imported")


def chosen(stage: str, **stages: Callable[[], Experiment]) -> Experiment:
    """Builds the experiment of a stage; raises `ValueError` for an unknown stage."""
    if stage not in stages:
        raise ValueError(f"unknown stage {stage!r}; expected one of: {', '.join(stages)}")
    return stages[stage]()


def _reference(dial: Dial) -> Dial:
    return dataclasses.replace(dial, depth=REFERENCE_DEPTH)


def _by_width(dial: Dial) -> float:
    """Factor of the learning rates of embedding tables and head: (width / 768)^-0.5."""
    return (width(dial) / 768) ** -0.5


def _november2026_optimizer(dial: Dial) -> Optimizer:
    """July's rates at its reference batch, times sqrt(1/2) (batch / 2^18)^0.1 (2520 / steps)^0.7.

    The law is fitted on the runs of docs/small_models.md and replaces nanochat's sqrt(batch / 2^19) below 2^18 tokens
    per step; the two agree at 2^18 tokens and 2,520 steps. With more than a tenth of July's rate for x0_scale or a
    fortieth for scalars the loss can jump. Lower momentum and b1 average gradients over fewer steps. The optimizer
    applies the steps' factor itself, so that a run can be extended. Later stages set `scale` instead.
    """
    if (batch := batch_tokens(dial)) >= SMALL_BATCH:
        return _july2026_optimizer(dial)
    base = _july2026_optimizer(dataclasses.replace(dial, batch_tokens=REFERENCE_BATCH))
    return dataclasses.replace(
        base,
        muon=Muon(0.02, 0.2, momentum=0.90, momentum_warmup=50),
        **{name: dataclasses.replace(getattr(base, name), b1=0.6) for name in ("head", "embed", "value_embeddings")},
        x0_scale=AdamW(0.05, 0.96, 0.95),
        scalars=AdamW(0.005, 0.8, 0.95),
        warmup_steps=10,
        scale=math.sqrt(SMALL_BATCH / REFERENCE_BATCH) * (batch / SMALL_BATCH) ** BATCH_EXPONENT,
        steps_exponent=STEPS_EXPONENT,
    )


def _july2026_optimizer(dial: Dial) -> Optimizer:
    """nanochat's rates: proportional to sqrt(batch); those of tables and head also to 1 / sqrt(width)."""
    by_batch, by_width = math.sqrt(batch_tokens(dial) / REFERENCE_BATCH), _by_width(dial)
    decay = REFERENCE_DECAY * by_batch * scaling_parameters(_reference(dial)) / scaling_parameters(dial)
    return Optimizer(
        muon=Muon(0.02 * by_batch, decay),
        head=AdamW(0.008 * by_width * by_batch, 0.8, 0.96, 0.01),
        embed=AdamW(0.3 * by_width * by_batch, 0.8, 0.995, 0.001),
        value_embeddings=AdamW(0.15 * by_width * by_batch, 0.8, 0.995, 0.01),
        resid_scale=AdamW(0.005 * by_batch, 0.8, 0.95, 0.05),
        x0_scale=AdamW(0.5 * by_batch, 0.96, 0.95),
        scalars=AdamW(0.2, 0.8, 0.95),
    )


def _october2025_optimizer(dial: Dial) -> Optimizer:
    by_width = _by_width(dial)
    table = AdamW(0.2 * by_width, 0.8, 0.95)
    plain = AdamW(0.005)
    return Optimizer(
        muon=Muon(0.02, 0.0, 0.85, 0.95, 0.95, 300, 0.9, False, False, False, False),
        head=AdamW(0.004 * by_width, 0.8, 0.95),
        embed=table,
        value_embeddings=table,
        resid_scale=plain,
        x0_scale=plain,
        scalars=plain,
        warmup_steps=0,
        warmdown_fraction=0.2,
        final_fraction=0.0,
        clip=1.0,
    )


def _july2026(dial: Dial, value_embedding_every: int = 2) -> Model:
    """nanochat's, with a value embedding in every other layer, or as set for November (docs/small_models.md)."""
    M = width(dial)
    heads = M // dial.head_dim
    short = math.ceil(dial.row_length / 4 / 128) * 128

    def mixer(layer: int) -> GQA:
        local = dial.windows == "SSSL" and layer % 4 != 3 and layer != dial.depth - 1
        return GQA(
            heads=heads,
            kv_heads=heads,
            head_dim=dial.head_dim,
            window=short if local else None,
            positions=RoPE(100_000.0),
            qk_norm=RMSNorm(),
            qk_scale=1.2,
            value_embedding=ValueEmbedding() if (dial.depth - 1 - layer) % value_embedding_every == 0 else None,
        )

    # A scan needs equal repeats; shallower models, which are unrolled, keep parameters of one stack per layer.
    period = 4 if dial.depth % 4 == 0 or _loop(dial) == "scan" else dial.depth
    layers = [Layer(mixer(i), ReluSquared(4 * M)) for i in range(dial.depth)]
    return Model(
        vocab=dial.vocab,
        width=M,
        depth=dial.depth,
        pattern=tuple(layers[:period]),
        tail=tuple(layers[dial.depth - dial.depth % period :]),
        residual_scales=ResidualScales(),
        smear=Smear(),
        backout=Backout(),
        layer_loop=_loop(dial),
    )


def _october2025(dial: Dial) -> Model:
    M = width(dial)
    heads = M // dial.head_dim
    mixer = GQA(heads=heads, kv_heads=heads, head_dim=dial.head_dim, init="normal")
    return Model(
        vocab=dial.vocab,
        width=M,
        depth=dial.depth,
        pattern=(Layer(mixer, ReluSquared(4 * M, init="normal", init_scale=1.0)),),
        embed_std=1.0,
        head_std=0.0,
        isolate_documents=False,
        layer_loop=_loop(dial),
    )


def _loop(dial: Dial) -> Literal["scan", "unroll"]:
    """Deep models scan over the layers, which compiles much faster."""
    return "scan" if dial.depth >= 12 else "unroll"


@dataclass(frozen=True)
class Family:
    """Functions from a dial to an architecture and an optimizer."""

    model: Callable[[Dial], Model]
    optimizer: Callable[[Dial], Optimizer]
    sft_scale: float = 0.8  # `optimizer.scale` of SFT; the default is nanochat's.
    rl_scale: float = 0.05  # `optimizer.scale` of RL; the default is nanochat's.


FAMILIES = {
    "november2026": Family(
        functools.partial(_july2026, value_embedding_every=1), _november2026_optimizer, sft_scale=0.25, rl_scale=0.125
    ),
    "july2026": Family(_july2026, _july2026_optimizer),
    "october2025": Family(_october2025, _october2025_optimizer),
}
