"""One page on the draws of a run: what they are, whether they can be used, how they predict."""

import datetime
import platform
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stochgrad.core import (
    Draws,
    check_count,
    check_instance,
    check_key,
    check_path,
    describe,
    first_line,
    observations_of,
)
from stochgrad.diagnostics import _report_figures as figures
from stochgrad.diagnostics._elpd import good_pareto_k
from stochgrad.diagnostics._loo import loo
from stochgrad.diagnostics._report_numbers import (
    Scalars,
    coverage,
    ecdf_difference,
    few,
    pit,
    predictions,
    reliability,
    scalars,
    statistics,
    summary,
)

_SHOWN, _PREDICTIVE_DRAWS, _LOO_DRAWS, _LOO_ROWS = 12, 100, 4000, 200
_LOO_POINTS = 20_000
_PACKAGES = ("stochgrad", "jax", "jaxlib", "numpy", "numpyro", "blackjax", "arviz", "arviz-stats")


def report(
    draws: Draws, path: Any, *, key: Any = None, rows: int = 2000, title: str | None = None
) -> Path:
    """One self-contained page on some draws: ``draws.report(path)``, which says more.

    Args:
        draws: Draws of a run.
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
    check_instance("draws", draws, Draws, "a stochgrad.Draws")
    target = _writable(path)
    key = jax.random.key(0) if key is None else check_key(key, "key") or key
    rows = check_count("rows", rows)
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be text, got {describe(title)}.")
    template = _template()
    method = str(draws.attrs.get("method", "draws"))
    verdict = _part(lambda: {"verdict": draws.verdict, "table": _table(draws.verdict.table)})
    numbers = _part(lambda: {"scalars": _usable(draws)})
    of = numbers.get("scalars")
    parts = {
        "verdict": verdict,
        "summary": _part(lambda: _of_summary(of)) if of else numbers,
        "mixing": _part(lambda: _of_mixing(of)) if of else numbers,
        "prediction": _part(lambda: _of_predictions(draws, key, rows)),
        "loo": _part(lambda: _of_loo(draws)),
    }
    page = template.render(
        title=title or f"Draws of {method}",
        facts=_facts(draws, method, of),
        settings=[(str(name), _text(value)) for name, value in draws.attrs.items()],
        timings=[(name, f"{float(value):,.2f} s") for name, value in draws.timings.items()],
        versions=_versions(),
        created=datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC"),
        **parts,
    )
    target.write_text(page, encoding="utf-8")
    return target


def _writable(path: Any) -> Path:
    target = check_path("path", path)
    if target.is_dir():
        raise IsADirectoryError(f"path must name a file, and {str(target)!r} is a directory.")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"path must lie in a directory that is there, and {str(target.parent)!r} is none: "
            "make it first."
        )
    return target


def _template() -> Any:
    for name in ("jinja2", "matplotlib"):
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"draws.report needs {name}: pip install 'stochgrad[report]'."
            ) from error
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = _number
    text = resources.files("stochgrad.diagnostics").joinpath("_report.html").read_text("utf-8")
    return environment.from_string(text)


def _part(make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """A part of the page, with what it warned of; or ``reason``, why there is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            part = dict(make())
        except Exception as error:  # the page is written all the same, and says what failed
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return {"reason": f"{kind}{first_line(error)}.", "notes": []}
    said = [w for w in caught if issubclass(w.category, UserWarning)]
    return {"reason": None, **part, "notes": list(dict.fromkeys(str(w.message) for w in said))}


def _usable(draws: Draws) -> Scalars:
    _check_finite(draws)
    if not jax.tree.leaves(draws.positions):
        raise ValueError("the run kept no draws, but a summary of them (draws.summary).")
    of = scalars(draws)
    if not of.names:
        raise ValueError("no variable of the draws is a finite real number.")
    return of


def _of_summary(of: Scalars) -> dict[str, Any]:
    return {"table": _table(summary(of)), "shown": len(of.names), "total": of.total}


def _of_mixing(of: Scalars) -> dict[str, Any]:
    worst = of.worst(_SHOWN)
    chains, draws, count = of.series.shape
    if draws < 4:
        raise ValueError(f"there are {draws} draws of a chain, too few for a picture of them.")
    plots = [
        {
            "name": of.names[i],
            "rhat": f"{of.rhat[i]:.3f}",
            "ess": f"{of.ess[i]:,.0f}",
            "trace": figures.trace(of.series[:, :, i], number),
            "ranks": figures.ranks(of.series[:, :, i], float(of.ess[i]), number),
        }
        for number, i in enumerate(worst, 1)
    ]
    drawn = len(figures.shown_chains(chains))
    return {
        "plots": plots,
        "hidden": count - len(plots),
        "chains": chains,
        "drawn": drawn,
        "total": of.total,
        "looked_at": count,
    }


