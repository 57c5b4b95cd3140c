"""Arguments of commands on a model that is trained in seconds, and what a command refuses."""

import pytest

from jaxchat.errors import UserError


def flags(place, **changes):
    """Arguments for two steps of a model of one layer of width 8, on one device."""
    values = {
        "config": "configs/tiny.py",
        "depth": 1,
        "head_dim": 8,
        "steps": 2,
        "batch_tokens": 128,
        "data.vocab": 300,
        "data.row_length": 16,
        "data.workers": 1,
        "micro_rows": 8,
        "mesh.data": 1,
        "keep_params": 0,
        "data.train": place / "train.jsonl",
        "data.val": place / "val.jsonl",
        "data.cache": place / "cache",
        "directory": place / "runs",
        "name": "small",
    }
    return [*(f"--{key}={value}" for key, value in (values | changes).items() if value is not None), "--prompts"]


def refusal(main, argv):
    """The sentence with which a launcher refuses its arguments."""
    with pytest.raises(UserError) as caught:
        main(argv)
    said = str(caught.value)
    assert said and "\n" not in said, said
    return said
