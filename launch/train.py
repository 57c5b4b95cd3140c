"""Trains one stage of a configuration: python -m launch.train --config=configs/tiny.py [--field=value ...]

Makes the tokenizer and the rows if they are missing, and resumes from the latest checkpoint if there is one. On SIGTERM
it saves a checkpoint and exits with status 75, so that a scheduler can restart it.
"""

from collections.abc import Mapping

from jaxchat import command_line, launcher


def main(argv: list[str]) -> Mapping[str, object] | None:
    experiment = command_line.load(argv, description=__doc__)
    from jaxchat import compilation, processes, stages

    with processes.joined():
        compilation.prepare_backend(experiment)
        return processes.from_first(stages.run(experiment))


if __name__ == "__main__":
    launcher.run(main, resumes=True)
