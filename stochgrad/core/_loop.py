"""The one loop: a host loop over compiled chunks, for every kernel there is."""

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from stochgrad.core._checks import check_count, check_key, check_position
from stochgrad.core._chunk import Carry, Program, build, chain_sharding, position_of, trace
from stochgrad.core._draws import Draws
from stochgrad.core._interrupt import heed_interrupts
from stochgrad.core._progress import progress_bar
from stochgrad.core._protocols import Kernel, Position, PRNGKey
from stochgrad.core._warnings import DivergenceWarning, InterruptWarning, warn_of_noise

_SECONDS_PER_CHUNK = 0.4
_GROWTH = 8


def sample(
    key: PRNGKey,
    kernel: Kernel,
    *,
    init: Position | Callable[[PRNGKey], Position] | None = None,
    num_samples: int,
    num_warmup: int = 0,
    thin: int = 1,
    num_chains: int = 1,
    share_batches: bool = False,
    progress: bool = True,
    collect: Callable[[Any], PyTree] | None = None,
    chunk_size: int | None = None,
) -> Draws:
    """Run a kernel and keep every ``thin``-th state.

    ``num_warmup`` and ``num_samples`` count draws, of ``thin`` steps each: the run takes
    ``(num_warmup + num_samples) * thin`` steps a chain. Chains run together in one program, spread
    over all devices there are. A draw is a function of the key, the chain and its number alone:
    the chunk size, the progress bar and the number of other draws do not change it.

    Ctrl-C returns what has been drawn so far, with a warning. A chain that leaves the finite
    numbers is named in a warning with the step at which it did; its draws up to then are kept, and
    the run goes on for the others.

    Args:
        key: A typed PRNG key.
        kernel: Any object with blackjax's ``init(position, rng_key)`` and ``step(rng_key, state)``.
        init: Where the chains start: one position for all, one with a leading axis of
            ``num_chains`` for each, or a function ``key -> position``. May be left out where the
            kernel's posterior knows (a numpyro model); each chain then starts somewhere else. A
            vector as long as there are chains is one position, if it fits the model as such. What
            has a ``position``, as the centre that ``stochgrad.find_center`` found, stands for it.
        num_samples: Draws to keep, per chain.
        num_warmup: Draws to discard before them, per chain.
        thin: Steps per draw.
        num_chains: Number of chains.
        share_batches: Whether all chains see the same minibatches. Each chain's law is the same
            either way; sharing turns the chains' gradients into one matrix product, but makes the
            chains dependent, so that pooled errors must come from ``stochgrad.diagnostics.mcse``.
        progress: Whether to show a progress bar (on a terminal only).
        collect: ``state -> pytree``, what to keep of a state; the position if left out.
        chunk_size: The most draws between two looks at the progress bar and at Ctrl-C; by default
            as many as take about half a second.

    Raises:
        TypeError: the key is not a typed PRNG key, the kernel not a kernel.
        ValueError: a number is out of range, or ``init`` does not fit the model or is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(10), order="full"
        ... )
        >>> kernel = stochgrad.sghmc(target, step_size=0.05, friction=2.0)
        >>> draws = stochgrad.sample(
        ...     jax.random.key(0), kernel, init=jnp.float32(0.0), num_samples=100, num_chains=2
        ... )
        >>> draws.positions.shape
        (2, 100)
    """
    check_key(key)
    if not (hasattr(kernel, "init") and hasattr(kernel, "step")):
        raise TypeError(f"kernel must have init and step, got {type(kernel).__name__}.")
    num_samples = check_count("num_samples", num_samples)
    num_warmup = check_count("num_warmup", num_warmup, least=0)
    thin = check_count("thin", thin)
    num_chains = check_count("num_chains", num_chains)
    if chunk_size is not None:
        chunk_size = check_count("chunk_size", chunk_size)

    begun = time.perf_counter()
    position_key, init_key, run_key = jax.random.split(key, 3)
    positions, example = _starting_points(position_key, kernel, init, num_chains)
    mesh = _mesh(num_chains)
    program = build(
        kernel.init,
        kernel.step,
        collect or position_of,
        thin,
        num_chains,
        share_batches,
        mesh,
        example,
    )
    keys = _chain_keys(run_key, num_chains)
    carry = program.init(positions, _chain_keys(init_key, num_chains))
    if mesh is not None:
        keys = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("chain")))
        carry = jax.device_put(carry, chain_sharding(carry, share_batches, mesh))

    total = num_warmup + num_samples
    bar = progress_bar(total * thin, num_warmup * thin) if progress else nullcontext()
    with bar as update:
        chunks, carry, seconds = _run_chunks(
            program,
            carry,
            keys,
            num_warmup,
            total,
            chunk_size,
            lambda n: update and update(n * thin),
        )

    draws = Draws.from_chunks(
        chunks,
        kernel,
        collected=collect is not None,
        several=num_chains > 1,
        state=carry.state,
        first_bad=np.atleast_1d(np.asarray(carry.first_bad)),
        timings={"total": time.perf_counter() - begun, **seconds},
        run={
            "num_warmup": num_warmup,
            "thin": thin,
            "share_batches": share_batches,
            "seed": np.asarray(jax.random.key_data(key)).tolist(),
        },
    )
    _report(draws, kernel, thin, num_warmup, num_samples)
    return draws


