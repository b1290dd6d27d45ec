"""Super-blocks of streamed data, read in a thread of their own while the device works."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import NamedSharding

from stochgrad.core._distributed import put_global
from stochgrad.core._stream import Resident, Stream, step_aside


class Supply:
    """Keeps one super-block on the device and, in a thread of its own, one ahead of it.

    Args:
        stream: What is streamed.
        words: The seed of the order of the super-blocks.
        sharding: The devices that a super-block goes to; the default one if left out.
    """

    def __init__(self, stream: Stream, words: Sequence[int], sharding: NamedSharding | None = None):
        self._stream, self._words, self._sharding = stream, [int(w) for w in words], sharding
        self._thread = ThreadPoolExecutor(1, "stochgrad-reader", step_aside)
        self._ahead: Future | None = None
        self._number, self._first, self._batches = -1, 0, 0
        # a device that is the CPU uses these as they are; each is free again when the other is used
        self._free, self._used = stream.blank(), stream.blank()
        self.resident: Any = None
        """The super-block on the device."""

    def left(self, minibatch: int) -> int:
        """How many minibatches the super-block has from this one on; it is changed if need be.

        The device must be done with the one before, whose memory the next will take.
        """
        used = (minibatch - self._first) % 2**32
        if self.resident is None or used >= self._batches:
            if self._ahead is None or used != self._batches:
                self._begin(self._stream.holding(minibatch, self._words))
            assert self._ahead is not None
            block: Resident = self._ahead.result()
            self.resident = self._ahead = None
            self.resident = jax.block_until_ready(self._place(block))
            self._free, self._used = self._used, self._free
            self._first, self._batches = int(block.first), int(block.batches)
            self._begin(self._number + 1)
            used = (minibatch - self._first) % 2**32
        return self._batches - used

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _place(self, block: Resident) -> Resident:
        return (
            jax.device_put(block) if self._sharding is None else put_global(block, self._sharding)
        )

    def _begin(self, number: int) -> None:
        self._number = number
        self._ahead = self._thread.submit(self._stream.load, self._words, number, self._free)
