"""A run whose model transformers knows, made without training, for tests of what leaves jaxchat."""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import sentencepiece
import small
from documents import texts

from configs.recipe import imported
from jaxchat.export import huggingface
from jaxchat.export.convert import write_checkpoint
from jaxchat.model import Model
from jaxchat.model.transformer import Params
from jaxchat.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

VOCAB = 420
SYLLABLES = list(zip("bdfghklmnprst", "aeiouaeiouaei"))
RUNS = "    return x\n        if x:\n\n----------  ====== 1867 나는 학교에 갔다. 나는 친구를 만났다.\n"


@cache
def tokenizer(algorithm: str = "bpe") -> Tokenizer:
    """Some words, runs of spaces and signs, Hangul; the rest is bytes."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(SYLLABLES, random.integers(1, 4)).ravel()) for _ in range(3000)]
    told = [*texts(80), *[RUNS] * 20, " ".join(words)]
    return train_tokenizer(told, vocab=VOCAB, config=TokenizerConfig(algorithm=algorithm))  # type: ignore[arg-type]


def model(**changes: object) -> Model:
    return small.october2025(**{"vocab": VOCAB} | changes)


def write_run(directory: Path, config: Model, *, stage: str = "sft", length: int = 64, scale: float = 0.3) -> str:
    """A stage directory with random parameters as checkpoint 0; returns its path.

    Its model prefers pieces of text to single bytes, <unk> and special tokens: these are shown in one way here and in
    another elsewhere.
    """
    experiment = dataclasses.replace(imported(config, length, stage), directory=str(directory))
    params = small.parameters(config, scale=scale)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer().model)
    unsaid = [i for i in range(VOCAB) if pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i)]
    params["ends"]["head"][:, unsaid] = 0
    write_checkpoint(directory / "run" / stage, experiment, params)
    tokenizer().save(directory / "run" / "tokenizer")
    return str(directory / "run" / stage)


def read_export(directory: Path, words: Tokenizer | None = None) -> tuple[Model, int, Params, Tokenizer]:
    """The model of an exported directory, its maximum number of positions, parameters and tokenizer."""
    source = huggingface.open_source(directory, words)
    return source.model, source.length, source.params(), source.tokenizer
