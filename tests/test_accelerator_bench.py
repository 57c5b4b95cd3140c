"""The benchmark of an accelerator, in tiny sizes on a CPU."""

import importlib.util
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import recipe
from jaxchat import command_line, compilation, devices
from jaxchat.benchmarks import decode
from jaxchat.benchmarks.accelerator import fitting, kernels, options, peers, running, timing, training
from jaxchat.benchmarks.accelerator.report import Clock, Rows
from jaxchat.errors import UserError
from jaxchat.model.counts import parameter_counts
from jaxchat.model.transformer import Transformer
from jaxchat.planning.chips import CHIPS
from jaxchat.sharding import Mesh
from launch import bench

ROOT = Path(__file__).parent.parent
SIZES = {
    "depths": 1,
    "row_length": 128,
    "data.vocab": 512,
    "head_dim": 32,
    "batch_tokens": 1024,
    "steps": 3,
    "kernel_rows": 2,
    "repeats": 2,
    "loss_chunks": "64,128",
    "batch_sizes": "1,2",
    "prompt_tokens": 6,
    "decode_tokens": 5,
    "rl_prompts": 2,
    "rl_samples": 4,
    "rl_tokens": 6,
    "peers": "plain",
    "peer_rows": 2,
    "cache": ROOT / ".jax_cache",
}


def make(depth: int, family: Any = "july2026", batch_tokens: int = 512) -> Any:
    dial = recipe.Dial(
        depth, family=family, steps=10, batch_tokens=batch_tokens, vocab=128, row_length=64, head_dim=32, windows="SSSL"
    )
    return recipe.pretrain(dial, name="bench", train=("tinyworld:train",))


def section(measure: Callable[..., Any], least: float = 0.0) -> running.Section:
    return running.Section(measure, 1.0, least, ("name",), ("speed",))


def adds(speed: float) -> Callable[..., None]:
    return lambda bench, make, rows: rows.attempt({"name": "one"}, lambda: {"speed": speed})


def run(path: Path, sections: Mapping[str, running.Section], *, budget_s: float = 600.0, **more: Any) -> dict[str, Any]:
    asked = options.Bench(budget_s=budget_s, out=str(path))
    return running.run(asked, make, command="python -m launch.bench gpu", sections=sections, **more)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_section_gives_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = {"rows": 2, "tokens_per_second": 50.0, "step_seconds": 1.0}
    monkeypatch.setattr(peers, "run", lambda asked, *, seconds: torch)
    every = training.variants
    monkeypatch.setattr(training, "variants", lambda bench, make: every(bench, make)[:1])  # Each compiles anew.
    out = tmp_path / "bench.json"
    told = bench.main(
        ["gpu", "--anyway", "--budget_s=100000", f"--out={out}", *(f"--{k}={v}" for k, v in SIZES.items())]
    )
    content = read(out)
    sections = content["sections"]
    assert list(sections) == list(running.SECTIONS)
    assert {name: part["status"] for name, part in sections.items()} == dict.fromkeys(running.SECTIONS, "done")
    rows = [row for part in sections.values() for row in part["rows"]]
    assert [row for row in rows if "error" in row] == []
    assert all(content[name] for name in ("hardware", "versions", "command", "budget_s", "seconds"))

    (train,) = sections["train"]["rows"]
    assert train["step_seconds"]["count"] == train["dispatch_ms"]["count"] == 3
    assert train["attention"] == "xla", "what was used, not what was asked for"
    assert train["micro_rows"] == 8 and train["devices"] == jax.device_count()
    speed = 1024 / train["step_seconds"]["median"]
    assert train["tokens_per_second"] == pytest.approx(speed, rel=1e-3)
    mfu = speed * train["flops_per_token"] / (train["peak_flops"] * train["devices"])
    assert train["mfu"] == pytest.approx(mfu, rel=0.02, abs=1e-4)
    tried = [(row["backend"], row["documents"]) for row in sections["attention"]["rows"]]
    assert tried == [(name, documents) for documents in (True, False) for name in ("xla", "xla_remat")]
    values = [row["value"] for row in sections["loss"]["rows"]]
    assert len(values) == 3 and values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert [row["rows"] for row in sections["decode"]["rows"]] == [1, 2]
    assert all(row["bytes_per_second"] > 0 for row in sections["decode"]["rows"])
    (rl,) = sections["rl"]["rows"]
    assert rl["step_seconds"] == pytest.approx(rl["sample_seconds"] + rl["score_seconds"] + rl["train_seconds"])
    ours, theirs = sections["peer"]["rows"]
    assert theirs["ratio"] == pytest.approx(ours["tokens_per_second"] / 50.0, rel=1e-3)
    loops = {row["layer_loop"] for row in (train, *sections["sweep"]["rows"])}
    assert loops == {"scan", "unroll"}
    assert told["train"]["depth=1"][0] == train["tokens_per_second"] and told["out"] == str(out)


