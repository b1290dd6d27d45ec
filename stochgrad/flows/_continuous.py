"""Continuous normalizing flows: a vector field followed for a unit of time."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection

from stochgrad.core import check_callable, check_count, check_instance, describe, first_line
from stochgrad.gradients import Pushed, freeze, push_score


class Continuous(AbstractBijection):
    r"""The flow of an ordinary differential equation, as a flowjax bijection.

    $$\dot x = f(x, t), \qquad \frac{d}{dt}\log|\det J| = \nabla\cdot f, \qquad
      \dot s = -\Bigl(\frac{\partial f}{\partial x}\Bigr)^{\top} s - \nabla_x(\nabla\cdot f).$$

    The last equation carries the score along with the point, in the same solve [Vaitl et al. 2022].
    The divergence is exact, from a Jacobian, for up to some hundred dimensions.

    Args:
        vector_field: ``(x, t) -> dx/dt``, or ``(x, t, condition) -> dx/dt`` where ``cond_shape`` is
            given: any callable pytree, an equinox module for example. It should be smooth.
        shape: Shape of a point.
        cond_shape: Shape of the condition.
        solver: A diffrax solver.
        num_steps: Steps of the solver, all of the same size.

    Raises:
        TypeError: the field is no function, or does not return a point; the solver is not one of
            diffrax.
        ValueError: the field fails on a point or returns another shape; a shape or the number of
            steps is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from stochgrad.flows import Continuous
        >>> layer = Continuous(lambda x, t: -x, shape=(2,))
        >>> y, log_det = layer.transform_and_log_det(jnp.ones(2))
        >>> bool(jnp.allclose(y, jnp.exp(-1.0))), round(float(log_det), 3)
        (True, -2.0)
    """

    vector_field: Callable[..., Any]
    shape: tuple[int, ...]
    cond_shape: tuple[int, ...] | None
    solver: Any
    num_steps: int

    def __init__(
        self,
        vector_field: Callable[..., Any],
        *,
        shape: tuple[int, ...],
        cond_shape: tuple[int, ...] | None = None,
        solver: Any = None,
        num_steps: int = 16,
    ):
        self.vector_field = check_callable("vector_field", vector_field, "a function (x, t)")
        self.shape = _shape("shape", shape)
        self.cond_shape = None if cond_shape is None else _shape("cond_shape", cond_shape)
        solver = diffrax.Tsit5() if solver is None else solver
        wanted = "a solver of ordinary differential equations of diffrax, such as Tsit5()"
        self.solver = check_instance("solver", solver, diffrax.AbstractSolver, wanted)
        self.num_steps = check_count("num_steps", num_steps)
        self._check_field()

    def transform_and_log_det(self, x, condition=None):
        x = jnp.asarray(x)
        return self._solve(self._moving(condition), (x, _zero_at(x)))

    def inverse_and_log_det(self, y, condition=None):
        y = jnp.asarray(y)
        return self._solve(self._moving(condition), (y, _zero_at(y)), back=True)

    def _check_field(self):
        x, t, condition = (
            None if shape is None else jax.ShapeDtypeStruct(shape, jnp.result_type(float))
            for shape in (self.shape, (), self.cond_shape)
        )
        try:
            out = jax.eval_shape(self._field, x, t, condition)
        except Exception as error:
            raise ValueError(
                f"vector_field fails on a point of shape {self.shape}"
                f"{'' if condition is None else f' and a condition of shape {condition.shape}'}: "
                f"{first_line(error)}."
            ) from error
        if not isinstance(out, jax.ShapeDtypeStruct):
            raise TypeError(f"vector_field must return one array, got {describe(out)}.")
        if out.shape != self.shape or not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(
                f"vector_field must return floating-point numbers of the shape {self.shape} of a "
                f"point, got {out.dtype} of shape {out.shape}."
            )

    def _field(self, x, t, condition):
        return self.vector_field(x, t, *(() if self.cond_shape is None else (condition,)))

    def _divergence(self, x, t, condition):
        jacobian = jax.jacfwd(lambda x: self._field(x, t, condition))(x)
        return jnp.trace(jacobian.reshape(x.size, x.size))

    def _moving(self, condition):
        def rates(t, state, _):
            x = state[0]
            return self._field(x, t, condition), self._divergence(x, t, condition)

        return rates

    def _solve(self, rates, start, back: bool = False):
        t0, t1 = (1.0, 0.0) if back else (0.0, 1.0)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rates),
            self.solver,
            t0,
            t1,
            (t1 - t0) / self.num_steps,
            start,
            saveat=diffrax.SaveAt(t1=True),
            max_steps=self.num_steps + 1,
        )
        return jax.tree.map(lambda leaf: leaf[0], solution.ys)


def _zero_at(x):
    """Zero, one for each point under ``vmap``.

    A sum that begins the same for all points, and grows the same where the divergence is constant,
    is carried once for all; the solver's backward pass then adds its gradient once for each point.
    """
    first = x.ravel()[:1]
    return jnp.sum(jnp.where(first > 0, 0.0, jnp.zeros_like(first)))


def _shape(name: str, value: Any) -> tuple[int, ...]:
    """The value as a shape, if it is one."""
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple of sizes, such as (2,), got {describe(value)}.")
    return tuple(check_count(f"{name}[{n}]", size) for n, size in enumerate(value))


@push_score.register(Continuous)
def _continuous(layer, x, score, condition=None) -> Pushed:
    moving = layer._moving(condition)
    frozen, given = freeze((layer, condition))

    def rates(t, state, args):
        still, s = freeze((state[0], state[2]))

        def falling(x):
            return jnp.vdot(frozen._field(x, t, given), s) + frozen._divergence(x, t, given)

        return *moving(t, state[:2], args), -jax.grad(falling)(still)

    y, log_det, score = layer._solve(rates, (x, _zero_at(x), score))
    return Pushed(y, log_det, freeze(score))
