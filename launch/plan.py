"""What a run will take, before it starts: python -m launch.plan --config=configs/d20.py [--topology=v5e-8,v6e-8]

Parameters, tokens, FLOPs, bytes, hours and dollars of every stage, or of one: --config=configs/d20.py:sft. With
--topology the real training step is compiled for TPUs that need not be here (extra tpu), and the largest micro-batch
that fits is found, or, with --micro_rows, that one is tried. --mfu=0.4 is the share of the chips' peak that hours are
told for, --dollars_per_chip_hour=2.5 what one costs. Every field can be given as for launch.speedrun.
"""

import os
from collections.abc import Sequence
from typing import Any

from jaxchat import command_line, launcher
from jaxchat.command_line import joined, stage_arguments
from jaxchat.errors import UserError
from jaxchat.experiment import STAGES

OWN = ("topology", "mfu", "dollars_per_chip_hour")


def main(argv: list[str]) -> dict[str, object]:
    # No accelerator is looked for, and two processes may compile at once.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    own, rest = split(argv)
    mfu = positive(own, "mfu", 0.4)
    price = positive(own, "dollars_per_chip_hour", None)
    asked = [(words, command_line.load(words, description=__doc__)) for words in stages(rest)]
    from jaxchat.planning import ahead, plan
    from jaxchat.planning.chips import topology

    assert mfu is not None
    topologies = [topology(name) for name in own.get("topology", "").split(",") if name]
    derived = {e.stage: plan.derived(e, mfu, price, topologies) for _, e in asked}
    plan.show(derived)
    words, e = asked[0]  # Later stages have the steps of pretraining, in smaller batches.
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
    """This launcher's own options, and the rest."""
    words, own, rest = iter(argv), dict[str, str](), list[str]()
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in OWN:
            own[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    return own, rest


def stages(argv: Sequence[str]) -> list[list[str]]:
    """The arguments of every stage that is asked for."""
    words = joined(argv)
    if any(word.startswith("--config=") and ":" in word for word in words):
        return [words]
    return [stage_arguments(argv, stage, STAGES) for stage in STAGES]


def positive(own: dict[str, str], name: str, default: float | None) -> float | None:
    if name not in own:
        return default
    try:
        value = float(own[name])
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"--{name}={own[name]} is no positive number")
    return value


if __name__ == "__main__":
    launcher.run(main)
