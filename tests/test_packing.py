"""Packing: what goes into rows comes out of them."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxchat.data.batch import START, TARGET, batch_of, decode_rows, encode_row, token_dtype
from jaxchat.data.packing import Packed, best_fit, pack, pack_whole

BOS = 999
LOSSLESS = ["best_fit", "concatenate"]


def numbered(lengths):
    """Documents whose every token names its document and its place, so that no two tokens are alike."""
    return [np.arange(n, dtype=np.uint32) + 1000 * (d + 1) for d, n in enumerate(lengths)]


def packed(lengths, row_length, rule) -> Packed:
    return pack(numbered(lengths), row_length, rule, bos=BOS, dtype=np.dtype(np.uint32))


lengths_and_row = st.tuples(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 12))
every_rule = pytest.mark.parametrize("rule", [*LOSSLESS, "crop"])


@pytest.mark.parametrize("rule", LOSSLESS)
@given(case=lengths_and_row)
@settings(max_examples=60, deadline=None)
def test_every_token_is_a_target_exactly_once(rule, case):
    lengths, row_length = case
    result = packed(lengths, row_length, rule)
    batch = batch_of(result.ids_RS, result.flags_RS)
    targets = batch["targets"][batch["weights"] > 0]
    expected = np.concatenate([*numbered(lengths), []])
    assert Counter(targets[targets != BOS].tolist()) == Counter(expected.tolist())
    assert (result.tokens, result.discarded) == (sum(lengths), 0)


@pytest.mark.parametrize("rule", LOSSLESS)
@given(case=lengths_and_row)
@settings(max_examples=60, deadline=None)
def test_every_target_follows_its_own_predecessor(rule, case):
    lengths, row_length = case
    result = packed(lengths, row_length, rule)
    batch = batch_of(result.ids_RS, result.flags_RS)
    for token, target, weight in zip(*(batch[k].ravel().tolist() for k in ("tokens", "targets", "weights"))):
        if weight and target != BOS:
            first_of_document = target % 1000 == 0
            assert token == (BOS if first_of_document else target - 1)


@every_rule
@given(case=lengths_and_row)
@settings(max_examples=60, deadline=None)
def test_a_segment_never_mixes_documents(rule, case):
    lengths, row_length = case
    result = packed(lengths, row_length, rule)
    batch = batch_of(result.ids_RS, result.flags_RS)
    for tokens, segments in zip(batch["tokens"], batch["segments"]):
        for segment in set(segments.tolist()):
            inside = tokens[segments == segment]
            documents = set((inside[inside != BOS] // 1000).tolist())
            assert len(documents) <= 1
            starts_with_bos, bos_count = inside[0] == BOS, int((inside == BOS).sum())
            assert bos_count == int(starts_with_bos) or not documents  # only padding repeats BOS


@every_rule
@given(case=lengths_and_row)
@settings(max_examples=60, deadline=None)
def test_bos_is_trained_only_as_the_end_of_a_whole_document(rule, case):
    lengths, row_length = case
    result = packed(lengths, row_length, rule)
    last = {int(document[-1]) for document in numbered(lengths) if len(document)}
    for ids, flags in zip(result.ids_RS, result.flags_RS):
        assert flags[0] == START
        for i in np.flatnonzero(ids[1:] == BOS) + 1:
            trained = bool(flags[i] & TARGET)
            if trained:
                assert int(ids[i - 1]) in last
            elif ids[i - 1] != BOS:
                assert flags[i] == START and (ids[i:] == BOS).all()  # the padding


@given(case=lengths_and_row)
@settings(max_examples=60, deadline=None)
def test_crop_counts_exactly_what_it_throws_away(case):
    lengths, row_length = case
    result = packed(lengths, row_length, "crop")
    batch = batch_of(result.ids_RS, result.flags_RS)
    targets = batch["targets"][batch["weights"] > 0]
    kept = targets[targets != BOS]
    assert len(set(kept.tolist())) == len(kept) == result.tokens
    assert result.tokens + result.discarded == sum(lengths)
    for d in range(len(lengths)):
        own = kept[kept // 1000 == d + 1] % 1000
        assert own.tolist() == list(range(len(own)))  # the head of the document, in order


@every_rule
@given(case=lengths_and_row)
@settings(max_examples=40, deadline=None)
def test_padding_is_counted_and_carries_no_weight(rule, case):
    lengths, row_length = case
    result = packed(lengths, row_length, rule)
    filled = (result.flags_RS & TARGET).sum(axis=1) > 0
    assert filled.all()  # no row is padding alone
    assert result.ids_RS.shape[1] == result.flags_RS.shape[1] == row_length + 1
    padded = 0
    for ids, flags in zip(result.ids_RS, result.flags_RS):
        run = 0
        while not flags[len(ids) - 1 - run] & TARGET and ids[len(ids) - 1 - run] == BOS:
            run += 1
        padded += run
    assert padded == result.padding


@pytest.mark.parametrize("tokens", [3, 7, 8, 9, 15, 16, 17])
def test_a_document_longer_than_a_row_overlaps_by_one_token(tokens):
    result = packed([tokens], 8, "best_fit")
    rows = -(-tokens // 8)
    assert len(result.ids_RS) == rows
    for before, after in zip(result.ids_RS, result.ids_RS[1:]):
        assert before[-1] == after[0]
    assert result.cut == int(rows > 1)


def test_a_continuation_after_another_segment_is_not_a_target_at_its_first_token():
    result = packed([5 + 8, 2 + 8], 8, "best_fit")  # two rests, of 5 and 2 targets, share the third row
    row, flags = result.ids_RS[2], result.flags_RS[2]
    assert row.tolist() == [1007, 1008, 1009, 1010, 1011, 1012, 2007, 2008, 2009]
    assert flags.tolist() == [START, *[TARGET] * 5, START, TARGET, TARGET]


def test_concatenate_pads_only_the_last_row():
    result = packed([7, 30, 1, 12, 55], 8, "concatenate")
    total = sum([7, 30, 1, 12, 55]) + 5
    assert len(result.ids_RS) == -(-(total - 1) // 8)
    assert result.padding == len(result.ids_RS) * 8 + 1 - total


def test_best_fit_fills_rows_with_what_fits_best():
    result = packed([5, 3, 7, 1, 2], 9, "best_fit")  # with BOS 6 4 8 2 3: 8+2, 6+4, 3
    assert sorted(((ids != BOS).sum()) for ids in result.ids_RS) == [2, 8, 8]
    assert result.padding == 7


def test_crop_takes_the_longest_that_fits_and_crops_the_shortest():
    result = packed([12, 5, 2, 9], 9, "crop")  # with BOS 13 6 3 10; row of 10: 10 | 6 3 + 1 of 13
    assert result.ids_RS[0].tolist() == [BOS, *range(4000, 4009)]
    assert result.ids_RS[1].tolist() == [BOS, *range(2000, 2005), BOS, 3000, 3001, BOS]
    assert (result.tokens, result.discarded, result.cut) == (16, 12, 1)


def test_crop_of_several_that_do_not_fit_takes_the_shortest():
    result = packed([14, 12, 5], 9, "crop")  # with BOS 15 13 6: 6 fits, then 4 of 13
    assert result.ids_RS[0].tolist() == [BOS, *range(3000, 3005), BOS, *range(2000, 2003)]
    assert result.discarded == 14 - 9 + 12 - 3


def test_no_documents_make_no_rows():
    for rule in [*LOSSLESS, "crop"]:
        assert packed([], 8, rule).ids_RS.shape == packed([0, 0], 8, rule).ids_RS.shape == (0, 9)


def test_many_short_documents_share_rows_without_loss():
    result = packed([20] * 1000, 512, "best_fit")
    assert len(result.ids_RS) == -(-1000 // 24)  # 24 documents of 21 ids in 513
    assert result.tokens == 20_000


def conversations(lengths):
    """Of one learned token at least, the last; every token names its conversation and place."""
    return [
        (np.array([BOS, *(1000 * (c + 1) + np.arange(1, n))]), np.array([i % 3 == 0 or i == n - 1 for i in range(n)]))
        for c, n in enumerate(lengths)
    ]


def whole(talks, row_length):
    return pack_whole(talks, row_length, bos=BOS, dtype=np.dtype(np.uint32))


conversation_lengths = st.tuples(st.lists(st.integers(2, 40), max_size=20), st.integers(1, 30))


@given(case=conversation_lengths)
@settings(max_examples=150, deadline=None)
def test_a_conversation_is_never_cut_and_its_mask_stays(case):
    lengths, row_length = case
    talks = conversations(lengths)
    result = whole(talks, row_length)
    batch = batch_of(result.ids_RS, result.flags_RS)
    found = []
    for tokens, targets, weights, segments in zip(*(batch[k] for k in ("tokens", "targets", "weights", "segments"))):
        for segment in sorted(set(segments.tolist())):
            inside = segments == segment
            trained = targets[inside][weights[inside] > 0]
            if len(trained):
                number = int(trained[-1]) // 1000 - 1
                ids, learned = talks[number]
                found.append(number)
                length = len(ids) - 1
                assert tokens[inside][: length + 1].tolist()[:length] == ids[:-1].tolist()
                assert targets[inside][:length].tolist() == ids[1:].tolist()
                assert weights[inside][:length].astype(bool).tolist() == learned[1:].tolist()
                assert not weights[inside][length:].any()
            else:
                assert (tokens[inside] == BOS).all()
    assert sorted(found) == [i for i, n in enumerate(lengths) if n <= row_length + 1]
    assert result.too_long == len(lengths) - len(found)


@given(case=conversation_lengths)
@settings(max_examples=150, deadline=None)
def test_every_row_of_conversations_trains_a_token(case):
    lengths, row_length = case
    result = whole(conversations(lengths), row_length)
    batch = batch_of(result.ids_RS, result.flags_RS)
    assert (batch["weights"].sum(axis=1) >= 1).all()
    assert result.ids_RS.shape == result.flags_RS.shape == (len(batch["weights"]), row_length + 1)
    fitting = [n for n in lengths if n <= row_length + 1]
    assert result.tokens == sum(fitting) - len(fitting)
    assert result.discarded == sum(n - 1 for n in lengths) - result.tokens
    assert result.padding == result.ids_RS.size - sum(fitting)


def test_a_row_of_conversations_is_the_one_written_by_hand():
    talks = [
        (np.array([BOS, 1, 2]), np.array([False, False, True])),
        (np.array([BOS, *range(3, 8)]), [False] * 4 + [True] * 2),
    ]
    result = whole(talks, 10)
    assert result.ids_RS.tolist() == [[BOS, 1, 2, BOS, 3, 4, 5, 6, 7, BOS, BOS]]
    assert result.flags_RS.tolist() == [[START, 0, TARGET, START, 0, 0, 0, TARGET, TARGET, START, 0]]


@given(lengths=st.lists(st.integers(1, 50), max_size=40), more=st.integers(0, 20))
@example(lengths=[1, 1], more=1)
@settings(max_examples=150, deadline=None)
def test_best_fit_leaves_no_row_empty_or_too_full(lengths, more):
    capacity = max(lengths, default=1) + more
    rows = best_fit(lengths, capacity)
    assert len(rows) == len(lengths)
    filled = Counter()
    for row, length in zip(rows.tolist(), lengths):
        filled[row] += length
    assert sorted(filled) == list(range(len(filled)))
    assert all(used <= capacity for used in filled.values())
    assert sum(2 * used <= capacity for used in filled.values()) <= 1  # two such would have shared a row


def test_best_fit_of_lengths_in_any_order_chooses_the_fullest_row():
    assert best_fit([2, 6, 4, 3], 8).tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="lengths from 2 to 9 must lie between 1 and 8"):
        best_fit([2, 9], 8)


@pytest.mark.parametrize("vocab", [65_536, 65_537])
def test_a_row_survives_the_disk(vocab):
    ids, flags = np.array([vocab - 1, 0, 7]), np.array([1, 2, 3], np.uint8)
    record = encode_row(ids, flags, token_dtype(vocab))
    ids_RS, flags_RS = decode_rows([record, record], 2, token_dtype(vocab))
    assert ids_RS.tolist() == [ids.tolist()] * 2
    assert flags_RS.tolist() == [flags.tolist()] * 2
    batch = batch_of(ids_RS, flags_RS)
    assert batch["tokens"].tolist() == [[vocab - 1, 0]] * 2
    assert batch["targets"].tolist() == [[0, 7]] * 2
    assert batch["weights"].tolist() == [[1.0, 1.0]] * 2
    assert batch["segments"].tolist() == [[1, 1]] * 2
