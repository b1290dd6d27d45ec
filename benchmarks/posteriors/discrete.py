"""Logistic, ordinal, Poisson and negative-binomial regressions, and mixtures."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import transforms

from .entry import Entry, codes, election, floats, r_data, single


def logistic_regression(x, y, sub=None):
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 10.0))
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb = numpyro.subsample(x, event_dim=1)
        yb = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Bernoulli(logits=intercept + xb @ slopes), obs=yb)


def ordered_regression(x, y, sub=None):
    """Seven ordered answers: cumulative logits with cut points."""
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    base = dist.Normal(jnp.zeros(6), jnp.array([5.0, 1.0, 1.0, 1.0, 1.0, 1.0])).to_event(1)
    cuts = numpyro.sample("cuts", dist.TransformedDistribution(base, transforms.OrderedTransform()))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb = numpyro.subsample(x, event_dim=1)
        yb = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.OrderedLogistic(xb @ slopes, cuts), obs=yb)


def poisson_regression(x, exposure, y, sub=None):
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb = numpyro.subsample(x, event_dim=1)
        eb, yb = numpyro.subsample(exposure, 0), numpyro.subsample(y, 0)
        numpyro.sample("y", dist.Poisson(eb * jnp.exp(intercept + xb @ slopes)), obs=yb)


def negative_binomial_regression(x, exposure, y, sub=None):
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    reciprocal = numpyro.sample("reciprocal", dist.HalfNormal(5.0))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        xb = numpyro.subsample(x, event_dim=1)
        eb, yb = numpyro.subsample(exposure, 0), numpyro.subsample(y, 0)
        mean = eb * jnp.exp(intercept + xb @ slopes)
        numpyro.sample("y", dist.NegativeBinomial2(mean, 1.0 / reciprocal), obs=yb)


def quadratic_counts(year, y, sub=None):
    """Great discoveries of a year, a parabola in the year as it stands in the calendar."""
    level = numpyro.sample("level", dist.Normal(0.0, 5.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 0.1))
    bend = numpyro.sample("bend", dist.Normal(0.0, 0.01))
    phi = numpyro.sample("phi", dist.Gamma(2.0, 0.2))
    with numpyro.plate("years", len(y), subsample_size=sub):
        t, yb = numpyro.subsample(year, 0) - 1900.0, numpyro.subsample(y, 0)
        mean = jnp.exp(level + slope * t + bend * t**2)
        numpyro.sample("y", dist.NegativeBinomial2(mean, phi), obs=yb)


def two_normals(y, low, spread, sub=None):
    """A mixture of two normals in order: the gap between the means is log-normal."""
    base = dist.Normal(jnp.array([low, jnp.log(spread)]), jnp.array([spread, 1.0])).to_event(1)
    mean = numpyro.sample("mean", dist.TransformedDistribution(base, transforms.OrderedTransform()))
    sigma = numpyro.sample("sigma", dist.HalfNormal(spread).expand([2]).to_event(1))
    share = numpyro.sample("share", dist.Beta(5.0, 5.0))
    with numpyro.plate("rows", len(y), subsample_size=sub):
        yb = numpyro.subsample(y, 0)
        weights = dist.Categorical(probs=jnp.stack([share, 1.0 - share]))
        numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mean, sigma)), obs=yb)


def wells():
    """Changes of well: arsenic, distance in meters, education in years, arsenic by distance."""
    d = r_data("carData", "Wells")
    x = floats(d["arsenic"], d["distance"], d["education"], d["arsenic"] * d["distance"])
    return x, np.asarray(d["switch"] == "yes", np.int32)


def vote():
    d = election()
    x = floats(d["PID"], d["selfLR"], d["age"], d["educ"], d["income"])
    return x, np.asarray(d["vote"], np.int32)


def party_ordered():
    d = election()
    x = floats(d["selfLR"], d["age"], d["educ"], d["income"])
    return x, np.asarray(d["PID"], np.int32)


def roaches():
    """Counts of roaches before and after a treatment of 262 apartments, with days of trapping."""
    rng = np.random.default_rng(21)
    before = np.round(np.where(rng.random(262) < 0.3, 0.0, rng.gamma(0.45, 130.0, 262)), 1)
    before = np.minimum(before, 450.0)  # the most of the study that this imitates
    treatment = (rng.random(262) < 0.6).astype(float)
    senior = (rng.random(262) < 0.3).astype(float)
    exposure = rng.choice([0.4, 0.8, 1.0, 1.0, 1.0, 1.2], 262)
    mean = exposure * np.exp(2.7 + 0.013 * before - 0.75 * treatment - 0.3 * senior)
    y = rng.poisson(rng.gamma(0.3, mean / 0.3))
    return floats(before, treatment, senior), single(exposure), np.asarray(y, np.int32)


def doctor_visits():
    d = r_data("AER", "DoctorVisits")
    x = floats(
        d["gender"] == "female", d["age"], d["income"], d["illness"], d["reduced"], d["health"]
    )
    return x, np.ones(len(x), np.float32), np.asarray(d["visits"], np.int32)


def school_absence():
    d = r_data("MASS", "quine")
    age = codes(d["Age"])
    x = floats(d["Eth"] == "A", d["Sex"] == "M", d["Lrn"] == "SL", *(age == k for k in (1, 2, 3)))
    return x, np.ones(len(x), np.float32), np.asarray(d["Days"], np.int32)


def discoveries():
    d = r_data("datasets", "discoveries")
    return single(d["time"]), np.asarray(d["value"], np.int32)


def simulated_mixture():
    rng = np.random.default_rng(22)
    first = rng.random(1000) < 0.37
    y = np.where(first, rng.normal(-2.7, 1.0, 1000), rng.normal(2.8, 1.2, 1000))
    return single(y), np.float32(-2.0), np.float32(2.0)


def geyser():
    """Minutes between eruptions."""
    return single(r_data("datasets", "faithful")["waiting"]), np.float32(50.0), np.float32(20.0)


LINEAR = ("intercept", "slopes")
MIXTURE = ("mean", "sigma", "share")

ENTRIES = [
    Entry("wells", logistic_regression, wells, 3020, 378, LINEAR),
    Entry("vote", logistic_regression, vote, 944, 118, LINEAR),
    Entry("party_ordered", ordered_regression, party_ordered, 944, 118, ("slopes", "cuts")),
    Entry(
        "roaches_poisson",
        poisson_regression,
        roaches,
        262,
        33,
        LINEAR,
        nuts={
            "start": {"intercept": 2.7, "slopes": [0.013, -0.75, -0.3]},
            "num_warmup": 3000,
            "max_tree_depth": 10,
        },
    ),
    Entry(
        "roaches_negative_binomial",
        negative_binomial_regression,
        roaches,
        262,
        33,
        (*LINEAR, "reciprocal"),
    ),
    Entry("doctor_visits", poisson_regression, doctor_visits, 5190, 649, LINEAR),
    Entry(
        "school_absence",
        negative_binomial_regression,
        school_absence,
        146,
        18,
        (*LINEAR, "reciprocal"),
    ),
    Entry("discoveries", quadratic_counts, discoveries, 100, 16, ("level", "slope", "bend", "phi")),
    Entry("mixture", two_normals, simulated_mixture, 1000, 125, MIXTURE),
    Entry("geyser", two_normals, geyser, 272, 34, MIXTURE),
]
