"""The text that a tokenizer is trained on, the peer, and the launcher."""

import json
import re
from pathlib import Path

import pytest
from test_tokenizer import ENGLISH, TEXTS, VOCAB

from jaxchat.tokenizer import load_tokenizer
from jaxchat.tokenizer.compare import peer_bytes_per_token
from jaxchat.tokenizer.sentencepiece import sample
from launch import tokenizer as tokenizer_launcher


def test_a_sample_is_spread_evenly_and_keeps_its_budget():
    texts = [f"document {i} " + "word " * 3000 for i in range(100)]
    blocks = sample(texts, 300_000, seed=0)
    size = sum(map(len, blocks))
    assert 300_000 <= size < 303_000
    starts = [int(found.group(1)) for block in blocks if (found := re.match(r"document (\d+) ", block))]
    assert starts == sorted(starts)
    assert min(starts) < 20 and max(starts) > 80
    assert blocks == sample(iter(texts), 300_000, seed=0)
    assert blocks != sample(texts, 300_000, seed=1)


def test_the_peer_splits_and_counts_as_nanochat_does():
    pytest.importorskip("rustbpe")
    pytest.importorskip("tiktoken")
    merges = 2  # a+b, then space+ab
    found = peer_bytes_per_token(["ab ab ab ab 1234"], ["ab ab 12"], vocab=256 + merges + 9)
    assert found == pytest.approx(8 / len(["ab", " ab", " ", "1", "2"]))
    assert peer_bytes_per_token(["123 " * 9], ["123"], vocab=256 + merges + 9) == pytest.approx(3 / len(["12", "3"]))


def test_the_launcher_trains_once_and_reports(tmp_path, capsys):
    for name, texts in (("train.jsonl", TEXTS), ("val.jsonl", [ENGLISH[0] + " Привет"])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    arguments = [
        f"--config={Path(__file__).parents[1] / 'configs/d4.py'}",
        f"--directory={tmp_path / 'runs'}",
        f"--data.vocab={VOCAB}",
        *("--data.train", str(tmp_path / "train.jsonl")),
        *("--data.val", str(tmp_path / "val.jsonl")),
    ]
    result = tokenizer_launcher.main(arguments)
    assert {"vocab", "bytes_per_token", "seconds", "path"} <= set(result) <= {*result, "peer_bytes_per_token"}
    saved = load_tokenizer(result["path"])
    assert result["vocab"] == saved.vocab_size == VOCAB
    tokens = len(saved.encode(ENGLISH[0] + " Привет"))
    assert result["bytes_per_token"] == pytest.approx(len((ENGLISH[0] + " Привет").encode()) / tokens, abs=1e-4)
    first = capsys.readouterr().err
    assert "training a bpe tokenizer" in first
    assert "Cyrillic takes 1.00 bytes per token" in first
    assert tokenizer_launcher.main(arguments)["path"] == result["path"]
    assert "training a" not in capsys.readouterr().err
