"""Several processes as one run: how they find each other, agree, share work, and notice that one is lost.

A process is one of a group where JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so, or where a
cluster does: Cloud TPU, SLURM, Open MPI or Kubernetes, as `jax.distributed` detects them.
"""

import contextlib
import itertools
import os
import pickle
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxchat import signals
from jaxchat.errors import UserError, first_line

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
JOIN_SECONDS = 300  # A slow host may still be installing.
HEARTBEAT_SECONDS = 2.0
HEARTBEAT_TIMEOUT = 30.0  # Seconds without a heartbeat after which a process counts as lost.
EXIT_RESTART = 75  # EX_TEMPFAIL: a scheduler should restart the job.
FOREVER_MS = 7 * 24 * 3600 * 1000  # A lost process is noticed by the watch.
HEARTBEAT_KEY = "jaxchat/alive"
_meetings = itertools.count()

Item = TypeVar("Item")
Result = TypeVar("Result")


def grouped(environment: Mapping[str, str]) -> bool:
    """Whether this process is to be one of several.

    Raises:
        UserError: some of the three variables are set, and not all, or they are no such numbers.
    """
    given = [name for name in (ADDRESS, COUNT, INDEX) if environment.get(name)]
    if environment.get(ADDRESS):
        if len(given) < 3:
            missing = " and ".join(name for name in (COUNT, INDEX) if name not in given)
            raise UserError(f"{ADDRESS} is set and not {missing}: set all three, or none")
        count, index = environment[COUNT], environment[INDEX]
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise UserError(f"{INDEX}={index} of {COUNT}={count} is no process: number them from 0")
        if ":" not in environment[ADDRESS]:
            raise UserError(f"{ADDRESS}={environment[ADDRESS]} names no port: give it as HOST:PORT")
        return True
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    if any(environment.get(name, "").isdigit() and int(environment[name]) > 1 for name in counts):
        return True
    if environment.get("KUBERNETES_SERVICE_HOST") and environment.get("JOB_COMPLETION_INDEX"):
        return True
    return tpu_hosts(environment) > 1


