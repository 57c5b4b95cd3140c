"""The benchmark of an accelerator: its sections, its budget of time, and what it leaves when it is stopped."""

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from test_benchmarks import SIZES, FakePeer

from benchmarks import accelerator, options, peer, report
from jaxchat import devices
from jaxchat.errors import UserError
from jaxchat.planning.chips import CHIPS
from launch import bench


def section(cases: Callable[..., Any], share: float = 1.0) -> accelerator.Section:
    return cases, share


def adds(speed: float) -> Callable[..., Any]:
    return lambda run: iter([({"name": "one"}, lambda: {"speed": speed})])


def measure(
    path: Path, sections: Mapping[str, accelerator.Section], *, budget_s: float = 600.0, **more: Any
) -> dict[str, Any]:
    run = accelerator.Run("gpu", options.Bench(budget_s=budget_s, out=str(path)), (), time.monotonic() + budget_s)
    kept = report.Report(path, report.surroundings(run.bench, "python -m launch.bench gpu"))
    return accelerator.measure_sections(run, kept, sections, **more)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_section_gives_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "Peer", FakePeer)
    monkeypatch.setattr(accelerator, "OTHERS", ())  # Each compiles anew.
    out = tmp_path / "bench.json"
    argv = ["gpu", "--anyway", "--budget_s=100000", f"--out={out}", *(f"--{k}={v}" for k, v in SIZES.items())]
    content = bench.main(argv)
    assert content == read(out)
    assert all(content[name] for name in ("machine", "versions", "command", "settings", "seconds"))
    rows = content["rows"]
    assert [row for row in rows if "error" in row] == []
    names = [row["section"] for row in rows]
    assert list(dict.fromkeys(names)) == list(accelerator.SECTIONS)
    by = {name: [row for row in rows if row["section"] == name] for name in names}

    (train,) = by["train"]
    assert train["depth"] == 1 and train["step_seconds"]["count"] == 3 and train["devices"] == jax.device_count()
    assert train["micro_rows"] == 8
    tried = [(row["backend"], row["documents"]) for row in by["attention"]]
    assert tried == [(name, documents) for documents in (True, False) for name in ("xla", "xla_remat")]
    assert [row["value"] for row in by["attention"]][::2] == pytest.approx(
        [row["value"] for row in by["attention"]][1::2]
    )
    values = [row["value"] for row in by["loss"]]
    assert [row["chunk_tokens"] for row in by["loss"]] == [64, 128, 256]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert [(row["rows"], row["decoding"]) for row in by["decode"]] == [(1, "xla"), (2, "xla")]
    assert by["rl"][0]["rollouts_per_second"] > 0
    (beside,) = by["peer"]
    assert beside["ratio"] == pytest.approx(beside["tokens_per_second"] / (2 * 128 / 0.5), rel=1e-5)
    assert {row["layer_loop"] for row in (train, *by["sweep"])} == {"scan", "unroll"}


def test_settings_of_the_sweep_differ_from_the_recipe_and_from_each_other() -> None:
    arguments = ["--data.row_length=64", "--batch_tokens=512", "--head_dim=32", "--data.vocab=128"]
    run = accelerator.Run("gpu", options.Bench(depths=(4, 12)), arguments, math.inf)
    cases = [(case["setting"], measured.args[0]) for case, measured in accelerator.sweep(run)]
    experiments = [e for _, e in cases]
    assert run.experiment(4) not in experiments and run.experiment(12) not in experiments
    assert all(one not in experiments[:i] for i, one in enumerate(experiments))
    assert [e.depth for e in experiments].count(4) == 1 and experiments[-1].depth == 4
    assert "--model.isolate_documents=False" in [setting for setting, _ in cases]


def test_a_section_that_fails_leaves_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    def fails(run: Any) -> Any:
        yield {"name": "row"}, lambda: {}["lost"]
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand a long tale")

    out = tmp_path / "bench.json"
    content = measure(out, {"bad": section(fails), "good": section(adds(2.0))})
    assert read(out) == content
    first, second, third = content["rows"]
    assert first == {"section": "bad", "name": "row", "error": "KeyError: 'lost'"}
    assert second == {"section": "bad", "error": "RuntimeError: RESOURCE_EXHAUSTED: no memory"}
    assert (third["section"], third["name"], third["speed"]) == ("good", "one", 2.0)


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"

    def interrupted(run: Any) -> Any:
        yield {"name": "half"}, lambda: {"speed": 3.0}
        assert [row["speed"] for row in read(out)["rows"]] == [1.0, 3.0], "the file is whole while the run goes on"
        raise KeyboardInterrupt

    measure(out, {"first": section(adds(1.0)), "second": section(interrupted), "third": section(adds(4.0))})
    rows = read(out)["rows"]
    assert [row["section"] for row in rows] == ["first", "second", "second"]
    assert rows[-1]["error"].startswith("cut off")
    assert list(tmp_path.iterdir()) == [out]


