"""Ctrl-C and SIGTERM as a question that a run answers when it can."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NOTICE = b"\nstopping after this step, with a checkpoint; a second time stops at once\n"


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C or SIGTERM is noted, and what is yielded says so; the second acts as ever.

    Only a main thread can take signals: in another one they are left as they are.
    """
    asked = threading.Event()
    process, before = os.getpid(), {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def ask(number: int, frame: object) -> None:
        restore()
        if os.getpid() == process:  # a worker that was forked off has this handler, too
            asked.set()
            os.write(sys.__stderr__.fileno(), NOTICE)  # print() is not to be called while it may be running

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell wants for what it runs in the background
                before[number] = signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        restore()
