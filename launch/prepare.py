"""Makes a configuration's tokenizer and rows: python -m launch.prepare --config=configs/tiny.py [--field=value ...]

Training does this automatically; this command is for a machine with many cores, or to see the packing statistics.
"""

from jaxchat import command_line, launcher
from jaxchat.errors import UserError


def main(argv: list[str]) -> dict[str, object]:
    experiment = command_line.load(argv, description=__doc__)
    from jaxchat.data import prepare
    from jaxchat.stages.stage import inherited

    e, log = experiment, launcher.log
    if e.rl is not None:
        raise UserError(f"stage {e.stage} samples its data, so it has no rows: leave :{e.stage} out of --config")
    e, tokenizer = inherited(e)
    tokenizer = tokenizer or prepare.ensure_tokenizer(e.data, e.cache_directory, seed=e.seed, log=log)
    rows = {
        split: prepare.ensure_rows(e.data, tokenizer, split, e.cache_directory, log, e.longer_rows)
        for split in ("train", "val")
    }
    return prepare.summary(rows["train"]) | {"val": prepare.summary(rows["val"])}


if __name__ == "__main__":
    launcher.run(main, resumes=True)
