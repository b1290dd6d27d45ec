"""Normalizing flows: path gradients, divergences, and draws with weights."""

from stochgrad.flows import _layers as _layers
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
from stochgrad.flows._objective import LogDensity as LogDensity
from stochgrad.flows._objective import beyond_reach as beyond_reach
from stochgrad.flows._reverse import reverse_kl as reverse_kl
from stochgrad.flows._sample import WeightedDraws as WeightedDraws
from stochgrad.flows._sample import WeightsWarning as WeightsWarning
from stochgrad.flows._sample import ess_under_target as ess_under_target
from stochgrad.flows._sample import metropolis as metropolis
from stochgrad.flows._sample import sample as sample
from stochgrad.flows._sample import through as through
