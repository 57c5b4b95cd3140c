"""Checkpoints by model name, loaded when asked for; the least recently used one that is idle makes room for another.

`runs/tiny` serves every stage and kept step, snapshots too, as tiny/sft (the latest step) and tiny/sft@300;
`runs/tiny/sft` serves that stage, `runs/tiny/sft@300` that step. Models of equal architecture share compiled programs.
"""

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxchat import checkpoint
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.errors import UserError
from jaxchat.experiment import STAGES
from jaxchat.inspection.text import View
from jaxchat.loading import Loaded, load_checkpoint
from jaxchat.paths import user_path
from jaxchat.serve.daemon_threads import DaemonThreads
from jaxchat.serve.errors import ApiError
from jaxchat.serve.warming import warm, warm_views
from jaxchat.serve.worker import Worker

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A model that can be asked for: its name, and where its checkpoint is. `created`: seconds since 1970, kept because
    a checkpoint may be removed while it is served."""

    name: str
    directory: Path
    step: int
    created: int

    @property
    def key(self) -> str:
        """The same for all names of one checkpoint, which is loaded once."""
        return f"{self.directory}@{self.step}"


def find_models(paths: Sequence[str]) -> dict[str, Entry]:
    """The models of checkpoints by name, stages in the order of the pipeline; the last is the default.

    Raises:
        UserError: a path has no checkpoint, or two have the same name.
    """
    entries: dict[str, Entry] = {}

    def add(name: str, directory: Path, step: int) -> None:
        entry = Entry(name, directory, step, int((directory / checkpoint.EXPERIMENT).stat().st_mtime))
        if entries.setdefault(name, entry).directory.resolve() != directory.resolve():
            raise UserError(f"two checkpoints would be named {name}: rename the directory of one of the runs")

    for path in paths:
        root = user_path(path)
        stages = [root / name for name in STAGES if (root / name / checkpoint.EXPERIMENT).is_file()]
        stages = [stage for stage in stages if checkpoint.readable_steps(stage)]
        if (root / checkpoint.EXPERIMENT).is_file() or not stages:
            directory, step = checkpoint.locate(path)
            stages = [directory]
            if "@" in root.name:
                stages, name = [], f"{directory.resolve().parent.name}/{directory.name}@{step}"
                add(name, directory, step)
        for directory in stages:
            name = f"{directory.resolve().parent.name}/{directory.name}"
            steps = checkpoint.readable_steps(directory)
            for step in steps:
                add(f"{name}@{step}", directory, step)
            add(name, directory, (checkpoint.finished_steps(directory) or steps)[-1])
    return entries


@dataclass(eq=False)
class Model:
    """A loaded model. `users`: number of requests that use it now; `bytes`: of its parameters and caches; `view`: the
    latest text that the microscope looked into."""

    entry: Entry
    loaded: Loaded
    worker: Worker
    fingerprint: str
    bytes: int
    users: int = 0
    view: View | None = None

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    def use(self, stack: ExitStack) -> None:
        """Keeps the model loaded until the stack is closed."""
        self.users += 1
        stack.callback(self._release)

    def _release(self) -> None:
        self.users -= 1


class Models:
    """The models of a server; `options` are those of launch.serve. All methods are called in the event loop."""

    def __init__(self, entries: dict[str, Entry], options: Any, make_engine: Callable[..., Engine] = Engine) -> None:
        self.entries, self.options, self.default = entries, options, options.default_model or next(reversed(entries))
        if self.default not in entries:
            raise UserError(f"there is no model {self.default}: there are {', '.join(entries)}")
        self.loaded: OrderedDict[str, Model] = OrderedDict()
        self._make_engine, self._lock, self._warmed = make_engine, asyncio.Lock(), set[Any]()
        self._threads = DaemonThreads()

    def entry(self, name: str | None) -> Entry:
        """The entry of a name, or the default one; raises `ApiError` 404 if there is none."""
        if (name or self.default) not in self.entries:
            raise ApiError(404, f"the model {name!r} does not exist; /v1/models lists those that do", param="model")
        return self.entries[name or self.default]

    async def use(self, name: str | None, stack: ExitStack) -> Model:
        """Returns a model, loaded if it was not, which stays until the stack is closed.

        Raises:
            ApiError: there is no such model (404), it cannot be loaded, or all others are busy (503).
        """
        entry = self.entry(name)
        while entry.key not in self.loaded:
            # A client that leaves does not end it: the next one would load the model a second time beside it.
            await asyncio.shield(asyncio.ensure_future(self._ensure(entry)))
        self.loaded.move_to_end(entry.key)
        self.loaded[entry.key].use(stack)
        return self.loaded[entry.key]

    async def _ensure(self, entry: Entry) -> None:
        async with self._lock:
            if entry.key not in self.loaded:
                self.loaded[entry.key] = await self._load(entry)

    @property
    def bytes(self) -> int:
        return sum(model.bytes for model in self.loaded.values())

    def sized(self, name: str | None = None) -> tuple[Loaded, EngineConfig, int]:
        """A model, by default that of requests that name none, without its parameters, its shape and its bytes.

        Raises:
            UserError: it cannot be loaded, or is larger than the limit.
        """
        entry, of = self.entries[name or self.default], self.options
        loaded = load_checkpoint(entry.key)
        length, prefixes = of.length or loaded.experiment.data.row_length, of.prefix_bytes
        shape = EngineConfig(slots=of.slots, steps=of.steps, adapt=of.adapt, length=length, prefix_cache_bytes=prefixes)
        size = model_bytes(loaded, shape)
        if size > of.model_bytes:
            limit = f"but the limit is {of.model_bytes}: set --model_bytes={size} or more"
            raise UserError(f"the model {entry.name} takes {size} bytes, {limit}")
        return loaded, shape, size

    async def _load(self, entry: Entry) -> Model:
        try:
            loaded, shape, size = await asyncio.to_thread(self.sized, entry.name)
            await self._make_room(size, entry.name)
            # Compilation takes minutes; a thread of `to_thread` would keep the process until it is done.
            loading = partial(self._engine, entry, loaded, shape)
            fingerprint, engine = await asyncio.get_running_loop().run_in_executor(self._threads, loading)
        except UserError as error:
            raise ApiError(503, f"the model {entry.name} cannot be loaded: {error}", code="model_unavailable") from None
        LOG.info("loaded %s, %d bytes", entry.name, size)
        # Its thread starts last: if the server ends before, nobody would end the thread.
        worker = Worker(engine, most_waiting=self.options.queue, name=f"engine {entry.name}")
        return Model(entry, loaded, worker, fingerprint, size)

    def _engine(self, entry: Entry, loaded: Loaded, shape: EngineConfig) -> tuple[str, Engine]:
        """The hash of a model's parameters, and its engine, compiled."""
        fingerprint = checkpoint.params_hash(entry.directory, entry.step)
        parts = (loaded.transformer(), loaded.params(), loaded.tokenizer, shape)
        engine = self._make_engine(*parts, tool_pool=self._threads)
        if self.options.warm and (engine.transformer, shape) not in self._warmed:
            warm(engine)
            if self.options.inspect:
                warm_views(engine)
            self._warmed.add((engine.transformer, shape))
        return fingerprint, engine

    async def _make_room(self, size: int, name: str) -> None:
        """Lets models go, the least recently used first, until one of `size` bytes fits."""
        for key, model in list(self.loaded.items()):
            if self.bytes + size <= self.options.model_bytes:
                return
            if not model.users:
                del self.loaded[key]
                model.worker.close()
                await asyncio.to_thread(model.worker.join)
                LOG.info("let %s go, %d bytes", model.entry.name, model.bytes)
        if self.bytes + size > self.options.model_bytes:
            raise ApiError(503, f"there is no room for {name} until another model is idle", retry_after=1)

    async def close(self) -> None:
        """Ends all answers and threads."""
        for model in self.loaded.values():
            model.worker.close()
        while self.loaded:
            await asyncio.to_thread(self.loaded.popitem()[1].worker.join)


def model_bytes(loaded: Loaded, shape: EngineConfig) -> int:
    """Bytes of a model's parameters, of its largest cache, and of the prefix cache when full."""
    transformer = loaded.transformer()
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(transformer.shapes()))
    cache = jax.eval_shape(lambda: transformer.empty_cache(shape.slots, shape.length, write=1))
    caches = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return params * jax.numpy.dtype(transformer.dtype).itemsize + caches + shape.prefix_cache_bytes
