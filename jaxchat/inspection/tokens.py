"""What a tokenizer makes of a text: its tokens with their bytes, and the merges that formed them."""

import codecs
import itertools
from collections.abc import Sequence
from typing import Any

import sentencepiece

from jaxchat.decode.explain import name_of
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer
from jaxchat.tokenizer.sentencepiece import SPACE_MARK, SentencePiece, parts


def tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Id, printable name and bytes of each token.

    `text` has the characters that end in the token: it is empty while a character (Hangul, an emoji) continues in the
    next token. Bytes that are not valid UTF-8 become U+FFFD. A special token's text is its name.
    """
    special, decoder = set(tokenizer.specials.values()), codecs.getincrementaldecoder("utf-8")("replace")
    found = []
    for i, number in enumerate(ids):
        data = tokenizer.decode_bytes([number], keep_specials=True)
        ends = i + 1 == len(ids) or ids[i + 1] in special
        text = decoder.decode(data, final=ends or number in special)
        name = name_of(tokenizer, number)
        found.append({"id": int(number), "name": name, "bytes": list(data), "text": text, "special": number in special})
    return found


def merges(tokenizer: Tokenizer, text: str) -> list[dict[str, Any]]:
    """Replays byte-pair merges: for each part of a text that is encoded on its own, the pieces after every merge.

    A part starts as characters; the adjacent pair whose joined piece was learned first is merged, the leftmost of equal
    ones, until no pair forms a piece (arXiv:1508.07909). `merged` has the index and rank of each merge; a character
    without a piece becomes its UTF-8 bytes in the end. Spaces are shown as U+2581.

    Raises:
        UserError: the tokenizer has no merges (Unigram).
    """
    if not isinstance(tokenizer, SentencePiece):
        raise UserError("only a sentencepiece tokenizer has merges to replay")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    ordinary = [i for i in range(tokenizer.vocab_size) if not (processor.is_control(i) or processor.is_byte(i))]
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in ordinary[1:]}  # The first one is <unk>.
    if any(score % 1 for score in scores.values()):
        raise UserError("a Unigram tokenizer has no merges: it takes the most likely segmentation as a whole")
    return [_replayed(tokenizer, part, scores) for part in parts(text)]


def _replayed(tokenizer: Tokenizer, part: str, scores: dict[str, float]) -> dict[str, Any]:
    now = list(part if part == SPACE_MARK else part.replace(" ", SPACE_MARK))
    steps: list[dict[str, Any]] = [{"pieces": now, "merged": None}]
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(now)) if a + b in scores]
        if not pairs or part == SPACE_MARK:
            break
        rank, i = min(pairs)
        now = [*now[:i], now[i] + now[i + 1], *now[i + 2 :]]
        steps.append({"pieces": now, "merged": {"index": i, "rank": int(rank)}})
    ids = tokenizer.encode(part)
    return {"text": part, "steps": steps, "ids": ids, "names": [name_of(tokenizer, i) for i in ids]}
