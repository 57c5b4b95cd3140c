"""Training speed of the October 2025 family, beside the same model in transformers under torch.compile.

Both sides start from the same weights, take the same AdamW steps on the same tokens in the same type, in short blocks
that alternate, so that a busy machine slows both; both losses are reported, which shows that the work was the same.
"""

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxchat import compilation, devices, sharding
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.model.counts import flops_per_token
from jaxchat.model.transformer import Model
from jaxchat.optimizer import AdamW, Optimizer
from jaxchat.train import init_state

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 1e-8, 0.1
DISTINCT_BATCHES = 4


@dataclass(frozen=True)
class Bench:
    """How long to measure; every other option is a field of the Experiment.

    Attributes:
        peer: also train the same model in transformers.
        blocks: alternating blocks of steps a side.
        block_steps: measured steps a block.
        threads: on a CPU, how many cores either side may use.
        pause: seconds between blocks, in which the threads of the side before go to sleep.
    """

    peer: Literal["none", "transformers"] = "none"
    blocks: int = 6
    block_steps: int = 4
    threads: int = 2
    pause: float = 0.5

    def __post_init__(self) -> None:
        if min(self.blocks, self.block_steps, self.threads) < 1 or self.pause < 0:
            raise ValueError("blocks, block_steps and threads must be at least 1, pause not negative")


class Side(NamedTuple):
    """One contestant: `step(i)` trains on batch i to its end and returns the loss."""

    step: Callable[[int], float]
    first_step_seconds: float


def level_field(experiment: Experiment, threads: int, *, devices: int = 0) -> None:
    """Before JAX starts: keeps both sides to `threads` cores, and to compiling afresh.

    We get one host device a core where that divides the rows, or `devices`.
    """
    few_cores(threads)
    rows = experiment.batch_rows
    by_rows = max(n for n in range(1, threads + 1) if rows % n == 0)
    jax.config.update("jax_num_cpu_devices", devices or by_rows)
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


def few_cores(threads: int) -> None:
    """Before JAX starts: keeps this process to `threads` cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def adamw_only(experiment: Experiment) -> Experiment:
    """The experiment with one AdamW and a constant learning rate for every parameter."""
    group = AdamW(LEARNING_RATE, *BETAS, WEIGHT_DECAY, EPS)
    optimizer = Optimizer(None, *(group,) * 6, warmup_steps=0, warmdown_fraction=0.0)
    return dataclasses.replace(experiment, optimizer=optimizer)


def run(experiment: Experiment, bench: Bench) -> dict[str, Any]:
    """Trains both sides and returns medians, their ratio, and the share of a measured matmul peak."""
    if bench.peer != "none":
        check_peer(experiment)
    experiment = adamw_only(experiment)
    ids = np.random.default_rng(experiment.seed).integers(
        0, experiment.model.vocab, (DISTINCT_BATCHES, experiment.batch_rows, experiment.data.row_length + 1)
    )
    ours, weights = _our_side(experiment, ids)
    sides = {"ours": ours}
    log(f"jaxchat: first step with compilation {ours.first_step_seconds:.1f} s")
    if bench.peer != "none":
        sides["peer"] = _peer_side(experiment, ids, weights, bench.threads)
        log(f"transformers: first step with compilation {sides['peer'].first_step_seconds:.1f} s")
    seconds, losses, peak = _race(sides, bench)
    speed = {name: experiment.batch_tokens / float(np.median(values)) for name, values in seconds.items()}
    peer_speed = speed.get("peer")
    flops = flops_per_token(experiment.model, experiment.data.row_length)["total"]
    return {
        "tokens_per_second": round(speed["ours"], 1),
        "peer_tokens_per_second": None if peer_speed is None else round(peer_speed, 1),
        "ratio": None if peer_speed is None else round(speed["ours"] / peer_speed, 4),
        "roofline_fraction": None if peak is None else round(speed["ours"] * flops / peak, 4),
        "peak_flops_per_second": peak,
        "flops_per_token": flops,
        "loss": losses["ours"],
        "peer_loss": losses.get("peer"),
        "first_step_seconds": round(ours.first_step_seconds, 2),
        "peer_first_step_seconds": round(sides["peer"].first_step_seconds, 2) if "peer" in sides else None,
        "steps": bench.blocks * bench.block_steps,
        "spread": {name: [round(float(q), 4) for q in np.quantile(v, (0.1, 0.9))] for name, v in seconds.items()},
        "model": {
            "depth": experiment.model.depth,
            "width": experiment.model.width,
            "vocab": experiment.model.vocab,
            "rows": experiment.batch_rows,
            "row_length": experiment.data.row_length,
            "dtype": "float32" if bench.peer != "none" else experiment.dtype,
        },
        "versions": versions(("jax", "jaxlib", "flax", "optax", *(("torch", "transformers") if peer_speed else ()))),
        "machine": machine(bench.threads),
    }


def _race(sides: dict[str, Side], bench: Bench) -> tuple[dict[str, list[float]], dict[str, float], float | None]:
    """Seconds of each measured step, the last loss of each side, and the best matmul peak met between blocks."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    peaks = []
    at = 1
    for block in range(bench.blocks):
        order = list(sides) if block % 2 == 0 else list(reversed(sides))
        for name in order:
            time.sleep(bench.pause)
            for i in range(bench.block_steps + 1):  # The first wakes the threads and is not counted.
                start = time.perf_counter()
                losses[name] = sides[name].step(at + i)
                if i:
                    seconds[name].append(time.perf_counter() - start)
        at += bench.block_steps + 1
        time.sleep(bench.pause)
        peaks.append(devices.peak_flops(jax.devices()[0]))
        told = "  ".join(f"{name} {np.median(values) * 1e3:.0f} ms" for name, values in seconds.items())
        log(f"block {block + 1}/{bench.blocks}: {told}")
    known = [peak * jax.device_count() for peak in peaks if peak is not None]
    return seconds, losses, max(known) if known else None


