"""Compute multipliers from made-up ladders whose answer is known, and a ladder that is really trained."""

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
from test_compare import flags, trained

import launch.compare
from jaxchat import comparison, ladder, serialization, stages
from jaxchat.errors import UserError

ROOT = Path(__file__).parent.parent
FLOPS = {2: 1e12, 3: 3e12, 4: 8e12}


def law(flops, floor=0.0):
    """Bits per byte of a power law, which is a straight line on logarithmic axes if the floor is 0."""
    return 20 * flops**-0.1 + floor


CURVE = [(flops, law(flops)) for flops in FLOPS.values()]


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("factor", [2.0, 0.5, 1.0, 1.3])
def test_a_variant_that_needs_a_share_of_the_flops_has_its_inverse_as_multiplier(depth, factor):
    """Each variant's run reaches what the baseline would reach with `factor` times as many FLOPs."""
    values = [law(factor * FLOPS[depth]), law(factor * FLOPS[depth])]
    found = ladder.multiplier([CURVE, CURVE], FLOPS[depth], values)
    assert found.factor == pytest.approx(factor) and found.interval == pytest.approx((factor, factor))
    assert found.extrapolated == (factor * FLOPS[depth] < 0.999 * 1e12 or factor * FLOPS[depth] > 1.001 * 8e12)


def test_between_two_depths_the_curve_is_straight_on_logarithmic_axes():
    curve = [(1e12, 4.0), (1e14, 1.0)]
    assert ladder.flops_at(curve, 2.0) == (pytest.approx(1e13), False)
    assert ladder.flops_at(curve, 0.5) == (pytest.approx(1e15), True)  # Extrapolated from the last piece.
    assert ladder.flops_at(curve, 8.0) == (pytest.approx(1e11), True)
    assert ladder.flops_at(curve, 1.0) == (pytest.approx(1e14), False)


@pytest.mark.parametrize("curve", [[(1e12, 1.0)], [(1e12, 1.0), (2e12, 1.1), (3e12, 0.9)], [(1e12, 1.0), (2e12, 1.0)]])
def test_a_curve_that_does_not_reach_each_value_once_gives_no_multiplier(curve):
    assert ladder.flops_at(curve, 0.95) is None and ladder.multiplier([curve], 1e12, [0.95]) is None


def test_a_measure_that_grows_is_read_off_a_growing_curve():
    curve = [(1e12, 0.1), (1e14, 0.4)]
    assert ladder.flops_at(curve, 0.2, lower=False) == (pytest.approx(1e13), False)
    assert ladder.flops_at(curve, 0.2) is None


def test_each_seed_is_read_off_its_own_curve_and_the_interval_is_of_logarithms():
    noisy = [[(flops, value * scale) for flops, value in CURVE] for scale in (1.0, 1.02)]
    values = [law(2 * 3e12), law(8 * 3e12) * 1.02]  # Factors 2 and 8.
    found = ladder.multiplier(noisy, 3e12, values)
    half = 12.706 * math.log(8 / 2) / math.sqrt(2) / math.sqrt(2)
    assert found.factor == pytest.approx(4) and found.verdict == "undecided"
    assert found.interval == pytest.approx((4 * math.exp(-half), 4 * math.exp(half)), rel=1e-3)
    assert ladder.multiplier(noisy, 3e12, [values[0], None]).interval is None  # One seed diverged.


def test_the_noise_floor_is_between_the_seeds_of_the_baseline():
    seeds = [[(flops, value * scale) for flops, value in CURVE] for scale in (0.99, 1.01)]
    found = ladder.noise(seeds, [own[1][1] for own in seeds])
    assert found["deviation"] == pytest.approx(law(3e12) * 0.02 / math.sqrt(2))
    # A share of 1 percent of the value is a tenth of a power of the FLOPs, so about 10 percent of them.
    assert found["compute"] == pytest.approx(math.exp(0.2 / math.sqrt(2)), rel=0.01)
    assert ladder.noise(seeds[:1], [1.0]) is None


