"""Measures speed, beside a peer in one run: python -m launch.bench train --config=configs/d4.py --peer=transformers

train: the October 2025 family at the configuration's depth, 8 rows of 512 tokens and vocabulary 4,096 unless given, in
float32, with AdamW on every parameter.
"""

import dataclasses

from configs import recipe
from jaxchat import config
from jaxchat.config import UserError
from jaxchat.experiment import Experiment

TRAIN_DEFAULTS = {
    "data.vocab": "4096",
    "data.row_length": "512",
    "data.train": "tinyworld:train",  # Not read: the benchmark trains on random ids.
    "batch_tokens": "4096",
    "micro_rows": "8",
    "steps": "1000",
    "dtype": "float32",
}


def main(argv: list[str]) -> dict[str, object]:
    benchmarks = {"train": train}
    if argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nOne of {', '.join(benchmarks)}; its options: python -m launch.bench train --help")
        raise SystemExit(0)
    if not argv or argv[0] not in benchmarks:
        raise UserError(
            f"which benchmark? name one of {', '.join(benchmarks)}: python -m launch.bench train --config=..."
        )
    return benchmarks[argv[0]](argv[1:])


def train(argv: list[str]) -> dict[str, object]:
    from jaxchat import compilation
    from jaxchat.benchmarks import train as benchmark

    own = {field.name for field in dataclasses.fields(benchmark.Bench)} | {"help"}
    mine = [word for word in argv if word.removeprefix("--").split("=")[0] in own]
    bench = config.parse(benchmark.Bench, mine, description=__doc__)
    rest = [word for word in argv if word not in mine]
    given = {word.removeprefix("--").split("=")[0] for word in rest}
    rest += [f"--{name}={value}" for name, value in TRAIN_DEFAULTS.items() if name not in given]
    experiment = _october(config.load(rest))
    compilation.prepare_backend(experiment)
    benchmark.level_field(experiment, bench.threads)
    return benchmark.run(experiment, bench)


def _october(experiment: Experiment) -> Experiment:
    """The experiment with the October 2025 model of its depth, head size, vocabulary and row length."""
    dial = recipe.Dial(
        depth=experiment.depth,
        family="october2025",
        vocab=experiment.data.vocab,
        row_length=experiment.data.row_length,
        head_dim=experiment.model.pattern[0].head_dim,
    )
    return dataclasses.replace(experiment, model=recipe.model(dial))


if __name__ == "__main__":
    config.run(main)
