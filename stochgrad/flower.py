"""Federated sampling over a network, on Flower. Needs the extra ``[flower]``."""

from stochgrad.interop.flower import FederationWarning as FederationWarning
from stochgrad.interop.flower import LoopbackGrid as LoopbackGrid
from stochgrad.interop.flower import PrivacyPolicy as PrivacyPolicy
from stochgrad.interop.flower import client_app as client_app
from stochgrad.interop.flower import federate as federate
from stochgrad.interop.flower import privacy_spent as privacy_spent
from stochgrad.interop.flower import server_app as server_app

__all__ = [
    "FederationWarning",
    "LoopbackGrid",
    "PrivacyPolicy",
    "client_app",
    "federate",
    "privacy_spent",
    "server_app",
]


def __dir__() -> list[str]:
    return sorted(__all__)
