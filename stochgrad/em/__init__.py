"""Latent-variable learning by Markov chain Monte Carlo expectation-maximization."""

from stochgrad.em._allocate import Allocator as Allocator
from stochgrad.em._allocate import Tally as Tally
from stochgrad.em._allocate import gvm as gvm
from stochgrad.em._allocate import reinforce_ada as reinforce_ada
from stochgrad.em._allocate import uniform as uniform
from stochgrad.em._allocate import vade as vade
from stochgrad.em._decode import Inputs as Inputs
from stochgrad.em._decode import Network as Network
from stochgrad.em._decode import Prompts as Prompts
from stochgrad.em._decode import decoder as decoder
from stochgrad.em._decode import left_padded as left_padded
from stochgrad.em._estimators import Estimator as Estimator
from stochgrad.em._estimators import bnpo as bnpo
from stochgrad.em._estimators import grpo as grpo
from stochgrad.em._estimators import maxk as maxk
from stochgrad.em._estimators import raft as raft
from stochgrad.em._estimators import reinforce as reinforce
from stochgrad.em._estimators import rest_em as rest_em
from stochgrad.em._estimators import star as star
from stochgrad.em._estimators import trice as trice
from stochgrad.em._evaluate import Evaluation as Evaluation
from stochgrad.em._evaluate import Rate as Rate
from stochgrad.em._evaluate import evaluate as evaluate
from stochgrad.em._evaluate import json_lines as json_lines
from stochgrad.em._history import History as History
from stochgrad.em._host_verifier import HostVerifier as HostVerifier
from stochgrad.em._host_verifier import host_verifier as host_verifier
from stochgrad.em._host_verifier import on_host as on_host
from stochgrad.em._latent_store import Memory as Memory
from stochgrad.em._latent_store import unsolved as unsolved
from stochgrad.em._mcmc_em import EMState as EMState
from stochgrad.em._mcmc_em import mcmc_em as mcmc_em
from stochgrad.em._minibatch import Minibatch as Minibatch
from stochgrad.em._minibatch import Stats as Stats
from stochgrad.em._minibatch import Visit as Visit
from stochgrad.em._model import Guide as Guide
from stochgrad.em._model import LatentModel as LatentModel
from stochgrad.em._model import Policy as Policy
from stochgrad.em._model import Questions as Questions
from stochgrad.em._model import Rationales as Rationales
from stochgrad.em._model import VerifierWarning as VerifierWarning
from stochgrad.em._model import verified as verified

__all__ = [
    "Allocator",
    "EMState",
    "Estimator",
    "Evaluation",
    "Guide",
    "History",
    "HostVerifier",
    "Inputs",
    "LatentModel",
    "Memory",
    "Minibatch",
    "Network",
    "Policy",
    "Prompts",
    "Questions",
    "Rate",
    "Rationales",
    "Stats",
    "Tally",
    "VerifierWarning",
    "Visit",
    "bnpo",
    "decoder",
    "evaluate",
    "grpo",
    "gvm",
    "host_verifier",
    "json_lines",
    "left_padded",
    "maxk",
    "mcmc_em",
    "on_host",
    "raft",
    "reinforce",
    "reinforce_ada",
    "rest_em",
    "star",
    "trice",
    "uniform",
    "unsolved",
    "vade",
    "verified",
]


def __dir__() -> list[str]:
    return sorted(__all__)
