"""Streams: which rows a step reads, on any number of hosts, and what of it is scored."""

import threading
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxchat.data import streams
from jaxchat.data.batch import START, TARGET, encode_row, token_dtype
from jaxchat.data.cache import write_json
from jaxchat.data.streams import Rows, RowStream, every_row_once
from jaxchat.errors import UserError

T = 3


def make_rows(directory, shards, first=0):
    """Rows that are numbered by all their tokens."""
    directory.mkdir(parents=True)
    number = first
    for i, rows in enumerate(shards):
        writer = ArrayRecordWriter(str(directory / f"{i}.array_record"), "group_size:1")
        for _ in range(rows):
            flags = np.array([START, *[TARGET] * T], np.uint8)
            writer.write(encode_row(np.full(T + 1, number), flags, token_dtype(1000)))
            number += 1
        writer.close()
    manifest = {
        "row_length": T,
        "dtype": "uint16",
        "tokenizer": "abc",
        "shards": [{"file": f"{i}.array_record", "rows": rows} for i, rows in enumerate(shards)],
    }
    write_json(directory / "manifest.json", manifest)
    return Rows(directory)


@pytest.fixture
def rows(tmp_path):
    return [make_rows(tmp_path / "a", [5, 0, 7, 1]), make_rows(tmp_path / "b", [4], first=100)]


def numbers(batch):
    return batch["tokens"][:, 0].tolist()


def stream(rows, weights=(), seed=0, batch_rows=4, **more):
    return RowStream(rows, weights, seed=seed, batch_rows=batch_rows, **more)


def test_a_row_is_found_in_its_shard(rows):
    assert rows[0].read(range(13))[0][:, 0].tolist() == list(range(13))
    assert rows[0].read([12, 0, 5])[0][:, 0].tolist() == [12, 0, 5]
    assert len(rows[0]) == 13


def test_more_shards_than_open_files_are_read(rows, monkeypatch):
    monkeypatch.setattr(streams, "OPEN_SHARDS", 1)
    assert rows[0].read([0, 12, 5, 1, 6])[0][:, 0].tolist() == [0, 12, 5, 1, 6]


def test_a_batch_has_fixed_names_shapes_and_types(rows):
    batch = stream(rows).batch(0)
    assert {name: (column.shape, column.dtype.name) for name, column in batch.items()} == {
        "tokens": ((4, T), "int32"),
        "targets": ((4, T), "int32"),
        "weights": ((4, T), "float32"),
        "segments": ((4, T), "int32"),
    }


def test_a_step_reads_the_same_rows_whatever_was_read_before(rows):
    forward = [numbers(stream(rows).batch(step)) for step in range(20)]
    one = stream(rows)
    assert [numbers(one.batch(step)) for step in reversed(range(20))] == forward[::-1]


def test_every_row_is_seen_once_an_epoch_in_another_order(rows):
    one = stream(rows, batch_rows=1)
    order = [numbers(one.batch(i))[0] for i in range(3 * 17)]
    epochs = [order[i : i + 17] for i in (0, 17, 34)]
    assert one.rows_per_pass == 17
    for epoch in epochs:
        assert sorted(epoch) == [*range(13), 100, 101, 102, 103]
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_seed_makes_another_order(rows):
    assert numbers(stream(rows, seed=0, batch_rows=16).batch(0)) != numbers(
        stream(rows, seed=1, batch_rows=16).batch(0)
    )


def test_the_batch_size_does_not_change_the_order_of_rows(rows):
    small, large = stream(rows, batch_rows=2), stream(rows, batch_rows=8)
    for step in range(2):
        assert [n for i in range(4) for n in numbers(small.batch(4 * step + i))] == numbers(large.batch(step))


@pytest.mark.parametrize("shares", [{}, {"weights": (0.25, 0.75)}, {"epochs": (1.5, 2.0)}])
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_places_of_all_hosts_are_the_global_batch(rows, shares, hosts):
    one = stream(rows, batch_rows=8, **shares)
    places = [np.arange(8)[host::hosts] for host in range(hosts)]
    for step in range(5):
        expected = one.batch(step)
        parts = [one.batch(step, own) for own in places]
        for name in expected:
            for own, part in zip(places, parts, strict=True):
                np.testing.assert_array_equal(part[name], expected[name][own])
    read_ahead = [batch for _, batch in one.prefetch(0, 5, places=places[1])]
    assert [numbers(batch) for batch in read_ahead] == [numbers(one.batch(step, places[1])) for step in range(5)]


