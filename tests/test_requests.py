"""Text as it comes: never half a character, never a part of a stop text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from letters import Letters

from jaxchat.decode.requests import TextStream


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


def test_text_that_can_be_no_stop_text_is_not_held_back() -> None:
    stream = TextStream(bytewise(), ("xyz",))  # type: ignore[arg-type]
    assert [stream.add(byte) for byte in b"axxyab"] == ["a", "", "x", "", "xya", "b"]
