"""Conversations become rows: what is learned, what is held out, and what is left out aloud."""

import dataclasses
import json
from collections import Counter

import pytest
from documents import settings, silent, talks, texts, write, write_rows
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jaxchat.data import conversations
from jaxchat.data.batch import batch_of
from jaxchat.data.formats import FORMATS
from jaxchat.data.prepare import ensure_rows, ensure_tokenizer, summary
from jaxchat.data.prepare import texts as texts_of
from jaxchat.errors import UserError
from jaxchat.tokenizer import chat
from jaxchat.tokenizer.chat_format import NANOCHAT
from jaxchat.tokenizer.sentencepiece import SentencePiece

ONCE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    return ensure_tokenizer(settings(write(place / "t.jsonl", texts(300))), place / "cache", 0, silent)


@pytest.fixture
def none_held_out(tmp_path):
    """Files to validate on, so that every conversation is trained on."""
    return (str(write_rows(tmp_path / "val.jsonl", talks(1, seed=9))),)


def talk_settings(*train, **fields):
    return settings(*train, **{"format": "chat", "row_length": 400} | fields)


def prepared(data, tokenizer, directory, split="train", log=silent):
    return ensure_rows(data, tokenizer, split, directory / "cache", log)


def segments_of(rows):
    """Of every conversation in the rows: its ids, and whether each but the first is learned."""
    found = []
    for part in rows:
        for i in range(len(part)):
            batch = batch_of(*part.read([i]))
            tokens, targets, weights, segments = (
                batch[k][0].tolist() for k in ("tokens", "targets", "weights", "segments")
            )
            for segment in range(1, max(segments) + 1):
                inside = [place for place, number in enumerate(segments) if number == segment]
                if any(weights[place] for place in inside):
                    last = max(place for place in inside if weights[place])
                    inside = [place for place in inside if place <= last]
                    ids = [tokens[inside[0]], *(targets[place] for place in inside)]
                    found.append((ids, [bool(weights[place]) for place in inside]))
    return found


def test_rows_hold_every_conversation_with_its_mask(tmp_path, tokenizer):
    given = talks(150)
    path = write_rows(tmp_path / "a.jsonl", given)
    data = talk_settings(path, val_fraction=0.2)
    found = [segments_of(prepared(data, tokenizer, tmp_path, split)) for split in ("train", "val")]
    rendered = [chat.render(row["messages"], tokenizer) for row in given]
    expected = Counter(json.dumps([ids, learned[1:]]) for ids, learned in rendered)
    assert Counter(json.dumps(pair) for pair in found[0] + found[1]) == expected
    assert 10 < len(found[1]) < 60


def test_the_stop_token_and_the_call_are_learned_and_the_tools_output_is_not(tmp_path, tokenizer, none_held_out):
    row = {"question": "What is 48/2?", "answer": "It is <<48/2=24>>24."}
    path = write_rows(tmp_path / "a.jsonl", [row])
    ((ids, learned),) = segments_of(prepared(talk_settings(path, val=none_held_out), tokenizer, tmp_path))
    taught = [number for number, learn in zip(ids[1:], learned) if learn]
    hidden = [number for number, learn in zip(ids[1:], learned) if not learn]
    assert tokenizer.decode_bytes(taught, keep_specials=True) == (
        b"It is <|python_start|>48/2<|python_end|>24.<|assistant_end|>"
    )
    assert tokenizer.decode_bytes(hidden, keep_specials=True) == (
        b"<|user_start|>What is 48/2?<|user_end|><|assistant_start|><|output_start|>24<|output_end|>"
    )


