"""Make nanochat_tokens.json with nanochat's own tokenizer: its pickled encoding, ids of lines, and conversations.

Run `python tests/golden/make_nanochat_tokens.py CHECKOUT` with a checkout of karpathy/nanochat at 92d63d4 and the
extras `convert` and `peers` installed. nanochat is imported, never copied. Then compares ids of jaxchat's import with
tiktoken's, on more texts than a test can.
"""

import base64
import hashlib
import json
import pickle
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), *sys.argv[1:2]]
from lines import RARE, lines  # noqa: E402

VOCAB, COUNT, GROUP = 700, 4_000, 100
TALKS = [
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "나는 <|user_end|> 학교에"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "12 x 7?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "12*7"},
                {"type": "python_output", "text": "84"},
                {"type": "text", "text": "84 🙂"},
            ],
        },
        {"role": "user", "content": "  Sure?\n"},
        {"role": "assistant", "content": "Yes"},
    ],
]


def check(theirs: Any) -> None:
    """Prints how many texts have other ids in jaxchat: around every code point, and of random tokens and letters."""
    from jaxchat.export.pickled import FILE, read_pickled

    with tempfile.TemporaryDirectory() as place:
        Path(place, FILE).write_bytes(pickle.dumps(theirs))
        ours = read_pickled(Path(place))
    rng = random.Random(0)
    every = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    pieces = [token.decode("utf-8", "ignore") for token in theirs.token_byte_values()]
    texts = {
        "around every code point": [f"a{c}a '{c} 1{c}2\n{c}{c}b" for c in every],
        "of random tokens": ["".join(rng.choices(pieces, k=12)) for _ in range(20_000)],
        "of few letters": ["".join(rng.choices(" \n\t=-a1나", k=30)) for _ in range(20_000)],
    }
    for name, listed in texts.items():
        print(f"{name}:", sum(ours.encode(one) != theirs.encode_ordinary(one) for one in listed), "of", len(listed))


def main() -> None:
    from nanochat.tokenizer import RustBPETokenizer

    tokenizer = RustBPETokenizer.train_from_iterator(lines(500, seed=1), VOCAB)
    ids = [tokenizer.encode(line) for line in [*lines(COUNT), *RARE]]
    groups = [json.dumps(ids[at : at + GROUP]).encode() for at in range(0, len(ids), GROUP)]
    golden = {
        "versions": {name: version(name) for name in ("tiktoken", "rustbpe")} | {"nanochat": "92d63d4"},
        "pickle": base64.b64encode(pickle.dumps(tokenizer.enc)).decode(),
        "count": COUNT,
        "group": GROUP,
        "ids": [hashlib.sha256(group).hexdigest()[:16] for group in groups],
        "first": ids[:3],
        "talks": [
            [
                talk,
                *tokenizer.render_conversation({"messages": talk}),
                tokenizer.render_for_completion({"messages": talk}),
            ]
            for talk in TALKS
        ],
    }
    path = HERE / "nanochat_tokens.json"
    path.write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.name, path.stat().st_size, "bytes,", sum(map(len, ids)), "ids")
    check(tokenizer.enc)


if __name__ == "__main__":
    main()
