"""Linear and robust regressions on raw, unstandardized data."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from .entry import Entry, election, floats, r_data, single


def flat_regression(x, y, sub=None):
    """Stan's default priors: flat on the coefficients, flat on the positive scale."""
    intercept = numpyro.sample("intercept", dist.ImproperUniform(constraints.real, (), ()))
    slopes = numpyro.sample(
        "slopes", dist.ImproperUniform(constraints.real_vector, (), (x.shape[1],))
    )
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb = numpyro.subsample(x, event_dim=1)
        yb = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(intercept + xb @ slopes, sigma), obs=yb)


def wide_regression(x, y, sub=None):
    """Proper priors, so wide that they say nothing."""
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 1e4))
    with numpyro.plate("predictors", x.shape[1]):
        slopes = numpyro.sample("slopes", dist.Normal(0.0, 1e3))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(10.0))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb = numpyro.subsample(x, event_dim=1)
        yb = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(intercept + xb @ slopes, sigma), obs=yb)


def one_predictor(x, y, sub=None):
    b = numpyro.sample("b", dist.Normal(0.0, 1000.0).expand([2]).to_event(1))
    s = numpyro.sample("s", dist.HalfCauchy(2.5))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb, yb = numpyro.subsample(x, 0), numpyro.subsample(y, 0)
        numpyro.sample("y", dist.Normal(b[0] + b[1] * xb, s), obs=yb)


def robust_regression(x, y, sub=None):
    """Student's t with degrees of freedom that are learned."""
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 200.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(20.0))
    nu = numpyro.sample("nu", dist.Gamma(2.0, 0.1))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb, yb = numpyro.subsample(x, 0), numpyro.subsample(y, 0)
        numpyro.sample("y", dist.StudentT(nu, intercept + slope * xb, sigma), obs=yb)


def cauchy_regression(x, y, sub=None):
    """Heavy tails twice: Cauchy's likelihood, Student's t for the coefficients."""
    b = numpyro.sample("b", dist.StudentT(3.0, 0.0, 2.0).expand([x.shape[1]]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfCauchy(1.0))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb = numpyro.subsample(x, event_dim=1)
        yb = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Cauchy(xb @ b, scale), obs=yb)


