"""ArviZ's own simulation-based calibration, an independent witness of ours."""

import arviz as az
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import stochgrad
from tests.conftest import FALSE_ALARM

simuk = pytest.importorskip("simuk")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # short runs, and what the other library warns of
]

X = np.random.default_rng(0).normal(size=(60, 1)).astype(np.float32)


def model(x, y=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    with numpyro.plate("rows", len(x), subsample_size=20):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(xb @ b, 1.0), obs=yb)


def test_both_find_uniform_ranks(key):
    """Twenty data sets: four bins of five."""
    kernel = stochgrad.numpyro.SGHMC(model, step_size=0.02, friction=20.0, mass=1.0, num_steps=20)
    data = {"x": X, "y": np.zeros(60, np.float32)}
    witness = simuk.SBC(
        kernel,
        num_simulations=20,
        sample_kwargs={"num_warmup": 50, "num_samples": 99, "num_chains": 1},
        data_dir=data,
        seed=1,
    )
    witness.run_simulations()
    ranks = np.ravel(witness.simulations["prior_sbc"]["b"])
    assert ranks.shape == (20,)
    counts = np.histogram(ranks, [0, 25, 50, 75, 100])[0]
    assert stats.chisquare(counts).pvalue > FALSE_ALARM

    target = stochgrad.from_numpyro(model, *data.values(), order="symmetric")
    options = {"num_draws": 100, "thin": 40, "window_steps": 300}
    ours = stochgrad.diagnostics.sbc(key, target, simulations=20, **options)
    assert ours.p_value > FALSE_ALARM
    if hasattr(az, "plot_ecdf_pit"):
        az.plot_ecdf_pit(ours.to_datatree(), backend="none")
