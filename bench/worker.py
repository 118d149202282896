"""One process that measures, replaced when it hangs or dies; what it runs must be importable, not a closure."""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator


class WorkerError(RuntimeError):
    """The worker raised an error or died; the message is one sentence."""


class TimeIsUpError(WorkerError):
    """The worker took too long and was stopped."""


class Worker:
    """A process that begins with empty compile caches, and with the real Triton rather than its interpreter."""

    def __init__(self) -> None:
        self._caches = tempfile.TemporaryDirectory(prefix="study-", ignore_cleanup_errors=True)
        self._pool: futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.replace()
        self._caches.cleanup()

    def submit(self, function: Callable[..., object], *args: object) -> futures.Future:
        """Start `function(*args)` in the worker."""
        if self._pool is not None:
            try:
                return self._pool.submit(function, *args)
            except futures.process.BrokenProcessPool:  # it died since the last call
                self.replace()
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pool = futures.ProcessPoolExecutor(1, spawn, _die_with_parent)
        caches = {v: f"{self._caches.name}/{v}" for v in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        with _environment(TRITON_INTERPRET=None, **caches):
            return self._pool.submit(function, *args)

    def result(self, future: futures.Future, seconds: float) -> object:
        """The function's result; on a time-out or a death the worker is stopped and a `WorkerError` raised."""
        try:
            return future.result(timeout=max(seconds, 0))
        except futures.TimeoutError:
            self.replace()
            raise TimeIsUpError(f"stopped after {seconds:.0f} s") from None
        except futures.process.BrokenProcessPool:
            self.replace()
            raise WorkerError("the process died (a broken CUDA context, or out of memory)") from None
        except Exception as error:
            self.replace()  # an error that `measure_call` lets through is one that poisons the process
            raise WorkerError(f"{type(error).__name__}: {error}".split("\n")[0][:300]) from error

    def call(self, function: Callable[..., object], *args: object, seconds: float) -> object:
        """`submit` and `result`."""
        return self.result(self.submit(function, *args), seconds)

    def replace(self) -> None:
        """Stop the process, whatever it is doing; the next function runs in a new one."""
        if self._pool is None:
            return
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None


def _die_with_parent() -> None:
    """A parent that is killed cannot stop its worker, which would go on holding the GPU."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _environment(**changes: str | None) -> Iterator[None]:
    """Change variables for the processes started inside the block; None unsets one."""
    before = {name: os.environ.get(name) for name in changes}

    def apply(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    apply(changes)
    try:
        yield
    finally:
        apply(before)