def test_a_section_that_fails_leaves_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    def fails(bench: Any, make: Any, rows: Rows) -> None:
        rows.attempt({"name": "row"}, lambda: {}["lost"])
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand a long tale")

    out = tmp_path / "bench.json"
    told = run(out, {"bad": section(fails), "good": section(adds(2.0))})
    sections = read(out)["sections"]
    assert sections["bad"]["status"] == "failed"
    assert sections["bad"]["error"] == "RuntimeError: RESOURCE_EXHAUSTED: no memory"
    assert sections["bad"]["rows"] == [{"name": "row", "error": "KeyError: 'lost'"}]
    assert sections["good"]["status"] == "done"
    assert told["good"]["name=one"] == [2.0] and told["bad"].startswith("failed: RuntimeError")


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"

    def interrupted(bench: Any, make: Any, rows: Rows) -> None:
        rows.attempt({"name": "half"}, lambda: {"speed": 3.0})
        there = read(out)["sections"]  # The file is whole while the run goes on.
        assert there["first"]["status"] == "done" and there["second"]["rows"][0]["speed"] == 3.0
        raise KeyboardInterrupt

    told = run(out, {"first": section(adds(1.0)), "second": section(interrupted), "third": section(adds(4.0))})
    sections = read(out)["sections"]
    assert {name: part["status"] for name, part in sections.items()} == {"first": "done", "second": "cut off"}
    assert told["first"]["name=one"] == [1.0] and told["second"]["name=half"] == [3.0]
    assert list(tmp_path.iterdir()) == [out]


def test_what_still_runs_after_the_budget_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, ended, timers = tmp_path / "bench.json", list[int](), list[Any]()

    class Timer(threading.Timer):
        def start(self) -> None:
            timers.append(self)

    def hangs(bench: Any, make: Any, rows: Rows) -> None:
        (timer,) = timers
        assert timer.interval == 600.0 + running.GRACE
        late = threading.Thread(target=timer.function)  # As where compiling has not come back by then.
        late.start()
        late.join()
        assert ended == [0]
        assert read(out)["sections"]["second"]["status"] == "cut off"
        assert json.loads(capsys.readouterr().out)["first"]["name=one"] == [1.0]
        ended.append(1)

    monkeypatch.setattr(running.threading, "Timer", Timer)
    run(out, {"first": section(adds(1.0)), "second": section(hangs)}, end=ended.append)
    assert ended == [0, 1]


def test_no_budget_skips_everything_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    with pytest.raises(UserError, match="nothing was measured"):
        run(out, {"one": section(adds(1.0), 5.0), "two": section(adds(1.0), 5.0)}, budget_s=0.0)
    assert [part["status"] for part in read(out)["sections"].values()] == ["skipped", "skipped"]
    said = capsys.readouterr().err
    assert "one: skipped, 0 s of the budget are left" in said and "two: skipped" in said


def test_a_share_that_is_used_up_skips_rows_but_never_the_first(tmp_path: Path) -> None:
    def three(bench: Any, make: Any, rows: Rows) -> None:
        for name in ("a", "b"):
            rows.attempt({"name": name}, lambda: {"speed": 1.0})

    out = tmp_path / "bench.json"
    run(out, {"one": section(three)._replace(share=0.0)})
    first, second = read(out)["sections"]["one"]["rows"]
    assert first["speed"] == 1.0 and second["error"] == "skipped: its share of the budget is used up"