def _run_chunks(
    program: Program,
    carry: Carry,
    keys,
    num_warmup: int,
    total: int,
    chunk_size: int | None,
    update: Callable[[int], Any],
) -> tuple[list, Carry, dict[str, float]]:
    """Run all chunks; on Ctrl-C, or when no chain is left, return what there is."""
    chunks, done, count = [], 0, 1
    seconds = {"compile": 0.0, "warmup": 0.0, "sample": 0.0}
    most = min(program.capacity, chunk_size or program.capacity)
    with heed_interrupts() as interrupted:
        while done < total:
            warming = done < num_warmup
            count = min(count if chunk_size is None else most, most)
            count = min(count, (num_warmup if warming else total) - done)
            before = time.perf_counter()
            carry, kept, stats = program.chunk(carry, keys, np.int32(done), np.int32(count))
            all_bad = bool(np.all(np.asarray(carry.first_bad) >= 0))
            took = time.perf_counter() - before
            if not warming:
                chunks.append(jax.tree.map(lambda x: np.asarray(x)[:count], (kept, stats)))
            phase = "compile" if done == 0 else "warmup" if warming else "sample"
            seconds[phase] += took
            done += count
            update(count)
            if all_bad or interrupted():
                break
            if phase != "compile":
                wanted = int(count * _SECONDS_PER_CHUNK / max(took, 1e-6))
                count = int(np.clip(wanted, 1, count * _GROWTH))
        if interrupted() and done < total:
            if not chunks:
                raise KeyboardInterrupt
            warnings.warn(
                f"interrupted: returning the {done - num_warmup} draws per chain made so far, "
                f"of {total - num_warmup}.",
                InterruptWarning,
                stacklevel=3,
            )
    if not chunks:  # every chain was lost while warming up
        carry, kept, stats = program.chunk(carry, keys, np.int32(done), np.int32(0))
        chunks.append(jax.tree.map(lambda x: np.asarray(x)[:0], (kept, stats)))
    return chunks, carry, seconds


def _starting_points(key, kernel, init, num_chains):
    """Positions with a chain axis if there are several chains, and the structure of one."""
    posterior = getattr(kernel, "posterior", None)
    initial = posterior.initial if posterior is not None else None
    if init is None:
        if initial is None:
            raise ValueError("init is needed: this kernel's target does not know where to start.")
        init = initial
    init = getattr(init, "position", init)
    if callable(init):
        points = [init(k) for k in jax.random.split(key, num_chains)]
        points = [_as_arrays(p) for p in points]
        positions = points[0]
        if num_chains > 1:
            positions = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
        check_position(positions)
        example = points[0]
    else:
        given = _as_arrays(init)
        check_position(given)
        reference = None if initial is None else jax.eval_shape(initial, key)
        chained = _has_chain_axis(kernel, given, reference, num_chains)
        # a copy: the loop donates what it is given
        positions = jax.tree.map(jnp.array, given)
        if num_chains > 1 and not chained:
            positions = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (num_chains, *x.shape)).copy(), given
            )
        elif num_chains == 1 and chained:
            positions = jax.tree.map(lambda x: x[0], positions)
        example = jax.tree.map(lambda x: x[0], given) if chained else given
    return positions, _trace(kernel, example)


def _as_arrays(position):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), position)


def _has_chain_axis(kernel, given, reference, num_chains) -> bool:
    """Whether ``init`` gives one position per chain. Raises if it fits neither way."""
    shapes = jax.tree.map(jnp.shape, given)
    if reference is not None:
        wanted = jax.tree.map(lambda s: s.shape, reference)
        lead = jax.tree.map(lambda s: (num_chains, *s.shape), reference)
        if shapes in (wanted, lead):
            return shapes == lead
        raise ValueError(
            f"init does not match the model: it has shapes {shapes}, the model's position has "
            f"{wanted} (with a leading axis of {num_chains} for one position per chain)."
        )
    if num_chains == 1 or {x.shape[:1] for x in jax.tree.leaves(given)} != {(num_chains,)}:
        return False
    per_chain = _traces(kernel, jax.tree.map(lambda x: x[0], given))
    if all(x.ndim > 1 for x in jax.tree.leaves(given)):
        return per_chain
    return per_chain and not _traces(kernel, given)  # a vector, unless only a scalar fits


def _trace(kernel, position) -> tuple[Any, tuple]:
    """Trace one step without compiling it, so that what does not fit says so at once."""
    leaves, structure = jax.tree.flatten(position)
    example = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    trace(kernel.init, kernel.step, example)
    return example


def _traces(kernel, position) -> bool:
    try:
        _trace(kernel, position)
    except (TypeError, ValueError, IndexError, AttributeError):
        return False
    return True


@partial(jax.jit, static_argnums=1)
def _chain_keys(key, num_chains):
    if num_chains == 1:
        return jax.random.fold_in(key, 0)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num_chains))


def _mesh(num_chains: int) -> Mesh | None:
    """A mesh over as many devices as divide the chains, or None where that is one."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if num_chains % n == 0)
    return Mesh(np.array(devices[:count]), ("chain",)) if count > 1 else None


def _report(draws: Draws, kernel, thin: int, num_warmup: int, num_samples: int) -> None:
    """Say once what went wrong, in words."""
    settings = dict(getattr(kernel, "settings", ()))
    bad = [(chain, step) for chain, step in enumerate(draws.first_bad) if step >= 0]
    if bad:
        named = "; ".join(
            f"chain {chain} at step {step} ("
            + (f"draw {step // thin - num_warmup}" if step >= num_warmup * thin else "warm-up")
            + ")"
            for chain, step in bad[:8]
        )
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        size = settings.get("step_size")
        try_this = f"{size / 10:g}" if isinstance(size, float) else "a smaller one"
        kept = int(np.sum(draws.finite))
        warnings.warn(
            f"left the finite numbers: {named}{more}. Most likely the step size is too large "
            f"for the curvature of the target: try step_size={try_this}. "
            f"{kept} finite draws are kept, of {num_samples * len(draws.first_bad)}.",
            DivergenceWarning,
            stacklevel=3,
        )
    whole = draws.finite_chains()
    warn_of_noise(whole.stats.get("noise_ratio"), stacklevel=4)
