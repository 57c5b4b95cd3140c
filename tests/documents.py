"""Small corpora for the tests of data."""

import gzip
import json
import os
from pathlib import Path

import numpy as np

import jaxchat
from jaxchat.data.prepare import Data

SENTENCE = (
    "the fox saw a bear near old trees and quiet water while small birds sang 17 songs \u2014 na\u00efve \u2581 ones"
)
WORDS = SENTENCE.split(" ")


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, n)) + f" {i}." for i, n in enumerate(rng.integers(1, 90, count))]


def write(path, documents):
    return write_rows(path, [{"text": text} for text in documents])


def corpus(directory):
    """Training and held-out documents for runs whose rows, tokenizer and programs are kept beside them."""
    write(directory / "train.jsonl", texts(300))
    write(directory / "val.jsonl", texts(12, seed=1))
    return directory


def talks(count, seed=0):
    """Conversations of one to three exchanges, some answered with the help of a tool."""
    rng = np.random.default_rng(seed)

    def words(n):
        return " ".join(rng.choice(WORDS, n))

    rows = []
    for i in range(count):
        messages = []
        for turn in range(rng.integers(1, 4)):
            answer = words(rng.integers(1, 9))
            if turn:
                call, result = ({"type": kind, "text": words(2)} for kind in ("python", "python_output"))
                answer = [call, result, {"type": "text", "text": answer}]
            asked = f"{i} {words(rng.integers(1, 9))}"
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    return rows


def write_rows(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def settings(*train, **fields):
    return Data(**{"train": tuple(map(str, train)), "vocab": 300, "row_length": 32, "workers": 1} | fields)


def silent(_):
    pass


def environment():
    """For a process that imports this jaxchat."""
    return os.environ | {"PYTHONPATH": str(Path(jaxchat.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