def test_a_part_that_the_chat_format_lacks_is_skipped_and_counted(tmp_path, tokenizer, none_held_out):
    other = SentencePiece(tokenizer.model, dataclasses.replace(NANOCHAT, parts={}))
    rows = [{"messages": ONCE}, {"question": "What is 48/2?", "answer": "It is <<48/2=24>>24."}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    (part,) = prepared(talk_settings(path, val=none_held_out), other, tmp_path)
    assert (part.manifest["documents"], part.manifest["skipped"]) == (1, {"unknown part": 1})
    assert f"{path} line 2: message 1 has a part of type 'python'" in json.dumps(part.manifest["examples"])


def test_a_row_of_one_answer_counts_as_such_when_all_turns_end_alike(tmp_path, tokenizer, none_held_out):
    ends = {role: dataclasses.replace(marks, end=NANOCHAT.end) for role, marks in NANOCHAT.turns.items()}
    other = SentencePiece(tokenizer.model, dataclasses.replace(NANOCHAT, turns=ends))
    path = write_rows(tmp_path / "a.jsonl", [{"messages": ONCE}, {"messages": ONCE * 2}])
    (part,) = prepared(talk_settings(path, val=none_held_out), other, tmp_path)
    assert (part.manifest["documents"], part.manifest["several"]) == (2, 1)


def test_everything_can_be_learned_but_the_bos(tmp_path, tokenizer, none_held_out):
    given = talks(20)
    data = talk_settings(write_rows(tmp_path / "a.jsonl", given), val=none_held_out)
    rows = [
        prepared(talk_settings(*data.train, val=data.val, train_on=what), tokenizer, tmp_path)
        for what in ("assistant", "everything")
    ]
    some, everything = (segments_of(part) for part in rows)
    assert [ids for ids, _ in some] == [ids for ids, _ in everything]
    assert all(all(learned) for _, learned in everything)
    assert not any(all(learned) for _, learned in some)
    told = [summary(part)["trained_fraction"] for part in rows]
    assert told[0] < told[1] == 1.0


def test_alpacas_template_is_text_with_a_learned_answer(tmp_path, tokenizer, none_held_out):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": "2 and 3", "output": "5"}]))
    data = talk_settings(path, format="alpaca", val=none_held_out)
    ((ids, learned),) = segments_of(prepared(data, tokenizer, tmp_path))
    prompt = conversations.alpaca_prompt("Add.", "2 and 3")
    assert ids == [
        tokenizer.bos,
        *tokenizer.encode(prompt),
        *tokenizer.encode("5"),
        tokenizer.specials["<|assistant_end|>"],
    ]
    assert learned == [False] * len(tokenizer.encode(prompt)) + [True] * (len(tokenizer.encode("5")) + 1)


def test_conversations_that_begin_alike_are_held_out_together(tmp_path, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": f"begin {i}"}, {"role": "assistant", "content": f"end {k}"}]}
        for i in range(60)
        for k in range(3)
    ]
    data = talk_settings(write_rows(tmp_path / "a.jsonl", rows), val_fraction=0.3)
    begun = []
    for split in ("train", "val"):
        found = [chat.parse(ids, tokenizer) for ids, _ in segments_of(prepared(data, tokenizer, tmp_path, split))]
        begun.append(Counter(messages[0]["content"] for messages in found))
    assert not begun[0].keys() & begun[1].keys()
    assert set(begun[0].values()) == set(begun[1].values()) == {3}


word = st.text(min_size=1, max_size=4)
leaf = st.none() | st.booleans() | st.integers() | st.floats() | word
names = st.sampled_from(["role", "content", "type", "text"])
anything = leaf | st.lists(leaf, max_size=3) | st.dictionaries(names, leaf, max_size=3)
part = st.fixed_dictionaries({"type": st.sampled_from(["text", *NANOCHAT.parts, "image"]), "text": word | anything})
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "function_call", "observation"]) | word,
        "content": word | st.lists(part, max_size=3) | anything,
    },
    optional=dict.fromkeys(("tool_calls", "function_call"), anything)
    | dict.fromkeys(("weight", "train", "tool_call_id"), st.none() | st.sampled_from([0, 1, False, True])),
)
question = st.fixed_dictionaries({"role": st.just("user"), "content": word})
answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": word | st.lists(part, min_size=1, max_size=3)})
messages = st.lists(st.tuples(question, answer).map(list) | st.lists(message, max_size=2), max_size=3).map(
    lambda parts: [said for part in parts for said in part]
)
field = messages | word | anything
rows_of_anything = st.fixed_dictionaries({"messages": messages}, optional={"tools": anything, "system": field}) | (
    st.sampled_from([keys for keys, _ in conversations.LAYOUTS]).flatmap(
        lambda keys: st.fixed_dictionaries(
            dict.fromkeys(keys, field), optional=dict.fromkeys(("input", "system", "tools"), field)
        )
    )
)


