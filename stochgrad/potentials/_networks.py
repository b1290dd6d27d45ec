"""Networks from a posterior: trained from different starts, then sampled from there."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from stochgrad.core import (
    ConvergenceWarning,
    DivergenceWarning,
    Draws,
    Kernel,
    Posterior,
    PRNGKey,
    Store,
    check_callable,
    check_count,
    check_flag,
    check_instance,
    check_key,
    check_number,
    check_path,
    check_position,
    describe,
    first_line,
    sample,
)
from stochgrad.kernels import ascend
from stochgrad.potentials._approximate import Approximation
from stochgrad.potentials._calculator import calculator
from stochgrad.potentials._potential import Potential
from stochgrad.potentials._saved import load_saved, save_networks


class Networks(NamedTuple):
    """Networks drawn from a posterior.

    Attributes:
        positions: ``{"params": ..., "noise": ...}`` with axes of chains and draws before their own;
            zarr arrays where the run had a store.
        trained: The trained networks that the chains started from, with an axis of chains.
        method: How they were drawn.
        run: What ``stochgrad.sample`` returned, None where nothing was sampled.
        posterior: What they were drawn from, None where they were loaded.
        potential: Their energy function, with elements, reference energies and cut-off of the data.
    """

    positions: PyTree
    trained: PyTree
    method: str
    run: Draws | None
    posterior: Posterior | None
    potential: Potential | None = None

    @property
    def params(self) -> PyTree:
        """The weights, with axes of chains and draws before their own."""
        return self.positions["params"]

    def members(self, per_chain: int | None = None) -> PyTree:
        """Weights and noise of all networks with one leading axis, chain by chain.

        Args:
            per_chain: How many of each chain, evenly spaced and ending with the last; all if None.

        Raises:
            ValueError: it is no positive count, or nothing was drawn.
        """
        draws = jax.tree.leaves(self.positions)[0].shape[1]
        if draws == 0:
            raise ValueError("there are no draws: the run diverged, or was cut.")
        count = draws if per_chain is None else min(check_count("per_chain", per_chain), draws)
        chosen = np.round(np.linspace(draws / count, draws, count)).astype(int) - 1
        pick = jax.tree.map(lambda x: np.asarray(x[:])[:, chosen], self.positions)
        return jax.tree.map(lambda x: jnp.asarray(x.reshape(len(x) * count, *x.shape[2:])), pick)

    def calculator(
        self,
        per_chain: int | None = 1,
        *,
        max_force_sd: float | None = None,
        above: Literal["warn", "stop"] = "warn",
    ) -> Any:
        """A calculator of ASE with the networks' mean and standard deviations.

        Args:
            per_chain: As in ``members``.
            max_force_sd: As in ``stochgrad.potentials.calculator``.
            above: Likewise.

        Raises:
            ImportError: ase is not installed.
            ValueError: the posterior was not made by ``force_matching``; and what
                ``stochgrad.potentials.calculator`` raises.
        """
        params = self.members(per_chain)["params"]
        potential = self._known_potential()
        return calculator(potential, params, max_force_sd=max_force_sd, above=above)

    def save(self, path: str | Path) -> None:
        """Write the networks to a directory, as arrays and a JSON; ``load_networks`` reads it.

        Args:
            path: A new directory, or one of networks that these replace.

        Raises:
            ValueError: it is a file, or a directory of something else.
            OSError: it cannot be written.
        """
        save_networks(path, self.positions, self.trained, self.method, self.potential)

    def _known_potential(self) -> Potential:
        if self.potential is None:
            raise ValueError(
                "networks must be of a posterior that stochgrad.potentials.force_matching made."
            )
        return self.potential


def load_networks(path: str | Path, energy_fn: Callable[..., Any], params: PyTree) -> Networks:
    """Networks that ``Networks.save`` wrote.

    Args:
        path: The directory.
        energy_fn: Their energy function.
        params: Weights of one network, for the structure: ``init(key)``.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: there are no networks, they are damaged, or have other leaves than ``params``.
    """
    positions, trained, method, potential = load_saved(path, energy_fn, params)
    return Networks(positions, trained, method, None, None, potential)


def networks(
    key: PRNGKey,
    posterior: Posterior,
    method: Callable[[Posterior], Kernel] | Approximation | None = None,
    *,
    num_chains: int = 8,
    train_steps: int = 2000,
    learning_rate: float = 1e-3,
    init: PyTree | Callable[[PRNGKey], PyTree] | None = None,
    num_samples: int = 1,
    num_warmup: int = 0,
    thin: int = 1,
    share_batches: bool = False,
    store: str | Path | Store | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Networks:
    r"""Train networks from different starts, and draw from the posterior around each.

    All chains run together in one compiled program. Each starts from its own random weights and is
    trained by Adam (with a learning rate that falls as a cosine to a tenth); what comes then is the
    method's. Unmixed chains form a locally sampled ensemble: ``force_rhat`` tells.

    Args:
        key: A typed PRNG key. Every chain's noise and minibatches come from it by their own split.
        posterior: From ``stochgrad.potentials.force_matching``.
        method: ``posterior -> kernel`` (``partial(stochgrad.psgld, step_size=1e-6)``,
            ``partial(stochgrad.sghmc, ...)``, ``lambda target: stochgrad.cyclical(...)``);
            ``stochgrad.potentials.swag(...)`` or ``last_layer_laplace(...)``; None for the trained
            networks themselves, a Deep Ensemble (of one draw a chain).
        num_chains: Networks trained, and chains.
        train_steps: Steps of training; zero to begin where ``init`` says.
        learning_rate: Of Adam's.
        init: Where to start; the posterior's own starts by default. ``Networks.trained`` of another
            call with ``train_steps=0`` saves training anew.
        num_samples: Networks to keep of each chain.
        num_warmup: Draws to discard before them, of methods that run a kernel.
        thin: Steps from one draw to the next, likewise.
        share_batches: Whether all chains see the same minibatches, which is several times faster on
            small networks and makes their noise dependent.
        store: Where the draws go, a directory (zarr) or ``stochgrad.Store``.
        checkpoint: A directory for the state of training and of sampling, saved as they go.
        resume: Whether to go on from there.
        progress: Whether to show progress bars.

    Raises:
        TypeError: the method is none of these, or another argument is of another kind.
        ValueError: a number is out of range, ``init`` does not fit the posterior, training left the
            finite numbers, the method fails; and what it raises.

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp, numpy as np, stochgrad
        >>> at = np.random.default_rng(0).normal(size=(20, 3, 3))
        >>> data = stochgrad.potentials.configurations(at, -2.0 * at)
        >>> target = stochgrad.potentials.force_matching(
        ...     lambda k, r: 0.5 * k * jnp.sum(r**2), data, noise=0.1, batch_size=5,
        ...     init=lambda key: jax.random.normal(key),
        ... )
        >>> found = stochgrad.potentials.networks(
        ...     jax.random.key(0), target, partial(stochgrad.sgld, step_size=1e-5), num_chains=2,
        ...     learning_rate=0.1, train_steps=200, num_samples=50,
        ... )
        >>> found.params.shape
        (2, 50)
    """
    check_key(key)
    wanted = "a posterior, as stochgrad.potentials.force_matching makes it"
    check_instance("posterior", posterior, Posterior, wanted)
    if isinstance(method, type) or not (
        method is None or callable(method) or isinstance(method, Approximation)
    ):
        raise TypeError(
            "method must be a function from a posterior to a kernel, an Approximation or None, "
            f"got {describe(method)}."
        )
    if isinstance(method, Approximation):
        check_callable("method.draw", method.draw)
    if store is not None:
        if method is None or isinstance(method, Approximation):
            raise ValueError(
                "store is for methods that run a kernel; of others take networks(...).save(path)."
            )
        if not isinstance(store, Store):
            check_path("store", store)
    checkpoint = None if checkpoint is None else check_path("checkpoint", checkpoint)
    resume, progress = check_flag("resume", resume), check_flag("progress", progress)
    share_batches = check_flag("share_batches", share_batches)
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint, the directory to resume from.")
    num_warmup = check_count("num_warmup", num_warmup, least=0)
    thin = check_count("thin", thin)
    num_chains = check_count("num_chains", num_chains)
    train_steps = check_count("train_steps", train_steps, least=0)
    num_samples = check_count("num_samples", num_samples)
    rate = check_number("learning_rate", learning_rate)
    potential = posterior.model if isinstance(posterior.model, Potential) else None
    train_key, sample_key = jax.random.split(key)
    options: dict[str, Any] = {"share_batches": share_batches, "progress": progress}

    def where(part: str) -> dict[str, Any]:
        if checkpoint is None:
            return options
        return {**options, "checkpoint": checkpoint / part, "resume": resume}

    begin = posterior.initial if init is None else init
    if begin is None:
        raise ValueError("init is needed: the posterior defines no starting point.")
    if train_steps:
        trained = _trained(
            train_key,
            ascend(posterior, _adam(rate, train_steps)),
            init=init,
            num_samples=1,
            thin=train_steps,
            num_chains=num_chains,
            **where("training"),
        )
    else:
        if callable(begin):
            keys = jax.random.split(train_key, num_chains)
            each = [_called(begin, k) for k in keys]
            trained = jax.tree.map(lambda *x: jnp.stack(x), *each)
        else:
            check_position(init)
            trained = jax.tree.map(jnp.asarray, init)
        _check_starts(trained, posterior, num_chains)
    if method is None:
        as_draws = jax.tree.map(lambda x: np.asarray(x)[:, None], trained)
        return Networks(as_draws, trained, "Deep Ensemble", None, posterior, potential)
    if isinstance(method, Approximation):
        drawn = method.draw(sample_key, posterior, trained, num_samples, where("sampling"))
        drawn = jax.tree.map(np.asarray, drawn)
        return Networks(drawn, trained, method.name, None, posterior, potential)
    kernel = _kernel_of(method, posterior)
    begin = trained if num_chains > 1 else jax.tree.map(lambda x: x[0], trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # force_rhat judges functions
        run = sample(
            sample_key,
            kernel,
            init=begin,
            num_samples=num_samples,
            num_warmup=num_warmup,
            thin=thin,
            num_chains=num_chains,
            store=store,
            **where("sampling"),
        )
    name = getattr(kernel, "method", type(kernel).__name__)
    return Networks(run.positions, trained, name, run, posterior, potential)


def _trained(key: PRNGKey, kernel: Kernel, **options: Any) -> PyTree:
    """Positions at the end of training.

    Raises:
        ValueError: a chain diverged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", DivergenceWarning)  # said below, of Adam
        run = sample(key, kernel, **options)
    bad = np.flatnonzero(np.asarray(run.first_bad) >= 0)
    if len(bad):
        chain, step = int(bad[0]), int(run.first_bad[bad[0]])
        why = (
            "its first gradient is not finite where it starts"
            if step == 0
            else "take a smaller learning_rate"
        )
        raise ValueError(
            f"training of {len(bad)} of {options['num_chains']} chains diverged, "
            f"that of chain {chain} at step {step}: {why}."
        )
    if run.num_draws == 0:
        raise KeyboardInterrupt("training was interrupted")
    return jax.tree.map(lambda x: jnp.asarray(x[:, -1]), run.positions)


