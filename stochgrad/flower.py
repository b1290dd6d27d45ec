"""Federated sampling over a network, on Flower. Needs the extra ``[flower]``."""

from stochgrad.interop.flower import FederationWarning as FederationWarning
from stochgrad.interop.flower import LoopbackGrid as LoopbackGrid
from stochgrad.interop.flower import client_app as client_app
from stochgrad.interop.flower import federate as federate
from stochgrad.interop.flower import server_app as server_app

__all__ = [
    "FederationWarning",
    "LoopbackGrid",
    "client_app",
    "federate",
    "server_app",
]


def __dir__() -> list[str]:
    return sorted(__all__)
