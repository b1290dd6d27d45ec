"""The posterior of a network's weights, given reference forces."""

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from stochgrad.core import (
    Order,
    Posterior,
    PRNGKey,
    by_name,
    check_number,
    check_position,
    describe,
    first_line,
    posterior,
)
from stochgrad.potentials._configurations import Configurations
from stochgrad.potentials._energy_checks import (
    check_gradient,
    check_padding,
    check_species_known,
)
from stochgrad.potentials._inputs import check_configurations, warn_of_rounding
from stochgrad.potentials._noise_model import (
    Learned,
    Noise,
    checked_noise,
    initial_noise,
    noise_log_prior,
    noise_scale,
)
from stochgrad.potentials._potential import potential_of
from stochgrad.potentials._predict import Predicted, predict_one

Prior = float | Literal["flat", "scaled"] | Callable[[PyTree], Scalar]


def force_matching(
    energy_fn: Callable[..., Scalar],
    dataset: Configurations,
    *,
    init: PyTree | Callable[[PRNGKey], PyTree],
    noise: float | Noise,
    prior: Prior = 1.0,
    batch_size: int | None = None,
    temperature: float = 1.0,
    order: Order = "reshuffled",
) -> Posterior:
    r"""The posterior of the weights of an energy function, given reference forces.

    With $F_\theta = -\nabla_R U_\theta$, for configurations i and force components k,

    $$\log\pi(\theta, s) = \frac1T\Big[\sum_{i,k} \log\mathcal N(F_{ik} \mid F_\theta(R_i)_k,
      \sigma_k^2) + \sum_i \log\mathcal N\Big(\frac{U_i}{n_i} \,\Big|\, \frac{U_\theta(R_i)}{n_i},
      \sigma_U^2\Big) + \dots + \log p(\theta) + \log p(\sigma)\Big] + \sum s,$$

    where energies and virials, if the data have them, are per atom ($n_i$ atoms), and a learned
    $\sigma = m e^s$ brings the last term, which no temperature touches. It is the likelihood of
    Thaler, Doehner & Zavadlav (J. Chem. Theory Comput. 2023), on unconstrained scales.

    The position is ``{"params": weights, "noise": {"forces": s, ...}}``.

    Args:
        energy_fn: ``(params, positions, **graph) -> scalar``, the energy of one configuration of
            shape (atoms, dim). By name it gets what the data have of ``species``, ``box``, ``mask``
            and further arrays. Wrapped, it may come from jax-md, flax, haiku or equinox.
        dataset: From ``stochgrad.potentials.configurations``.
        init: ``key -> params``, called for every chain, so that chains start apart; or one tree,
            which may be callable itself, as modules of equinox and structs of flax are.
        noise: $\sigma$ of the forces: a number, an array of one for each species, or
            ``stochgrad.potentials.learned(mean)``. Where there are energies or virials too, a
            mapping with an entry for each: ``{"forces": learned(50.0), "energies": 0.1}``.
        prior: Of the weights: a number, the standard deviation of independent normals;
            ``"scaled"``, normals of variance 1/fan-in for matrices (fan-in: all axes but the last)
            and 1 for vectors; ``"flat"``; or a function ``params -> log density``.
        batch_size: Configurations of a minibatch; optional with ``order="full"``.
        temperature: T. Below one the posterior is cold: prior and likelihood are both sharpened.
        order: As in ``stochgrad.posterior``.

    Warns:
        PrecisionWarning: total energies are so large that their type cannot tell a tenth of their
            noise.

    Raises:
        ValueError: a number is out of range; the noise does not name what the data have, or has no
            number for a species that they have; ``energy_fn`` fails on the data, returns no scalar,
            has no parameters for a species, depends on padding, or its forces or their gradient by
            the weights are not finite (the configuration and the leaf are named).
        TypeError: the dataset is not one, or another argument is of another kind.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, stochgrad
        >>> at = np.random.default_rng(0).normal(size=(20, 3, 3))
        >>> data = stochgrad.potentials.configurations(at, -2.0 * at)
        >>> target = stochgrad.potentials.force_matching(
        ...     lambda k, r: 0.5 * k * jnp.sum(r**2), data, init=jnp.float32(1.0), noise=0.1,
        ...     batch_size=5,
        ... )
        >>> draws = stochgrad.sample(
        ...     jax.random.key(0), stochgrad.sgld(target, 1e-5), num_samples=500, num_warmup=100
        ... )
        >>> round(float(draws.positions["params"].mean()), 1)
        2.0
    """
    check_configurations("dataset", dataset)
    cold = check_number("temperature", temperature)
    targets = {
        name: np.nan_to_num(value) if name in dataset.weights else value
        for name, value in dataset.labels.items()
    }
    scales = checked_noise(noise, list(targets))
    if "forces" in scales:
        _refuse_species_without_noise(scales["forces"], dataset)
    start = _starts(init)
    example = start(jax.random.key(0))
    dtype = check_species_known(energy_fn, example, dataset)
    log_weights = _log_prior(prior, example)
    if dataset.energies is not None:
        _warn_of_energies(dataset, scales["energies"], dtype)
    check_padding(energy_fn, example, dataset)
    check_gradient(energy_fn, example, dataset, batch_size)
    each, shared = dataset.inputs()
    shared = jax.tree.map(jnp.asarray, shared)
    strain = None if dataset.virials is None else dataset.virials.shape[1:]
    rows = {
        "positions": dataset.positions,
        "target": targets,
        "graph": each,
        "weights": dataset.weights,
    }

    def log_prior(position):
        density, jacobian = noise_log_prior(position["noise"])
        weights = jnp.asarray(log_weights(position["params"]), float)
        return (weights + density.astype(weights.dtype)) / cold + jacobian.astype(weights.dtype)

    def of_row(position, row):
        graph = {**row["graph"], **shared}
        found = predict_one(energy_fn, position["params"], row["positions"], graph, strain)
        terms = _log_likelihoods(found, row["target"], scales, position["noise"], graph)
        for name, weight in row["weights"].items():
            terms[name] *= weight.astype(terms[name].dtype)
        return reduce(add, terms.values()) / cold

    def log_likelihood(position, batch):
        return jax.vmap(lambda row: of_row(position, row))(batch)

    target = posterior(log_prior, log_likelihood, rows, batch_size=batch_size, order=order)

    def initial(key):
        return {"params": start(key), "noise": initial_noise(scales)}

    def constrain(position):
        named = by_name({"params": position["params"]})
        learnt = {
            f"sigma_{name}": jnp.asarray(scales[name].mean, s.dtype) * jnp.exp(s)
            for name, s in position["noise"].items()
        }
        return {**learnt, **named}

    model = potential_of(energy_fn, dataset)
    return target._replace(initial=initial, constrain=constrain, model=model)


