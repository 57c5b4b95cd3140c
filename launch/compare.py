"""Compares variants: python -m launch.compare --config=configs/tiny.py --variants "base:" "deep: --depth=4"

Trains every variant with every seed, on the same rows, for as many tokens as the first one (or as long, with
--equal=time), with --ladder at several depths, to compare them at equal FLOPs too. Writes a table of paired differences
with 95 percent intervals and curves to runs/NAME/compare.md. Other options are those of launch.train and apply to every
variant. Run the same command again to resume.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxchat import command_line, errors, launcher
from jaxchat.experiment import Experiment


@dataclass(frozen=True)
class Compare:
    """Options of launch.compare."""

    variants: tuple[str, ...] = ()
    """Each is "NAME: --field=value ...", flags may be empty; the first is the baseline for the others."""
    seeds: tuple[int, ...] = (0, 1, 2)  # Each variant is trained once with each seed; differences are paired by seed.
    equal: Literal["tokens", "time"] = "tokens"
    """Give each variant as many tokens, or as much time, as the first; not to one with its own --steps."""
    measure: str = "val_bpb"  # Name of the number to compare, from the last line of launch.train.
    ladder: tuple[int, ...] = ()
    """Depths of the dial at which each variant is trained; its compute multiplier is read off the first one's curve."""

    def __post_init__(self) -> None:
        if self.ladder and (min(self.ladder) < 1 or len(set(self.ladder)) < max(len(self.ladder), 2)):
            raise ValueError(f"ladder={self.ladder} must have at least two different depths, each at least 1")


def main(argv: list[str]) -> Mapping[str, object] | None:
    options, rest = command_line.parse_known(Compare, argv, description=__doc__)
    for name, many in (("--seed", "--seeds"), *([("--depth", "--ladder")] if options.ladder else [])):
        if any(word.partition("=")[0] == name for word in rest):
            raise errors.UserError(f"every variant is trained with each of {many}; leave {name} out")

    def load(flags: Sequence[str]) -> Experiment:
        return command_line.load(["--name=compare", *rest, *flags])

    from jaxchat import comparison, compilation, processes

    variants = comparison.read_variants(options.variants, load, options.ladder)
    with processes.joined():
        compilation.prepare_backend(load([]))
        how = {"seeds": options.seeds, "equal": options.equal, "measure": options.measure, "depths": options.ladder}
        result = comparison.run(variants, load, **how, log=launcher.log)
        return processes.from_first(result)


if __name__ == "__main__":
    launcher.run(main, resumes=True)
