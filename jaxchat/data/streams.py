"""Reads batches of rows from disk, in an order that is a pure function of the step.

Row `i` of global batch `step` is row `order(seed, step * batch_rows + i)`, so resuming needs no state, and the numbers
of hosts and devices do not change the training data. A host reads only the places of a batch that it needs.
"""

import bisect
import json
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from jaxchat.data.batch import Batch, batch_of, decode_rows
from jaxchat.errors import UserError

OPEN_SHARDS = 256
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


class Rows:
    """Random access to the rows of one directory that is prepared completely; thread-safe."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text("utf-8"))
        self.row_length: int = self.manifest["row_length"]
        self._dtype = np.dtype(self.manifest["dtype"])
        self._stops = list(accumulate(shard["rows"] for shard in self.manifest["shards"]))
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and flags, both (R, S), of the rows at `indices`, in that order."""
        places_by_shard: dict[int, list[int]] = {}
        for place, i in enumerate(indices):
            places_by_shard.setdefault(bisect.bisect_right(self._stops, i), []).append(place)
        records: list[bytes] = [b""] * len(indices)
        with self._lock:
            for shard, places in places_by_shard.items():
                start = self._stops[shard - 1] if shard else 0
                shard_records = self._reader(shard).read([int(indices[place]) - start for place in places])
                for place, record in zip(places, shard_records, strict=True):
                    records[place] = record
        return decode_rows(records, self.row_length, self._dtype)

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        if len(self._readers) >= OPEN_SHARDS:
            self._readers.popitem(last=False)[1].close()
        path = self.directory / self.manifest["shards"][shard]["file"]
        rows = self.manifest["shards"][shard]["rows"]
        if not path.exists():  # the reader would treat a missing file as one without rows
            raise UserError(f"{path} is missing; delete {self.directory} and prepare it again")
        try:
            reader = ArrayRecordReader(str(path), RANDOM_ACCESS)
            found = reader.num_records()
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete {self.directory} and prepare it again") from None
        if found != rows:
            raise UserError(f"{path} holds {found} rows, not {rows}; delete {self.directory} and prepare it again")
        self._readers[shard] = reader
        return reader


class RowStream:
    """Endless shuffled batches of one or several sources of rows.

    By default every row is seen once per pass. With `weights`, each source is shuffled and repeated on its own, and
    the sources are mixed in those proportions. With `epochs`, a pass contains each source that many times, shuffled
    together; with a fraction of an epoch, the next pass continues with the source's remaining rows.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        weights: Sequence[float] = (),
        *,
        seed: int,
        batch_rows: int,
        epochs: Sequence[float] = (),
    ):
        self.rows = tuple(rows)
        self.batch_rows = batch_rows
        self._stops = list(accumulate(len(part) for part in rows))
        self._order = _Passes(self._stops, epochs, seed) if epochs else _order(self._stops, weights, seed)

    @property
    def rows_per_pass(self) -> int:
        """Number of rows in a pass: each source repeated by its epochs, or every row once without epochs."""
        return self._order.rows if isinstance(self._order, _Passes) else self._stops[-1]

    def batch(self, step: int, places: Sequence[int] | None = None) -> Batch:
        """Global batch `step`, or only its rows at `places`."""
        first = step * self.batch_rows
        wanted = range(self.batch_rows) if places is None else places
        return _read(self.rows, self._stops, [int(self._order[first + i]) for i in wanted])

    def prefetch(
        self, start_step: int, stop_step: int, *, places: Sequence[int] | None = None, depth: int = 4
    ) -> Iterator[tuple[int, Batch]]:
        """Yields (step, batch) for start_step <= step < stop_step; a thread reads up to `depth` batches ahead."""
        steps = iter(range(start_step, stop_step))
        pool = ThreadPoolExecutor(1, thread_name_prefix="rows")

        def read(count: int) -> Iterator[tuple[int, Future[Batch]]]:
            return ((step, pool.submit(self.batch, step, places)) for step in islice(steps, count))

        try:
            ahead = deque(read(depth))
            while ahead:
                step, batch = ahead.popleft()
                ahead.extend(read(1))
                yield step, batch.result()
        finally:
            pool.shutdown(cancel_futures=True)


def every_row_once(
    rows: Sequence[Rows], batch_rows: int, *, places: Sequence[int] | None = None, limit: int | None = None
) -> Iterator[Batch]:
    """Yields batches of one shape over every row, or over `limit` evenly spaced rows; `places` selects rows of each.

    The last batch is padded with rows of weight 0.
    """
    wanted = np.arange(batch_rows) if places is None else np.asarray(places)
    stops = list(accumulate(len(part) for part in rows))
    total = stops[-1] if limit is None else min(limit, stops[-1])
    for start in range(0, total, batch_rows):
        here = start + wanted
        batch = _read(rows, stops, [int(place) * stops[-1] // total for place in np.minimum(here, total - 1)])
        batch["weights"][here >= total] = 0.0
        yield batch


def _order(stops: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Row index at each place of the endless stream."""
    if not weights:
        return grain.MapDataset.range(stops[-1]).seed(seed).shuffle().repeat()
    sources = [
        grain.MapDataset.range(start, stop).seed(seed + i).shuffle().repeat()
        for i, (start, stop) in enumerate(zip([0, *stops], stops))
    ]
    return grain.MapDataset.mix(sources, weights=list(weights))


class _Passes:
    """Row index at each place of a stream whose passes contain each source `epochs` times.

    Each source is an endless shuffled sequence. A pass takes the next section of each sequence and shuffles the
    sections together, so that all rows of a source are seen equally often over many passes, even for fractional epochs.
    """

    def __init__(self, stops: Sequence[int], epochs: Sequence[float], seed: int):
        lengths = [stop - start for start, stop in zip([0, *stops], stops)]
        self._takes = [max(1, round(share * length)) for share, length in zip(epochs, lengths)]
        self._borders = list(accumulate(self._takes))
        self._sources = [
            grain.MapDataset.range(start, start + length).seed(seed + i).shuffle().repeat()
            for i, (start, length) in enumerate(zip([0, *stops], lengths))
        ]
        self._mixed = grain.MapDataset.range(self.rows).seed(seed + len(lengths)).shuffle().repeat()

    @property
    def rows(self) -> int:
        return self._borders[-1]

    def __getitem__(self, place: int) -> int:
        mixed = int(self._mixed[place])
        i = bisect.bisect_right(self._borders, mixed)
        before = self._borders[i - 1] if i else 0
        return int(self._sources[i][place // self.rows * self._takes[i] + mixed - before])


def _read(rows: Sequence[Rows], stops: Sequence[int], indices: Sequence[int]) -> Batch:
    if len(rows) == 1:
        return batch_of(*rows[0].read(indices))
    order = [(bisect.bisect_right(stops, i), i) for i in indices]
    parts = {}
    for source in sorted({source for source, _ in order}):
        start = stops[source - 1] if source else 0
        parts[source] = iter(zip(*rows[source].read([i - start for s, i in order if s == source])))
    pairs = [next(parts[source]) for source, _ in order]
    return batch_of(np.stack([ids_S for ids_S, _ in pairs]), np.stack([flags_S for _, flags_S in pairs]))
