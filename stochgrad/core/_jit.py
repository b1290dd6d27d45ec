"""``jax.jit`` whose programs are told by what they compute, and hold no data.

Arrays that a function closes over become arguments of its program, and so do the numbers that it
marks by ``number``. What is left is a trace: primitives, shapes and literals. Two functions of one
trace share an executable, so that another step size, another data set of the same shapes or the
same recipe once more compiles nothing; and as an executable holds no arrays, keeping it keeps no
data.
"""

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache, wraps
from types import MethodType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer, eval_jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from stochgrad.core._checks import describe
from stochgrad.core._distributed import put_global

T = TypeVar("T")

_MOST_EXECUTABLES = 128
_MOST_CONSTANT_BYTES = 2**12
_executables: OrderedDict[Hashable, Any] = OrderedDict()

_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
"""Primitives that carry rules for a differentiation that has been done by now."""


def number(value: Any, dtype: Any = float) -> Array:
    """A number or an array of some type; a plain number is an argument of the program it is in.

    The value itself is rounded here, once, from the double precision of the host.
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if isinstance(value, jax.Array) or np.ndim(value) > 0:
        return jnp.asarray(value, dtype)
    # jax writes scalars into a program, and hands in what has an axis
    return lax.squeeze(np.asarray(value).astype(dtype)[None], (0,))


class _Memory(OrderedDict):
    """What a function remembers; a copy of the function in another process begins anew."""

    def __reduce__(self):
        return type(self), ()


def remember(owner: Any, key: Hashable, make: Callable[[], T], most: int = 16) -> T:
    """``make()``, or what it made before for this owner and key; it is forgotten with the owner.

    Args:
        owner: A function; where it has no room for attributes nothing is remembered.
        key: What tells one result from another.
        make: Makes it.
        most: How many results an owner remembers; the oldest go.
    """
    memory = getattr(owner, "__dict__", {}).get("_stochgrad_memory")
    if memory is None:
        memory = _Memory()
        try:
            owner._stochgrad_memory = memory
        except (AttributeError, TypeError):
            return make()
    if key not in memory:
        memory[key] = make()
        while len(memory) > most:
            memory.popitem(last=False)
    memory.move_to_end(key)
    return memory[key]


def remembered(make: Callable[..., T]) -> Callable[..., T]:
    """A function whose results its first argument, itself a function, remembers."""

    @wraps(make)
    def recall(owner, *args):
        return remember(owner, (make, *args), lambda: make(owner, *args))

    return recall


class hoisted_jit:
    """``jax.jit``, with the arrays that a function closes over passed as arguments.

    Closed-over arrays would be constants of the program: a data set of 100 MB is then printed into
    it, held twice and folded over. As arguments they cost nothing.

    Args:
        function: A pure function of trees of arrays.
        mesh: The devices that arguments are spread over, if there are several.
        donate: Whether the first argument's memory may be used for the results.
    """

    def __init__(self, function: Callable, mesh: Mesh | None = None, donate: bool = False):
        self._function = function
        self._mesh = mesh
        self._donate = donate
        self._programs: dict[Hashable, tuple[list, Callable, Any]] = {}

    def __call__(self, *args):
        leaves, structure = jax.tree.flatten(args)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return self._function(*args)
        # with a mesh jit itself looks after where arguments lie
        places = () if self._mesh is not None else tuple(map(_place, leaves))
        form = structure, tuple(map(_form, leaves)), places
        if form not in self._programs:
            closed, out = jax.make_jaxpr(self._function, return_shape=True)(*args)
            if any(isinstance(c, Tracer) for c in closed.consts):
                return self._function(*args)
            self._programs[form] = self._compile(closed, args, jax.tree.structure(out))
        constants, run, out = self._programs[form]
        first = jax.tree.leaves(args[:1])
        return jax.tree.unflatten(out, run(constants, first, leaves[len(first) :]))

    def _compile(self, closed, args, out) -> tuple[list, Callable, Any]:
        def program(constants, first, rest):
            return eval_jaxpr(closed.jaxpr, constants, *first, *rest)

        donated = (1,) if self._donate else ()
        jitted = jax.jit(program, donate_argnums=donated, compiler_options=_compiler_options())
        if self._mesh is not None:
            replicated = NamedSharding(self._mesh, PartitionSpec())
            lies = lambda c: getattr(getattr(c, "sharding", None), "mesh", None) == self._mesh
            return [c if lies(c) else put_global(c, replicated) for c in closed.consts], jitted, out
        constants = [jnp.asarray(c) for c in closed.consts]
        inputs = constants, jax.tree.leaves(args[:1]), jax.tree.leaves(args[1:])
        content = _content(closed.jaxpr)
        if content is None:
            return constants, jitted.lower(*inputs).compile(), out
        key = content, tuple(map(_place, jax.tree.leaves(inputs))), self._donate, len(inputs[1])
        if key not in _executables:
            _executables[key] = jitted.lower(*inputs).compile()
            while len(_executables) > _MOST_EXECUTABLES:
                _executables.popitem(last=False)
        _executables.move_to_end(key)
        return constants, _executables[key], out


@cache
def _compiler_options() -> dict[str, Any]:
    """Options of XLA under which a step of many small operations is not slower than their sum.

    On a CPU it orders operations so that independent ones may run on several threads; where they
    take a microsecond, handing them over costs more than that.
    """
    options: dict[str, Any] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except Exception:  # a version of XLA that knows no such option
        return {}
    return options


def _form(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else type(leaf)


def _place(leaf: Any) -> Hashable:
    """Where an argument lies, unless it goes where the others are."""
    committed = isinstance(leaf, jax.Array) and getattr(leaf, "committed", False)
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return leaf.sharding if committed else str(default)


_PLAIN = (bool, int, float, str, type(None))


class _Private(Exception):
    """A trace holds something that cannot be told by its value: a closure, or much data."""


def _content(jaxpr: Any) -> Hashable | None:
    """What a trace computes of its constants and arguments, as a value that equals that of any
    other such trace; None if it holds what cannot be compared, such as a callback.
    """
    try:
        content = _of_jaxpr(jaxpr, consts=())
        hash(content)
        return content
    except (_Private, TypeError):
        return None


def _of_jaxpr(jaxpr: Any, consts: Any = None) -> Hashable:
    numbers: dict[Any, int] = {}

    def define(variables):
        for variable in variables:
            numbers[variable] = len(numbers)
        return tuple(variable.aval for variable in variables)

    def read(atom):
        if hasattr(atom, "val"):
            return _of_value(np.asarray(atom.val)), atom.aval
        return numbers[atom]

    consts = getattr(jaxpr, "consts", ()) if consts is None else consts
    consts = tuple(map(_of_value, consts))
    inside = jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr
    inputs = define(inside.constvars), define(inside.invars)
    equations = []
    for equation in inside.eqns:
        read_in = tuple(read(atom) for atom in equation.invars)
        params = equation.params
        if equation.primitive.name in _RULES:
            params = {name: params[name] for name in ("call_jaxpr", "fun_jaxpr") if name in params}
        equations.append(
            (
                equation.primitive.name,
                read_in,
                define(equation.outvars),
                tuple((name, _of_value(params[name])) for name in sorted(params)),
                equation.ctx.compute_type,
                equation.ctx.threefry_partitionable,
                str(equation.ctx.xla_metadata),
            )
        )
    return consts, inputs, tuple(equations), tuple(read(atom) for atom in inside.outvars)


def _of_value(value: Any) -> Hashable:
    """A parameter of a primitive by its value."""
    if type(value) in _PLAIN:
        return type(value), value
    if hasattr(value, "eqns"):
        return _of_jaxpr(value)
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_of_value, value))
    if isinstance(value, dict):
        return tuple((name, _of_value(x)) for name, x in value.items())
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        if array.nbytes > _MOST_CONSTANT_BYTES or array.dtype.hasobject:
            raise _Private(describe(value))
        return array.shape, array.dtype, array.tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (getattr(value, field.name) for field in dataclasses.fields(value))
        return type(value), tuple(map(_of_value, fields))
    own = type(value).__hash__ not in (None, object.__hash__) and not isinstance(value, MethodType)
    if own or value is None or isinstance(value, Mesh):  # there is one mesh of each kind
        return type(value), value
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if getattr(module, getattr(value, "__qualname__", ""), None) is value:
        return value  # a function or a class of a module
    marker = type(value).__module__.startswith("jax.") and not getattr(value, "__dict__", None)
    if marker and not callable(value):
        return type(value)  # a mark without a state, such as that of a sharding left open
    raise _Private(describe(value))