def tpu_hosts(environment: Mapping[str, str]) -> int:
    """How many hosts share the TPU that is attached to this one; 1 where none is."""
    if not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio/0").exists():
        return 1
    named = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if named is None and not environment.get("TPU_SKIP_MDS_QUERY"):
        request = urllib.request.Request(METADATA, headers={"Metadata-Flavor": "Google"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            named = answer.read().decode()
    return len((named or "").split(","))


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it this process is one of its group, where it has one; call it before JAX starts.

    A process that fails tells the others why, and they stop as well; one that is lost ends them within half a minute,
    with exit status 75: what is started again goes on from the last checkpoint. Where process 0 is lost, JAX itself
    ends the others, with a message of its own and status 134.

    Raises:
        UserError: the others did not come.
    """
    if not grouped(os.environ) or jax.distributed.is_initialized():
        yield
        return
    _join(os.environ)
    watch = _Watch()
    try:
        yield
        gather(None)  # Nobody leaves before the last is done.
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        watch.leave_with(error)
    watch.end("done")
    jax.distributed.shutdown()


def _join(environment: Mapping[str, str]) -> None:
    # Signals are ours: a checkpoint is saved at a step that all agree on.
    jax.config.update("jax_enable_preemption_service", False)
    by_hand: dict[str, Any] = {}
    if environment.get(ADDRESS):
        by_hand = {"coordinator_address": environment[ADDRESS]}
        by_hand |= {"num_processes": int(environment[COUNT]), "process_id": int(environment[INDEX])}
        by_hand |= {"cluster_detection_method": "deactivate"}
    remedy = f"start as many as {COUNT} says, on hosts that reach {environment.get(ADDRESS, 'the first of them')}"
    failed: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                **by_hand,
                initialization_timeout=2 * JOIN_SECONDS,
                heartbeat_timeout_seconds=2 * int(HEARTBEAT_TIMEOUT),
                shutdown_timeout_seconds=2 * int(HEARTBEAT_TIMEOUT),
            )
        except (RuntimeError, ValueError) as error:
            failed.append(error)

    # In a thread, for no signal reaches Python while it waits; and beyond its time it ends with a stack of C++.
    thread, start = threading.Thread(target=initialize, daemon=True), time.monotonic()
    thread.start()
    try:
        while thread.is_alive() and time.monotonic() - start < JOIN_SECONDS:
            thread.join(0.2)
    except KeyboardInterrupt as stop:
        _leave(f"stopped by a signal; {stop}: start again to continue", EXIT_RESTART)
    if thread.is_alive():
        _leave(f"error: the processes did not find each other in {JOIN_SECONDS} s: {remedy}", 2)
    if failed:
        raise UserError(f"the processes did not find each other ({first_line(failed[0])}): {remedy}") from failed[0]


def _group() -> Any:
    """What jax.distributed knows; it has no public name, and asking for the devices would start them."""
    from jax._src import distributed

    return distributed.global_state


def joined_count() -> int:
    """How many processes there are, before JAX starts its devices."""
    return _group().num_processes


class _Watch:
    """Tells the other processes that this one lives, and ends it where another does not, or has failed."""

    def __init__(self) -> None:
        self._ended, group = threading.Event(), _group()
        self._store, self._index, self._count = group.client, group.process_id, group.num_processes
        self._heard: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        beat = 0
        while not self._ended.wait(HEARTBEAT_SECONDS):
            beat += 1
            try:
                self._tell(f"alive {beat} of {os.environ.get(COUNT, self._count)}")
                heartbeats = dict(self._store.key_value_dir_get(HEARTBEAT_KEY))
            except jax.errors.JaxRuntimeError:
                self._stop("process 0 is lost")
            for other in range(self._count):
                self._hear(other, heartbeats.get(f"{HEARTBEAT_KEY}/{other}", ""))

    def _tell(self, text: str) -> None:
        self._store.key_value_set(f"{HEARTBEAT_KEY}/{self._index}", text, allow_overwrite=True)

    def _hear(self, other: int, text: str) -> None:
        now = time.monotonic()
        if self._heard.get(other, ("", 0.0))[0] != text or other not in self._heard:
            self._heard[other] = text, now
        silent, what = now - self._heard[other][1], text.partition(" ")[0]
        if what == "alive" and text.rpartition(" ")[2] != os.environ.get(COUNT, str(self._count)):
            self._stop(f"process {other} was given another {COUNT}")
        if what == "failed" and other != self._index:
            self._stop(f"process {other} stopped ({text.removeprefix('failed ')})")
        if what == "stopping" and silent > HEARTBEAT_TIMEOUT and not Agreement.stopping:
            self._stop(f"process {other} was told to stop")
        if what not in ("stopping", "done") and silent > HEARTBEAT_TIMEOUT:
            self._stop(f"process {other} is lost")

    def _stop(self, why: str) -> None:
        if not self._ended.is_set():
            print(f"{why}, and with it process {self._index}: start all again to continue", file=sys.stderr, flush=True)
            self._let_others_read()
            _leave("", EXIT_RESTART)

    def _let_others_read(self) -> None:
        """Waits where this is process 0: it keeps what the others read, and JAX would end them without it."""
        if self._index == 0:
            time.sleep(3 * HEARTBEAT_SECONDS)

    def end(self, text: str) -> None:
        """Says that this process needs no watching any more."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell(text)

    def leave_with(self, error: BaseException) -> NoReturn:
        """Ends this process as its launcher would, once the others have read why."""
        if isinstance(error, signals.Interrupted):
            print(f"stopped by a signal; {error}: start again to continue", file=sys.stderr, flush=True)
            self._stop_together()
            _leave("", EXIT_RESTART)
        if _broken(error):
            # If another process broke the connection, the watch learns which, and ends this one.
            time.sleep(2 * HEARTBEAT_SECONDS)
        status = self._report_error(error)  # Before anything else: JAX may end this process while it waits.
        self.end(f"failed {first_line(error)}")
        time.sleep(HEARTBEAT_SECONDS)
        self._let_others_read()
        _leave("", status)

    def _report_error(self, error: BaseException) -> int:
        """Tells an error as its launcher would; gives the exit status."""
        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else 1
        if _broken(error):
            problem = f"another process is lost, or the connection to it ({first_line(error)})"
            print(f"error: {problem}: start all again to continue", file=sys.stderr, flush=True)
            return EXIT_RESTART
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        sys.excepthook(type(error), error, error.__traceback__)
        return 1

    def _stop_together(self) -> None:
        """Returns once no other is at work: they stop by themselves where they agreed to, once they have saved."""
        self.end("stopping")
        before, since = None, time.monotonic()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while time.monotonic() - since < HEARTBEAT_TIMEOUT:
                alive = [text for _, text in self._store.key_value_dir_get(HEARTBEAT_KEY) if text.startswith("alive")]
                if not alive:
                    break
                if alive != before:
                    before, since = alive, time.monotonic()
                time.sleep(HEARTBEAT_SECONDS)
            self._let_others_read()


def _broken(error: BaseException | None) -> bool:
    """Whether an error comes of a collective that failed, as one does when a process that takes part is lost."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__
    return error is not None and "RESOURCE_EXHAUSTED" not in str(error)


def _leave(text: str, status: int) -> NoReturn:
    """Ends the process at once: Python's own way would wait for the others."""
    if text:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Agreement:
    """Whether any process said yes, told with the next call: so all act at the same step, and none waits for another.

    Alone, it is told at once.
    """

    stopping = False  # Once all of them have said yes here, one that is silent has only stopped before this one.

    def __init__(self) -> None:
        self._before: jax.Array | None = None
        if jax.process_count() > 1:
            devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
            everywhere = jax.sharding.Mesh(np.array(devices), ("device",), axis_types=(AxisType.Auto,))
            self._placed = NamedSharding(everywhere, PartitionSpec("device"))
            self._any = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(everywhere, PartitionSpec()))

    def __call__(self, flag: bool) -> bool:
        if jax.process_count() == 1:
            return flag
        mine = np.full(jax.local_device_count(), flag, np.int32)
        before = self._before
        self._before = self._any(jax.make_array_from_process_local_data(self._placed, mine))
        yes = before is not None and bool(before)
        Agreement.stopping |= yes
        return yes


def barrier() -> None:
    """Returns once every process is here, however much later: a first collective waits for half a minute only."""
    if jax.process_count() > 1:
        _group().client.wait_at_barrier(f"jaxchat/meet/{next(_meetings)}", timeout_in_ms=FOREVER_MS)


def gather(value: Result) -> list[Result]:
    """What every process gave, in their order; all must call it."""
    if jax.process_count() == 1:
        return [value]
    barrier()
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(mine)], np.int32)).ravel()
    padded = np.pad(mine, (0, int(sizes.max()) - len(mine)))
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def share_out(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """`work(items)`, every process doing a part of them; each gets all the results, in order."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return list(work(items))
    results: list[Any] = [None] * len(items)
    for start, part in enumerate(gather(list(work(items[index::count])))):
        results[start::count] = part
    return results


def everyone(work: Callable[[], Result]) -> Result:
    """What some work gives; raises in every process the ValueError or OSError of the first in which it failed."""
    failed: Exception | None = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        failed = error
    for found in gather(failed):
        if found is not None:
            raise found
    return result


def from_first(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A launcher's result, which the first process prints."""
    return result if jax.process_index() == 0 else None


def check_same(what: str, value: Any, remedy: str) -> None:
    """Raises `UserError` where processes differ in a value that they must share."""
    if len({repr(one) for one in gather(value)}) > 1:
        raise UserError(f"{what} is not the same in every process: {remedy}")


def check_shared(directory: Path, option: str) -> None:
    """Raises `UserError` where processes do not see the same files in a directory."""
    if jax.process_count() == 1:
        return
    mark = directory / "shared"
    (named,) = gather(f"{time.time_ns()}")[:1]
    if jax.process_index() == 0:
        mark.write_text(named)
    gather(None)  # Written by now.
    seen = mark.read_text() if mark.exists() else ""
    everywhere = all(gather(seen == named))
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    if not everywhere:
        raise UserError(
            f"{directory} is not the same directory for every process: name one that all of them reach with {option}, "
            "on a shared file system or a mounted bucket"
        )


def own_copy(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Arrays on the whole mesh as whole copies on this process's own devices; alone, the tree itself."""
    if jax.process_count() == 1:
        return tree
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    placed = NamedSharding(own_mesh(mesh), PartitionSpec())

    def mine(leaf: jax.Array) -> jax.Array:
        shards = {shard.device: shard.data for shard in leaf.addressable_shards}
        parts = [shards[device] for device in placed.mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(leaf.shape, placed, parts)

    return jax.tree.map(mine, whole)


def own_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """A mesh with the axes of `mesh` over this process's own devices of it, all along the first axis; alone, `mesh`."""
    if jax.process_count() == 1:
        return mesh
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    shape = (len(devices),) + (1,) * (len(mesh.axis_names) - 1)
    return jax.sharding.Mesh(np.array(devices).reshape(shape), mesh.axis_names, axis_types=mesh.axis_types)
