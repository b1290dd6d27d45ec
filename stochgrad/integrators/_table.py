"""The integrators by name. To add one, write its step in a file of its own and enter it here."""

from stochgrad.integrators._euler_maruyama import euler_maruyama
from stochgrad.integrators._protocol import Integrator
from stochgrad.integrators._semi_implicit import semi_implicit

INTEGRATORS: dict[str, Integrator] = {"SGHMC": semi_implicit, "EM": euler_maruyama}