@given(row=rows_of_anything, form=st.sampled_from(["chat", "alpaca"]))
@hypothesis_settings(max_examples=150, deadline=None)
def test_any_row_gives_something_to_learn_or_one_sentence(tokenizer, row, form):
    try:
        found = FORMATS[form].read(row)
    except chat.Malformed as error:
        assert "\n" not in str(error)
        return
    ids, learned = FORMATS[form].encode(found, tokenizer)
    assert len(ids) == len(learned)
    assert any(learned[1:])


def test_what_is_none_is_skipped_and_said_with_its_place_once(tmp_path, tokenizer):
    rows = talks(30)
    rows[4] = {"messages": rows[4]["messages"][:1]}
    rows[7]["messages"][1]["content"] = " "
    rows[8]["messages"][0]["content"] = ""
    rows[9]["messages"].insert(0, rows[9]["messages"][0])
    path = write_rows(tmp_path / "a.jsonl", rows)
    said = []
    data = talk_settings(path, val_fraction=0.3)
    made = [prepared(data, tokenizer, tmp_path, split, said.append)[0] for split in ("train", "val")]
    skipped = sum((Counter(part.manifest["skipped"]) for part in made), Counter())
    assert skipped == {"no assistant turn": 1, "empty content": 2, "roles out of order": 1}
    assert sum(summary([part])["skipped"] for part in made) == 4
    assert sum(part.manifest["documents"] for part in made) == 26
    warnings = [line for line in said if line.startswith("warning")]
    assert (
        f"warning: {path}: 1 conversation skipped: no assistant turn; the first is {path} line 5: "
        "there is no message of the assistant" in warnings
    )
    assert len([line for line in warnings if "roles out of order" in line]) == 1


def test_conversations_longer_than_a_row_are_left_out_and_said(tmp_path, tokenizer, none_held_out):
    rows = talks(40)
    lengths = [len(chat.render(row["messages"], tokenizer).ids) for row in rows]
    path = write_rows(tmp_path / "a.jsonl", rows)
    border = sorted(lengths)[25]
    said = []
    data = talk_settings(path, row_length=border - 1, val=none_held_out)
    (made,) = prepared(data, tokenizer, tmp_path, log=said.append)
    assert summary([made])["too_long"] == made.manifest["too_long"] == sum(n > border for n in lengths) > 0
    assert len(segments_of([made])) == sum(n <= border for n in lengths)
    assert said[-1] == (
        f"warning: {path}: {made.manifest['too_long']} conversations of more than {border} tokens left out; "
        f"--data.row_length={max(lengths) - 1} fits the longest"
    )
    fitting = talk_settings(path, row_length=max(lengths) - 1, val=none_held_out)
    assert prepared(fitting, tokenizer, tmp_path)[0].manifest["too_long"] == 0


def test_a_file_in_which_everything_is_skipped_is_refused_with_the_reasons(tmp_path, tokenizer, none_held_out):
    rows = [{"messages": [{"role": "user", "content": "Hello"}]}] * 3 + talks(2)
    path = write_rows(tmp_path / "a.jsonl", rows)
    for _ in range(2):  # made, and met again in the cache
        with pytest.raises(UserError, match=r"no conversation to use in --data.train .*a.jsonl") as caught:
            prepared(talk_settings(path, row_length=8, val=none_held_out), tokenizer, tmp_path)
        assert "3 conversations skipped: no assistant turn; the first is " in str(caught.value)
        assert "2 conversations of more than 9 tokens left out; --data.row_length=" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_any_change_that_matters_makes_other_rows(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [row for row in talks(90) if len(row["messages"]) == 2])

    def place(**fields):
        return prepared(talk_settings(path, **fields), tokenizer, tmp_path)[0].directory

    places = [place(), place(format="alpaca"), place(train_on="everything"), place(row_length=300)]
    assert len(set(places)) == len(places)
    assert place(epochs=(3.0,)) == place(weights=(2.0,)) == place(workers=2) == places[0]


