"""What a run returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._after_draws import log_likelihoods, predictions
from stochgrad.core._by_rows import MEMORY
from stochgrad.core._checks import check_instance
from stochgrad.core._datatree import by_name, to_datatree
from stochgrad.core._draw_index import draw_index
from stochgrad.core._groups import ALWAYS, Groups
from stochgrad.core._jit import hoisted_jit, remembered
from stochgrad.core._protocols import Posterior, PRNGKey

if TYPE_CHECKING:
    import xarray

_FEW = 2048


@dataclass(frozen=True, repr=False)
class Draws:
    """Draws of a run, on the host.

    Attributes:
        positions: What was kept of each state: arrays of shape (chain, draw, ...), in the
            position's structure (or in that of ``collect``'s result). If the run had a store they
            are its zarr arrays, read where they are indexed, and checked against its checksums.
        stats: Numbers that go with each draw, arrays of shape (chain, draw): among them
            ``step_size``, ``log_density`` (the minibatch estimate), ``gradient_norm`` and
            ``noise_ratio`` for our own kernels.
        finite: Whether each draw is finite, shape (chain, draw).
        first_bad: Step at which each chain diverged, -1 where it never did.
        state: The kernel's last state.
        timings: Seconds spent: ``compile``, ``warmup``, ``sample``, ``total``.
        attrs: Method, settings and seed of the run.
        posterior: The posterior that was sampled, if the kernel knows it.
        collected: Whether ``positions`` came from a ``collect`` of the caller's.
        summary: What an ``Online`` learnt of the draws, with a leading chain axis if there are
            several chains.
        settings: The kernel's settings as they are, arrays included.
        notes: What speaks against the draws from before there were any: a warm-up that has not
            settled, a budget that was spent.
        law: What ``stochgrad.diagnostics.predict_law`` predicted of them, if it was asked.
    """

    positions: PyTree
    stats: dict[str, np.ndarray]
    finite: np.ndarray
    first_bad: np.ndarray
    state: Any = None
    timings: dict[str, float] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    posterior: Posterior | None = None
    collected: bool = False
    summary: PyTree = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    law: Any = None

    @classmethod
    def from_chunks(
        cls,
        chunks: list | None,
        kernel: Any,
        *,
        several: bool,
        run: dict[str, Any],
        online: bool = False,
        **fields: Any,
    ) -> "Draws":
        """Put the chunks of a run together, chain axis first; None where all is in ``fields``."""

        def join(*parts):
            whole = np.concatenate(parts)
            return np.swapaxes(whole, 0, 1) if several else whole[None]

        if chunks is not None:
            positions, stats = jax.tree.map(join, *chunks)
            finite = positions["finite"] if online else _finite(positions)
            fields |= {"positions": positions, "stats": stats, "finite": finite}
        if online:
            fields["positions"] = {}
        draws = cls(
            attrs=run_attributes(kernel, run),
            posterior=getattr(kernel, "posterior", None),
            settings=dict(getattr(kernel, "settings", ())),
            **fields,
        )
        if np.all(draws.first_bad >= 0):  # nothing is left to keep the last draws for
            return draws[: _last_finite(draws.finite)]
        return draws

    @property
    def num_chains(self) -> int:
        return self.finite.shape[0]

    @property
    def num_draws(self) -> int:
        return self.finite.shape[1]

    @cached_property
    def verdict(self) -> Any:
        """Whether the draws can be used: ``stochgrad.diagnose`` of them."""
        return import_module("stochgrad.diagnostics").diagnose(self)

    def __getstate__(self) -> dict[str, Any]:
        """For ``pickle``: the draws in the model's own space, without functions and state."""
        kept = {**self.__dict__, "state": None, "settings": {}}
        if self.posterior is not None:
            names = {"dims": self.posterior.dims, "coords": self.posterior.coords}
            kept |= {"positions": self.constrained(), "collected": True}
            kept["posterior"] = Posterior(_not_here, None, **names)  # pyright: ignore
        return kept

    def __getitem__(self, draws: Any) -> "Draws":
        """Some of the draws of all chains: ``draws[500:]``, ``draws[-1]``, ``draws[mask]``.

        Args:
            draws: A range; a number, counted from the end if it is negative, which gives one draw
                (the draw axis stays); a list or array of numbers; one boolean per draw.

        Raises:
            TypeError: it is none of these.
            IndexError: a number is out of range.
            ValueError: there are more or fewer booleans than draws.
        """
        index = draw_index(draws, self.num_draws)
        return self._select(lambda x: x[:, index])

    def finite_chains(self) -> "Draws":
        """The chains that stayed finite to the end."""
        healthy = self.first_bad < 0
        return self._select(lambda x: np.asarray(x)[healthy], chains=healthy)

    def constrained(self) -> dict[str, np.ndarray]:
        """Draws in the model's own space, by name: arrays of shape (chain, draw, ...)."""
        constrain = None if self.posterior is None else self.posterior.constrain
        if constrain is None or self.collected:
            return {name: np.asarray(leaf) for name, leaf in by_name(self.positions).items()}
        size = whole = self.num_draws
        if 0 < size < _FEW:
            whole = 2 ** (size - 1).bit_length()  # few sizes, few compilations

        def padded(leaf):
            leaf = np.asarray(leaf)
            return np.concatenate([leaf, np.repeat(leaf[:, -1:], whole - size, axis=1)], axis=1)

        values = _in_bulk(constrain)(jax.tree.map(padded, self.positions))
        return {name: np.asarray(value)[:, :size] for name, value in values.items()}

    def predict(
        self,
        key: PRNGKey,
        *args: Any,
        sites: Sequence[str] | None = None,
        rows: Any = None,
        memory_bytes: int = MEMORY,
        store: "str | Path | None" = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        r"""Draws of what is observed, row by row: $\tilde y_i \sim p(y_i \mid \theta)$.

        The work is done in blocks of draws and of rows, over all devices; one key gives the same
        predictions whatever the memory.

        Args:
            key: A typed PRNG key.
            *args: Other data than those of the run: the model's arguments, with None for what it
                would observe, or the ``data`` of a plain posterior. Without any, the predictions
                are of the rows of the run.
            sites: Which sites: observed ones by default; deterministic ones have names, too.
            rows: Numbers of rows; all by default.
            memory_bytes: Memory for the work at one time, and for what is returned. Work on one
                draw and 4,096 rows must fit (all rows, for other data than those of the run where
                the model has no plate that it reads them by).
            store: A directory to be made for predictions that do not fit into memory: a zarr group
                that ``xarray.open_datatree`` reads lazily.
            **kwargs: The model's keyword arguments, with other data.

        Returns:
            Arrays of shape (chain, draw, row, ...) by site; with a store, its zarr arrays.

        Raises:
            ValueError: the draws have no posterior, or one that cannot predict; ``memory_bytes``
                is too small; the store is there already.
            TypeError: an argument is of another kind.

        Example:
            >>> import jax, jax.numpy as jnp, stochgrad
            >>> target = stochgrad.posterior(
            ...     lambda m: -0.5 * m**2,
            ...     lambda m, x: -0.5 * (x - m) ** 2,
            ...     jnp.ones(10),
            ...     order="full",
            ...     predict=lambda key, m, x: m + jax.random.normal(key, x.shape),
            ... )
            >>> draws = stochgrad.sample(
            ...     jax.random.key(0), stochgrad.sgld(target, 0.1), init=jnp.zeros(()),
            ...     num_samples=100, num_chains=2,
            ... )
            >>> draws.predict(jax.random.key(1))["x"].shape
            (2, 100, 10)
        """
        options: dict[str, Any] = {"memory_bytes": memory_bytes, "store": store}
        return predictions(self, key, (args, kwargs), sites=sites, rows=rows, **options)

    def log_likelihood(
        self,
        *args: Any,
        rows: Any = None,
        memory_bytes: int = MEMORY,
        store: "str | Path | None" = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        r"""The log likelihood of each row at each draw: $\log p(y_i \mid \theta)$, unscaled.

        Args:
            *args: Other data than those of the run, as in ``predict``, with what was observed.
            rows: As in ``predict``.
            memory_bytes: As in ``predict``.
            store: As in ``predict``.
            **kwargs: As in ``predict``.

        Returns:
            Arrays of shape (chain, draw, row, ...) by observed site, without the dimensions of an
            event; with a store, its zarr arrays.

        Raises:
            ValueError: as in ``predict``, or the model observes nothing.
            TypeError: an argument is of another kind.
        """
        options: dict[str, Any] = {"memory_bytes": memory_bytes, "store": store}
        return log_likelihoods(self, (args, kwargs), rows=rows, **options)

    def to_datatree(
        self,
        groups: str | Sequence[str] = ALWAYS,
        *,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        key: PRNGKey | None = None,
        predictions: Mapping[str, Any] | None = None,
        prior_draws: int = 500,
        warmup: "Draws | None" = None,
        memory_bytes: int = MEMORY,
        store: "str | Path | None" = None,
    ) -> "xarray.DataTree":
        """The draws as an ``xarray.DataTree`` with the groups that ArviZ reads.

        Group ``posterior`` holds the draws, constrained and named for a numpyro model;
        ``sample_stats`` holds ``stats`` (``lp`` is the minibatch log density, ``diverging`` marks
        what is not finite); the attributes say method, settings, seed and versions.

        Args:
            groups: Names of groups of ArviZ's schema, or ``"all"`` that can be made: beside the two
                ``observed_data``, ``constant_data`` (numpyro arguments that are not observed),
                ``log_likelihood``, ``log_prior``, ``posterior_predictive``, ``predictions``,
                ``prior`` and ``prior_predictive`` (numpyro), ``unconstrained_posterior``.
            coords: Labels along the dimensions, added to the model's own.
            dims: Names of the dimensions of a variable after chain and draw, likewise.
            key: For the groups that are random.
            predictions: Of other rows, from ``draws.predict(key, ...)``, for that group.
            prior_draws: Draws of ``prior`` and ``prior_predictive``.
            warmup: The draws of the warm-up, for the groups ``warmup_posterior`` and
                ``warmup_sample_stats``. A run does not keep its own; one with ``num_warmup=0`` has
                the same draws, all of them: ``draws[500:].to_datatree(warmup=draws[:500])``.
            memory_bytes: As in ``predict``.
            store: A directory to be made for the groups that have a value for each row and draw,
                which are then read as they are looked at.

        A slash in a name, as numpyro's ``scope`` makes it, becomes a dot (``group/m`` is
        ``group.m``), and a variable called ``chain`` or ``draw`` gets an underscore at its end;
        ``dims`` and ``coords`` know both names. So it is in a store.

        Raises:
            TypeError: ``coords`` or ``dims`` is no mapping to labels or names.
            ValueError: they name what is not there, or have another length; two variables have
                one name; a group cannot be made, or does not fit into the memory.
        """
        from xarray import DataTree

        made = Groups(self, key, predictions, prior_draws, memory_bytes, store)
        names = made.chosen(groups)
        tree = to_datatree(self, coords=coords, dims=dims)
        if warmup is not None:
            check_instance("warmup", warmup, Draws, "the Draws of a warm-up")
            early = to_datatree(warmup, coords=coords, dims=dims)
            for name in ALWAYS:
                tree[f"warmup_{name}"] = early[name]
        for name in ALWAYS:
            if name not in names:
                del tree[name]
        for name in names:
            if name not in ALWAYS:
                tree[name] = DataTree(made.make(name))
        return tree

    def to_arviz(self, groups: str | Sequence[str] = ALWAYS, **options: Any) -> Any:
        """The draws as whatever the installed ArviZ takes; the arguments are ``to_datatree``'s.

        With ArviZ 1.x the ``xarray.DataTree`` of ``to_datatree``, with 0.2x an ``InferenceData``.
        There are no energies (momenta are not drawn anew each step), so that BFMI and
        ``plot_energy`` are for NUTS alone.
        """
        try:
            import arviz
        except ImportError as error:
            raise ImportError("to_arviz needs ArviZ: pip install arviz.") from error
        tree = self.to_datatree(groups, **options)
        return arviz.from_datatree(tree) if hasattr(arviz, "from_datatree") else tree

    def report(
        self,
        path: "str | Path",
        *,
        key: PRNGKey | None = None,
        rows: int = 2000,
        title: str | None = None,
    ) -> Path:
        """Write one self-contained HTML page on these draws, to read and to hand on.

        The verdict, ArviZ's summary, traces and ranks of what mixes worst, predictions against
        observations and their calibration, leave-one-out, settings, timings and versions. A part
        that these draws cannot give says why.

        Args:
            path: The file, which is replaced if it is there.
            key: For what is random; ``jax.random.key(0)`` by default.
            rows: Rows that predictions are compared on, at most.
            title: Of the page.

        Returns:
            The file's absolute path.

        Raises:
            TypeError: an argument is of another kind.
            OSError: the directory is not there, or the path is one.
            ImportError: jinja2 or matplotlib is missing (``pip install 'stochgrad[report]'``).
        """
        write = import_module("stochgrad.diagnostics").report
        return write(self, path, key=key, rows=rows, title=title)

    def _select(self, index: Any, chains: Any = slice(None)) -> "Draws":
        return replace(
            self,
            positions=jax.tree.map(index, self.positions),
            stats=jax.tree.map(index, self.stats),
            finite=index(self.finite),
            first_bad=self.first_bad[chains],
        )

    def __repr__(self) -> str:
        shapes = jax.tree.map(lambda x: x.shape[2:], self.positions)
        return (
            f"Draws({self.attrs.get('method')}, {self.num_chains} chains of {self.num_draws} "
            f"draws, positions {shapes})"
        )


def _not_here(position: Any, batch: Any) -> Any:
    raise ValueError("these draws were unpickled, and their posterior did not come with them.")


def run_attributes(kernel: Any, run: Mapping[str, Any]) -> dict[str, Any]:
    """Method, settings and course of a run, as numbers and strings where they can be."""
    settings = {
        name: value if isinstance(value, str | int | float) else repr(value)
        for name, value in getattr(kernel, "settings", ())
    }
    return {"method": getattr(kernel, "method", "kernel"), **settings, **run}


def _finite(positions: PyTree) -> np.ndarray:
    each = [
        np.isfinite(leaf).all(axis=tuple(range(2, leaf.ndim)))
        for leaf in jax.tree.leaves(positions)
    ]
    return np.logical_and.reduce(each)


def _last_finite(finite: np.ndarray) -> int:
    """How many draws there are up to the last at which any chain is finite."""
    alive = np.flatnonzero(finite.any(axis=0))
    return int(alive[-1]) + 1 if alive.size else 0


@remembered
def _in_bulk(constrain):
    return hoisted_jit(jax.vmap(jax.vmap(constrain)))
