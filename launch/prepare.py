"""Makes a configuration's tokenizer and rows: python -m launch.prepare --config=configs/tiny.py [--field=value ...]

Training does this automatically; this command is for a machine with many cores, or to see the packing statistics.
"""

from jaxchat import command_line, launcher


def main(argv: list[str]) -> dict[str, object]:
    experiment = command_line.load(argv, description=__doc__)
    from jaxchat.data import prepare

    log = launcher.log
    tokenizer = prepare.ensure_tokenizer(experiment.data, experiment.cache_directory, seed=experiment.seed, log=log)
    rows = {
        split: prepare.ensure_rows(experiment.data, tokenizer, split, experiment.cache_directory, log=log)
        for split in ("train", "val")
    }
    return prepare.summary(rows["train"]) | {"val": prepare.summary(rows["val"])}


if __name__ == "__main__":
    launcher.run(main, resumes=True)