def horseshoe_regression(x, y, sub=None):
    """Few large coefficients among many: global and local scales with heavy tails."""
    tau = numpyro.sample("tau", dist.HalfCauchy(0.1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("predictors", x.shape[1]):
        local = numpyro.sample("local", dist.HalfCauchy(1.0))
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    b = numpyro.deterministic("b", tau * local * z)
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb = numpyro.subsample(x, event_dim=1)
        yb = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(xb @ b, sigma), obs=yb)


def growth_curve(days, weight, sub=None):
    """Exponential decay to a limit: nonlinear least squares in days and kilograms."""
    limit = numpyro.sample("limit", dist.Normal(80.0, 40.0))
    loss = numpyro.sample("loss", dist.Normal(100.0, 40.0))
    half_life = numpyro.sample("half_life", dist.LogNormal(np.log(150.0), 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("rows", len(weight), subsample_size=sub):
        t, y = numpyro.subsample(days, 0), numpyro.subsample(weight, 0)
        mean = limit + loss * jnp.exp2(-t / half_life)
        numpyro.sample("weight", dist.Normal(mean, sigma), obs=y)


def lagged_regression(before, level, sub=None):
    """Autoregression of a level in feet above the sea; the last year's level is a column."""
    a = numpyro.sample("a", dist.Normal(0.0, 1000.0))
    b = numpyro.sample("b", dist.Normal(0.0, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(5.0))
    with numpyro.plate("years", len(level), subsample_size=sub):
        x, y = numpyro.subsample(before, 0), numpyro.subsample(level, 0)
        numpyro.sample("level", dist.Normal(a + b * x, sigma), obs=y)


def child_scores():
    rng = np.random.default_rng(11)
    high_school = (rng.random(434) < 0.79).astype(float)
    iq = np.clip(rng.normal(98.0 + 3.0 * high_school, 15.0), 71.0, 139.0)
    score = -11.5 + 51.3 * high_school + 1.1 * iq - 0.5 * high_school * iq
    score = np.round(score + rng.normal(0.0, 18.0, 434))
    return floats(high_school, iq, high_school * iq), single(score)


def silent_center():
    rng = np.random.default_rng(1)
    x = (rng.random(434) < 0.78).astype(np.float32)
    return x, (77.5 + 11.8 * x + 20 * rng.normal(size=434)).astype(np.float32)


def earnings():
    """Log earnings on height in inches, sex and their product."""
    rng = np.random.default_rng(12)
    male = (rng.random(1192) < 0.4).astype(float)
    height = np.round(rng.normal(64.5 + 5.6 * male, 2.7))
    log_earnings = 8.4 + 0.017 * height - 0.08 * male + 0.0075 * male * height
    log_earnings = log_earnings + rng.normal(0.0, 0.88, 1192)
    return floats(height, male, height * male), single(log_earnings)


def shrubs():
    """Log weight of 46 shrubs on logs of strongly correlated sizes in meters."""
    rng = np.random.default_rng(13)
    size = rng.normal(0.3, 0.4, 46)
    parts = [size + rng.normal(0.0, s, 46) for s in (0.15, 0.2, 0.2, 0.18)]
    density = np.log(rng.poisson(0.7, 46) + 1.0)
    group = (rng.random(46) < 0.43).astype(float)
    y = 5.3 + 0.4 * parts[0] + 1.1 * parts[1] + 0.4 * parts[2] + 0.4 * parts[3]
    y = y + 0.1 * density + 0.6 * group + rng.normal(0.0, 0.33, 46)
    return floats(*parts, density, group), single(y)


def crime():
    d = r_data("MASS", "UScrime")
    return floats(d["M"], d["Ed"], d["Po1"], d["U2"], d["Ineq"], d["Prob"]), single(d["y"])


def cars():
    d = r_data("ISLR", "Auto")
    return floats(d["year"], d["weight"], d["origin"] == 1), single(d["mpg"])


def diamonds():
    d = r_data("ggplot2", "diamonds").sample(5000, random_state=14)
    log_carat = np.log(d["carat"])
    x = floats(
        log_carat,
        d["carat"],
        log_carat**2,
        d["depth"],
        d["table"],
        d["cut"] == "Ideal",
        d["color"] <= "F",
    )
    return x, single(np.log(d["price"]))


def party():
    d = election()
    x = floats(d["selfLR"], d["age"], d["educ"], d["income"], d["TVnews"])
    return x, single(d["PID"])


def heights_and_weights():
    """Kilograms on centimeters; one person's two figures are exchanged."""
    d = r_data("carData", "Davis")
    return single(d["height"]), single(d["weight"])


def correlated():
    """Ten predictors whose covariance has condition number 1e4."""
    rng = np.random.default_rng(15)
    rotation = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    x = rng.normal(size=(1000, 10)) * np.logspace(0, -2, 10) @ rotation.T
    y = 1.0 + x @ rng.normal(size=10) + rng.normal(size=1000)
    return x.astype(np.float32), single(y)


def heavy():
    rng = np.random.default_rng(16)
    x = floats(np.ones(300), *rng.normal(size=(4, 300)))
    return x, single(x @ np.array([0.5, 1.0, -2.0, 0.0, 8.0]) + 0.7 * rng.standard_cauchy(300))


def sparse():
    rng = np.random.default_rng(17)
    x = rng.normal(size=(200, 20))
    y = x @ np.r_[2.0, -1.5, 0.7, np.zeros(17)] + rng.normal(size=200)
    return x.astype(np.float32), single(y)


def lost_weight():
    d = r_data("MASS", "wtloss")
    return single(d["Days"]), single(d["Weight"])


def lake():
    level = single(r_data("datasets", "LakeHuron")["value"])
    return level[:-1], level[1:]


COEFFICIENTS = ("intercept", "slopes", "sigma")

ENTRIES = [
    Entry("child_scores", flat_regression, child_scores, 434, 54, COEFFICIENTS),
    Entry("silent_center", one_predictor, silent_center, 434, 64, ("b", "s")),
    Entry("earnings", flat_regression, earnings, 1192, 149, COEFFICIENTS),
    Entry("shrubs", flat_regression, shrubs, 46, 16, COEFFICIENTS),
    Entry("crime", flat_regression, crime, 47, 16, COEFFICIENTS),
    Entry("cars", wide_regression, cars, 392, 49, COEFFICIENTS),
    Entry("diamonds", wide_regression, diamonds, 5000, 625, COEFFICIENTS),
    Entry("party", wide_regression, party, 944, 118, COEFFICIENTS),
    Entry(
        "heights_and_weights",
        robust_regression,
        heights_and_weights,
        200,
        25,
        ("intercept", "slope", "sigma", "nu"),
    ),
    Entry("correlated", wide_regression, correlated, 1000, 125, COEFFICIENTS),
    Entry("heavy_tails", cauchy_regression, heavy, 300, 38, ("b", "scale")),
    Entry(
        "horseshoe",
        horseshoe_regression,
        sparse,
        200,
        25,
        ("b", "sigma"),
        nuts={"target_accept_prob": 0.99, "dense_mass": False, "max_tree_depth": 10},
    ),
    Entry(
        "weight_loss", growth_curve, lost_weight, 52, 16, ("limit", "loss", "half_life", "sigma")
    ),
    Entry(
        "lake_autoregression",
        lagged_regression,
        lake,
        97,
        16,
        ("a", "b", "sigma"),
        nuts={"num_samples": 20_000},
    ),
]
