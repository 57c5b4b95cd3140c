"""Lines of every kind that tokenizers cut differently: words, Hangul, emoji, code, digits and runs of whitespace."""

import random
from collections.abc import Iterator

WORDS = ["the", "model's", "isn't", "Über", "naïve", "we'LL", "I'd", "GPT-4", "x1", "e\u0301", "ﬁ", "Ａ", "straße"]
HANGUL = ["나는", "학교에", "갔다", "만났어요", "한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8", "값이", "뷁"]
EMOJI = ["🙂", "👩‍👩‍👧", "🇰🇷", "👍🏽", "☃️", "🧶🧶"]
CODE = [
    "def f(x):\n    return x**2",
    "if (a[i] != b->c) { i++; }",
    "<div class='a'>&amp;</div>",
    "\tfor(;;)\r\n",
    "#!/bin/sh",
    "x_1 = {'k': [1, 2.5e-3]}",
    "<|im_end|></s>[INST]",
]
NUMBERS = ["7", "42", "1867", "3.14159", "1,000,000", "0x1F", "12345678901", "²³", "٣٤"]
SPACES = [" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", " \n ", "\r\n", "\u3000", "\xa0", " " * 17, "\u200b"]
SIGNS = ["...", "!!", "---", "«»", "“quoted”", "=", "====", "(", ")", "▁", "，。", "\\n"]
KINDS = (WORDS, HANGUL, EMOJI, CODE, NUMBERS, SPACES, SIGNS)


def lines(count: int, seed: int = 0) -> Iterator[str]:
    """A fixed sequence of lines: of one kind, or of several with and without spaces between them."""
    rng = random.Random(seed)
    for _ in range(count):
        kinds = rng.choices(KINDS, (4, 3, 1, 2, 2, 2, 2), k=rng.randint(1, 10))
        glue = rng.choice(("", " ", " ", "  "))
        yield glue.join(rng.choice(kind) for kind in kinds)


# An emoji, a letter and syllables without tokens of their own in any vocabulary that is trained on the lines.
RARE = ["🦤", "ꙮ", "뷀뷃", "\U0010ffff", "𝔘𝔫𝔦"]
