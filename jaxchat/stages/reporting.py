"""Reporting of a stage: the plan before it starts, a record per step, and samples of the model's text."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxchat import devices, metrics, optim, processes
from jaxchat.compilation import Compiled, Setup
from jaxchat.data.cache import Log, write_text
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.decode.tools import usable_tools
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.model.counts import flops_per_token, parameter_counts
from jaxchat.serialization import to_json
from jaxchat.stages.stability import Stability
from jaxchat.tokenizer import Tokenizer, chat
from jaxchat.train import STEP_METRICS, State

# How a base model continues a text: its most likely text repeats itself.
CONTINUE = SamplingParams(0.8, top_p=0.95, max_tokens=64, seed=0)


class StepLog:
    """Writes a record of each step, with speed and utilisation; an instability is logged once, counted in each record.

    `peak` is in FLOP/s per device, None if unknown. `more` returns further numbers of a step; it is given for stages
    without a fixed number of tokens per step, whose records then have no speed.
    """

    def __init__(
        self,
        setup: Setup,
        peak: float | None,
        writers: list[metrics.Writer],
        more: Callable[[int, dict[str, float]], dict[str, Any]] | None = None,
        log: Log = log,
    ) -> None:
        e = setup.experiment
        self.stability, self._log = Stability(e.model.vocab if e.rl is None else None), log
        self._experiment, self._writers, self._more = e, writers, more
        self._rate = optim.learning_rate_factor(e.optimizer, e.steps)
        self._flops = flops_per_token(e.model, e.data.row_length)["total"]
        self._peak = None if peak is None else peak * setup.mesh.size
        self._speeds: list[float] = []
        self._utilisations: list[float] = []
        self.loss: float | None = None

    def __call__(self, number: int, values: dict[str, float], seconds: float) -> None:
        taken = number - 1 - values["skipped"] + (values["skipped_in_row"] > 0)  # The optimizer ignores skipped steps.
        record: dict[str, Any] = {
            "step": number,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate_factor": float(self._rate(np.float64(taken))),
        }
        if self._more is None:
            speed = self._experiment.batch_tokens / seconds
            record |= {
                "tokens": number * self._experiment.batch_tokens,
                "tokens_per_second": speed,
                "mfu": None if self._peak is None else speed * self._flops / self._peak,
            }
        record["seconds"] = seconds
        if self._more is not None:
            record |= self._more(number, values)
        record |= {name: value for name, value in values.items() if name not in STEP_METRICS}
        record |= {"skipped": values["skipped"], "memory_bytes": devices.memory_bytes()}
        if report := self.stability(record):
            self._log(f"warning: {report}")
        record["unstable_steps"] = self.stability.unstable_steps
        self._add(record)
        for writer in self._writers:
            writer.write(record)

    def replay(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Restores the state from the records that a resumed run wrote before."""
        for record in records:
            if "grad_norm" in record:
                self.stability(record)
                self._add(record)

    def _add(self, record: Mapping[str, Any]) -> None:
        self.loss = record["loss"]
        self._speeds.append(self._tokens(record) / record["seconds"])
        if (mfu := record.get("mfu")) is not None:  # By the peak of that time: a restart may measure another.
            self._utilisations.append(mfu)

    def finish(self) -> None:
        """Logs an instability of the last steps that has not been reported yet."""
        if report := self.stability.finish():
            self._log(f"warning: {report}")

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the median step, without the first; None before any step. In RL, trained tokens and all phases."""
        return round(float(np.median(self._speeds[1:] or self._speeds)), 1) if self._speeds else None

    @property
    def mfu(self) -> float | None:
        """Utilisation of the median step; None where the peak is unknown, and in RL, which decodes as well."""
        values = self._utilisations[1:] or self._utilisations
        return round(float(np.median(values)), 4) if values else None

    def _tokens(self, record: Mapping[str, Any]) -> float:
        """Trained tokens of a step: those of a batch, or in RL those of the record."""
        return self._experiment.batch_tokens if self._more is None else record["trained_tokens"]


def write_samples(setup: Setup, tokenizer: Tokenizer, state: State, *, number: int, log: Log) -> None:
    """Answers each prompt greedily, or continues it with `CONTINUE` if the model is a base model; writes samples.md.

    Entries of this step and of later ones, left from before a restart, are replaced.
    """
    e = setup.experiment
    if not e.prompts:
        return
    params = processes.own_copy(setup.mesh, state.params)
    if jax.process_index():
        return
    shape = EngineConfig(length=min(128, e.data.row_length), slots=len(e.prompts), steps=16, adapt=False)
    engine = Engine(setup.transformer, params, tokenizer, shape, mesh=processes.own_mesh(setup.mesh))
    sampling = SamplingParams(0.0, max_tokens=64) if e.chats else CONTINUE
    chats = e.chats
    prompts = [prompt for prompt in e.prompts if prompt or not chats]
    asked = [chat.asked(prompt, tokenizer, in_turns=chats) for prompt in prompts]
    tools = usable_tools(tokenizer.chat_format) if chats else []
    lines = [f"\n## Step {number}\n"]
    answers = engine.generate([Request(ids, sampling, tools=tools) for ids in asked])
    for prompt, (answer,) in zip(prompts, answers):
        if answer.error:  # Not worth stopping a long run.
            log(f"warning: no sample for {prompt!r}: {answer.error}")
            continue
        text = f" {answer.shown}" if chats else answer.text
        lines.append(as_item(prompt, text))
        log(f"  | {prompt}{text}".replace("\n", "\n  | "))
    path = e.stage_directory / "samples.md"
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    head, *parts = re.split(r"^\n## Step (\d+)$", before, flags=re.M)
    earlier = [f"\n## Step {step}{text}" for step, text in zip(parts[::2], parts[1::2]) if int(step) < number]
    write_text(path, "".join([head, *earlier, *lines]))


def as_item(prompt: str, text: str) -> str:
    """A prompt and what follows as an item of a Markdown list, which keeps line breaks; signs are escaped."""
    prompt, text = (re.sub(r"([\\`*_<#]|\](?=[(\[]))", r"\\\1", part) for part in (prompt, text))
    bold = f"**{prompt}**" if prompt.strip() else ""
    return "- " + f"{bold}{text}".strip().replace("\n", "  \n  ") + "\n"


def make_writers(e: Experiment, start: int, terminal: metrics.Terminal) -> list[metrics.Writer]:
    """Creates the metrics writers; only the first process has any."""
    if jax.process_index():
        return []
    writers: list[metrics.Writer] = [terminal, metrics.JsonLines(e.stage_directory / "metrics.jsonl", start)]
    if e.tensorboard:
        writers.append(metrics.TensorBoard(e.stage_directory / "tensorboard"))
    if e.wandb:
        writers.append(metrics.WeightsAndBiases(f"{e.name}/{e.stage}", to_json(e)))
    return writers


def describe(setup: Setup, compiled: Compiled, peak: float | None, log: Log) -> None:
    """Logs the plan of a run: sizes, batches, mesh, dtype, attention and peak."""
    e, counts = setup.experiment, parameter_counts(setup.experiment.model)
    flops = flops_per_token(e.model, e.data.row_length)["total"]
    mesh = " x ".join(f"{name}={size}" for name, size in setup.mesh.shape.items())
    device = setup.mesh.devices.flat[0]
    active = f", {counts['active']:,} active for a token" * (counts["active"] < counts["total"])
    convention = "6 per matrix parameter + attention, not halved"
    log(f"{counts['total']:,} parameters{active}  {flops:.3e} FLOPs per token ({convention})")
    each = f"{e.batch_tokens:,} tokens = {e.steps * e.batch_tokens:,} tokens"
    if e.rl is not None:
        each = f"{e.rl.update_samples:,} of {e.rl.prompts} prompts x {e.rl.samples} answers, {e.rl.objective}"
    log(f"{e.steps:,} steps x {each}  micro-batches of {compiled.rows} rows x {e.data.row_length}")
    isolated = "isolated" if e.model.isolate_documents else "not isolated"
    peak_text = "unknown peak: no MFU" if peak is None else f"peak {peak / 1e12:.2f} TFLOP/s per device"
    dtypes = f"{setup.transformer.dtype}"
    if e.matmul is not None:
        dtypes += f", layer products in {e.matmul} (FLOPs and peak are those of {setup.transformer.dtype})"
    log(
        f"{mesh} on {device.device_kind}  {dtypes}  "
        f"attention {setup.transformer.attention}, documents {isolated}  "
        f"{peak_text}  compiled in {compiled.seconds:.1f} s"
    )
