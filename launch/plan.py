"""Estimates the cost of a run: python -m launch.plan --config=configs/d20.py [--topology=v5e-8,v6e-8]

Prints parameters, tokens, FLOPs, bytes, hours and dollars of every stage, or of one: --config=configs/d20.py:sft. With
--topology it compiles the training step for TPUs that need not be present (extra tpu) and finds the largest micro-batch
that fits; --micro_rows tries that one only. --mfu=0.4 is the assumed share of the chips' peak,
--dollars_per_chip_hour=2.5 the assumed price. Fields are given as for launch.speedrun.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from jaxchat import command_line, launcher
from jaxchat.experiment import SPEEDRUN, STAGES


@dataclass(frozen=True)
class Plan:
    """Options of launch.plan."""

    topology: str = ""
    mfu: float = 0.4
    dollars_per_chip_hour: float | None = None

    def __post_init__(self) -> None:
        for name in ("mfu", "dollars_per_chip_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name}={value} must be a positive number")


def main(argv: list[str]) -> dict[str, object]:
    # Do not look for accelerators; allow two processes to compile for TPUs at once.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    options, rest = command_line.parse_known(Plan, argv)
    arguments = stages(rest)
    experiments = [command_line.load(words, description=__doc__) for words in arguments]
    from jaxchat.planning import ahead, plan
    from jaxchat.planning.chips import topology

    topologies = [topology(name) for name in options.topology.split(",") if name]
    derived = {e.stage: plan.derived(e, options.mfu, options.dollars_per_chip_hour, topologies) for e in experiments}
    plan.show(derived)
    shallower = lambda depth: command_line.load([*arguments[0], f"--depth={depth}"])  # noqa: E731
    # The later stages have the same training step with smaller batches.
    fits = ahead.fits(experiments[0], topologies, launcher.log, shallower=shallower)
    return {"stages": derived, **({"topologies": fits} if fits else {})}


def stages(argv: Sequence[str]) -> list[list[str]]:
    """The arguments for each stage: all stages, or the one in --config=FILE:STAGE."""
    words = command_line.joined(argv)
    one = any(word.startswith("--config=") and ":" in word for word in words)
    return [words] if one else [command_line.stage_arguments(words, stage, STAGES) for stage in SPEEDRUN]


if __name__ == "__main__":
    launcher.run(main)