def test_a_file_that_is_there_is_kept_and_one_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.json"
    for speed in (1.0, 2.0, 3.0):
        run(out, {"one": section(adds(speed))})
    found = [read(out.with_name(name))["sections"]["one"]["rows"][0] for name in ("bench.json", "bench-1.json")]
    assert found[0] != found[1] and read(out.with_name("bench-2.json"))["sections"]["one"]["rows"][0] not in found
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"bench.json cannot be written .*: name another file with --out"):
        run(tmp_path / "file" / "bench.json", {"one": section(adds(1.0))})


@pytest.mark.parametrize("kind, extra", [("gpu", "cuda"), ("tpu", "tpu")])
def test_a_machine_without_the_accelerator_is_refused(kind: str, extra: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    with pytest.raises(UserError, match=rf"no {kind.upper()} here, JAX computes on cpu: .*\.\[{extra}\].*--anyway"):
        bench.main([kind, f"--out={out}", f"--cache={SIZES['cache']}"])
    assert not out.exists()


def test_a_misspelt_section_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="no section 'atention' to measure: did you mean attention"):
        bench.main(["gpu", "--only=train,atention"])
    with pytest.raises(UserError, match="peers"):
        bench.main(["gpu", "--peers=jax"])
    with pytest.raises(UserError, match="steps=0 must be at least 1"):
        bench.main(["gpu", "--steps=0"])


@pytest.mark.parametrize("window", [None, 1, 5, 11, 12, 40])
def test_attention_flops_are_those_of_the_pairs_that_see_each_other(window: int | None) -> None:
    q, k = np.arange(12)[:, None], np.arange(12)
    seen = (k <= q) & (k > q - 1 - (99 if window is None else window))
    assert kernels.visible_pairs(12, window) == seen.sum()
    # Two products of D multiplications and additions a pair.
    assert kernels.attention_flops(3, 12, 2, 8, window=window) == 3 * 2 * int(seen.sum()) * 2 * (8 + 8)


def test_bytes_of_a_decoding_step_are_matrices_and_cache() -> None:
    e = make(2, "october2025")
    M, V, T = e.model.width, 128, 10
    counted = 2 * 12 * M * M + V * M
    transformer = Transformer(e.model, jax.numpy.dtype("bfloat16"))
    assert decode.step_bytes(transformer, 0, T) == 2 * counted
    assert decode.step_bytes(transformer, 3, T) == 2 * (counted + 3 * T * 2 * M * 2)


def test_bandwidths_are_those_of_the_planner() -> None:
    class Device:
        platform = "gpu"
        device_kind = ""

    kinds = {
        "a100": "NVIDIA A100-SXM4-80GB",
        "h100": "NVIDIA H100 80GB HBM3",
        "h200": "NVIDIA H200",
        "b200": "NVIDIA B200",
    }
    for name, kind in kinds.items():
        Device.device_kind, gpu = kind, CHIPS[name].gpu
        assert gpu is not None and devices.peak_bandwidth(Device()) == gpu.bandwidth
    assert kinds.keys() == {name for name, chip in CHIPS.items() if chip.gpu}
    for chip in CHIPS.values():
        if chip.gpu is None:
            Device.device_kind = chip.kind
            assert devices.peak_bandwidth(Device()) is not None
    Device.device_kind = "NVIDIA A100-SXM4-40GB"  # Its memory is slower than the 80 GB model's.
    assert devices.peak_bandwidth(Device()) is None