def _our_side(experiment: Experiment, ids: np.ndarray) -> tuple[Side, dict[str, np.ndarray]]:
    """The training step as launch.train compiles it, its first step taken, and the weights it started from."""
    setup = compilation.make_setup(experiment, log)
    placed = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    with jax.set_mesh(setup.mesh):
        start = jax.jit(lambda key: init_state(setup.transformer, setup.tx, key), out_shardings=placed)
        state = start(jax.random.key(experiment.seed))
        weights = jax.device_get(state.params)
        begin = time.perf_counter()
        step, rows, _ = compilation.compile_step(setup, log)
    shape = (experiment.batch_rows // rows, rows, experiment.data.row_length)
    batches = [
        sharding.put_batch(
            setup.mesh,
            {
                "tokens": part[:, :-1].astype(np.int32).reshape(shape),
                "targets": part[:, 1:].astype(np.int32).reshape(shape),
                "weights": np.ones(shape, np.float32),
                "segments": np.zeros(shape, np.int32),
            },
        )
        for part in ids
    ]

    def advance(i: int) -> float:
        nonlocal state
        state, told = step(state, batches[i % len(batches)])
        jax.block_until_ready(state)
        return float(told["loss"])

    advance(0)
    return Side(advance, time.perf_counter() - begin), state_dict(experiment.model, weights)


def state_dict(config: Model, params: Any) -> dict[str, np.ndarray]:
    """Parameters of the October 2025 family under the names and in the layout of transformers."""
    c, M = config, config.width
    embed_VM, head_MV = params["ends"]["embed"][: c.vocab], params["ends"]["head"][:, : c.vocab]
    state = {"model.embed_tokens.weight": embed_VM, "lm_head.weight": head_MV.T}
    period = len(c.pattern)
    for i in range(c.depth):
        layer = jax.tree.map(lambda stacked, i=i: stacked[i // period], params["layers"][i % period])
        prefix = f"model.layers.{i}."
        for name in ("q", "k", "v"):
            state[f"{prefix}self_attn.{name}_proj.weight"] = layer["mixer"][name].reshape(M, -1).T
        state[f"{prefix}self_attn.o_proj.weight"] = layer["mixer"]["o"].reshape(-1, M).T
        state[f"{prefix}mlp.fc1.weight"] = layer["mlp"]["in"].T
        state[f"{prefix}mlp.fc2.weight"] = layer["mlp"]["out"].T
    return state


def check_peer(experiment: Experiment) -> None:
    """Raises UserError where the peer is not installed or does not know the model."""
    c = experiment.model
    mixers = set(c.pattern)
    plain = all(part is None for part in (c.smear, c.backout, c.residual_scales)) and not c.tied
    if not plain or len(mixers) > 1 or any(m.window or m.value_embedding or m.qk_scale != 1 for m in mixers):
        raise UserError("transformers knows the October 2025 family only: leave the model as the dial makes it")
    if experiment.dtype != "float32":
        raise UserError(f"--peer=transformers compares in float32, not dtype={experiment.dtype}: pass --dtype=float32")
    try:
        import torch  # noqa: F401
        from transformers import NanoChatForCausalLM  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--peer=transformers needs torch and transformers 5 ({error}): pip install 'jaxchat[interop]'"
        ) from None


def _peer_side(experiment: Experiment, ids: np.ndarray, weights: dict[str, np.ndarray], threads: int) -> Side:
    """transformers' NanoChat with its loss under torch.compile, and torch's fused AdamW; its first step taken."""
    import torch
    from transformers import NanoChatForCausalLM

    torch.set_num_threads(threads)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    c = experiment.model
    model = NanoChatForCausalLM(peer_config(c, length=experiment.data.row_length))
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    model.to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    batches = [(torch.from_numpy(part[:, :-1]).to(device), torch.from_numpy(part[:, 1:]).to(device)) for part in ids]

    @torch.compile
    def loss_of(tokens: Any, targets: Any) -> Any:
        logits = model(tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, c.vocab), targets.reshape(-1))

    def advance(i: int) -> float:
        loss = loss_of(*batches[i % len(batches)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    begin = time.perf_counter()
    advance(0)
    return Side(advance, time.perf_counter() - begin)


def peer_config(c: Model, *, length: int, use_cache: bool = False) -> Any:
    """The model as transformers configures it."""
    from transformers import NanoChatConfig

    mixer = c.pattern[0]
    return NanoChatConfig(
        vocab_size=c.vocab,
        hidden_size=c.width,
        intermediate_size=c.mlp.hidden,
        num_hidden_layers=c.depth,
        num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.kv_heads,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": mixer.rope.base},  # type: ignore[union-attr]
        final_logit_softcapping=c.softcap,
        rms_norm_eps=c.norm.eps,
        pad_token_id=None,
        use_cache=use_cache,
    )


def versions(names: tuple[str, ...]) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def machine(threads: int) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    device = jax.devices()[0]
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "backend": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }
