"""Text as it comes: never half a character, never a part of a stop text."""

import itertools

import pytest
from documents import texts
from hypothesis import given
from hypothesis import strategies as st
from letters import Letters

from jaxchat.decode.requests import TextStream
from jaxchat.tokenizer import TokenizerConfig, train_tokenizer


def bytewise() -> Letters:
    """A tokenizer of one id a byte, so that every character takes as many tokens as it has bytes."""
    return Letters({i: bytes([i]) for i in range(256)}, bos=256)


def streamed(text: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(bytewise(), stop)  # type: ignore[arg-type]
    pieces = [stream.add(byte) for byte in text]
    return [*pieces, stream.finish()], stream


TEXTS = ["👩‍👩‍👧 family", "한국어 각 각", "e\u0301 n\u0303 ok", "naïve — “quotes”", "\U0010ffff\u2028"]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    pieces, stream = streamed(text.encode())
    assert "".join(pieces) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) == len(text), "a character comes as soon as it is complete"


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_that_never_ends_is_left_out(text: str) -> None:
    data = text.encode()
    for size in range(len(data)):
        pieces, _ = streamed(data[:size])
        assert "".join(pieces) == data[:size].decode(errors="ignore")


@given(st.text("abé👩", max_size=30), st.lists(st.text("abé👩", min_size=1, max_size=4), max_size=3))
def test_stop_texts_leak_no_character(text: str, stop: list[str]) -> None:
    pieces, stream = streamed(text.encode(), tuple(stop))
    found = [text.index(part) for part in stop if part in text]
    # The first to be complete ends the text; one that begins earlier but ends later has not been seen by then.
    ends = [text.index(part) + len(part) for part in stop if part in text]
    until = text[: min(ends)] if ends else text
    expected = min((until.index(part) for part in stop if part in until), default=len(text))
    assert "".join(pieces) == stream.text == text[:expected]
    assert stream.stopped == bool(found)


WORDS = ["👩\u200d👩\u200d👧", "\u1112\u1161\u11ab", "e\u0301", "n\u0303", "a", "b"]


@given(st.lists(st.sampled_from(WORDS), max_size=12), st.data())
def test_neither_borders_inside_characters_nor_long_tokens_leak(words: list[str], data: st.DataObject) -> None:
    """Tokens of any bytes: the text is what a look at all of it after each token would have let through."""
    text = "".join(words).encode()
    cuts = data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12))
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[here:there] for here, there in itertools.pairwise(borders)]
    stop = tuple(data.draw(st.lists(st.sampled_from([*WORDS, "ab", "\u200d", "\u0301b", "ba👩"]), max_size=2)))
    stream = TextStream(Letters(dict(enumerate(pieces))), stop)  # type: ignore[arg-type]
    stream._tokenizer.specials = {}
    shown = [stream.add(i) for i in range(len(pieces))]
    shown.append(stream.finish())
    expected = text.decode()
    for seen in (text[:border].decode(errors="ignore") for border in borders):
        if found := [seen.index(part) for part in stop if part in seen]:
            expected = seen[: min(found)]
            break
    assert "".join(shown) == stream.text == expected
    assert "\ufffd" not in stream.text


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_a_trained_tokenizer_stream_their_text(text: str) -> None:
    tokenizer = train_tokenizer(texts(100), vocab=300, config=TokenizerConfig())
    stream = TextStream(tokenizer)
    pieces = [*map(stream.add, tokenizer.encode(text)), stream.finish()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_that_can_be_no_stop_text_is_not_held_back() -> None:
    stream = TextStream(bytewise(), ("xyz",))  # type: ignore[arg-type]
    assert [stream.add(byte) for byte in b"axxyab"] == ["a", "", "x", "", "xya", "b"]


CALL = Letters(python_start=50, python_end=51, output_start=52, output_end=53)
BEGIN, END, RESULT, DONE = 50, 51, 52, 53


@pytest.mark.parametrize(
    ("tokens", "text", "shown"),
    [
        ([BEGIN, 9, 4, END, RESULT, 5, DONE, 7, 8], "94578", "[94 = 5] 78"),
        ([1, BEGIN, 9, END, RESULT, 5, DONE], "195", "1[9 = 5] "),
        ([BEGIN, 9, END, 3], "93", "[9] 3"),
        ([BEGIN, 9, END], "9", "[9]"),
        ([BEGIN, 9], "9", "[9]"),
        ([BEGIN, 9, END, RESULT, 5], "95", "[9 = 5]"),
        ([BEGIN, 1, END, BEGIN, 2, END, RESULT, 3, DONE, 4], "1234", "[1] [2 = 3] 4"),
        ([RESULT, 5, DONE, 1], "51", "[= 5] 1"),
        ([END, 1, DONE, 2], "12", "12"),
        ([BEGIN, BEGIN, 1, DONE, END, 2], "12", "[1] 2"),
        ([1, 2, 3], "123", "123"),
    ],
)
def test_a_call_and_its_result_are_shown_as_such(tokens: list[int], text: str, shown: str) -> None:
    stream = TextStream(CALL)  # type: ignore[arg-type]
    pieces = [*map(stream.add, tokens), stream.finish()]
    assert (stream.text, stream.shown, "".join(pieces)) == (text, shown, shown)


def test_calls_keep_their_place_where_text_is_held_back() -> None:
    """A character that is not complete, and text that may begin a stop text."""
    tokens = [1, 2, BEGIN, 3, END, RESULT, 4, DONE, 5]
    for stop, text, shown in [
        ("129", "12345", "12[3 = 4] 5"),
        ("123", "", ""),
        ("34", "12", "12[]"),
        ("45", "123", "12[3 = ]"),
    ]:
        stream = TextStream(CALL, (stop,))  # type: ignore[arg-type]
        pieces = [*map(stream.add, tokens), stream.finish()]
        assert (stream.text, stream.shown, "".join(pieces)) == (text, shown, shown), stop
