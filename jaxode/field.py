"""The user's function, traced once, and moved to the unit interval.

Every solve is a solve on [0, 1]: with t = t0 + (t1 - t0) s, dy/dt = f(y, t) becomes
dy/ds = (t1 - t0) f(y, t0 + (t1 - t0) s). Decreasing time is then nothing special (t1 - t0 < 0), the
gradients with respect to t0 and t1 are those of two more parameters of the field, and steps keep
their full relative precision when t0 is large, because what is added up is s and not t.
"""

import functools
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend import core
from jaxtyping import Array, PyTree

from jaxode import tree


class Field(eqx.Module):
    """The right-hand side on the unit interval: `field(y, s)` is dy/ds, a pytree like y.

    Its arrays (the parameters found in func, in args and in what func closes over; t0 and t1) are
    leaves, so that a solve can be differentiated with respect to them.
    """

    trace: "Trace" = eqx.field(static=True)
    leaves: list[Any]
    t0: Array
    t1: Array
    span: Array  # t1 - t0; 1 if they are equal
    time_dtype: Any = eqx.field(static=True)

    def time(self, s):
        """t0 + (t1 - t0) s, never beyond t1 by a rounding; t0 if func does not look at it."""
        if not self.trace.uses_time:
            return self.t0
        t = self.t0 + self.span * s
        low, high = jnp.minimum(self.t0, self.t1), jnp.maximum(self.t0, self.t1)
        # `where`, not `clip`: at a tie the derivative is that of t.
        return jnp.where(t < low, low, jnp.where(t > high, high, t))

    def __call__(self, y: PyTree, s) -> PyTree:
        out = self.trace(self.leaves, y, lax.convert_element_type(self.time(s), self.time_dtype))
        return jax.tree.map(lambda k: tree.scale(self.span, k), out)


class Trace:
    """A jaxpr with its constants taken out: a function that is equal to another when it does the same.

    Two Python functions with the same operations have equal traces, so that a new lambda or a
    rebuilt module does not compile again, and one function that has changed (a global that it reads
    was rebound) does. Custom derivative rules cannot be compared: where there are any, `origin`
    (what was traced: its structure and static parts) has to be equal as well.
    """

    def __init__(self, closed: core.ClosedJaxpr, out_tree, origin):
        self.jaxpr, self.out_tree = closed.jaxpr, out_tree
        rules = []
        key = fingerprint(closed.jaxpr, rules)
        self.key = (key, out_tree, frozen(origin, rules) if rules else None)
        time = closed.jaxpr.invars[-1]
        used = [x for eqn in closed.jaxpr.eqns for x in eqn.invars] + closed.jaxpr.outvars
        self.uses_time = any(x is time for x in used)

    def depends(self, outputs, inputs) -> bool:
        """Whether any of these leaves of dy/dt depends on any of these leaves of y."""
        y = self.jaxpr.invars[-1 - len(self.jaxpr.outvars) : -1]
        reached = {y[i] for i in inputs}
        for eqn in self.jaxpr.eqns:
            if any(not isinstance(x, core.Literal) and x in reached for x in eqn.invars):
                reached |= set(eqn.outvars)
        return any(self.jaxpr.outvars[i] in reached for i in outputs)

    def __call__(self, leaves, y, t):
        out = self.call(leaves, jax.tree.leaves(y), t)
        return jax.tree.unflatten(self.out_tree, out)

    @functools.cached_property
    def call(self):
        """The jaxpr as a function, which JAX traces, and differentiates, once for all its calls."""

        @jax.jit
        def func(leaves, y, t):
            count = len(self.jaxpr.constvars)
            closed = core.ClosedJaxpr(self.jaxpr, leaves[:count])
            return core.jaxpr_as_fun(closed)(*leaves[count:], *y, t)

        return func

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, Trace) and self.key == other.key


def fingerprint(jaxpr, rules: list) -> tuple:
    """What a jaxpr does, as nested tuples that can be compared; custom rules are only collected."""
    number = itertools.count()
    names = {}

    def name(atom):
        if isinstance(atom, core.Literal):
            return "literal", str(atom.aval), np.asarray(atom.val).tobytes()
        if atom not in names:
            names[atom] = next(number)
        return names[atom], str(atom.aval)

    def parameter(eqn, value):
        plain = isinstance(value, core.ClosedJaxpr | core.Jaxpr | bool | int | str | tuple | list)
        if eqn.primitive.name.startswith("custom_") and not plain:
            rules.append(value)
            return "rule"
        return frozen(value, rules)

    heads = tuple(map(name, [*jaxpr.constvars, *jaxpr.invars]))
    equations = tuple(
        (
            eqn.primitive,
            tuple(map(name, eqn.invars)),
            tuple(map(name, eqn.outvars)),
            tuple((key, parameter(eqn, value)) for key, value in sorted(eqn.params.items())),
        )
        for eqn in jaxpr.eqns
    )
    return heads, equations, tuple(map(name, jaxpr.outvars))


def frozen(value, rules: list):
    """A parameter of an equation, as something hashable that is equal only to what does the same."""
    if isinstance(value, core.ClosedJaxpr):
        consts = tuple(frozen(c, rules) for c in value.consts)
        return fingerprint(value.jaxpr, rules), consts
    if isinstance(value, core.Jaxpr):
        return fingerprint(value, rules)
    if isinstance(value, list | tuple):
        return type(value), tuple(frozen(item, rules) for item in value)
    if isinstance(value, dict):
        return tuple((key, frozen(item, rules)) for key, item in sorted(value.items()))
    if isinstance(value, np.ndarray | np.generic) or (
        isinstance(value, jax.Array) and not isinstance(value, Tracer)
    ):
        return str(value.dtype), value.shape, np.asarray(value).tobytes()
    try:
        hash(value)
    except TypeError:
        return Identity(value)
    return value


class Identity:
    """Equal to nothing but the same object, which it keeps alive."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return id(self.value)

    def __eq__(self, other):
        return isinstance(other, Identity) and self.value is other.value
