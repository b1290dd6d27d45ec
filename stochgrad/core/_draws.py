"""What a run returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

from stochgrad.core._datatree import by_name

if TYPE_CHECKING:
    import xarray

    from stochgrad.core._protocols import Posterior


_FEW = 2048


@dataclass(frozen=True, repr=False)
class Draws:
    """Draws of a run, on the host.

    Attributes:
        positions: What was kept of each state: arrays of shape (chain, draw, ...), in the
            position's structure (or in that of ``collect``'s result); zarr arrays, which are read
            where they are indexed, if the run had a store.
        stats: Numbers that go with each draw, arrays of shape (chain, draw): among them
            ``step_size``, ``log_density`` (the minibatch estimate), ``gradient_norm`` and
            ``noise_ratio`` for our own kernels.
        finite: Whether each draw is finite, shape (chain, draw).
        first_bad: Step at which each chain left the finite numbers, -1 where it never did.
        state: The kernel's last state.
        timings: Seconds spent: ``compile``, ``warmup``, ``sample``, ``total``.
        attrs: Method, settings and seed of the run.
        posterior: The posterior that was sampled, if the kernel knows it.
        collected: Whether ``positions`` came from a ``collect`` of the caller's.
        summary: What an ``Online`` learnt of the draws, with a leading chain axis if there are
            several chains.
    """

    positions: PyTree
    stats: dict[str, np.ndarray]
    finite: np.ndarray
    first_bad: np.ndarray
    state: Any = None
    timings: dict[str, float] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    posterior: "Posterior | None" = None
    collected: bool = False
    summary: PyTree = ()

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

    def __getitem__(self, draws: slice) -> "Draws":
        """A range of the draws of all chains: ``draws[500:]``."""
        return self._select(lambda x: x[:, draws])

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

    def to_datatree(
        self,
        *,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> "xarray.DataTree":
        """The draws as an ``xarray.DataTree`` with the groups that ArviZ reads.

        Group ``posterior`` holds the draws, constrained and named for a numpyro model;
        ``sample_stats`` holds ``stats`` (``lp`` is the minibatch log density, ``diverging`` marks
        what is not finite); the attributes say method, settings, seed and versions.

        Args:
            coords: Coordinates along the dimensions, added to the model's own.
            dims: Names of the dimensions of a variable after chain and draw, likewise.
        """
        from stochgrad.core._datatree import to_datatree

        return to_datatree(self, coords=coords, dims=dims)

    def to_arviz(
        self,
        *,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """The draws as whatever the installed ArviZ takes.

        With ArviZ 1.x the ``xarray.DataTree`` of ``to_datatree``, with 0.2x an ``InferenceData``.
        """
        import arviz

        tree = self.to_datatree(coords=coords, dims=dims)
        return arviz.from_datatree(tree) if hasattr(arviz, "from_datatree") else tree

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


@lru_cache(maxsize=16)
def _in_bulk(constrain):
    return jax.jit(jax.vmap(jax.vmap(constrain)))
