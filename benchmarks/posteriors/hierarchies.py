"""Multilevel models, centered and non-centered, with a plate over rows."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import transforms
from numpyro.infer.reparam import TransformReparam

from .entry import Entry, codes, floats, r_data, single


def group_effects(name, mean, scale, size, centered, plate):
    """Effects of ``size`` groups, Normal(mean, scale) or ``mean + scale * z``."""
    if centered:
        with numpyro.plate(plate, size):
            return numpyro.sample(name, dist.Normal(mean, scale))
    transform = transforms.AffineTransform(mean, scale)
    shifted = dist.TransformedDistribution(dist.Normal(0.0, 1.0), transform)
    with numpyro.handlers.reparam(config={name: TransformReparam()}), numpyro.plate(plate, size):
        return numpyro.sample(name, shifted)


def partially_pooled_counts(system, method, y, centered=True, sub=None):
    m = numpyro.sample("m", dist.Normal(4.0, 2.0))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    phi = numpyro.sample("phi", dist.Gamma(2.0, 0.2))
    a = group_effects("a", m, s, 120, centered, "systems")
    with numpyro.plate("rows", len(y), subsample_size=sub):
        i, k, c = (numpyro.subsample(v, event_dim=0) for v in (system, method, y))
        numpyro.sample("y", dist.NegativeBinomial2(jnp.exp(a[i] + b * k), phi), obs=c)


def radon(county, basement, uranium, y, centered=True, sub=None):
    """Log radon of houses: a county's level depends on the uranium of its soil."""
    level = numpyro.sample("level", dist.Normal(0.0, 10.0))
    soil = numpyro.sample("soil", dist.Normal(0.0, 10.0))
    floor = numpyro.sample("floor", dist.Normal(0.0, 10.0))
    between = numpyro.sample("between", dist.HalfCauchy(5.0))
    within = numpyro.sample("within", dist.HalfCauchy(5.0))
    a = group_effects("a", level + soil * uranium, between, len(uranium), centered, "counties")
    with numpyro.plate("houses", len(y), subsample_size=sub):
        i, f, yb = (numpyro.subsample(v, event_dim=0) for v in (county, basement, y))
        numpyro.sample("y", dist.Normal(a[i] + floor * f, within), obs=yb)


