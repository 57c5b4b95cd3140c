"""Several processes as one run: joining, collectives on the host, shared work, and detection of lost processes.

A process belongs to a group if JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, or in a cluster
that `jax.distributed` detects: Cloud TPU, SLURM, Open MPI or Kubernetes.
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

from jaxchat import launcher, signals
from jaxchat.errors import UserError, first_line

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
JOIN_SECONDS = 300  # A slow host may still be installing.
TIMEOUT = "JAXCHAT_HEARTBEAT_TIMEOUT"  # Seconds without a heartbeat after which a process counts as lost; default 30.
FOREVER_MS = 7 * 24 * 3600 * 1000  # Timeout of barriers; heartbeats detect a lost process earlier.
HEARTBEAT_KEY = "jaxchat/alive"
_barriers = itertools.count()

Item = TypeVar("Item")
Result = TypeVar("Result")


def grouped(environment: Mapping[str, str]) -> bool:
    """Whether the environment makes this process one of several. JAX_NUM_PROCESSES=1 alone denies it.

    Raises:
        UserError: some of the three variables are set and others are not, or one is invalid.
    """
    present = [name for name in (ADDRESS, COUNT, INDEX) if environment.get(name)]
    if present == [COUNT] and environment[COUNT] == "1":  # Alone, though a cluster numbers its processes.
        return False
    if 0 < len(present) < 3:
        missing = " and ".join(name for name in (ADDRESS, COUNT, INDEX) if name not in present)
        raise UserError(f"{' and '.join(present)} is set without {missing}: set all three or none")
    if present:
        count, index = environment[COUNT], environment[INDEX]
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise UserError(f"{INDEX}={index} is invalid with {COUNT}={count}: number the processes from 0")
        if ":" not in environment[ADDRESS]:
            raise UserError(f"{ADDRESS}={environment[ADDRESS]} has no port: write it as HOST:PORT")
        return True
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    if any(environment.get(name, "").isdigit() and int(environment[name]) > 1 for name in counts):
        return True
    if environment.get("KUBERNETES_SERVICE_HOST") and environment.get("JOB_COMPLETION_INDEX"):
        return True
    return tpu_hosts(environment) > 1


def tpu_hosts(environment: Mapping[str, str]) -> int:
    """Number of hosts that share this host's TPU slice; 1 without a TPU."""
    if not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio/0").exists():
        return 1
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if hosts is None and not environment.get("TPU_SKIP_MDS_QUERY"):
        request = urllib.request.Request(METADATA, headers={"Metadata-Flavor": "Google"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            hosts = answer.read().decode()
    return len((hosts or "").split(","))


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Context manager that joins the group if the environment describes one. Enter it before JAX initializes.

    If a process fails, the others stop and print its error. If one is lost, the others exit with status 75 after
    JAXCHAT_HEARTBEAT_TIMEOUT seconds (default 30); a restart of all resumes from the last checkpoint. If process 0 is
    lost, JAX itself ends the others, with a message of its own and status 134.

    Raises:
        UserError: the group could not be joined, or the timeout is not a number.
    """
    signals.check()
    if not grouped(os.environ) or jax.distributed.is_initialized():
        yield
        return
    timeout = os.environ.get(TIMEOUT) or "30"
    if not (timeout.isdecimal() and int(timeout)):
        raise UserError(f"{TIMEOUT}={timeout} is not a number of seconds")
    _join(os.environ, int(timeout))
    watch = _Watch(int(timeout))
    try:
        yield
        if any(gather(bool(signals.received()))):  # No process leaves before all are done.
            raise signals.Interrupted(signals.KEPT)
    except (Exception, KeyboardInterrupt) as error:
        watch.leave_with(error)
    watch.end("done")
    jax.distributed.shutdown()


def _join(environment: Mapping[str, str], timeout: int) -> None:
    # jaxchat handles signals itself: a checkpoint is saved at a step on which all processes agree.
    jax.config.update("jax_enable_preemption_service", False)
    group: dict[str, Any] = {}
    if environment.get(ADDRESS):
        group = {"coordinator_address": environment[ADDRESS]}
        group |= {"num_processes": int(environment[COUNT]), "process_id": int(environment[INDEX])}
        group |= {"cluster_detection_method": "deactivate"}
    first = environment.get(ADDRESS, "the first process")
    remedy = f"start {environment.get(COUNT, 'all')} processes, on hosts that can reach {first}"
    failed: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                **group,
                initialization_timeout=2 * JOIN_SECONDS,
                # JAX sends heartbeats at half of this, and so may find a process lost after half of this already.
                heartbeat_timeout_seconds=4 * timeout,
                shutdown_timeout_seconds=4 * timeout,
            )
        except (RuntimeError, ValueError) as error:
            failed.append(error)

    # In a thread, because Python handles no signal while it waits, and its own timeout ends in a C++ stack trace.
    thread, start = threading.Thread(target=initialize, daemon=True), time.monotonic()
    thread.start()
    try:
        while thread.is_alive() and time.monotonic() - start < JOIN_SECONDS:
            thread.join(0.2)
            signals.check()
    except KeyboardInterrupt as stop:
        _exit(signals.EXIT_RESTART, f"stopped by a signal; {stop}: start again to continue")
    if thread.is_alive():
        _exit(2, f"error: the processes did not find each other in {JOIN_SECONDS} s: {remedy}")
    if failed:
        raise UserError(f"the processes did not find each other ({first_line(failed[0])}): {remedy}") from failed[0]


def _group() -> Any:
    """The state of jax.distributed. It is private in JAX, but `jax.process_count()` would initialize the devices."""
    from jax._src import distributed

    return distributed.global_state


def joined_count() -> int:
    """Number of processes; does not initialize JAX's devices."""
    return _group().num_processes


class _Watch:
    """Sends heartbeats to the other processes, and ends this process if another one is lost or has failed."""

    def __init__(self, timeout: int) -> None:
        self._timeout, self._beat_seconds = timeout, timeout / 15
        self._ended, group = threading.Event(), _group()
        self._store, self._index, self._count = group.client, group.process_id, group.num_processes
        self._others = dict.fromkeys(set(range(self._count)) - {self._index}, ("", time.monotonic()))
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for beat in itertools.count():
            try:
                self._publish(f"alive {beat} of {self._count}")
                self._read()
            except jax.errors.JaxRuntimeError:
                self._stop("process 0 is lost")
            for other, (text, changed) in self._others.items():
                status, silent = text.partition(" ")[0], time.monotonic() - changed > self._timeout
                if status == "alive" and not text.endswith(f" of {self._count}"):
                    self._stop(f"process {other} has a different {COUNT}")
                if status == "failed":
                    self._stop(f"process {other} failed ({text.removeprefix('failed ')})")
                if status == "stopping" and silent and not Agreement.stopping:
                    self._stop(f"process {other} was stopped by a signal")
                if status in ("alive", "") and silent:
                    self._stop(f"process {other} is lost")
            if self._ended.wait(self._beat_seconds):
                return

    def _publish(self, text: str) -> None:
        self._store.key_value_set(f"{HEARTBEAT_KEY}/{self._index}", text, allow_overwrite=True)

    def _read(self) -> None:
        """Updates the last heartbeat of every other process and the time at which it was new."""
        texts = dict(self._store.key_value_dir_get(HEARTBEAT_KEY))
        for other, (before, _) in self._others.items():
            text = texts.get(f"{HEARTBEAT_KEY}/{other}", "")
            if text != before:
                self._others[other] = text, time.monotonic()

    def _stop(self, reason: str) -> None:
        # An error of this process itself, if it follows at once, is reported instead.
        if not self._ended.wait(self._beat_seconds):
            print(f"{reason}, so process {self._index} stops: start all again to continue", file=sys.stderr, flush=True)
            self._leave("left", signals.EXIT_RESTART)

    def end(self, text: str) -> None:
        """Stops the heartbeats and publishes `text` as this process's last status."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._publish(text)

    def _leave(self, status: str, code: int) -> NoReturn:
        """Ends this process with exit code `code` once no other process is at work.

        Process 0 hosts the key-value store and therefore leaves last: without it JAX would end the others.
        """
        self.end(status)
        self._wait_while("", "alive")
        if self._index == 0:
            self._wait_while("failed", "stopping")
            time.sleep(2 * self._beat_seconds)  # For those that have published that they leave, and are about to.
        self.end("left")
        _exit(code)

    def _wait_while(self, *statuses: str) -> None:
        """Waits while the status of a process that is not silent is one of `statuses`."""

        def busy() -> bool:
            self._read()
            earliest = time.monotonic() - self._timeout
            return any(text.partition(" ")[0] in statuses and at > earliest for text, at in self._others.values())

        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while busy():
                time.sleep(self._beat_seconds / 10)

    def leave_with(self, error: BaseException) -> NoReturn:
        """Ends this process with the message and exit code of its launcher, and tells the others the reason."""
        if isinstance(error, signals.Interrupted):
            print(f"stopped by a signal; {error}: start again to continue", file=sys.stderr, flush=True)
            self._leave("stopping", signals.EXIT_RESTART)
        code, message = 1, ""
        if _broken(error):
            time.sleep(3 * self._beat_seconds)  # If another process failed, the watch says which one and why.
            problem = f"another process or the connection to it is lost ({first_line(error)})"
            code, message = signals.EXIT_RESTART, f"error: {problem}: start all again to continue"
        elif (sentence := launcher.sentence(error)) is not None:
            code, message = 2, f"error: {sentence}"
        # Printed first, because JAX may end this process while it waits.
        if message:
            print(message, file=sys.stderr, flush=True)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
        self._leave(f"failed {first_line(error)}", code)


def _broken(error: BaseException | None) -> bool:
    """Whether an error is caused by a failed collective, as when another process is lost."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__
    return error is not None and "RESOURCE_EXHAUSTED" not in str(error)


def _exit(code: int, message: str = "") -> NoReturn:
    """Ends the process at once; a regular exit would wait for the others."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Agreement:
    """The logical or of all processes' flags, one call late: all act at the same step, and none waits for another.

    A single process gets its flag back at once.
    """

    stopping = False  # True once all agreed to stop: a process that is silent from then on has only stopped earlier.

    def __init__(self) -> None:
        Agreement.stopping = False
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
    """Waits up to a week for all processes; a first collective would time out after half a minute."""
    if jax.process_count() > 1:
        _group().client.wait_at_barrier(f"jaxchat/barrier/{next(_barriers)}", timeout_in_ms=FOREVER_MS)


def gather(value: Result) -> list[Result]:
    """The values of all processes, in order of their index. Every process must call it."""
    if jax.process_count() == 1:
        return [value]
    barrier()
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    # As bytes, because JAX would make 32 bits of a 64-bit integer.
    size_bytes = np.asarray(multihost_utils.process_allgather(np.array([len(mine)], np.int64).view(np.uint8)))
    sizes = size_bytes.ravel().view(np.int64)
    padded = np.pad(mine, (0, int(sizes.max()) - len(mine)))
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def share_out(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """`work(items)` with the items divided among the processes. Every process gets all results, in order."""
    index, count = jax.process_index(), jax.process_count()
    results: list[Any] = [None] * len(items)
    for start, part in enumerate(gather(list(work(items[index::count])))):
        results[start::count] = part
    return results


def everyone(work: Callable[[], Result]) -> Result:
    """Runs `work` in every process. If any raises ValueError or OSError, all raise the first of these errors."""
    failure: Exception | None = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        failure = error
    for other in gather(failure):
        if other is not None:
            raise other
    return result


def from_first(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The result in process 0, whose launcher prints it; None in the others."""
    return result if jax.process_index() == 0 else None


def check_same(what: str, value: Any, remedy: str) -> None:
    """Raises `UserError` if a value that must be equal in all processes is not; `remedy` ends the message."""
    if len({repr(one) for one in gather(value)}) > 1:
        raise UserError(f"{what} is not the same in every process: {remedy}")


def check_shared(directory: Path, option: str) -> None:
    """Raises `UserError` if the processes do not see the same files in a directory, set by the flag `option`."""
    if jax.process_count() == 1:
        return
    mark = directory / f"shared-{gather(time.time_ns())[0]}"
    if jax.process_index() == 0:
        mark.touch()
    barrier()
    everywhere = all(gather(mark.exists()))
    mark.unlink(missing_ok=True)
    if not everywhere:
        raise UserError(
            f"{directory} is not the same directory for every process: set {option} to one that all can access, "
            "on a shared file system or in a mounted bucket"
        )


def own_copy(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Copies arrays from the whole mesh to each of this process's devices; returns `tree` for a single process."""
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
    """The part of `mesh` on this process's devices, all along the first axis; `mesh` itself for a single process."""
    if jax.process_count() == 1:
        return mesh
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    shape = (len(devices),) + (1,) * (len(mesh.axis_names) - 1)
    return jax.sharding.Mesh(np.array(devices).reshape(shape), mesh.axis_names, axis_types=mesh.axis_types)
