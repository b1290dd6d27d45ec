"""On a conjugate toy the stationary laws of FSGLD and DSGLD are known for any length of visits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochgrad import federated
from tests.conftest import Z
from tests.federated.toys import TRUTH_PRECISION, gaussian_mean

pytestmark = [
    pytest.mark.filterwarnings("ignore::stochgrad.GradientNoiseWarning"),
    # visits of 2000 steps under surrogates of first order, whose mean alone is looked at
    pytest.mark.filterwarnings("ignore::stochgrad.federated.StabilityWarning"),
]

H = 0.2 / TRUTH_PRECISION
OPTIONS = {"num_samples": 1500, "num_warmup": 100, "thin": 11, "num_chains": 64, "progress": False}


def run(method, local_steps, **options):
    target, data, _ = gaussian_mean(order="iid")
    draws = federated.sample(
        jax.random.key(3),
        target,
        method=method,
        surrogate=options.pop("surrogate", "exact"),
        local_steps=local_steps,
        step_size=H,
        init=jnp.zeros(2),
        control_variate=False,
        **{**OPTIONS, **options},
    )
    return draws, data


def noise(x, share):
    """Variance of a client's stochastic gradient, from one row drawn at random."""
    return (len(x) / share) ** 2 * x.var(axis=0)


def check(draws, mean, variance):
    """Mean and variance agree, in standard errors from chains, which are independent."""
    x = np.asarray(draws.positions, np.float64)
    for found, expected in ((x, mean), ((x - mean) ** 2, variance)):
        of_chain = found.mean(axis=1)
        error = of_chain.std(axis=0, ddof=1) / np.sqrt(len(of_chain))
        assert np.all(np.abs(of_chain.mean(axis=0) - expected) < Z * error)
    error = ((x - mean) ** 2).mean(axis=1).std(axis=0) / np.sqrt(len(x))
    return error / variance


@pytest.mark.slow
@pytest.mark.parametrize(
    "visits",
    [
        {"local_steps": 1},
        {"local_steps": 7, "probabilities": [0.3, 0.4, 0.3]},
        {"local_steps": 50},
        {"local_steps": [3, 17, 9], "selection": "permuted"},
        {"local_steps": 2000, "surrogate": "global_first_order", "probabilities": [0.3, 0.4, 0.3]},
    ],
)
def test_fsgld_with_exact_surrogates_has_the_law_of_the_closed_form(visits):
    draws, data = run("FSGLD", **visits)
    shares = federated.visiting(
        gaussian_mean()[0], **{k: v for k, v in visits.items() if k != "surrogate"}
    ).batches.owners.shares
    _, _, mean = gaussian_mean()
    if visits.get("surrogate") == "global_first_order":
        # each client's own curvature, its mean right: within a visit a Gaussian of that curvature
        assert np.all(np.abs(np.asarray(draws.positions).mean((0, 1)) - mean) < 0.02)
        return
    v = sum(noise(x, f) * f for x, f in zip(data, shares, strict=True))
    k = TRUTH_PRECISION
    expected = (1 + H * v / 2) / (1 - H * k / 2) / k
    power = check(draws, mean, expected)
    assert np.all(power < 0.05 / (Z + 1))


def moments_of_dsgld(data, shares, probabilities, steps):
    """Mean and variance over all steps, from the linear recursion of each visit."""
    laws = []
    for x, f, t in zip(data, shares, steps, strict=True):
        n = len(x)
        a = 1 - H * (1 + n / f)
        drift, heat = H * n / f * x.mean(axis=0), 2 * H + H**2 * noise(x, f)
        laws.append((a, drift, heat, t))
    mean, square = np.zeros(2), np.zeros(2)
    for _ in range(2000):
        before = mean, square
        mean, square = np.zeros(2), np.zeros(2)
        total_mean, total_square, total = np.zeros(2), np.zeros(2), 0.0
        for p, (a, drift, heat, t) in zip(probabilities, laws, strict=True):
            m, s = before
            for _ in range(t):
                m, s = a * m + drift, a**2 * s + 2 * a * drift * m + drift**2 + heat
                total_mean, total_square, total = (
                    total_mean + p * m,
                    total_square + p * s,
                    total + p,
                )
            mean, square = mean + p * m, square + p * s
        if np.allclose(mean, before[0], rtol=1e-10) and np.allclose(square, before[1], rtol=1e-10):
            break
    mean = total_mean / total
    return mean, total_square / total - mean**2


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_dsgld_drifts_off_as_predicted(steps):
    p = np.array([0.3, 0.4, 0.3])
    draws, data = run("DSGLD", steps, probabilities=p)
    mean, variance = moments_of_dsgld(data, p, p, [steps] * 3)
    check(draws, mean, variance)
    _, _, truth = gaussian_mean()
    sd = TRUTH_PRECISION**-0.5
    # with visits of one step the mean is right; with long ones it is that of the clients' own
    gap = np.abs(mean - truth).max() / sd
    assert gap < 1e-4 if steps == 1 else gap > 0.3
