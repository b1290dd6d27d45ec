"""What all sections measure with."""

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

import stochgrad


class Figure(NamedTuple):
    """Something to measure: what tells it from others of its section, and how to."""

    case: dict[str, Any]
    measure: Callable[[], dict[str, Any]]


Section: TypeAlias = Callable[[bool], Iterator[Figure]]
"""``small -> figures``, in the order of their worth; ``small`` asks for sizes that a CPU can do."""


def wall(function: Callable, *args) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - begun


def seconds(function: Callable, *args, repeat: int = 3) -> float:
    """Least wall time of a call, after one that compiles."""
    wall(function, *args)
    return min(wall(function, *args) for _ in range(repeat))


def rate(timed: Callable[[int], float], steps: int, small: bool) -> dict[str, float]:
    """Steps a second, where ``timed(n)`` is the seconds that ``n * steps`` of them take.

    From runs of two lengths, so that fixed costs fall out; the longer one is as long as it takes
    for them to differ by a fair fraction of a second.
    """
    first = wall(timed, 1)
    short = min(timed(1) for _ in range(3))
    goal, n = (0.05 if small else 0.4), 2
    while True:
        more = min(timed(n) for _ in range(2)) - short
        if more >= goal or n == 1000:
            break
        n = min(1000, max(2 * n, int(n * min(20, 1.3 * goal / max(more, 1e-6)))))
    if more <= 0:
        raise RuntimeError(f"{n * steps} steps take no longer than {steps}: too short to measure")
    return {"steps_per_s": (n - 1) * steps / more, "first_s": first}


NOTHING = stochgrad.Online(lambda position: (), lambda summary, position: summary)


def sampling(kernel, init, chains: int, steps: int, share: bool = False) -> Callable[[int], float]:
    """``n -> seconds``: of the loop over n draws of ``steps`` steps, of which none is kept.

    Every n has the same program, and all draws are in one call of it.
    """

    def timed(n):
        draws = stochgrad.sample(
            jax.random.key(0),
            kernel,
            init=init,
            num_samples=n,
            thin=steps,
            num_chains=chains,
            share_batches=share,
            collect=NOTHING,
            chunk_size=1000,
            progress=False,
        )
        return draws.timings["compile"] + draws.timings["sample"]

    return timed


@cache
def copy_bandwidth(small: bool) -> float:
    """Bytes a second of a copy, those read and those written."""
    x = jnp.zeros(2**22 if small else 2**28, jnp.float32)
    return 2 * x.nbytes / seconds(jax.jit(lambda x: x + 1), x)


PRECISIONS = {"float32": "highest", "tf32": "default", "bfloat16": "default"}


@cache
def matmul_flops(kind: str, small: bool) -> float:
    """Operations a second of a product of square matrices; "tf32" is jax's default for float32."""
    n = 512 if small else 8192
    a = jax.random.normal(jax.random.key(1), (n, n))
    if kind == "bfloat16":
        a = a.astype(jnp.bfloat16)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=PRECISIONS[kind]))
    return 2 * n**3 / seconds(product, a)


def against(figures: dict[str, float], small: bool, operations: float, **moved: float) -> dict:
    """The figures, with the ceiling that binds and the share of it.

    Args:
        figures: With ``steps_per_s``.
        small: As in a section.
        operations: Of a step's matrix products.
        moved: Bytes of a step, by what they are counted for.
    """
    ceilings = {name: copy_bandwidth(small) / size for name, size in moved.items()}
    ceilings["arithmetic"] = matmul_flops("tf32", small) / operations
    least = {name: ceilings[name] for name in ("memory", "arithmetic")}
    binds = min(least, key=lambda name: least[name])
    return {
        **figures,
        "binds": binds,
        **{f"{name}_ceiling": value for name, value in ceilings.items()},
        "share": figures["steps_per_s"] / least[binds],
    }