def test_what_still_runs_after_the_budget_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, ended, timers = tmp_path / "bench.json", list[int](), list[Any]()

    class Timer(threading.Timer):
        def start(self) -> None:
            timers.append(self)

    def hangs(run: Any) -> Any:
        (timer,) = timers
        assert timer.interval == pytest.approx(600.0 + accelerator.GRACE, abs=60)
        late = threading.Thread(target=timer.function)  # As where compiling has not come back by then.
        late.start()
        late.join()
        assert ended == [0]
        last = read(out)["rows"][-1]
        assert last["section"] == "second" and last["error"] == "cut off: the budget was over"
        assert json.loads(capsys.readouterr().out)["rows"][0]["speed"] == 1.0
        ended.append(1)
        yield {}, dict

    monkeypatch.setattr(accelerator, "threading", SimpleNamespace(Timer=Timer))
    measure(out, {"first": section(adds(1.0)), "second": section(hangs)}, end=ended.append)
    assert ended == [0, 1]


def test_no_budget_skips_everything_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    with pytest.raises(UserError, match="nothing was measured"):
        measure(out, {"one": section(adds(1.0)), "two": section(adds(1.0))}, budget_s=0.0)
    assert [(row["section"], row["error"][:8]) for row in read(out)["rows"]] == [
        ("one", "skipped:"),
        ("two", "skipped:"),
    ]
    shown = capsys.readouterr().err
    assert '"section":"one","error":"skipped: ' in shown and "0 s are left" in shown


def test_a_share_that_is_used_up_skips_rows_but_never_the_first(tmp_path: Path) -> None:
    two = lambda run: iter([({"name": name}, lambda: {"speed": 1.0}) for name in "ab"])  # noqa: E731
    first, second = measure(tmp_path / "bench.json", {"one": section(two, 0.0)})["rows"]
    assert first["speed"] == 1.0 and second["error"].startswith("skipped: its share")


def test_a_file_that_is_there_is_kept_and_one_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.json"
    for speed in (1.0, 2.0, 3.0):
        measure(out, {"one": section(adds(speed))})
    names = ("bench-1.json", "bench-2.json", "bench.json")
    assert [read(out.with_name(name))["rows"][0]["speed"] for name in names] == [1.0, 2.0, 3.0]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"bench.json cannot be written .*: name another --out"):
        measure(tmp_path / "file" / "bench.json", {"one": section(adds(1.0))})


@pytest.mark.parametrize("kind, extra", [("gpu", "cuda"), ("tpu", "tpu")])
def test_a_machine_without_the_accelerator_is_refused(kind: str, extra: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    with pytest.raises(UserError, match=rf"no {kind.upper()} here, JAX computes on cpu: .*--anyway.*\.\[{extra}\]"):
        bench.main([kind, f"--out={out}", f"--cache={SIZES['cache']}"])
    assert not out.exists()


def test_bandwidths_are_those_of_the_planner() -> None:
    device = SimpleNamespace(platform="gpu", device_kind="")
    kinds = {
        "a100": "NVIDIA A100-SXM4-80GB",
        "h100": "NVIDIA H100 80GB HBM3",
        "h200": "NVIDIA H200",
        "b200": "NVIDIA B200",
    }
    for name, kind in kinds.items():
        device.device_kind, gpu = kind, CHIPS[name].gpu
        assert gpu is not None and devices.peak_bandwidth(device) == gpu.bandwidth
    assert kinds.keys() == {name for name, chip in CHIPS.items() if chip.gpu}
    for chip in CHIPS.values():
        if chip.gpu is None:
            device.device_kind = chip.kind
            assert devices.peak_bandwidth(device) is not None
    device.device_kind = "NVIDIA A100-SXM4-40GB"  # Its memory is slower than the 80 GB model's.
    assert devices.peak_bandwidth(device) is None
