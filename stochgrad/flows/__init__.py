"""Normalizing flows: path gradients, divergences, and draws with weights."""

from stochgrad.flows import _layers as _layers
from stochgrad.flows._agreement import Agreement as Agreement
from stochgrad.flows._bijx import from_bijx as from_bijx
from stochgrad.flows._continuous import Continuous as Continuous
from stochgrad.flows._divergences import alpha_divergence as alpha_divergence
from stochgrad.flows._divergences import jensen_shannon as jensen_shannon
from stochgrad.flows._divergences import renyi_bound as renyi_bound
from stochgrad.flows._draw import FlowDraws as FlowDraws
from stochgrad.flows._draw import check_flow as check_flow
from stochgrad.flows._draw import draw_with_score as draw_with_score
from stochgrad.flows._draw import parameters as parameters
from stochgrad.flows._draw import split_flow as split_flow
from stochgrad.flows._draw import unwrap_flow as unwrap_flow
from stochgrad.flows._forward import forward_kl as forward_kl
from stochgrad.flows._jeffreys import jeffreys as jeffreys
from stochgrad.flows._mixture_base import mixture_of_normals as mixture_of_normals
from stochgrad.flows._modes import ModesFit as ModesFit
from stochgrad.flows._modes import ModesWarning as ModesWarning
from stochgrad.flows._modes import fit_modes as fit_modes
from stochgrad.flows._objective import LogDensity as LogDensity
from stochgrad.flows._objective import beyond_reach as beyond_reach
from stochgrad.flows._reverse import reverse_kl as reverse_kl
from stochgrad.flows._sample import ess_under_target as ess_under_target
from stochgrad.flows._sample import metropolis as metropolis
from stochgrad.flows._sample import sample as sample
from stochgrad.flows._sample import through as through
from stochgrad.flows._weighted import WeightedDraws as WeightedDraws
from stochgrad.flows._weighted import WeightsWarning as WeightsWarning

__all__ = [
    "Agreement",
    "Continuous",
    "FlowDraws",
    "ModesFit",
    "ModesWarning",
    "WeightedDraws",
    "WeightsWarning",
    "alpha_divergence",
    "draw_with_score",
    "ess_under_target",
    "fit_modes",
    "forward_kl",
    "from_bijx",
    "jeffreys",
    "jensen_shannon",
    "metropolis",
    "mixture_of_normals",
    "parameters",
    "renyi_bound",
    "reverse_kl",
    "sample",
    "through",
]


def __dir__() -> list[str]:
    return sorted(__all__)
