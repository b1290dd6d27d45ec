"""Ctrl-C, heard between chunks."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def heed_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C has been pressed; pressed again, it raises.

    An interrupt in the middle of a chunk would lose the carry that the chunk has consumed, so the
    first one only asks the loop to stop at the chunk's end.
    """
    pressed = False

    def handle(signum, frame):
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
