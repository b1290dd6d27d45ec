"""The one loop: a host loop over compiled chunks, for every kernel there is."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from stochgrad.core._checks import (
    check_count,
    check_flag,
    check_key,
    check_number,
    check_position,
    describe,
    first_line,
    is_function,
    is_ours,
)
from stochgrad.core._distributed import is_lead_process, put_global, to_host
from stochgrad.core._draws import Draws, run_attributes
from stochgrad.core._fingerprint import identity
from stochgrad.core._noise import key_words
from stochgrad.core._program import build, chain_axis, chain_sharding, position_of
from stochgrad.core._progress import progress_bar
from stochgrad.core._protocols import Kernel, Online, Position, PRNGKey
from stochgrad.core._report import report
from stochgrad.core._run_loop import RunLoop
from stochgrad.core._sinks import Sink, check_places
from stochgrad.core._store import Store
from stochgrad.core._supply import Supply
from stochgrad.core._trace import trace
from stochgrad.core._verdict import check_start

_MOST_STEPS = 2**31 - 1
"""Counters of steps, here and in kernels, are of 32 bits."""


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
    collect: Callable[[Any], PyTree] | Online | None = None,
    chunk_size: int | None = None,
    store: str | Path | Store | None = None,
    checkpoint: str | Path | None = None,
    every: float = 60.0,
    resume: bool = False,
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
            vector whose length equals ``num_chains`` is one position if the model accepts it. An
            object with a ``position``, such as the result of ``stochgrad.find_center``, is
            accepted.
        num_samples: Draws to keep, per chain.
        num_warmup: Draws to discard before them, per chain.
        thin: Steps per draw.
        num_chains: Number of chains.
        share_batches: Whether all chains see the same minibatches. Each chain's law is the same
            either way; sharing turns the chains' gradients into one matrix product, but makes the
            chains dependent, so that pooled errors must come from ``stochgrad.diagnostics.mcse``.
        progress: Whether to show a progress bar (on a terminal only).
        collect: ``state -> pytree``, what to keep of a state; the position if left out. Or an
            ``Online``, as ``stochgrad.moments`` and ``stochgrad.swag`` make: then draws are summed
            up as they come and not kept, and the summaries are in ``Draws.summary``.
        chunk_size: The most draws between two looks at the progress bar and at Ctrl-C; by default
            as many as take about half a second.
        store: A directory for the draws, or a ``stochgrad.Store`` that also says in which
            precision. They are appended as the run goes on to a zarr group, which xarray and ArviZ
            open at any time, and are not held in memory: ``Draws.positions`` are then zarr arrays,
            read where they are indexed. Needs the extra ``[store]``.
        checkpoint: A directory for the state of the run, saved at the end of a chunk when ``every``
            seconds have passed, on Ctrl-C, on failure and at the end.
        every: Seconds between two checkpoints.
        resume: Whether to go on from the checkpoint, if there is one. The draws are then those of
            an uninterrupted run, to the bit on one machine and one set of versions; a larger
            ``num_samples`` makes the run longer.

    Raises:
        TypeError: the key is not a typed PRNG key, the kernel not a kernel.
        ValueError: a number is out of range, or ``init`` does not fit the model or is not finite;
            the run has more than 2^31 - 1 steps; the store or the checkpoint was written by a
            different run, or this one without ``resume``, or lacks draws that the other counts; the
            checkpoint is damaged; streamed data hold NaN, change their length or cannot be read.
        OSError: the store or the checkpoint cannot be written, or another run writes there; the
            store is damaged.

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
    if not all(callable(getattr(kernel, name, None)) for name in ("init", "step")):
        raise TypeError(
            "kernel must have init and step, as stochgrad.sgld(...) or an algorithm of blackjax "
            f"has, got {describe(kernel)}."
        )
    num_samples = check_count("num_samples", num_samples)
    num_warmup = check_count("num_warmup", num_warmup, least=0)
    thin = check_count("thin", thin)
    num_chains = check_count("num_chains", num_chains)
    if chunk_size is not None:
        chunk_size = check_count("chunk_size", chunk_size)
    online = isinstance(collect, Online)
    if not (collect is None or callable(collect) or online):
        raise TypeError(
            f"collect must be a function of a state or an Online, got {describe(collect)}."
        )
    every = check_number("every", every, zero=True)
    share_batches = check_flag("share_batches", share_batches)
    progress = check_flag("progress", progress)
    resume = check_flag("resume", resume)
    if (num_warmup + num_samples) * thin > _MOST_STEPS:
        raise ValueError(
            f"num_warmup, num_samples and thin make {(num_warmup + num_samples) * thin:,} steps a "
            f"chain, and steps are counted up to {_MOST_STEPS:,}: take several runs with keys of "
            "their own."
        )
    store, checkpoint = check_places(store, checkpoint, resume)

    begun = time.perf_counter()
    position_key, init_key, run_key = jax.random.split(key, 3)
    posterior = getattr(kernel, "posterior", None)
    stream = posterior.batches.stream if posterior is not None else None
    positions, example = _starting_points(position_key, kernel, init, num_chains, stream)
    mesh = _mesh(num_chains, posterior.batches.mesh if posterior is not None else None)
    # on an accelerator a loop of unknown length waits for the host at each step
    known_thin = thin if thin == 1 or jax.default_backend() != "cpu" else None
    program = build(
        kernel.init,
        kernel.step,
        collect or position_of,
        known_thin,
        num_chains,
        share_batches,
        mesh,
        example,
        stream,
        posterior and (posterior.log_density, posterior.batches.init, posterior.batches.next),
    )
    run = {
        "num_warmup": num_warmup,
        "thin": thin,
        "share_batches": share_batches,
        "seed": np.asarray(jax.random.key_data(key)).tolist(),
    }
    as_draws = partial(
        Draws.from_chunks,
        kernel=kernel,
        collected=collect is not None,
        online=online,
        several=num_chains > 1,
        run=run,
    )
    sink = Sink(as_draws, program.shapes, online)
    first_of_chains = jax.tree.map(lambda x: x[0], positions) if num_chains > 1 else positions
    keys, init_keys = _chain_keys(run_key, num_chains), _chain_keys(init_key, num_chains)
    everywhere = by_chain = None
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        by_chain = NamedSharding(mesh, chain_axis(mesh)) if num_chains > 1 else everywhere
        positions, keys, init_keys = put_global((positions, keys, init_keys), by_chain)
    supply = None
    try:
        if store is not None or checkpoint is not None:
            metadata = {**run_attributes(kernel, run), "num_chains": num_chains, "collect": collect}
            sink.open(
                identity(program.traced, metadata, example, stream),
                store,
                checkpoint,
                every,
                num_samples,
                resume,
            )
        if stream is not None:
            words = np.asarray(key_words(jax.random.fold_in(run_key, num_chains))).tolist()
            supply = Supply(stream, words, everywhere)
        shapes = partial(
            jax.eval_shape, program.start, positions, init_keys, stream and stream.shapes()
        )
        saved = sink.load(shapes, num_warmup)
        if saved is None:
            if supply is not None:
                supply.left(0)
            if program.density is not None:
                values = program.density(positions, init_keys, supply and supply.resident)
                check_start(to_host(values), first_of_chains)
            carry = program.init(positions, init_keys, supply and supply.resident)
        else:
            carry = saved.state
        if mesh is not None:
            one = num_chains == 1
            shardings = everywhere if one else chain_sharding(carry, share_batches, mesh)
            carry = put_global(carry, shardings)

        total = num_warmup + num_samples
        bar = (
            progress_bar(total * thin, num_warmup * thin)
            if progress and is_lead_process()
            else None
        )
        run_loop = RunLoop(program, keys, supply, thin, num_warmup, total, chunk_size)
        with bar or nullcontext() as update:
            carry, seconds = run_loop.run(
                carry,
                saved.done if saved is not None else 0,
                sink,
                lambda n: update and update(n * thin),
            )
    finally:
        sink.close()
        if supply is not None:
            supply.close()

    draws = sink.draws(
        state=carry.state,
        summary=to_host(carry.summary),
        first_bad=np.atleast_1d(to_host(carry.first_bad)),
        timings={"total": time.perf_counter() - begun, **seconds},
    )
    exact = getattr(store, "dtype", None) is None
    report(draws, kernel, first_of_chains, thin, num_warmup, num_samples, exact)
    return draws


def initial_of(kernel: Any) -> Callable[[Any], Any] | None:
    """Where a kernel starts unless told otherwise: its own answer, or its posterior's."""
    posterior, initial = getattr(kernel, "posterior", None), getattr(kernel, "initial", None)
    return posterior.initial if initial is None and posterior is not None else initial