def _log_likelihoods(found: Predicted, target, scales, free, graph) -> dict[str, Scalar]:
    """Of one configuration's forces, energies and virials."""
    dtype = found.forces.dtype
    mask = graph.get("mask")
    atoms = found.forces.shape[0] if mask is None else jnp.sum(mask)
    atoms = jnp.asarray(atoms, dtype)

    def scale(name):
        return noise_scale(scales[name], free.get(name), graph.get("species")).astype(dtype)

    def normal(error, sigma):
        return -0.5 * (error / sigma) ** 2 - jnp.log(sigma) - 0.5 * np.log(2 * np.pi)

    by_label = {}
    if "forces" in target:
        sigma = jnp.broadcast_to(scale("forces"), found.forces.shape[:1])[:, None]
        sigma = jnp.broadcast_to(sigma, found.forces.shape)
        terms = normal(target["forces"].astype(dtype) - found.forces, sigma)
        terms = terms if mask is None else jnp.where(mask[:, None], terms, 0)
        by_label["forces"] = jnp.sum(terms)
    if "energies" in target:
        error = (target["energies"].astype(dtype) - found.energy) / atoms
        by_label["energies"] = normal(error, scale("energies"))
    if "virials" in target:
        error = (target["virials"].astype(dtype) - found.virial) / atoms
        terms = normal(error, jnp.broadcast_to(scale("virials"), error.shape))
        by_label["virials"] = jnp.sum(terms)
    return by_label


def _starts(init: Any) -> Callable[[PRNGKey], PyTree]:
    """``key -> params``: the caller's function, or one that gives the caller's tree."""
    leaves = jax.tree.leaves(init)
    tree = not callable(init) or not (len(leaves) == 1 and leaves[0] is init)
    if tree and not isinstance(init, jax.tree_util.Partial):
        check_position(init)
        params = jax.tree.map(jnp.asarray, init)
        return lambda key: params

    def start(key):
        try:
            params = init(key)
        except Exception as error:
            raise ValueError(f"init fails on a key: {first_line(error)}.") from error
        check_position(params, "init(key)")
        return jax.tree.map(jnp.asarray, params)

    return start


def _log_prior(prior: Prior, params: PyTree) -> Callable[[PyTree], Scalar]:
    """``params -> log density``, up to a constant."""
    if callable(prior):
        try:
            out = jax.eval_shape(lambda p: jnp.asarray(prior(p)), params)
        except Exception as error:
            raise ValueError(f"prior fails on the weights: {first_line(error)}.") from error
        if out.shape != () or not jnp.issubdtype(out.dtype, jnp.number):
            raise ValueError(f"prior must return a scalar, the log density, got {out}.")
        return prior
    if isinstance(prior, str) and prior == "flat":
        return lambda params: jnp.zeros(())
    if not isinstance(prior, int | float | np.number | jax.Array | np.ndarray) and (
        not isinstance(prior, str) or prior != "scaled"
    ):
        raise ValueError(
            f"prior must be a number, 'scaled', 'flat' or a function, got {describe(prior)}."
        )
    scaled = isinstance(prior, str)
    sd = 1.0 if scaled else check_number("prior", prior)

    def log_density(params):
        def of_leaf(x: Array):
            x = jnp.asarray(x)
            fan_in = float(np.prod(x.shape[:-1])) if scaled and x.ndim > 1 else 1.0
            return -0.5 * jnp.sum(x.astype(float) ** 2) * (fan_in / sd**2)

        return sum(map(of_leaf, jax.tree.leaves(params)), jnp.zeros(()))

    return log_density


def _refuse_species_without_noise(scale, dataset: Configurations) -> None:
    shape = np.shape(scale.mean if isinstance(scale, Learned) else scale)
    if not shape:
        return
    species = dataset.known_species()
    if species is None:
        raise ValueError("noise of one number for each species needs species in the data.")
    last = int(species.max())
    if last >= shape[0]:
        raise ValueError(f"noise has {shape[0]} species, the data have a species {last}.")


def _warn_of_energies(dataset: Configurations, scale, dtype) -> None:
    """Warn where rounding of total energies is not small against their noise."""
    sigma = np.asarray(scale.mean if isinstance(scale, Learned) else scale, np.float64)
    remedy = "subtract an energy for each atom, so that totals are small"
    energies = np.nan_to_num(np.asarray(dataset.energies))
    warn_of_rounding(energies, dtype, sigma * dataset.atoms, "their noise", remedy, stacklevel=3)
