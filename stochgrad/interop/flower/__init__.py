"""The bridge to Flower."""

from stochgrad.interop.flower._client import client_app as client_app
from stochgrad.interop.flower._faults import FederationWarning as FederationWarning
from stochgrad.interop.flower._loopback import LoopbackGrid as LoopbackGrid
from stochgrad.interop.flower._privacy import PrivacyPolicy as PrivacyPolicy
from stochgrad.interop.flower._privacy import privacy_spent as privacy_spent
from stochgrad.interop.flower._server import federate as federate
from stochgrad.interop.flower._server import server_app as server_app