def _starting_points(key, kernel, init, num_chains, stream):
    """Positions with a chain axis if there are several chains, and the structure of one."""
    initial = initial_of(kernel)
    if init is None:
        if initial is None:
            raise ValueError("init is needed: the kernel's target defines no starting point.")
        init = initial
    init = getattr(init, "position", init)
    if is_function(init):
        points = [_made(init, k) for k in jax.random.split(key, num_chains)]
        positions = points[0]
        if num_chains > 1:
            positions = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
        example = points[0]
    else:
        check_position(init)
        given = _as_arrays(init)
        reference = None if initial is None else jax.eval_shape(initial, key)
        chained = _has_chain_axis(key, kernel, given, reference, num_chains, stream)
        # a copy: the loop donates what it is given
        positions = jax.tree.map(jnp.array, given)
        if num_chains > 1 and not chained:
            positions = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (num_chains, *x.shape)).copy(), given
            )
        elif num_chains == 1 and chained:
            positions = jax.tree.map(lambda x: x[0], positions)
        example = jax.tree.map(lambda x: x[0], given) if chained else given
    return positions, _trace(key, kernel, example, stream)


def _made(init, key):
    """The position that a function of a key gives."""
    try:
        position = init(key)
    except Exception as error:
        raise ValueError(
            "init must be a position or a function key -> position, and fails: "
            f"{first_line(error)}."
        ) from error
    check_position(position, "init(key)")
    return _as_arrays(position)


