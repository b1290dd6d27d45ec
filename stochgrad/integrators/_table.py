"""The integrators by name. To add one, write its step in a file of its own and enter it here."""

from stochgrad.integrators._euler import euler_maruyama, leapfrog, semi_implicit
from stochgrad.integrators._protocol import Integrator
from stochgrad.integrators._ruth import third_order
from stochgrad.integrators._splitting import splitting
from stochgrad.integrators._symmetric import symmetric_splitting

INTEGRATORS: dict[str, Integrator] = {
    "SGHMC": semi_implicit,
    "EM": euler_maruyama,
    "LEAPFROG": leapfrog,
    "SSI": symmetric_splitting,
    "LT": splitting("BABO"),
    "MT3": third_order,
}


def integrator_of(name: str) -> Integrator:
    """The integrator of a name, or of a splitting word.

    Raises:
        ValueError: it is neither; the letters at fault are named.
    """
    if isinstance(name, str) and name in INTEGRATORS:
        return INTEGRATORS[name]
    try:
        return splitting(name)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"integrator must be one of {list(INTEGRATORS)} or a splitting word such as 'BAOAB', "
            f"got {name!r}: {error}"
        ) from None
