"""The collection of posteriors in benchmarks/: models, references and what counts as right."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

import stochgrad
from benchmarks.posteriors import ENTRIES, compare, references


@pytest.mark.parametrize("name", ["silent_center", "counts_centered"])
def test_a_model_reads_as_minibatches(name):
    entry = ENTRIES[name]
    with jax.numpy_dtype_promotion("standard"):  # models multiply integers and floats
        target = stochgrad.from_numpyro(entry.minibatch_model(), *entry.data())
        site = target.constrain(target.initial(jax.random.key(0)))
    assert (target.batches.size, target.batches.batch_size) == (entry.rows, entry.batch_size)
    assert set(entry.parameters) <= set(site)


PENDING = {"horseshoe"}
"""Posteriors whose long run has not been made or accepted: no comparison knows them."""


def test_references_cover_every_posterior_that_is_compared():
    known = {name for name in ENTRIES if references.known(name)}
    assert set(ENTRIES) - known == PENDING
    assert len(known) >= 24
    for name in known:
        reference, entry = references.reference(name), ENTRIES[name]
        assert reference["accepted"], name
        assert set(reference["mean"]) == set(reference["sd"]) == set(entry.parameters), name
        assert all(np.all(np.asarray(sd) > 0) for sd in reference["sd"].values()), name


def fake_infer(scale, shift, ok):
    """What ``infer`` returns, with draws of a known mean and spread."""
    reference = references.reference("silent_center")

    def infer(key, model, *args, batch_size, method, num_samples, num_chains, progress):
        rng = np.random.default_rng(0)
        draws = {
            name: np.asarray(mean)
            + np.asarray(reference["sd"][name])
            * (shift + scale * rng.normal(size=(num_chains, num_samples, *np.shape(mean))))
            for name, mean in reference["mean"].items()
        }
        return SimpleNamespace(
            constrained=lambda: draws,
            verdict=SimpleNamespace(ok=ok, reasons=[] if ok else ["not mixed"]),
            attrs={"gradients": 10},
            timings={},
        )

    return infer


@pytest.mark.parametrize(
    ("scale", "shift", "ok", "expected"),
    [
        (1.0, 0.0, True, "right"),
        (1.0, 0.0, False, "says no, is right"),
        (1.0, 0.4, True, "WRONG IN SILENCE"),
        (1.4, 0.0, True, "WRONG IN SILENCE"),
        (0.7, 0.0, False, "says no"),
        (np.nan, 0.0, True, "WRONG IN SILENCE"),
    ],
)
def test_what_is_wrong_without_a_word_is_called_so(scale, shift, ok, expected):
    entry = ENTRIES["silent_center"]
    record = compare.compare(
        entry, fake_infer(scale, shift, ok), "sghmc", references.reference(entry.name)
    )
    assert record["outcome"] == expected


def test_an_error_is_a_record():
    def refuse(*args, **options):
        raise ValueError("no such posterior")

    entry = ENTRIES["silent_center"]
    record = compare.compare(entry, refuse, "sghmc", references.reference(entry.name))
    assert record["outcome"] == "error"
    assert "no such posterior" in record["error"]
