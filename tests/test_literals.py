"""Values that a judge and a program exchange as literals."""

import json
from collections import Counter

import pytest

from jaxchat.sandbox.literals import NotLiteral, decode, encode


@pytest.mark.quick
def test_literals_arrive_as_they_were():
    values = [None, True, 0, -(1 << 63), 10**4000, 1.5, "\ud800é", b"\x00", 1j, [1, [2]], (1,), {1, 2}, frozenset(), {}]
    values += [{(1, 2): {"a": [b"b"]}}, float("inf"), -0.0]
    for value in values:
        arrived = decode(json.loads(json.dumps(encode(value))))
        assert type(arrived) is type(value) and repr(arrived) == repr(value)
    assert encode(Counter("aab")) == encode({"a": 2, "b": 1})


@pytest.mark.quick
@pytest.mark.parametrize("value", [object(), iter([]), range(3), [[print]], {1: type}])
def test_what_is_no_literal_is_not_sent(value):
    with pytest.raises(NotLiteral):
        encode(value)


@pytest.mark.quick
def test_what_says_no_literal_is_not_read():
    deep: object = 1
    for _ in range(80):
        deep = ["list", [deep]]
    odd = [
        "list",
        ["int", "x"],
        ["bytes", "0"],
        ["dict", [[["list", []], 1]]],
        ["set", [["list", []]]],
        ["dict", [[1]]],
    ]
    for text in (deep, {}, [], [1], *odd[1:], ["eval", "1"], ["complex", ["a", 1]], ["list", "ab"]):
        with pytest.raises(NotLiteral):
            decode(text)
