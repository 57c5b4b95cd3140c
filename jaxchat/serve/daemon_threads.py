"""Threads for tools and for loading models. A thread cannot be ended, so one that hangs or takes minutes must stop
neither others nor the end of the process."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

MOST_RUNNING = 256  # Those that hang included.


class DaemonThreads(Executor):
    """Runs each call in a daemon thread of its own: the threads of a ThreadPoolExecutor delay the end of a process."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(MOST_RUNNING)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        if self._free.acquire(blocking=False):
            threading.Thread(target=self._run, args=(future, fn, args, kwargs), name="daemon", daemon=True).start()
        else:
            future.set_exception(RuntimeError(f"{MOST_RUNNING} threads are running already"))
        return future

    def _run(self, future: Future[Any], fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # It is raised where the result is read; a signal interrupts an engine.
            future.set_exception(error)
        finally:
            self._free.release()
