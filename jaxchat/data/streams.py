"""Rows on disk to batches: the order is a pure function of the step.

Row `i` of global batch `step` is row `order(seed, step * batch_rows + i)`, so resuming costs nothing and neither the
number of hosts nor that of devices changes what is trained on. A host reads those places of a batch that it needs.
"""

import bisect
import json
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from jaxchat.data.batch import Batch, Row, batch_of, decode_rows
from jaxchat.errors import UserError

OPEN_SHARDS = 256
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


class Rows:
    """The rows of one prepared folder, read at random; safe to share between threads."""

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest
        self.row_length: int = manifest["row_length"]
        self._dtype = np.dtype(manifest["dtype"])
        self._stops = list(accumulate(shard["rows"] for shard in manifest["shards"]))
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(i)
        ids_RS, flags_RS = self.read([i])
        return Row(ids_RS[0], flags_RS[0])

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and flags, both (R, S), of some rows in the order asked for."""
        places_by_shard: dict[int, list[int]] = {}
        for place, i in enumerate(indices):
            places_by_shard.setdefault(bisect.bisect_right(self._stops, i), []).append(place)
        records: list[bytes] = [b""] * len(indices)
        with self._lock:
            for shard, places in places_by_shard.items():
                start = self._stops[shard - 1] if shard else 0
                found = self._reader(shard).read([int(indices[place]) - start for place in places])
                for place, record in zip(places, found, strict=True):
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
        if not path.exists():  # which the reader would take for a file without rows
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


def open_rows(directory: str | Path, *, tokenizer_hash: str | None = None) -> Rows:
    """Opens prepared rows; refuses rows made by another tokenizer than `tokenizer_hash`."""
    path = Path(directory) / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"no rows in {directory}; make them with python -m launch.prepare") from None
    except ValueError:
        raise UserError(f"{path} is damaged; delete {directory} and prepare it again") from None
    if tokenizer_hash is not None and manifest["tokenizer"] != tokenizer_hash:
        raise UserError(
            f"the rows in {directory} were made with tokenizer {manifest['tokenizer'][:12]}, "
            f"not {tokenizer_hash[:12]}; prepare them again with this tokenizer"
        )
    return Rows(Path(directory), manifest)


class RowStream:
    """Endless shuffled batches of one or several sources of rows.

    Without weights and epochs every row is seen once a pass. With weights each source is shuffled and repeated by
    itself, and the sources alternate in those proportions. With epochs a pass holds each source so many times, all
    shuffled together; half an epoch is another half in the next pass.
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
        _check(rows)
        for name, given in (("weights", weights), ("epochs", epochs)):
            if given and len(given) != len(rows):
                raise UserError(f"--data.{name} has {len(given)} entries for {len(rows)} entries of --data.train")
        if weights and epochs:
            raise UserError("--data.weights and --data.epochs both say how often rows are seen: give one of them")
        self.rows = tuple(rows)
        self.batch_rows = batch_rows
        self._stops = list(accumulate(len(part) for part in rows))
        self._order = _Passes(self._stops, epochs, seed) if epochs else _order(self._stops, weights, seed)

    @property
    def rows_per_epoch(self) -> int:
        return self._stops[-1]

    @property
    def rows_per_pass(self) -> int:
        """Rows until every source was seen as often as its epochs say; without epochs, every row once."""
        return self._order.rows if isinstance(self._order, _Passes) else self.rows_per_epoch

    def batch(self, step: int, places: Sequence[int] | None = None) -> Batch:
        """The rows of global batch `step`, or those of them at `places`."""
        first = step * self.batch_rows
        wanted = range(self.batch_rows) if places is None else places
        return _read(self.rows, self._stops, [int(self._order[first + i]) for i in wanted])

    def prefetch(
        self, start_step: int, stop_step: int, *, places: Sequence[int] | None = None, depth: int = 4
    ) -> Iterator[tuple[int, Batch]]:
        """Yields (step, batch) from start_step up to stop_step, read ahead by a thread that ends with the iterator."""
        ready: queue.Queue[tuple[int, Batch] | BaseException | None] = queue.Queue(depth)
        closed = threading.Event()

        def put(item: tuple[int, Batch] | BaseException | None) -> None:
            while not closed.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read_ahead() -> None:
            try:
                for step in range(start_step, stop_step):
                    if closed.is_set():
                        return
                    put((step, self.batch(step, places)))
                put(None)
            except BaseException as error:  # handed to the consumer, who raises it
                put(error)

        thread = threading.Thread(target=read_ahead, name="rows", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()


def every_row_once(
    rows: Sequence[Rows], batch_rows: int, *, places: Sequence[int] | None = None, limit: int | None = None
) -> Iterator[Batch]:
    """Batches of one shape over every row, or over `limit` rows spread evenly; what fills up the last one weighs 0.

    With `places`, those places of each batch.
    """
    _check(rows)
    wanted = np.arange(batch_rows) if places is None else np.asarray(places)
    stops = list(accumulate(len(part) for part in rows))
    total = stops[-1] if limit is None else min(limit, stops[-1])
    for start in range(0, total, batch_rows):
        here = start + wanted
        batch = _read(rows, stops, [int(place) * stops[-1] // total for place in np.minimum(here, total - 1)])
        batch["weights"][here >= total] = 0.0
        yield batch


def _order(stops: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The number of the row at every place of the endless stream."""
    if not weights:
        return grain.MapDataset.range(stops[-1]).seed(seed).shuffle().repeat()
    sources = [
        grain.MapDataset.range(start, stop).seed(seed + i).shuffle().repeat()
        for i, (start, stop) in enumerate(zip([0, *stops], stops))
    ]
    return grain.MapDataset.mix(sources, weights=list(weights))


class _Passes:
    """The number of the row at every place, where a pass takes each source `epochs` times.

    Each source has an endless order of its own, of which a pass takes the next stretch; the stretches are shuffled
    together. So over many passes every row of a source is seen equally often, also where its epochs are no whole
    number.
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


def _check(rows: Sequence[Rows]) -> None:
    if not rows:
        raise UserError("no rows to read; name documents with --data.train")
    for part in rows:
        if not len(part):
            raise UserError(f"no rows in {part.directory}: its documents are all empty")
        if part.row_length != rows[0].row_length:
            raise UserError(
                f"rows of length {part.row_length} in {part.directory} do not go with rows of length "
                f"{rows[0].row_length} in {rows[0].directory}; prepare them again with one --data.row_length"
            )