@pytest.mark.parametrize("row", [1.0, 3.0, 7.0, 30.0, 99.0])
def test_the_largest_micro_batch_that_fits_is_found_in_few_compilations(
    row: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = compilation.make_setup(make(1, batch_tokens=64 * 64), lambda _: None, jax.devices()[:1])
    fixed, compiled = fitting.fixed_bytes(setup), list[int]()
    limit = fixed + 100 * 2**10

    def compile_rows(setup: Any, rows: int) -> Any:
        compiled.append(rows)
        needed = fixed + rows * row * 2**10
        return f"step {rows}", (needed if needed < fixed + 400 * 2**10 else float("inf")), timing.Compiled()

    monkeypatch.setattr(fitting, "compile_rows", compile_rows)
    monkeypatch.setattr(devices, "memory_limit", lambda device: limit / compilation.MEMORY_SHARE)
    monkeypatch.setattr(fitting, "row_bytes", lambda setup: 10 * 2**10)
    found = fitting.fit(setup, tries=3)
    assert found.rows == max(n for n in (1, 2, 4, 8, 16, 32, 64) if n * row <= 100)
    assert found.step == f"step {found.rows}" and len(compiled) == len(set(compiled)) <= 4
    assert fitting.fit(setup, tries=3, most=2).rows == min(found.rows, 2)
    limit = fixed
    with pytest.raises(UserError, match=r"no micro-batch of .* fits"):
        fitting.fit(setup, tries=3)
    limit, before = compilation.state_bytes(setup) - 1, len(compiled)
    with pytest.raises(UserError, match=r"state alone needs .* with --mesh\.fsdp, or name smaller --depths"):
        fitting.fit(setup, tries=3)
    assert len(compiled) == before


def test_the_mesh_is_that_of_the_training_step() -> None:
    asked = command_line.parse(options.Bench, ["--mesh.fsdp=4", "--depths", "1"], description="")
    assert bench._dialled(asked, 1, "july2026", 2**18).mesh == Mesh(fsdp=4)


def test_steps_are_dispatched_before_the_metrics_of_the_last_are_read() -> None:
    events: list[str] = []

    class Loss:
        def __init__(self, number: int) -> None:
            self.number = number

        def __float__(self) -> float:
            events.append(f"read {self.number}")
            return float(self.number)

    def step(state: int, batch: str) -> tuple[int, dict[str, Any]]:
        events.append(f"step {state} {batch}")
        return state + 1, {"loss": Loss(state)}

    times = timing.time_steps(step, 0, ["even", "odd"], steps=3, warm=1, clock=Clock(600.0))
    assert events == ["step 0 even", "step 1 odd", "read 0", "step 2 even", "read 1", "step 3 odd", "read 2", "read 3"]
    assert times.losses == [1.0, 2.0, 3.0]
    assert len(times.seconds) == len(times.dispatch) == 3
    late = timing.time_steps(step, 0, ["even"], steps=50, clock=Clock(0.0))
    assert timing.LEAST_STEPS <= len(late.seconds) <= timing.LEAST_STEPS + 1  # One more is under way already.


def test_settings_of_the_sweep_differ_from_the_recipe_and_from_each_other() -> None:
    asked = options.Bench(depths=(4, 12), row_length=64, batch_tokens=512)
    found = training.variants(asked, make)
    experiments = [variant.experiment(make, 512) for variant in found]
    assert make(12) not in experiments
    assert all(one not in experiments[:i] for i, one in enumerate(experiments))
    assert len({json.dumps(variant.label()) for variant in found}) == len(found)
    assert {"depth": 12, "family": "july2026", "isolated": False} in [variant.label() for variant in found]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_trains_a_model_of_the_same_size(dtype: str) -> None:
    pytest.importorskip("torch")
    from jaxchat.benchmarks.accelerator import torch_side

    e = make(2, "october2025")
    asked = peers.asked(e, "plain", options.Bench(peer_rows=2, steps=2, peer_compile=False), "cpu")
    told = torch_side.main([json.dumps(asked.__dict__ | {"dtype": dtype})])
    assert told["parameters"] == parameter_counts(e.model)["total"]
    assert told["tokens_per_second"] == pytest.approx(2 * 64 / told["step_seconds"])
    assert np.log(128) / 2 < told["loss"] < 2 * np.log(128)


def test_a_peer_that_fails_is_told_in_its_own_words() -> None:
    asked = peers.asked(make(1, "october2025"), "nobody", options.Bench(), "cpu")
    here = importlib.util.find_spec("torch") is not None
    said = r"torch ended with status 1: .+" if here else r"No module named 'torch': pip install .+interop"
    with pytest.raises(UserError, match=said):
        peers.run(asked.__class__(**asked.__dict__ | {"device": "nowhere"}), seconds=600.0)