def ticks(brood, year, height, y, centered=True, sub=None):
    """Ticks on grouse chicks: counts with an effect of each brood."""
    level = numpyro.sample("level", dist.Normal(0.0, 3.0))
    years = numpyro.sample("years", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    a = group_effects("a", level, scale, 118, centered, "broods")
    with numpyro.plate("chicks", len(y), subsample_size=sub):
        i, t, h, yb = (numpyro.subsample(v, event_dim=0) for v in (brood, year, height, y))
        shift = jnp.where(t > 0, years[t - 1], 0.0)
        rate = jnp.exp(a[i] + shift + slope * h / 100.0)
        numpyro.sample("y", dist.Poisson(rate), obs=yb)


def funnel(group, y, centered=True, sub=None):
    """Forty effects of which the data say little: their scale may be 0."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    effect = group_effects("effect", mean, scale, 40, centered, "groups")
    with numpyro.plate("rows", len(y), subsample_size=sub):
        i, yb = numpyro.subsample(group, 0), numpyro.subsample(y, 0)
        numpyro.sample("y", dist.Normal(effect[i], 3.0), obs=yb)


def sleep(subject, days, reaction, centered=True, sub=None):
    """Reaction times in milliseconds, a line for each subject."""
    level = numpyro.sample("level", dist.Normal(250.0, 100.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 50.0))
    scale_level = numpyro.sample("scale_level", dist.HalfNormal(50.0))
    scale_slope = numpyro.sample("scale_slope", dist.HalfNormal(20.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(50.0))
    a = group_effects("a", level, scale_level, 18, centered, "levels")
    b = group_effects("b", slope, scale_slope, 18, centered, "slopes")
    with numpyro.plate("rows", len(reaction), subsample_size=sub):
        i, t, y = (numpyro.subsample(v, event_dim=0) for v in (subject, days, reaction))
        numpyro.sample("y", dist.Normal(a[i] + b[i] * t, sigma), obs=y)


def contraception(district, x, y, centered=False, sub=None):
    level = numpyro.sample("level", dist.Normal(0.0, 5.0))
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    a = group_effects("a", level, scale, 60, centered, "districts")
    with numpyro.plate("women", len(y), subsample_size=sub):
        i, yb = numpyro.subsample(district, 0), numpyro.subsample(y, 0)
        xb = numpyro.subsample(x, event_dim=1)
        numpyro.sample("y", dist.Bernoulli(logits=a[i] + xb @ slopes), obs=yb)


def seizures(subject, x, y, centered=False, sub=None):
    level = numpyro.sample("level", dist.Normal(0.0, 5.0))
    slopes = numpyro.sample("slopes", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfCauchy(1.0))
    a = group_effects("a", level, scale, 59, centered, "subjects")
    with numpyro.plate("visits", len(y), subsample_size=sub):
        i, yb = numpyro.subsample(subject, 0), numpyro.subsample(y, 0)
        xb = numpyro.subsample(x, event_dim=1)
        numpyro.sample("y", dist.Poisson(jnp.exp(a[i] + xb @ slopes)), obs=yb)


def herds(herd, period, size, cases, centered=False, sub=None):
    level = numpyro.sample("level", dist.Normal(0.0, 3.0))
    periods = numpyro.sample("periods", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    a = group_effects("a", level, scale, 15, centered, "herds")
    with numpyro.plate("rows", len(cases), subsample_size=sub):
        i, t, n, y = (numpyro.subsample(v, event_dim=0) for v in (herd, period, size, cases))
        logits = a[i] + jnp.where(t > 0, periods[t - 1], 0.0)
        numpyro.sample("y", dist.Binomial(n, logits=logits), obs=y)


def item_response(person, item, y, sub=None):
    """Two-parameter logistic model: ability, difficulty and discrimination."""
    spread = numpyro.sample("spread", dist.HalfCauchy(2.0))
    center = numpyro.sample("center", dist.Normal(0.0, 2.0))
    with numpyro.plate("persons", 100):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
    with numpyro.plate("items", 20):
        difficulty = numpyro.sample("difficulty", dist.Normal(center, spread))
        discrimination = numpyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("answers", len(y), subsample_size=sub):
        p, k, yb = (numpyro.subsample(v, event_dim=0) for v in (person, item, y))
        logits = discrimination[k] * (ability[p] - difficulty[k])
        numpyro.sample("y", dist.Bernoulli(logits=logits), obs=yb)


def counts_data():
    rng = np.random.default_rng(0)
    system = np.repeat(np.arange(120), 8)
    method = np.tile(np.repeat([0, 1], 4), 120)
    a = rng.normal(4.5, 0.5, 120)
    mean = np.exp(a[system] + 0.35 * method)
    return system, method, rng.poisson(rng.gamma(8.0, mean / 8.0))


def radon_data():
    d = r_data("HLMdiag", "radon")
    county = codes(d["county"])
    uranium = np.zeros(county.max() + 1, np.float32)
    uranium[county] = d["uranium"]
    return county, single(d["basement"]), uranium, single(d["log.radon"])


def ticks_data():
    d = r_data("lme4", "grouseticks")
    y = np.asarray(d["TICKS"], np.int32)
    return codes(d["BROOD"]), codes(d["YEAR"]), single(d["cHEIGHT"]), y


def funnel_data():
    rng = np.random.default_rng(31)
    group = np.repeat(np.arange(40), 4)
    y = 1.0 + rng.normal(0.0, 0.5, 40)[group] + rng.normal(0.0, 3.0, 160)
    return group, single(y)


def sleep_data():
    d = r_data("lme4", "sleepstudy")
    return codes(d["Subject"]), single(d["Days"]), single(d["Reaction"])


def contraception_data():
    d = r_data("mlmRev", "Contraception")
    children = [d["livch"] == level for level in ("1", "2", "3+")]
    x = floats(d["age"], d["age"] ** 2 / 100, d["urban"] == "Y", *children)
    return codes(d["district"]), x, np.asarray(d["use"] == "Y", np.int32)


def seizures_data():
    d = r_data("MASS", "epil")
    x = floats(np.log(d["base"] / 4), d["trt"] == "progabide", np.log(d["age"]), d["V4"])
    return codes(d["subject"]), x, np.asarray(d["y"], np.int32)


def herds_data():
    d = r_data("lme4", "cbpp")
    size, cases = (np.asarray(d[name], np.int32) for name in ("size", "incidence"))
    return codes(d["herd"]), codes(d["period"]), size, cases


def item_response_data():
    rng = np.random.default_rng(32)
    person, item = np.repeat(np.arange(100), 20), np.tile(np.arange(20), 100)
    logits = rng.lognormal(0.0, 0.4, 20)[item] * (
        rng.normal(size=100)[person] - rng.normal(0.3, 1.0, 20)[item]
    )
    return person, item, (rng.random(2000) < 1.0 / (1.0 + np.exp(-logits))).astype(np.int32)


def noncentered(model):
    def with_noncentered_effects(*args, sub=None):
        return model(*args, centered=False, sub=sub)

    return with_noncentered_effects


def both(name, model, data, rows, batch_size, parameters, **nuts):
    """The centered form, and the non-centered one that gives the reference of both."""
    twin = f"{name}_noncentered"
    return [
        Entry(f"{name}_centered", model, data, rows, batch_size, parameters, twin=twin),
        Entry(twin, noncentered(model), data, rows, batch_size, parameters, nuts=HIERARCHY | nuts),
    ]


HIERARCHY = {"target_accept_prob": 0.95, "dense_mass": False, "num_samples": 10_000}

ENTRIES = [
    *both("counts", partially_pooled_counts, counts_data, 960, 96, ("m", "s", "b", "phi")),
    *both("radon", radon, radon_data, 919, 115, ("level", "soil", "floor", "between", "within")),
    *both(
        "ticks",
        ticks,
        ticks_data,
        403,
        50,
        ("level", "years", "slope", "scale"),
        num_samples=20_000,
    ),
    *both("funnel", funnel, funnel_data, 160, 20, ("mean", "scale")),
    *both(
        "sleep",
        sleep,
        sleep_data,
        180,
        23,
        ("level", "slope", "scale_level", "scale_slope", "sigma"),
    ),
    Entry(
        "contraception",
        contraception,
        contraception_data,
        1934,
        242,
        ("level", "slopes", "scale"),
        nuts=HIERARCHY,
    ),
    Entry(
        "seizures", seizures, seizures_data, 236, 30, ("level", "slopes", "scale"), nuts=HIERARCHY
    ),
    Entry("herds", herds, herds_data, 56, 16, ("level", "periods", "scale"), nuts=HIERARCHY),
    Entry(
        "item_response",
        item_response,
        item_response_data,
        2000,
        250,
        ("spread", "center", "difficulty", "discrimination"),
        nuts=HIERARCHY,
    ),
]
