"""From the first chunk of a run to its last."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from stochgrad.core._distributed import broadcast_from_lead, to_host
from stochgrad.core._interrupt import defer_interrupts
from stochgrad.core._program import Carry, Plan, Program
from stochgrad.core._sinks import Sink
from stochgrad.core._stream import minibatches_taken
from stochgrad.core._supply import Supply
from stochgrad.core._warnings import InterruptWarning

_SECONDS_PER_CHUNK = 0.4
_GROWTH = 8


class RunLoop:
    """The chunks of a run, one after another.

    A chunk is as many draws as take about half a second, and no more than the rows in memory last
    for. Between two chunks, and only there, the host acts: it takes the draws, saves the state,
    shows progress and checks for Ctrl-C.

    Args:
        program: The compiled kernel.
        keys: The chains' keys.
        supply: Where streamed rows come from, if they are.
        thin: Steps per draw.
        num_warmup: Draws not to keep.
        total: Draws in all.
        chunk_size: The most draws of a chunk.
    """

    def __init__(
        self,
        program: Program,
        keys: Any,
        supply: Supply | None,
        thin: int,
        num_warmup: int,
        total: int,
        chunk_size: int | None,
    ):
        self.program, self.keys, self.supply = program, keys, supply
        self.thin, self.num_warmup, self.total = thin, num_warmup, total
        self.plan = Plan(np.int32(thin), np.int32(num_warmup))
        self.fixed = chunk_size is not None
        self.most = min(program.capacity, chunk_size or program.capacity)

    def run(
        self, carry: Carry, done: int, sink: Sink, update: Callable[[int], Any]
    ) -> tuple[Carry, dict[str, float]]:
        """Go from draw number ``done`` to the last, or to where it ends.

        Ctrl-C ends it, a chain that is the last to leave the finite numbers does, an ``Online``
        that has learnt enough, and an error, of the disk or of the data, after which the state is
        saved.

        Returns:
            The last carry, and the seconds that compilation, warm-up and sampling took.
        """
        seconds = {"compile": 0.0, "warmup": 0.0, "sample": 0.0}
        count, offset, compiling = (self.most if self.fixed else 1), 0, True
        update(done)
        with defer_interrupts(terminate=sink.saves) as interrupted:
            while done < self.total:
                warming = done < self.num_warmup
                end = self.num_warmup if warming else self.total
                before = time.perf_counter()
                try:
                    following = self._run_one_chunk(
                        carry, done, offset, min(count, self.most, end - done)
                    )
                    over = bool(np.all(to_host(following[0].first_bad) >= 0))
                    if self.program.done is not None and not over:
                        over = bool(to_host(self.program.done(following[0].summary)))
                except Exception as error:
                    if not _consumed(carry):  # the host's failure: of data, most likely
                        if offset == 0:
                            sink.save(done, carry, now=True)
                        raise
                    if not isinstance(error, jax.errors.JaxRuntimeError):
                        error.add_note(sink.last_saved())
                        raise
                    reason = str(error).strip().split("\n")[0]
                    raise RuntimeError(
                        f"the device failed at draw {done}: {reason}. {sink.last_saved()}"
                    ) from error
                carry, kept, stats, draws, offset = following
                took = time.perf_counter() - before
                phase = "compile" if compiling else "warmup" if warming else "sample"
                seconds[phase] += took
                done += draws
                if draws and not warming:
                    sink.add(kept, stats, draws)
                stop = bool(broadcast_from_lead(over or interrupted()))
                if offset == 0:
                    sink.save(done, carry, now=stop or done == self.total)
                update(draws)
                if stop:
                    break
                if draws and not self.fixed and not compiling:
                    wanted = int(draws * _SECONDS_PER_CHUNK / max(took, 1e-6))
                    count = int(broadcast_from_lead(int(np.clip(wanted, 1, count * _GROWTH))))
                compiling = compiling and draws == 0
            if interrupted() and done < self.total:
                if done <= self.num_warmup:
                    raise KeyboardInterrupt
                warnings.warn(
                    f"interrupted: returning the {done - self.num_warmup} draws per chain made so "
                    f"far, of {self.total - self.num_warmup}.",
                    InterruptWarning,
                    stacklevel=3,
                )
        return carry, seconds

    def _run_one_chunk(self, carry: Carry, done: int, offset: int, count: int):
        """Whole draws, or those steps of one for which there are rows in memory."""
        keys, plan = self.keys, self.plan
        if self.supply is None:
            out = self.program.chunk(carry, keys, None, plan, np.int32(done), np.int32(count))
            return *out, count, 0
        before = minibatches_taken(carry.state)
        left = self.supply.left(before)
        resident = self.supply.resident
        if offset or left < self.thin:
            last = min(self.thin, offset + left)
            steps, draws = last - offset, int(last == self.thin)
            numbers = map(np.int32, (done, offset, last))
            out = self.program.part(carry, keys, resident, plan, *numbers)
            offset = last % self.thin
        else:
            draws = min(count, left // self.thin)
            steps = draws * self.thin
            numbers = map(np.int32, (done, draws))
            out = self.program.chunk(carry, keys, resident, plan, *numbers)
        after = minibatches_taken(out[0].state)
        if (after - before) % 2**32 > steps:
            raise TypeError(
                f"this kernel took {after - before} minibatches in {steps} steps: streamed data "
                "support kernels that use one minibatch per step."
            )
        return *out, draws, offset


def _consumed(carry: Carry) -> bool:
    """Whether a program has taken over the memory of a carry, and with it the state."""
    leaves = [leaf for leaf in jax.tree.leaves(carry) if isinstance(leaf, jax.Array)]
    return any(leaf.is_deleted() for leaf in leaves)
