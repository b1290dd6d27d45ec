"""The posterior of a network's weights, given reference forces."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from stochgrad.core import Order, Posterior, PRNGKey, by_name, check_number, posterior
from stochgrad.potentials._configurations import Configurations
from stochgrad.potentials._noise_model import (
    Learned,
    Noise,
    checked_noise,
    initial_noise,
    noise_log_prior,
    noise_scale,
)
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
        init: ``key -> params``, called for every chain, so that chains start apart; or one tree.
        noise: $\sigma$ of the forces: a number, an array of one for each species, or
            ``stochgrad.potentials.learned(mean)``. Where there are energies or virials too, a
            mapping with an entry for each: ``{"forces": learned(50.0), "energies": 0.1}``.
        prior: Of the weights: a number, the standard deviation of independent normals;
            ``"scaled"``, normals of variance 1/fan-in for matrices (fan-in: all axes but the last)
            and 1 for vectors; ``"flat"``; or a function ``params -> log density``.
        batch_size: Configurations of a minibatch; may be left out for ``order="full"``.
        temperature: T. Below one the posterior is cold: prior and likelihood are both sharpened.
        order: As in ``stochgrad.posterior``.

    Raises:
        ValueError: a number is out of range; the noise does not name what the data have, or has no
            number for a species that they have; ``energy_fn`` fails on the data, returns no scalar,
            or has no parameters for a species.
        TypeError: the dataset is not one.

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
    if not isinstance(dataset, Configurations):
        raise TypeError(
            "dataset must come from stochgrad.potentials.configurations, got "
            f"{type(dataset).__name__}."
        )
    cold = check_number("temperature", temperature)
    targets = {"forces": dataset.forces, "energies": dataset.energies, "virials": dataset.virials}
    targets = {name: value for name, value in targets.items() if value is not None}
    scales = checked_noise(noise, list(targets))
    _refuse_species_without_noise(scales["forces"], dataset)
    start = init if callable(init) else lambda key: init
    example = start(jax.random.key(0))
    _check_energy(energy_fn, example, dataset)
    log_weights = _log_prior(prior)
    each, shared = dataset.inputs()
    shared = {name: jnp.asarray(value) for name, value in shared.items()}
    strain = None if dataset.virials is None else dataset.virials.shape[1:]
    rows = {"positions": dataset.positions, "target": targets, "graph": each}

    def log_prior(position):
        density, jacobian = noise_log_prior(position["noise"])
        weights = jnp.asarray(log_weights(position["params"]), float)
        return (weights + density.astype(weights.dtype)) / cold + jacobian.astype(weights.dtype)

    def of_row(position, row):
        graph = {**row["graph"], **shared}
        found = predict_one(energy_fn, position["params"], row["positions"], graph, strain)
        return _log_likelihood(found, row["target"], scales, position["noise"], graph) / cold

    def log_likelihood(position, batch):
        return jax.vmap(lambda row: of_row(position, row))(batch)

    target = posterior(log_prior, log_likelihood, rows, batch_size=batch_size, order=order)

    def initial(key):
        params = jax.tree.map(jnp.asarray, start(key))
        return {"params": params, "noise": initial_noise(scales)}

    def constrain(position):
        named = by_name({"params": position["params"]})
        learnt = {
            f"sigma_{name}": jnp.asarray(scales[name].mean, s.dtype) * jnp.exp(s)
            for name, s in position["noise"].items()
        }
        return {**learnt, **named}

    return target._replace(initial=initial, constrain=constrain)


def _log_likelihood(found: Predicted, target, scales, free, graph) -> Scalar:
    """Of one configuration."""
    dtype = found.forces.dtype
    mask = graph.get("mask")
    atoms = found.forces.shape[0] if mask is None else jnp.sum(mask)
    atoms = jnp.asarray(atoms, dtype)

    def scale(name):
        return noise_scale(scales[name], free.get(name), graph.get("species")).astype(dtype)

    def normal(error, sigma):
        return -0.5 * (error / sigma) ** 2 - jnp.log(sigma) - 0.5 * np.log(2 * np.pi)

    sigma = jnp.broadcast_to(scale("forces"), found.forces.shape[:1])[:, None]
    sigma = jnp.broadcast_to(sigma, found.forces.shape)
    terms = normal(target["forces"].astype(dtype) - found.forces, sigma)
    if mask is not None:
        terms = jnp.where(mask[:, None], terms, 0)
    total = jnp.sum(terms)
    if "energies" in target:
        error = (target["energies"].astype(dtype) - found.energy) / atoms
        total += normal(error, scale("energies"))
    if "virials" in target:
        error = (target["virials"].astype(dtype) - found.virial) / atoms
        total += jnp.sum(normal(error, jnp.broadcast_to(scale("virials"), error.shape)))
    return total


def _log_prior(prior: Prior) -> Callable[[PyTree], Scalar]:
    """``params -> log density``, up to a constant."""
    if callable(prior):
        return prior
    if prior == "flat":
        return lambda params: jnp.zeros(())
    if isinstance(prior, str) and prior != "scaled":
        raise ValueError(f"prior must be a number, 'scaled', 'flat' or a function, got {prior!r}.")
    sd = 1.0 if prior == "scaled" else check_number("prior", prior)

    def log_density(params):
        def of_leaf(x: Array):
            x = jnp.asarray(x)
            fan_in = float(np.prod(x.shape[:-1])) if prior == "scaled" and x.ndim > 1 else 1.0
            return -0.5 * jnp.sum(x.astype(float) ** 2) * (fan_in / sd**2)

        return sum(map(of_leaf, jax.tree.leaves(params)), jnp.zeros(()))

    return log_density


def _refuse_species_without_noise(scale, dataset: Configurations) -> None:
    shape = np.shape(scale.mean if isinstance(scale, Learned) else scale)
    if not shape:
        return
    if dataset.species is None:
        raise ValueError("noise of one number for each species needs species in the data.")
    if dataset.species.max() >= shape[0]:
        raise ValueError(
            f"noise has {shape[0]} species, the data have a species {dataset.species.max()}."
        )


def _check_energy(energy_fn, params, dataset: Configurations) -> None:
    """Raise unless the energy function gives a scalar, and tells the last species from others."""
    each, shared = dataset.inputs()
    graph = {**{name: value[0] for name, value in each.items()}, **shared}
    positions = jnp.asarray(dataset.positions[0])
    try:
        out = jax.eval_shape(lambda p, r, g: energy_fn(p, r, **g), params, positions, graph)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"energy_fn fails on positions of shape {positions.shape} with {sorted(graph)}: "
            f"{reason}"
        ) from error
    if getattr(out, "shape", None) != ():
        raise ValueError(f"energy_fn must return a scalar, got {out}.")
    if dataset.species is None or dataset.species.max() == 0:
        return
    last = int(dataset.species.max())
    species = dataset.species if dataset.species.ndim == 1 else None
    if species is None:
        row = int(np.argmax((dataset.species == last).any(1)))
        species = dataset.species[row]
        graph = {**{name: value[row] for name, value in each.items()}, **shared}
        positions = jnp.asarray(dataset.positions[row])

    def energy(species):
        return float(energy_fn(params, positions, **{**graph, "species": jnp.asarray(species)}))

    as_before = energy(np.where(species == last, last - 1, species).astype(np.int32))
    now, first = energy(species), energy(np.zeros_like(species))
    unknown = np.isnan(now) and np.isfinite(as_before)  # beyond the rows of an embedding
    if unknown or (now == as_before and first != as_before):
        raise ValueError(
            f"energy_fn has no parameters for species {last}: it takes them for species "
            f"{last - 1}, the last that it knows."
        )
