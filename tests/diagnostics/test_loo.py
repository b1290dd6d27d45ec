"""Cross-validation and sensitivity, against closed forms and ArviZ's own functions."""

import dataclasses

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochgrad
from stochgrad.core import Draws
from stochgrad.diagnostics import kfold, loo, sensitivity

N, CHAINS, DRAWS = 3000, 4, 500
RNG = np.random.default_rng(3)
X = np.stack([np.ones(N), RNG.normal(size=N)], 1).astype(np.float32)
Y = (X @ [0.5, -1.0] + RNG.normal(size=N)).astype(np.float32)
GROUPS = np.repeat(np.arange(30), 100)


def log_prior(b):
    return -0.5 * jnp.sum(b**2) / 100


def log_likelihood(b, rows):
    return -0.5 * (rows["y"] - rows["x"] @ b) ** 2 - 0.5 * np.log(2 * np.pi)


def conjugate(rows=None, prior=100.0):
    """Mean and covariance of the posterior given some rows."""
    rows = np.arange(N) if rows is None else rows
    covariance = np.linalg.inv(np.eye(2) / prior + X[rows].T.astype(float) @ X[rows])
    return covariance @ (X[rows].T.astype(float) @ Y[rows]), covariance


def exact_draws(key, rows=None, order="reshuffled"):
    """Independent draws of the posterior given some rows, as draws of a run."""
    rows = np.arange(N) if rows is None else np.asarray(rows)
    size = None if order == "full" else 30
    data = {"x": X[rows], "y": Y[rows]}
    target = stochgrad.posterior(log_prior, log_likelihood, data, batch_size=size, order=order)
    mean, covariance = conjugate(rows)
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**30)))
    positions = rng.multivariate_normal(mean, covariance, (CHAINS, DRAWS)).astype(np.float32)
    finite, bad = np.ones((CHAINS, DRAWS), bool), np.full(CHAINS, -1)
    return Draws(
        positions, {"log_density": np.zeros((CHAINS, DRAWS))}, finite, bad, posterior=target
    )


def exact_elpd(leave_out):
    """Sum over what is left out together of each row's log predictive density given the rest."""
    total = 0.0
    for out in leave_out:
        mean, covariance = conjugate(np.setdiff1d(np.arange(N), out))
        variance = 1 + np.einsum("ni,ij,nj->n", X[out], covariance, X[out])
        error = Y[out] - X[out] @ mean
        total += np.sum(-0.5 * error**2 / variance - 0.5 * np.log(2 * np.pi * variance))
    return total


def elpd_of(result):
    """In both lines of ArviZ."""
    if hasattr(result, "elpd"):
        return result.elpd, result.se, result.elpd_i
    return result["elpd_loo"], result["se"], result["loo_i"]


@pytest.fixture(scope="module")
def draws():
    return exact_draws(jax.random.key(1))


def test_on_all_rows_it_is_arvizs_own(draws):
    elpd, _, pointwise = elpd_of(loo(draws, rows=None))
    tree = draws.to_arviz(["posterior", "log_likelihood"])
    theirs = elpd_of(az.loo(tree, pointwise=True))
    np.testing.assert_allclose(elpd, theirs[0], rtol=1e-6)
    np.testing.assert_allclose(pointwise, theirs[2], rtol=1e-4)
    np.testing.assert_allclose(elpd, exact_elpd(np.arange(N)[:, None]), atol=0.05)


def test_wide_draws_cost_their_excess_times_the_effective_parameters(draws):
    """What the docstring says of a step size that is too large."""
    excess = 1.0
    mean = draws.positions.mean((0, 1))
    positions = mean + np.sqrt(1 + excess) * (draws.positions - mean)
    wide = loo(dataclasses.replace(draws, positions=positions), rows=None)
    narrow = loo(draws, rows=None)
    change = elpd_of(wide)[0] - elpd_of(narrow)[0]
    center, covariance = conjugate()
    leverage = np.einsum("ni,ij,nj->n", X, covariance, X)
    parameters = np.sum(leverage * (Y - X @ center) ** 2)
    assert 1.5 < parameters < 2.5
    np.testing.assert_allclose(change, -excess * parameters, atol=0.15)


