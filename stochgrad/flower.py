"""Federated sampling over a network, on Flower. Needs the extra ``[flower]``."""

from stochgrad.interop._flower_client import client_app as client_app
from stochgrad.interop._flower_loopback import LoopbackGrid as LoopbackGrid
from stochgrad.interop._flower_server import federate as federate
from stochgrad.interop._flower_server import server_app as server_app