def test_weights_give_each_source_its_share_of_every_stretch(rows):
    one = stream(rows, (0.25, 0.75), batch_rows=8)
    for step in range(3):
        assert Counter(number >= 100 for number in numbers(one.batch(step))) == {True: 6, False: 2}
    seen = Counter(number for step in range(13) for number in numbers(one.batch(step)))
    assert {count for number, count in seen.items() if number < 100} == {2}  # 26 draws of 13 rows
    assert sorted(count for number, count in seen.items() if number >= 100) == [19, 19, 20, 20]  # 78 draws of 4 rows


@pytest.mark.parametrize("epochs", [(1.0, 3.0), (0.5, 2.25), (2.0, 0.1)])
def test_a_pass_sees_each_source_as_often_as_its_epochs_say(rows, epochs):
    one = stream(rows, batch_rows=1, epochs=epochs)
    takes = [max(1, round(share * length)) for share, length in zip(epochs, (13, 4))]
    assert one.rows_per_pass == sum(takes)
    passes = [Counter(numbers(one.batch(i))[0] for i in range(n * sum(takes), (n + 1) * sum(takes))) for n in range(8)]
    for seen in passes:
        parts = [{k: n for k, n in seen.items() if (k >= 100) == later} for later in (False, True)]
        assert [sum(part.values()) for part in parts] == takes
    for later, length in ((False, 13), (True, 4)):
        total = Counter({k: sum(seen[k] for seen in passes) for k in set().union(*passes) if (k >= 100) == later})
        assert len(total) == min(length, 8 * takes[later])
        assert max(total.values()) - min(total.values() if len(total) == length else [0]) <= 1
    if epochs == (1.0, 3.0):
        assert set(passes[0].values()) == {1, 3}


def test_a_pass_mixes_its_sources_and_is_a_function_of_the_step(rows):
    one = stream(rows, batch_rows=4, epochs=(2.0, 3.0))
    batches = [numbers(one.batch(step)) for step in range(30)]
    fresh = stream(rows, batch_rows=4, epochs=(2.0, 3.0))
    assert [numbers(fresh.batch(step)) for step in reversed(range(30))] == batches[::-1]
    order = [number >= 100 for batch in batches for number in batch]
    assert sum(a != b for a, b in pairwise(order[: one.rows_per_pass])) > 5
    assert batches[:9] != [numbers(stream(rows, seed=1, epochs=(2.0, 3.0)).batch(step)) for step in range(9)]


def test_without_epochs_a_pass_is_every_row_once(rows):
    assert stream(rows).rows_per_pass == stream(rows, (0.5, 0.5)).rows_per_pass == 17


def test_prefetch_gives_the_batches_of_its_steps_and_ends_its_thread(rows):
    one = stream(rows)
    found = [(step, numbers(batch)) for step, batch in one.prefetch(3, 9)]
    assert found == [(step, numbers(one.batch(step))) for step in range(3, 9)]
    ahead = one.prefetch(0, 10**9)
    assert next(ahead)[0] == 0
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_prefetch_raises_what_its_thread_met(rows):
    (rows[0].directory / "0.array_record").unlink()
    with pytest.raises(UserError, match=r"0.array_record is missing; .* prepare it again"):
        list(stream(rows).prefetch(0, 20))


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("limit", [None, 5, 100])
def test_every_row_is_scored_once(rows, hosts, limit):
    seen, shapes = [], set()
    for host in range(hosts):
        for batch in every_row_once(rows, 4, places=range(host, 4, hosts), limit=limit):
            shapes.add(batch["tokens"].shape)
            kept = batch["weights"].any(axis=1)
            seen += batch["tokens"][kept, 0].tolist()
    assert shapes == {(4 // hosts, T)}
    every = [*range(13), 100, 101, 102, 103]
    assert sorted(seen) == (every if limit != 5 else [every[i * 17 // 5] for i in range(5)])


def test_hosts_make_equally_many_batches_to_score(rows):
    assert {len(list(every_row_once(rows, 4, places=[host]))) for host in range(4)} == {5}


def test_damaged_rows_are_refused(rows):
    path = rows[0].directory / "2.array_record"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"2.array_record"):
        rows[0].read([6])
    rows[0].row_length = 4
    with pytest.raises(UserError, match="a row has 12 bytes, but row_length=4 needs 15"):
        rows[0].read([0])