def _of_predictions(draws: Draws, key: Any, rows: int) -> dict[str, Any]:
    _check_finite(draws)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    sites, count = [], 0
    for number, (name, found) in enumerate(
        predictions(draws, key, rows, _PREDICTIVE_DRAWS).items(), 1
    ):
        if isinstance(found, str):
            sites.append({"name": name, "reason": found})
            continue
        count = len(found.replicated)
        site: dict[str, Any] = {
            "name": name,
            "reason": None,
            "rows": found.rows,
            "size": found.observed.size,
            "missing": found.missing,
            "picture": figures.predictive(found, number),
            "statistics": statistics(found),
            "binary": found.binary,
        }
        if found.binary:
            bins = reliability(found)
            outside = int(np.sum((bins.observed < bins.low) | (bins.observed > bins.high)))
            site |= {"calibration": figures.frequencies(bins, number)}
            site |= {"outside": outside, "bins": len(bins.observed)}
        else:
            ranks = pit(found, rng)
            difference = ecdf_difference(ranks)
            site |= {"calibration": figures.calibration(difference, number)}
            site |= {"outside": int(difference.outside.sum()), "coverage": coverage(ranks)}
        sites.append(site)
    if not sites:
        raise ValueError("the model observes nothing.")
    return {"sites": sites, "draws": count}


def _check_finite(draws: Draws) -> None:
    if not draws.num_draws or not np.any(draws.first_bad < 0):
        raise ValueError("no chain is finite to the end.")


def _of_loo(draws: Draws) -> dict[str, Any]:
    _check_finite(draws)
    of = observations_of(draws, ((), {}))
    some = few(draws, _LOO_DRAWS if of.rows else _LOO_DRAWS // 4)
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[0, 0], some.positions)
    known = jax.eval_shape(of.log_likelihood, one, of.take(np.arange(min(of.size, 2))))
    if not known:
        raise ValueError("the model observes nothing.")
    points = max(int(np.prod(x.shape)) for x in known.values())
    if of.rows is None and points > _LOO_POINTS:
        raise ValueError(
            f"rows cannot be told apart in this model, and all {points:,} data points are too many "
            "for a page: build the posterior with batch_size=, or call stochgrad.diagnostics.loo."
        )
    good = good_pareto_k(some.num_chains * some.num_draws)
    sites = []
    for number, name in enumerate(known, 1):
        site = _part(partial(_loo_of_site, some, name, good, number))
        sites.append({"name": name, **site})
    return {"sites": sites, "good": good, "draws": some.num_chains * some.num_draws}


def _loo_of_site(draws: Draws, name: str, good: float, number: int) -> dict[str, Any]:
    result = loo(draws, _LOO_ROWS, var_name=name)
    old = not hasattr(result, "elpd")  # ArviZ 0.2x
    k = np.asarray(result.pareto_k)
    k = k[~np.isnan(k)]
    bounds = [(-np.inf, good), (good, 1.0), (1.0, np.inf)]
    return {
        "elpd": float(result["elpd_loo"] if old else result.elpd),
        "se": float(result.se),
        "p": float(result["p_loo"] if old else result.p),
        "rows": int(k.size),
        "points": int(result.n_data_points),
        "counts": [int(np.sum((k > low) & (k <= high))) for low, high in bounds],
        "picture": figures.pareto_k(k, good, number),
    }


def _facts(draws: Draws, method: str, of: Scalars | None) -> list[tuple[str, str]]:
    facts = [
        ("method", method),
        ("chains", f"{draws.num_chains:,}"),
        ("draws of a chain", f"{draws.num_draws:,}"),
    ]
    if of is not None:
        # without a warning where all is NaN, as it is for draws that never move
        facts.append(("largest R-hat", _number(np.fmax.reduce(of.rhat), "rhat")))
        facts.append(("smallest ESS", _number(np.fmin.reduce(of.ess), "ess")))
    if "total" in draws.timings:
        facts.append(("total time", f"{draws.timings['total']:,.1f} s"))
    return facts


def _table(frame: Any) -> dict[str, Any]:
    """A data frame as text, without the columns that hold nothing."""
    frame = frame.dropna(axis="columns", how="all")
    columns = [str(name) for name in frame.columns]
    rows = [
        (str(name), [_number(value, column) for value, column in zip(row, columns, strict=True)])
        for name, row in zip(frame.index, frame.to_numpy(float), strict=True)
    ]
    return {"columns": columns, "rows": rows}


def _number(value: Any, column: str = "") -> str:
    value = float(value)
    if np.isnan(value):
        return "\N{EN DASH}"
    if column.startswith("ess"):
        return f"{value:,.0f}"
    if column in ("rhat", "r_hat"):
        return f"{value:.3f}"
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if len(text) <= 2000 else f"{text[:2000]} ... ({len(text):,} characters)"


def _versions() -> list[tuple[str, str]]:
    versions = [("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            versions.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return [*versions, ("devices", f"{len(devices)} x {devices[0].device_kind}")]