def _as_arrays(position):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), position)


def _has_chain_axis(key, kernel, given, reference, num_chains, stream) -> bool:
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
    per_chain = _traces(key, kernel, jax.tree.map(lambda x: x[0], given), stream)
    if all(x.ndim > 1 for x in jax.tree.leaves(given)):
        return per_chain
    return per_chain and not _traces(
        key, kernel, given, stream
    )  # a vector, unless only a scalar fits


def _trace(key, kernel, position, stream) -> tuple[Any, tuple, Any]:
    """Trace one step without compiling it, so that what does not fit says so at once."""
    leaves, structure = jax.tree.flatten(position)
    example = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), key.dtype)
    try:
        trace(kernel.init, kernel.step, example, stream)
    except Exception as error:
        if is_ours(error) or isinstance(error, NotImplementedError):
            raise
        shapes = jax.tree.map(jnp.shape, position)
        raise ValueError(
            f"kernel fails on a position of shape {shapes}: does init match it? "
            f"({first_line(error)})"
        ) from error
    return example


def _traces(key, kernel, position, stream) -> bool:
    try:
        _trace(key, kernel, position, stream)
    except (TypeError, ValueError, IndexError, AttributeError):
        return False
    return True


@partial(jax.jit, static_argnums=1)
def _chain_keys(key, num_chains):
    if num_chains == 1:
        return jax.random.fold_in(key, 0)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num_chains))


def _mesh(num_chains: int, given: Mesh | None) -> Mesh | None:
    """The data's mesh, or one over as many devices as divide the chains, or None for one device."""
    if given is not None:
        count = dict(given.shape).get("chain", 1)
        if num_chains % count:
            raise ValueError(
                f"num_chains must be a multiple of the {count} devices along 'chain', "
                f"got {num_chains}."
            )
        return given
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if num_chains % n == 0)
    if jax.process_count() > 1 and count < len(devices):
        raise ValueError(
            f"num_chains must be a multiple of the number of devices of all processes, "
            f"{len(devices)}, got {num_chains}."
        )
    return Mesh(np.array(devices[:count]), ("chain",)) if count > 1 else None
