"""The figures of a report: inline SVG whose colors are the page's, without any text of a user's."""

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from stochgrad.core import evenly
from stochgrad.diagnostics._report_numbers import (
    Difference,
    Predictions,
    Reliability,
    ecdf_difference,
)

MOST_CHAINS = 8
_BINS, _STRETCHES, _PIXELS = 40, 160, 140

# each color stands for a variable of the page's style sheet, which knows light from dark
_INK, _MUTED, _LINE, _DATA, _MODEL = "#a00010", "#a00011", "#a00012", "#a00013", "#a00014"
_CHAINS = [f"#a0000{i}" for i in range(MOST_CHAINS)]
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _LINE: "--line",
    _DATA: "--data",
    _MODEL: "--model",
    **{color: f"--chain-{i}" for i, color in enumerate(_CHAINS)},
}
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.0,
    "path.simplify_threshold": 0.3,
}


def _drawn(draw: Callable[[Any], None], width: float, height: float, label: str) -> str:
    """SVG of what is drawn on axes of some inches; ``label`` is read aloud in its place."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # names in the drawing, which hold in the whole page, are made from the salt
        settings: Any = {**_SETTINGS, "svg.hashsalt": label}
        matplotlib.rcParams.update(settings)
        figure = Figure((width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    return _inline(text.getvalue(), label, round(_PIXELS * width))


def _inline(svg: str, label: str, most: int) -> str:
    """SVG to put into a page: no metadata, as wide as there is room, the page's font."""
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    opening = f'<svg viewBox="{box[1]}" style="max-width: {most}px" role="img"'
    return f'{opening} aria-label="{label}">{svg}'


def shown_chains(chains: int) -> np.ndarray:
    """Numbers of the chains that are drawn."""
    return evenly(chains, MOST_CHAINS)


def trace(series: Float[np.ndarray, "chains draws"], number: int) -> str:
    """Draws in their order: the smallest and the largest of each short stretch."""

    def draw(axes: Any) -> None:
        for i, chain in enumerate(shown_chains(len(series))):
            axes.plot(*_extremes(series[chain]), color=_CHAINS[i], lw=0.7, alpha=0.75)
        axes.set_xlim(0, max(series.shape[1] - 1, 1))
        axes.yaxis.set_major_locator(_ticks(4))

    return _drawn(draw, 4.6, 1.2, f"trace of scalar {number}")


def _ticks(most: int, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=integer)


def _extremes(values: Float[np.ndarray, " draws"]) -> tuple[np.ndarray, np.ndarray]:
    if len(values) <= 2 * _STRETCHES:
        return np.arange(len(values)), values
    parts = np.array_split(np.arange(len(values)), _STRETCHES)
    ends = [sorted((part[values[part].argmin()], part[values[part].argmax()])) for part in parts]
    places = np.ravel(ends)
    return places, values[places]


def ranks(series: Float[np.ndarray, "chains draws"], effective: float, number: int) -> str:
    """Distribution of each chain's ranks among all draws, less the uniform one.

    The band is for as many independent draws as there are effective ones; a single chain is
    compared by its halves.
    """
    if len(series) == 1:
        half = series.shape[1] // 2
        series = series[:, : 2 * half].reshape(2, half)
    chains, draws = series.shape
    order = np.argsort(np.argsort(series.ravel(), kind="stable"), kind="stable")
    uniform = (order.reshape(chains, draws) + 0.5) / order.size
    # a chain is compared with all, of which it is a part
    worth = max(int(min(effective, order.size) / max(chains - 1, 1)), 1)

    def draw(axes: Any) -> None:
        each = [ecdf_difference(uniform[chain], worth) for chain in shown_chains(chains)]
        for i, (grid, difference, _) in enumerate(each):
            axes.plot(grid, difference, color=_CHAINS[i], lw=0.9)
        _band(axes, each[0])

    return _drawn(draw, 2.3, 1.2, f"ranks of scalar {number}")


