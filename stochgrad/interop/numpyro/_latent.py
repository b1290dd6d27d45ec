"""Numpyro models with latent variables of each row, and guides for them, for MCMC-EM."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from numpyro import handlers
from numpyro.distributions import biject_to, constraints

from stochgrad.core import PRNGKey, check_callable, describe, first_line
from stochgrad.em import Guide, LatentModel, Policy, Rationales
from stochgrad.interop.numpyro._sites import is_latent


def latent_model(model: Callable, plate: str | None = None) -> LatentModel:
    r"""A numpyro model with a plate of rows, each with latent variables of its own, for MCMC-EM.

    With ``numpyro.param`` sites $\theta$, latent sites z and observed ones y, row by row,

    $$p_\theta(z_n\mid x_n) = \prod_{\text{latent sites}} p(z_n^s\mid\cdot),\qquad
      p_\theta(y_n\mid z_n, x_n) = \prod_{\text{observed sites}} p(y_n^s\mid\cdot),$$

    and ``stochgrad.em.mcmc_em`` climbs the mean of $\log\sum_z p_\theta(z\mid x_n)\,
    p_\theta(y_n\mid z, x_n)$. Latents may be discrete or continuous, and several to a row, as
    along a hidden Markov chain, by a Python loop or numpyro's ``scan``: they need no enumeration.

    The position is the dict of parameters in unconstrained space; ``stochgrad.fit(...).model`` has
    them as the model sees them.

    Args:
        model: A numpyro model. ``Questions.prompts`` are its arguments, a tuple of arrays whose
            leading axis is the plate's; it is called with a minibatch of them, so that the plate's
            size must come from their shapes.
        plate: Name of the plate of rows; by default the outermost one around all sample sites.

    Raises:
        TypeError: the model is no function, or the plate no name.
        ValueError: when handed to ``mcmc_em``, where there is no such plate, a sample site lies
            outside it, it is subsampled, the model has no parameters, or fails.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, stochgrad
        >>> from numpyro.distributions import constraints
        >>> def mixture(x):
        ...     share = numpyro.param("share", jnp.ones(2) / 2, constraint=constraints.simplex)
        ...     mean = numpyro.param("mean", jnp.array([-1.0, 1.0]))
        ...     with numpyro.plate("rows", len(x)):
        ...         z = numpyro.sample("z", dist.Categorical(share))
        ...         numpyro.sample("x", dist.Normal(mean[z], 1.0), obs=x)
        >>> x = jnp.concatenate([jnp.full(30, -3.0), jnp.full(10, 2.0)])
        >>> gradient = stochgrad.em.mcmc_em(
        ...     stochgrad.numpyro.latent_model(mixture), stochgrad.em.Questions((x,)),
        ...     batch_size=40, estimator=stochgrad.em.trice("none"), order="full")
        >>> fit = stochgrad.fit(jax.random.key(0), gradient, 500, learning_rate=0.1)
        >>> (4 * fit.model["share"]).round().tolist(), fit.model["mean"].round(1).tolist()
        ([3.0, 1.0], [-3.0, 2.0])
    """
    sites = _Sites(*_check_model("model", model, plate), latents_only=False)

    def log_likelihood(params, prompts, tokens, mask, answers):
        return sites.log_prob(params, prompts, tokens, observed=True)

    return LatentModel(
        sites.policy(),
        log_likelihood,
        initial=lambda key, questions: sites.initial(key, questions.prompts),
        constrain=lambda params, questions: sites.constrained(params, questions.prompts),
    )


def latent_guide(guide: Callable, plate: str | None = None) -> Guide:
    r"""A numpyro guide $q_\phi(z\mid x, y)$ as a proposal that learns with the model.

    Joint stochastic approximation: the chains are moved by proposals of the guide, and the guide
    follows $\nabla_\phi\log q_\phi(z\mid x, y)$ at the chains. Its sites need no
    reparameterization.

    Args:
        guide: A numpyro guide, with the latent sites of the model. ``Questions.hints`` are its
            arguments, a tuple of arrays.
        plate: As for ``latent_model``.

    Raises:
        TypeError: as for ``latent_model``.
        ValueError: as for ``latent_model``.
    """
    sites = _Sites(*_check_model("guide", guide, plate), latents_only=True)
    return Guide(
        sites.policy(),
        learned=True,
        initial=lambda key, questions: sites.initial(key, questions.hints),
    )


def _check_model(name: str, model: Any, plate: Any) -> tuple[Callable, str | None]:
    check_callable(name, model, "a numpyro model, a function of the data")
    if isinstance(model, type):
        raise TypeError(f"{name} must be a function of the data, got {describe(model)}.")
    if plate is not None and not (isinstance(plate, str) and plate):
        raise TypeError(f"plate must be the name of a plate, or None, got {describe(plate)}.")
    return model, plate


class _Sites(NamedTuple):
    """The sample sites of a model or guide, row by row."""

    model: Callable
    plate: str | None
    latents_only: bool

    def policy(self) -> Policy:
        def sample(params, key, prompts):
            sites, axis = self.run(params, key, prompts)
            tokens = {
                name: jnp.moveaxis(site["value"], axis - len(site["fn"].event_shape), 0)
                for name, site in _latent(sites).items()
            }
            rows = next(iter(tokens.values())).shape[0]
            log_prob = self.log_prob(params, prompts, tokens, observed=False)
            return Rationales(tokens, log_prob, jnp.ones((rows, 1), bool))

        def log_prob(params, prompts, tokens, mask):
            return self.log_prob(params, prompts, tokens, observed=False)

        return Policy(sample, log_prob)

    def run(
        self, params, key: PRNGKey, prompts, tokens: Mapping[str, Any] = {}
    ) -> tuple[Mapping[str, Any], int]:
        """Its sites with these parameters and latents, and the dimension of the rows' plate."""
        bare = self.trace(self.model, key, prompts)
        rows, values = self.axis(bare), self.parameters(bare, params)
        for name, value in tokens.items():
            axis = rows - len(bare[name]["fn"].event_shape) + jnp.ndim(bare[name]["value"])
            values[name] = jnp.moveaxis(value, 0, axis)
        return self.trace(handlers.substitute(self.model, values), key, prompts), rows

    @property
    def name(self) -> str:
        return "guide" if self.latents_only else "model"

    def parameters(self, sites: Mapping[str, Any], params) -> dict[str, PyTree]:
        """Parameters as the model sees them, if they are its own."""
        own = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}
        if not isinstance(params, Mapping) or params.keys() != own.keys():
            raise ValueError(
                f"the parameters must be a dict of the {self.name}'s numpyro.param sites "
                f"{sorted(own)}, got {describe(params)}."
            )
        constrained = _constrain(sites, params)
        for name, value in own.items():
            shapes = [jax.tree.map(jnp.shape, tree) for tree in (value, constrained[name])]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the parameter {name!r} must have shape {shapes[0]} as the {self.name} sees "
                    f"it, got {shapes[1]}."
                )
        return constrained

    def trace(self, model, key, prompts) -> Mapping[str, Any]:
        arguments = prompts if isinstance(prompts, tuple) else (prompts,)
        try:
            return handlers.trace(handlers.seed(model, key)).get_trace(*arguments)
        except Exception as error:
            raise ValueError(
                f"{self.name} fails on its arguments, questions."
                f"{'hints' if self.latents_only else 'prompts'}: {type(error).__name__}: "
                f"{first_line(error)}."
            ) from error

    def log_prob(self, params, prompts, tokens, observed: bool) -> Float[Array, " rows"]:
        """Log probability of the observed sites, or of the latent ones, of each row."""
        sites, axis = self.run(params, jax.random.key(0), prompts, tokens)
        chosen = _observed(sites) if observed else {name: sites[name] for name in tokens}
        total = jnp.zeros(())
        for site in chosen.values():
            log_prob = site["fn"].log_prob(site["value"])
            if site["scale"] is not None:
                log_prob = site["scale"] * log_prob
            by_row = jnp.moveaxis(log_prob, axis, 0)
            total = total + jnp.sum(by_row.reshape(by_row.shape[0], -1), axis=1)
        return total

    def initial(self, key: PRNGKey, prompts) -> dict[str, PyTree]:
        """The parameters' initial values, in unconstrained space."""
        sites = self.trace(self.model, key, prompts)
        self.axis(sites)
        values = {
            name: jax.tree.map(lambda leaf: _transform(site).inv(jnp.asarray(leaf)), site["value"])
            for name, site in sites.items()
            if site["type"] == "param"
        }
        if not values:
            raise ValueError(
                f"the {self.name} has no numpyro.param sites: there is nothing to learn."
            )
        return values

    def constrained(self, params, prompts) -> dict[str, PyTree]:
        """The parameters as the model sees them."""
        return self.parameters(self.trace(self.model, jax.random.key(0), prompts), params)

    def axis(self, sites: Mapping[str, Any]) -> int:
        """Dimension of the plate of rows."""
        samples = {n: s for n, s in sites.items() if s["type"] == "sample"}
        if not _latent(samples):
            raise ValueError(f"the {self.name} has no latent sample site.")
        frames = {n: {f.name: f for f in s["cond_indep_stack"]} for n, s in samples.items()}
        shared = set.intersection(*(set(names) for names in frames.values()))
        if self.plate is not None:
            shared &= {self.plate}
        for name, around in frames.items():
            if not shared:
                raise ValueError(
                    f"sample site {name!r} is inside the plates {sorted(around)}, and no plate "
                    f"{'' if self.plate is None else repr(self.plate) + ' '}is around all sites: "
                    "put latent and observed sites into one plate of rows, and make what rows "
                    "share a numpyro.param."
                )
        frame = min((frames[next(iter(frames))][name] for name in shared), key=lambda f: f.dim)
        for site in sites.values():
            if site["type"] == "plate" and site["name"] == frame.name:
                size, subsample_size = site["args"]
                if subsample_size is not None and subsample_size < size:
                    raise ValueError(
                        f"the plate {frame.name!r} is subsampled: leave subsample_size out, "
                        "mcmc_em draws the minibatches."
                    )
        if not self.latents_only and not _observed(samples):
            raise ValueError("the model has no observed site.")
        return frame.dim


def _latent(sites: Mapping[str, Any]) -> dict[str, Any]:
    return {name: site for name, site in sites.items() if is_latent(site)}


def _observed(sites: Mapping[str, Any]) -> dict[str, Any]:
    samples = {name: site for name, site in sites.items() if site["type"] == "sample"}
    return {name: site for name, site in samples.items() if site["is_observed"]}


def _transform(site) -> Any:
    return biject_to(site["kwargs"].get("constraint", constraints.real))


def _constrain(sites: Mapping[str, Any], params) -> dict[str, PyTree]:
    """Parameters from unconstrained space."""
    return {
        name: jax.tree.map(lambda leaf, name=name: _transform(sites[name])(leaf), value)
        for name, value in params.items()
    }