def test_some_rows_are_enough(draws):
    """Over many subsets the estimate is unbiased, and off by what it says that it is."""
    exact = exact_elpd(np.arange(N)[:, None])
    found = [elpd_of(loo(draws, rows=60, seed=seed)) for seed in range(25)]
    elpd = np.array([elpd for elpd, *_ in found])
    spread = elpd.std(ddof=1)
    assert abs(elpd.mean() - exact) < 5.5 * spread / np.sqrt(len(elpd)) + 0.05
    assert spread < 1  # elpd is -4,300 here, and 60 of its terms alone would give it to 350
    _, error, pointwise = found[0]
    full = elpd_of(loo(draws, rows=None))
    np.testing.assert_allclose(error, full[1], rtol=0.05)
    np.testing.assert_allclose(pointwise.sum(), elpd[0], rtol=1e-9)


def test_two_models_share_their_rows(draws):
    flat = stochgrad.posterior(
        log_prior, lambda b, rows: log_likelihood(b, rows) - 0.1, {"x": X, "y": Y}, batch_size=30
    )
    other = dataclasses.replace(draws, posterior=flat)
    one, two = loo(draws, rows=100), loo(other, rows=100)
    table = az.compare({"one": one, "two": two})
    np.testing.assert_allclose(table["elpd_diff"].abs().max(), 0.1 * N, rtol=1e-4)
    assert table["dse"].max() < 1e-2


def test_groups_are_left_out_together(draws):
    """Ten groups of wide spread would be too much for PSIS; thirty of equal law are not."""
    result = loo(draws, groups=GROUPS)
    elpd, *_ = elpd_of(result)
    assert result["n_data_points"] == 30
    joint = 0.0
    for g in range(30):
        out = g == GROUPS
        mean, covariance = conjugate(np.flatnonzero(~out))
        law = np.eye(out.sum()) + X[out] @ covariance @ X[out].T
        error = Y[out] - X[out] @ mean
        _, log_det = np.linalg.slogdet(2 * np.pi * law)
        joint += -0.5 * error @ np.linalg.solve(law, error) - 0.5 * log_det
    np.testing.assert_allclose(elpd, joint, atol=0.5)


def test_refits_give_the_exact_answer(draws, key):
    result = kfold(key, draws, exact_draws, folds=5, seed=2)
    elpd, *_ = elpd_of(result)
    fold_of = np.random.default_rng(2).permutation(np.arange(N) % 5)
    exact = exact_elpd([np.flatnonzero(fold_of == k) for k in range(5)])
    np.testing.assert_allclose(elpd, exact, atol=0.5)
    assert "nan" not in str(result)


def test_sensitivity_is_arvizs_own(draws):
    found = sensitivity(draws)
    tree = draws.to_arviz(["posterior", "log_likelihood", "log_prior"])
    if hasattr(az, "psense"):
        theirs = [az.psense(tree, group=component) for component in ("prior", "likelihood")]
    else:  # whose own floor, one hundredth, hides a weak prior
        theirs = [None, az.psens(tree, component="likelihood")]
    for ours, expected in zip(found["x"], theirs, strict=True):
        if expected is not None:
            np.testing.assert_allclose(ours, expected["x"], rtol=1e-3, atol=1e-6)
    assert float(found["x"].sel(component="likelihood").min()) > 0.05
    assert float(found["x"].sel(component="prior").max()) < 0.05


def test_pareto_k_of_an_outlier_is_said():
    wild = Y.copy()
    wild[7] = 400.0
    data = {"x": X, "y": wild}
    target = stochgrad.posterior(log_prior, log_likelihood, data, batch_size=30)
    draws = dataclasses.replace(exact_draws(jax.random.key(2)), posterior=target)
    with pytest.warns(UserWarning, match="1 of 3000 data points along 'row' have a Pareto k above"):
        loo(draws, rows=None)


def test_bad_input_gets_one_sentence(draws, key):
    with pytest.raises(ValueError, match="rows must be an integer of at least 2"):
        loo(draws, rows=1)
    with pytest.raises(TypeError, match="draws must be draws of"):
        loo({"b": 1})
    with pytest.raises(ValueError, match="groups must be a label for each of 3000 rows"):
        loo(draws, groups=[1, 2])
    with pytest.raises(ValueError, match="var_name must be one of"):
        loo(draws, rows=5, var_name="z")
    with pytest.raises(ValueError, match="folds must be an integer from 2 to 3000"):
        kfold(key, draws, exact_draws, folds=1)
    with pytest.raises(TypeError, match=r"fit\(key, rows\) must be draws"):
        kfold(key, draws, lambda key, rows: None, folds=2)
