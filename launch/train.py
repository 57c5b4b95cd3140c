"""Trains one stage of a configuration: python -m launch.train --config=configs/tiny.py [--field=value ...]

Makes the tokenizer and the rows where they are missing, continues from the newest checkpoint where there is one, and
saves and exits with status 75 on SIGTERM, so that a scheduler starts it again.
"""

import sys

from jaxchat import config, signals


def main(argv: list[str]) -> dict[str, object]:
    try:
        with signals.raised() as stopped:
            experiment = config.load(argv, description=__doc__)
            from jaxchat import compilation, stages

            compilation.prepare_backend(experiment)
            return stages.run(experiment, stopped)
    except signals.Interrupted as stop:
        print(f"stopped by a signal; {stop}: start again to continue", file=sys.stderr)
        raise SystemExit(75) from None


if __name__ == "__main__":
    config.run(main)
