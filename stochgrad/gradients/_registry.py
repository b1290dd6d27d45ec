"""The gradients of a posterior by name. To add one, write its file and enter it here.

Every gradient that is entered goes through all tests of ``tests/sgmcmc/test_contract.py``.
"""

from collections.abc import Callable

from stochgrad.core import Gradient, Position, Posterior
from stochgrad.gradients._control_variate import control_variate
from stochgrad.gradients._minibatch import minibatch
from stochgrad.gradients._saga import saga
from stochgrad.gradients._svrg import svrg

GRADIENTS: dict[str, Callable[[Posterior, Position], Gradient]] = {
    "minibatch": lambda posterior, position: minibatch(posterior),
    "control variate": control_variate,
    "svrg": lambda posterior, position: svrg(posterior, period=7),
    "saga": lambda posterior, position: saga(posterior),
}
"""``(posterior, position) -> gradient``, with a position near the mode for those that need one."""
