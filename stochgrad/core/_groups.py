"""The groups of ArviZ's schema beside the draws and their statistics."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from stochgrad.core._after_draws import log_likelihoods, log_priors, observations_of, predictions
from stochgrad.core._by_rows import ROWS
from stochgrad.core._checks import check_count, check_key, check_path, describe
from stochgrad.core._datatree import dotted, tree_names, unconstrained_group
from stochgrad.core._observations import Observations

if TYPE_CHECKING:
    import xarray

    from stochgrad.core._draws import Draws

ALWAYS = ("posterior", "sample_stats")
_RANDOM = ("posterior_predictive", "prior", "prior_predictive")


class Groups:
    """Makes groups of a run's draws.

    Args:
        draws: The draws.
        key: For what is random.
        fresh: Predictions of other rows, as ``draws.predict`` gave them.
        prior_draws: Draws from the prior.
        memory_bytes: For what goes through memory at a time.
        store: A directory for groups that have a value for each row and draw.
    """

    def __init__(
        self,
        draws: "Draws",
        key: Any = None,
        fresh: Mapping[str, Any] | None = None,
        prior_draws: int = 500,
        memory_bytes: int = 2**30,
        store: str | Path | None = None,
    ):
        self.draws, self.fresh = draws, fresh
        if key is not None:
            check_key(key)
        self.key: Any = key
        self.prior_draws = check_count("prior_draws", prior_draws)
        self.memory_bytes = memory_bytes
        self.store = None if store is None else check_path("store", store)
        self._prior: dict[str, Any] = {}

    def chosen(self, wanted: str | Sequence[str]) -> list[str]:
        """Names of groups, of all that can be made or of those that are wanted.

        Raises:
            ValueError: one is unknown, or cannot be made.
        """
        if wanted == "all":
            return [*ALWAYS, *(name for name in MAKERS if self._lacks(name) is None)]
        if isinstance(wanted, str) or not all(isinstance(name, str) for name in wanted):
            raise TypeError(f"groups must be 'all' or a list of names, got {describe(wanted)}.")
        unknown = [name for name in wanted if name not in (*ALWAYS, *MAKERS)]
        if unknown:
            raise ValueError(f"groups must be of {[*ALWAYS, *MAKERS]}, got {unknown[0]!r}.")
        for name in wanted:
            reason = self._lacks(name)
            if reason is not None:
                raise ValueError(f"groups: {name!r} {reason}.")
        return list(wanted)

    def make(self, name: str) -> "xarray.Dataset":
        """One of the groups beside ``posterior`` and ``sample_stats``."""
        return MAKERS[name](self)

    def _lacks(self, name: str) -> str | None:
        """Why a group cannot be made, if it cannot."""
        if name in (*ALWAYS, "unconstrained_posterior"):
            return None
        if name == "predictions":
            return None if self.fresh else "needs predictions=draws.predict(key, other data)"
        if name in _RANDOM and self.key is None:
            return "needs key=, a typed PRNG key"
        try:
            of = observations_of(self.draws, ((), {}))
        except ValueError as error:
            return f"cannot be made: {str(error).rstrip('.')}"
        lacking = {
            "posterior_predictive": of.predict is None and "a posterior that can predict",
            "constant_data": of.constants is None and "a numpyro model with data in memory",
            "prior": of.simulate is None and "a numpyro model, whose prior can be drawn from",
            "prior_predictive": of.simulate is None and "a numpyro model",
        }.get(name)
        return f"needs {lacking}" if lacking else None

    @property
    def _of(self) -> Observations:
        return observations_of(self.draws, ((), {}))

    def unconstrained(self) -> "xarray.Dataset":
        import xarray

        return xarray.Dataset(*unconstrained_group(self.draws))

    def observed(self) -> "xarray.Dataset":
        of, parts = self._of, []
        for start in range(0, of.size, ROWS):
            batch = of.take(np.arange(start, min(start + ROWS, of.size)))
            parts.append({name: np.asarray(value) for name, value in of.values(batch).items()})
        values = {
            name: parts[0][name]
            if of.axis(name) is None
            else np.concatenate([part[name] for part in parts], axis=of.axis(name))
            for name in parts[0]
        }
        return self._dataset(values, ())

    def constant(self) -> "xarray.Dataset":
        import xarray

        assert self._of.constants is not None
        constants = {
            name: (tuple(map(dotted, dims)), value)
            for name, (dims, value) in self._of.constants().items()
        }
        return xarray.Dataset(tree_names(constants))

    def log_prior(self) -> "xarray.Dataset":
        values = log_priors(self.draws, self.memory_bytes)
        return self._dataset(values, ("chain", "draw"), prior=True)

    def log_likelihood(self) -> "xarray.Dataset":
        options: dict[str, Any] = {"rows": None, **self._space("log_likelihood")}
        return self._by_draw(log_likelihoods(self.draws, ((), {}), **options), "log_likelihood")

    def posterior_predictive(self) -> "xarray.Dataset":
        name = "posterior_predictive"
        options: dict[str, Any] = {"rows": None, "sites": None, **self._space(name)}
        key = jax.random.fold_in(self.key, 0)
        return self._by_draw(predictions(self.draws, key, ((), {}), **options), name)

    def predictions(self) -> "xarray.Dataset":
        assert self.fresh is not None
        values = {name: np.asarray(value) for name, value in self.fresh.items()}
        lead = self.draws.num_chains, self.draws.num_draws
        for name, value in values.items():
            if value.shape[:2] != lead:
                raise ValueError(
                    f"predictions of {name!r} must have shape {lead} + (rows, ...), as "
                    f"draws.predict gives them, got {value.shape}."
                )
        return self._dataset(values, ("chain", "draw"))

    def prior(self) -> "xarray.Dataset":
        return self._of_prior(lambda name: name not in self._of.observed)

    def prior_predictive(self) -> "xarray.Dataset":
        return self._of_prior(lambda name: name in self._of.observed)

    def _of_prior(self, wanted: Callable[[str], bool]) -> "xarray.Dataset":
        if not self._prior:
            simulate: Any = self._of.simulate
            self._check_fits(simulate)
            keys = jax.random.split(jax.random.fold_in(self.key, 1), self.prior_draws)
            drawn = jax.lax.map(simulate, keys, batch_size=32)
            self._prior = {name: np.asarray(value)[None] for name, value in drawn.items()}
        values = {name: value for name, value in self._prior.items() if wanted(name)}
        return self._dataset(values, ("chain", "draw"), prior=True)

    def _check_fits(self, simulate: Callable) -> None:
        """Draws from the prior are of all rows at once."""
        one = jax.tree.leaves(jax.eval_shape(simulate, self.key))
        need = self.prior_draws * sum(x.size * x.dtype.itemsize for x in one)
        if need > self.memory_bytes:
            raise ValueError(
                f"memory_bytes must be at least {need:,}, what {self.prior_draws} draws from the "
                f"prior take, got {self.memory_bytes:,}: raise it, or take fewer (prior_draws=)."
            )

    def _space(self, name: str) -> dict[str, Any]:
        store = None if self.store is None else self.store / name
        if store is not None:
            store.parent.mkdir(parents=True, exist_ok=True)
        return {"memory_bytes": self.memory_bytes, "store": store}

    def _by_draw(self, values: Mapping[str, Any], name: str) -> "xarray.Dataset":
        """Values for each row and draw, read where they are looked at if they are stored."""
        if self.store is None:
            return self._dataset(dict(values), ("chain", "draw"))
        import xarray

        return xarray.open_zarr(self.store / name, group=name, chunks=None)

    def _dataset(
        self, values: Mapping[str, np.ndarray], lead: tuple[str, ...], prior: bool = False
    ) -> "xarray.Dataset":
        import xarray

        of, own = self._of, self.draws.posterior
        variables: dict[str, Any] = {}
        for (site, value), name in zip(values.items(), tree_names(values), strict=True):
            names = of.dims.get(site, ()) if prior else of.dims_of(site)
            own_dims = tuple(map(dotted, names))[: value.ndim - len(lead)]
            more = range(len(own_dims), value.ndim - len(lead))
            dims = (*lead, *own_dims, *(f"{name}_dim_{i}" for i in more))
            variables[name] = (dims, value)
        sizes = {d: n for dims, v in variables.values() for d, n in zip(dims, v.shape, strict=True)}
        coords: dict[str, Any] = {dim: np.arange(size) for dim, size in sizes.items()}
        labels = {} if own is None else own.coords
        coords |= {d: c for d, c in labels.items() if len(c) == sizes.get(d)}
        return xarray.Dataset(variables, coords)


MAKERS: dict[str, Callable[[Groups], Any]] = {
    "unconstrained_posterior": Groups.unconstrained,
    "observed_data": Groups.observed,
    "constant_data": Groups.constant,
    "log_likelihood": Groups.log_likelihood,
    "log_prior": Groups.log_prior,
    "posterior_predictive": Groups.posterior_predictive,
    "predictions": Groups.predictions,
    "prior": Groups.prior,
    "prior_predictive": Groups.prior_predictive,
}
"""What makes a group, by its name in ArviZ's schema."""