def _called(init: Callable, key: PRNGKey) -> PyTree:
    try:
        position = init(key)
    except Exception as error:
        raise ValueError(f"init fails on a key: {first_line(error)}.") from error
    check_position(position, "init(key)")
    return jax.tree.map(jnp.asarray, position)


def _check_starts(trained: PyTree, posterior: Posterior, num_chains: int) -> None:
    """Raise unless positions have an axis of chains, and fit the posterior."""
    lead = {jnp.shape(x)[:1] for x in jax.tree.leaves(trained)}
    if lead != {(num_chains,)}:
        raise ValueError(
            f"init must have a leading axis of the {num_chains} chains, got axes {lead}."
        )
    if posterior.initial is None:
        return
    wanted = jax.eval_shape(posterior.initial, jax.random.key(0))
    shapes = jax.tree.map(lambda x: x.shape[1:], trained)
    if shapes != jax.tree.map(lambda x: x.shape, wanted):
        raise ValueError(
            f"init must fit the posterior: it has positions of shapes {shapes}, the posterior "
            f"{jax.tree.map(lambda x: x.shape, wanted)}."
        )


def _kernel_of(method: Callable[[Posterior], Kernel], posterior: Posterior) -> Kernel:
    try:
        kernel = method(posterior)
    except Exception as error:
        raise ValueError(f"method fails on the posterior: {first_line(error)}.") from error
    if not (callable(getattr(kernel, "init", None)) and callable(getattr(kernel, "step", None))):
        raise TypeError(f"method must return a kernel, with init and step, got {describe(kernel)}.")
    return kernel


def _adam(rate: float, steps: int):
    import optax

    return optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.1))
