"""The documentation holds: names, examples, links."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import stochgrad

ROOT = Path(__file__).parents[1]
MODULES = [
    m.name
    for m in pkgutil.walk_packages(stochgrad.__path__, "stochgrad.")
    if "__main__" not in m.name
]


def public_names():
    for module in (
        stochgrad,
        stochgrad.diagnostics,
        stochgrad.numpyro,
        stochgrad.gradients,
        stochgrad.federated,
        stochgrad.flower,
        stochgrad.flows,
        stochgrad.em,
    ):
        for name, value in vars(module).items():
            if not name.startswith("_") and not inspect.ismodule(value) and callable(value):
                yield f"{module.__name__}.{name}"
    yield "stochgrad.from_numpyro"


def test_every_public_name_has_its_place_in_the_docs():
    text = (ROOT / "docs/api.md").read_text()
    shown = set(re.findall(r"stochgrad[\w.]*\.(\w+)", text))
    internal = {
        "Any",
        "import_module",
        "as_gradient",
        "check_center",
        "why_no_mode",
        "Baseline",
        "LogDensity",
        "check_like",
        "evaluated",
        "beyond_the_path",
        "FDivergence",
        "RenyiBound",
        "alpha_family",
        "jensen_shannon_family",
        "renyi",
        "depends",
        "with_conducive",
        "client_rows",
        "map_batches",
        "concatenate_clients",
        "likelihood_sum",
        "prior_only",
        "set_share",
        "Precision",
        "check_surrogates_fit",
        "check_flow",
        "split_flow",
        "unwrap_flow",
        "beyond_reach",
        "maximize_over_clients",
        "warn_of_own_effects",
        "warn_of_unstable_visits",
        "rim",
        "visit_notes",
        "step_time",
        "Adjacency",
        "block_visits",
        "check_adjacency",
        "check_delta",
        "client_sums",
        "noisy_fisher",
        "noisy_slope",
    }
    missing = {name for name in public_names() if name.split(".")[-1] not in shown | internal}
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_every_link_between_pages_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
@pytest.mark.pages
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [
        *(
            "guide",
            "samplers",
            "orders",
            "scale",
            "federated",
            "privacy",
            "flows",
            "chain_of_thought",
        ),
        "potentials",
    ],
)
def test_the_pages_run(page, monkeypatch, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
    blocks = [b for b in blocks if "MCMC(" not in b]  # tests/interop/test_numpyro_kernels.py
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        space = {}
        for block in blocks:
            exec(compile(block, page, "exec"), space)
    if page == "guide":
        assert space["draws"].finite.all()
        assert space["data"].posterior["scale"].min() >= 0
    if page == "samplers":
        assert 0 < len(space["snapshots"].positions[0]) < 1000
        assert space["center"].distance < 1
    if page == "federated":
        truth = space["draws"].positions.mean(axis=(0, 1))
        assert abs(space["again"].positions.mean(axis=(0, 1)) - truth).max() < 0.05
        assert abs(space["over_the_wire"].positions.mean(axis=(0, 1)) - truth).max() < 0.1
        assert (space["report"].margin > 0).all()
    if page == "chain_of_thought":
        assert space["stats"].reward[-50:].mean() > 1.5 * space["stats"].reward[:50].mean()
        assert abs(space["fit"].model["mean"] - jax.numpy.array([-1.0, 1.0])).max() < 0.3
    if page == "potentials":
        assert space["run"].sound.all()
        assert (space["bands"].epistemic > space["bands"].sampling).any()
    if page == "scale":
        assert space["again"].num_draws == 2000
        spread = space["again"].positions[:].std(axis=(0, 1))
        assert abs(spread / space["expected_sd"] - 1).max() < 0.2
    if page == "orders":
        assert abs(space["found"].position_order - 2) < 0.1
        assert abs(space["second"].value * 2001 - 1).max() < 0.2