def ladder_flags(place, *variants, **more):
    argv = [word for word in flags(place, *variants, **more) if not word.startswith("--depth=")]
    return [*argv, "--ladder", "1", "2"]


def test_a_ladder_is_trained_seed_by_seed_resumed_and_reported(tmp_path, monkeypatch):
    """Runs are made up: values fall with FLOPs, and those of `half` are reached with half of them."""
    monkeypatch.chdir(ROOT)
    ran = []

    def run(e):
        ran.append(e.name.removeprefix("compare/"))
        result = trained(e)
        flops = comparison._model_facts(e)["flops"] * (2 if "half" in e.name else 1)
        return result | {"val_bpb": law(flops) * (1 + 0.01 * e.seed)}

    monkeypatch.setattr(stages, "run", run)
    argv = ladder_flags(tmp_path, "base:", "half: --model.mlp=swiglu")
    found = launch.compare.main(argv)
    wanted = [f"{name}/depth{d}/seed{s}" for s in (0, 1) for d in (1, 2) for name in ("base", "half")]
    assert ran == wanted
    rows = found["variants"]["half"]
    assert [rows[depth]["multiplier"] for depth in rows] == pytest.approx([2.0, 2.0])
    assert {rows[depth]["verdict_at_equal_flops"] for depth in rows} == {"better"} and rows[2]["extrapolated"]
    assert found["variants"]["base"][1]["noise"]["deviation"] > 0
    report = Path(found["report"]).read_text()
    assert "| half | 2 |" in report and "| 2* | 2 to 2 | better |" in report and "noise floor at depth 1" in report
    assert (tmp_path / "runs/compare/compare.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(serialization.json_line(found))["variants"]["half"]["1"]["cache_bytes_per_token"] == 2 * 2 * 64
    shutil.rmtree(tmp_path / "runs/compare/half/depth2/seed1")
    assert launch.compare.main(argv) == found and ran == [*wanted, wanted[-1]]


@pytest.mark.parametrize(
    "variants, more, said",
    [
        (("base:", "deep: --depth=2"), ["--ladder", "1", "2"], "variant 'deep': --depth=2 cannot differ"),
        (("base:", "b: --steps=7"), ["--ladder", "1", "2", "--depth=2"], "with each of --ladder; leave --depth out"),
        (("base:", "b: --steps=7"), ["--ladder", "2"], "at least two different depths"),
        (("base:", "b: --start_from=runs/a/pretrain"), ["--ladder", "1", "2"], "the model is that of a checkpoint"),
        (
            ("base:", "b: --model.smear.channels=100"),
            ["--ladder", "1", "2"],
            "smear.channels=100 is more than width=64",
        ),
    ],
)
def test_a_mistake_is_refused_before_the_first_run(tmp_path, monkeypatch, variants, more, said):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("a run was started"))
    argv = ladder_flags(tmp_path, *variants)[:-3]
    with pytest.raises(UserError, match=said):
        launch.compare.main([*argv, *more])


def test_a_ladder_is_really_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ladder_flags(tmp_path, "base:", "fast: --optimizer.scale=3", steps=2)
    found = launch.compare.main([*argv, "--seeds", "0"])
    base, fast = (found["variants"][name] for name in ("base", "fast"))
    assert base[2]["flops"] > base[1]["flops"] == fast[1]["flops"]
    assert base[1]["values"] != fast[1]["values"] and fast[1]["interval"] is None


@pytest.mark.slow
def test_the_variants_of_the_documented_comparison_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = (ROOT / "docs/architectures.md").read_text().split("```")[1]
    words = shlex.split(command.replace("\\\n", " "))
    monkeypatch.setattr(comparison, "run", lambda variants, load, **how: {"variants": variants, "how": how})
    found = launch.compare.main(words[words.index("-m") + 2 :])
    assert found["how"]["depths"] == (2, 3, 4) and len(found["variants"]) > 20
