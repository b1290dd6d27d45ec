"""Ctrl-C, heard between chunks."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def defer_interrupts(terminate: bool = False) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C has been pressed; pressed again, it raises.

    An interrupt in the middle of a chunk would lose the carry that the chunk has consumed, so the
    first one only asks the loop to stop at the chunk's end.

    Args:
        terminate: Whether to hear SIGTERM in the same way, by which a scheduler ends a job. It is
            raised again at the end.
    """
    heard: list[int] = []

    def handle(signum, frame):
        if heard and signum == signal.SIGINT:
            raise KeyboardInterrupt
        heard.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signals = [signal.SIGINT, signal.SIGTERM] if terminate else [signal.SIGINT]
    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield lambda: bool(heard)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if signal.SIGTERM in heard:
            signal.raise_signal(signal.SIGTERM)