def test_the_villages_talk_is_conversations_without_exception(tmp_path, tokenizer):
    data = talk_settings("tinyworld:chat:60", val=("tinyworld:chat:20",))
    for split, count in (("train", 60), ("val", 20)):
        (rows,) = prepared(data, tokenizer, tmp_path, split)
        assert (rows.manifest["documents"], rows.manifest["skipped"], rows.manifest["too_long"]) == (count, {}, 0)
        assert len(segments_of([rows])) == count


def test_a_tokenizer_can_be_trained_on_conversations(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", talks(200))
    data = talk_settings(path, val_fraction=0.2)
    assert ensure_tokenizer(data, tmp_path / "cache", 0, silent).vocab_size == 300
    ensure_tokenizer(talk_settings(path, val_fraction=0.2, format="alpaca"), tmp_path / "cache", 0, silent)
    assert len([place for place in (tmp_path / "cache" / "tokenizers").iterdir() if place.is_dir()]) == 2
    known = {conversations.words(row["messages"]) for row in talks(200)}
    train, val = (set(texts_of(data, split, tmp_path / "cache", silent)) for split in ("train", "val"))
    assert train | val == known
    assert not train & val
    assert val


def test_text_among_conversations_is_read_as_documents_and_trains_no_tokenizer(tmp_path):
    chats = write_rows(tmp_path / "a.jsonl", talks(40))
    train, val = write(tmp_path / "t.jsonl", ["only in training"]), write(tmp_path / "v.jsonl", ["held out"])
    data = talk_settings(chats, f"text:{train}", val=(f"text:{val}",))
    assert list(texts_of(data, "val", tmp_path / "cache", silent)) == ["held out"]
    known = [conversations.words(row["messages"]) for row in talks(40)]
    assert list(texts_of(data, "train", tmp_path / "cache", silent)) == known


def test_what_is_not_read_as_it_stands_is_counted(tmp_path, tokenizer, none_held_out):
    rows = talks(12)
    for row in rows[:4]:
        row["messages"][1]["weight"] = 0
        row["messages"] += [{"role": "user", "content": "More?"}, {"role": "assistant", "content": "More."}]
    rows[5]["messages"].append({"role": "user", "content": "Are you there?"})
    rows[6]["messages"].insert(0, {"role": "assistant", "content": "Hello"})
    path = write_rows(tmp_path / "a.jsonl", [*rows, None])
    said = []
    for train_on in ("assistant", "everything"):
        data = talk_settings(path, val=none_held_out, train_on=train_on)
        (made,) = prepared(data, tokenizer, tmp_path, log=said.append)
        weighed = [chat.render(conversations.read(row), tokenizer, everything=train_on == "everything") for row in rows]
        expected = sorted(json.dumps([ids, learned[1:]]) for ids, learned in weighed)
        assert sorted(json.dumps(pair) for pair in segments_of([made])) == expected
        assert made.manifest["notes"] == {
            "with messages of weight 0, which are not trained on": 4,
            "whose messages after the last answer are left out": 1,
            "whose greeting before the first user message is left out": 1,
        }
    warnings = [line for line in said if line.startswith("warning")]
    assert f"warning: {path}: 4 conversations with messages of weight 0, which are not trained on" in warnings
    assert f"warning: {path}: 1 conversation whose messages after the last answer are left out" in warnings
    assert any("1 conversation skipped: no message; the first is" in line for line in warnings)
