"""Draws of a store, without the script that made them."""

from pathlib import Path

import numpy as np

from stochgrad.core._checks import check_path
from stochgrad.core._draws import Draws
from stochgrad.core._stored_draws import open_root, read_back, whole_draws


def open_draws(path: str | Path) -> Draws:
    """The draws of a run that had a store, read from it whatever has been upgraded since.

    Args:
        path: The store's directory, finished or still growing.

    Returns:
        ``Draws`` whose ``positions`` are the variables of the group ``posterior`` by name: zarr
        arrays of shape (chain, draw, ...), in the model's own space, read where they are indexed.
        ``first_bad`` is the last step of the first draw that is not finite, and there is no
        ``state``. Names of dimensions and coordinates are what ``xarray.open_datatree`` reads.

    Raises:
        TypeError: the path is none.
        ValueError: it is no store of draws.
        OSError: a file of the store is missing or damaged.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, stochgrad
        >>> target = stochgrad.posterior(
        ...     lambda m: -0.5 * m**2, lambda m, x: -0.5 * (x - m) ** 2, jnp.ones(10), order="full"
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = stochgrad.sample(
        ...         jax.random.key(0), stochgrad.sgld(target, 0.01), init=jnp.float32(0.0),
        ...         num_samples=200, store=folder + "/draws",
        ...     )
        ...     draws = stochgrad.open_draws(folder + "/draws")
        ...     draws.positions["x"].shape, draws.attrs["method"]
        ((1, 200), 'SGLD')
    """
    path = check_path("path", path)
    if not whole_draws(path):
        raise ValueError(
            f"path={str(path)!r} holds no draws: it must be the store of a run of stochgrad.sample."
        )
    root = open_root(path)
    variables = {
        group: [
            name
            for name, array in root[group].arrays()
            if (array.metadata.dimension_names or ())[:2] == ("chain", "draw")
        ]
        for group in ("posterior", "sample_stats")
        if group in root
    }
    names = variables.get("posterior", [])
    stats = [x for x in variables["sample_stats"] if x not in ("diverging", "finite")]
    stored = read_back(path, names, stats, where="posterior")
    assert stored is not None  # it holds whole draws
    attrs = dict(root["sample_stats"].attrs)
    thin, warmup = attrs.get("thin", 1), attrs.get("num_warmup", 0)
    bad = ~stored.finite
    first = np.where(bad.any(axis=1), (warmup + bad.argmax(axis=1) + 1) * thin - 1, -1)
    return Draws(
        positions=dict(zip(names, stored.positions, strict=True)),
        stats=dict(zip(stats, stored.stats, strict=True)),
        finite=stored.finite,
        first_bad=first,
        attrs=attrs,
        collected=True,
    )
