"""Estimates the cost of a run: python -m launch.plan --config=configs/d20.py [--topology=v5e-8,v6e-8]

Prints parameters, tokens, FLOPs, bytes, hours and dollars of every stage, or of one: --config=configs/d20.py:sft. With
--topology it compiles the training step for TPUs that need not be present (extra tpu) and finds the largest micro-batch
that fits; --micro_rows tries that one only. --mfu=0.4 is the assumed share of the chips' peak,
--dollars_per_chip_hour=2.5 the assumed price. Fields are given as for launch.speedrun.
"""

import os
from collections.abc import Sequence
from typing import Any

from jaxchat import command_line, launcher
from jaxchat.command_line import joined, stage_arguments
from jaxchat.errors import UserError
from jaxchat.experiment import SPEEDRUN, STAGES

OWN = ("topology", "mfu", "dollars_per_chip_hour")


def main(argv: list[str]) -> dict[str, object]:
    # Do not look for accelerators; allow two processes to compile for TPUs at once.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    own, rest = split(argv)
    mfu = positive(own, "mfu", 0.4)
    price = positive(own, "dollars_per_chip_hour", None)
    experiments = [(words, command_line.load(words, description=__doc__)) for words in stages(rest)]
    from jaxchat.planning import ahead, plan
    from jaxchat.planning.chips import topology

    assert mfu is not None
    topologies = [topology(name) for name in own.get("topology", "").split(",") if name]
    derived = {e.stage: plan.derived(e, mfu, price, topologies) for _, e in experiments}
    plan.show(derived)
    words, e = experiments[0]  # The later stages have the same training step with smaller batches.
    shallower = lambda depth: command_line.load([*words, f"--depth={depth}"])  # noqa: E731
    fits: dict[str, Any] = {}
    for there in topologies:
        try:
            fits[there.name] = ahead.fit(e, there, launcher.log, shallower=shallower)
        except UserError as error:
            if len(topologies) == 1:
                raise
            launcher.log(f"{there.name}: {error}")
            fits[there.name] = {"fits": False, "why": str(error)}
    return {"stages": derived, **({"topologies": fits} if fits else {})}


def split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separates this launcher's own options from the rest."""
    words, own, rest = iter(argv), dict[str, str](), list[str]()
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in OWN:
            own[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    return own, rest


def stages(argv: Sequence[str]) -> list[list[str]]:
    """The arguments for each stage: all stages, or the one in --config=FILE:STAGE."""
    words = joined(argv)
    if any(word.startswith("--config=") and ":" in word for word in words):
        return [words]
    return [stage_arguments(argv, stage, STAGES) for stage in SPEEDRUN]


def positive(own: dict[str, str], name: str, default: float | None) -> float | None:
    """Parses an option; raises `UserError` unless it is positive and finite."""
    if name not in own:
        return default
    try:
        value = float(own[name])
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"--{name}={own[name]} must be a positive number")
    return value


if __name__ == "__main__":
    launcher.run(main)