def _band(axes: Any, difference: Difference) -> None:
    grid, half = difference.grid, difference.band
    axes.fill_between(grid, -half, half, color=_MODEL, alpha=0.16, lw=0)
    axes.axhline(0, color=_MUTED, lw=0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1])
    axes.yaxis.set_major_locator(_ticks(4))


def predictive(found: Predictions, number: int) -> str:
    """Histogram of the observations over those of replications: their median and central 90%."""
    edges = _edges(found)
    inside = np.clip(found.observed, edges[0], edges[-1])
    observed = np.histogram(inside, edges)[0] / inside.size
    each = [
        np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / values.size
        for values in found.replicated
    ]
    low, middle, high = np.quantile(each, [0.05, 0.5, 0.95], axis=0)

    def draw(axes: Any) -> None:
        if len(middle) <= 12:
            centers, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
            axes.bar(centers, observed, 0.62 * width, color=_DATA, alpha=0.35, lw=0)
            errors = [middle - low, high - middle]
            axes.errorbar(centers, middle, errors, fmt="o", ms=3, lw=1.2, color=_MODEL)
            axes.xaxis.set_major_locator(_ticks(12, integer=True))
        else:
            axes.stairs(high, edges, baseline=low, fill=True, color=_MODEL, alpha=0.28, lw=0)
            axes.stairs(middle, edges, baseline=None, color=_MODEL, lw=1.0)
            axes.stairs(observed, edges, baseline=None, color=_DATA, lw=1.4)
            axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0)
        axes.yaxis.set_major_locator(_ticks(4))
        axes.set_xlabel("observed value")
        axes.set_ylabel("share of observations")

    return _drawn(draw, 3.5, 2.4, f"predictive check {number}")


def _edges(found: Predictions) -> np.ndarray:
    values = np.concatenate([found.observed, found.replicated.ravel()])
    low, high = np.quantile(values, [0.001, 0.999])
    own = np.quantile(found.observed, [0.005, 0.995])
    low, high = min(low, own[0]), max(high, own[1])
    if found.discrete:
        step = max(np.ceil((high - low + 1) / (1.5 * _BINS)), 1)
        return np.arange(np.floor(low), high + step + 0.5, step) - 0.5
    if high <= low:
        low, high = low - 0.5, low + 0.5
    return np.linspace(low, high, _BINS + 1)


def calibration(difference: Difference, number: int) -> str:
    """The distribution of the ranks of observations among their replications, less the uniform."""

    def draw(axes: Any) -> None:
        axes.plot(difference.grid, difference.difference, color=_DATA, lw=1.4)
        _band(axes, difference)
        axes.set_xlabel("rank of the observation among its predictions")
        axes.set_ylabel("ECDF less uniform")

    return _drawn(draw, 3.5, 2.4, f"calibration {number}")


def frequencies(found: Reliability, number: int) -> str:
    """Observed against predicted frequencies."""

    def draw(axes: Any) -> None:
        every = np.concatenate([found.low, found.observed, found.high])
        ends = [every.min(), every.max()]
        axes.plot(ends, ends, color=_MUTED, lw=0.6)
        axes.vlines(found.predicted, found.low, found.high, color=_MODEL, lw=5, alpha=0.3)
        axes.plot(found.predicted, found.observed, "o", ms=3.5, color=_DATA)
        axes.set_xlabel("predicted frequency")
        axes.set_ylabel("observed frequency")

    return _drawn(draw, 3.5, 2.4, f"reliability {number}")


def pareto_k(values: Float[np.ndarray, " rows"], good: float, number: int) -> str:
    """Histogram of Pareto k, with what is good."""

    def draw(axes: Any) -> None:
        axes.hist(values, 40, color=_MODEL, alpha=0.45)
        axes.axvline(good, color=_DATA, lw=1, ls="--")
        axes.yaxis.set_major_locator(_ticks(4, integer=True))
        axes.set_xlabel("Pareto k")
        axes.set_ylabel("data points")

    return _drawn(draw, 3.5, 1.9, f"Pareto k {number}")
