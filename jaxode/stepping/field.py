"""The user's function, traced once, and moved to the unit interval.

Every solve is a solve on [0, 1]: with t = t0 + (t1 - t0) s, dy/dt = f(y, t) becomes
dy/ds = (t1 - t0) f(y, t0 + (t1 - t0) s). Decreasing time is then nothing special (t1 - t0 < 0), the
gradients with respect to t0 and t1 are those of two more parameters of the field, and steps keep
their full relative precision when t0 is large, because what is added up is s and not t.
"""

import dataclasses
import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.kernels.traces import Trace
from jaxode.methods.method import Parts


class Field(eqx.Module):
    """The right-hand side on the unit interval: `field(y, s)` is dy/ds, a pytree like y.

    Its arrays (the parameters found in func, in args and in what func closes over; t0 and t1) are
    leaves, so that a solve can be differentiated with respect to them.
    """

    trace: Trace = eqx.field(static=True)
    leaves: list[Any]
    t0: Array
    t1: Array
    span: Array  # t1 - t0; 1 if they are equal
    time_dtype: Any = eqx.field(static=True)
    beyond: bool = eqx.field(static=True, default=False)  # as of a `Method`

    @property
    def parts(self) -> list["Field"]:
        """The fields of which this is the sum: one, or a stiff one and another."""
        return [dataclasses.replace(self, trace=trace) for trace in self.trace.parts]

    def time(self, s):
        """t0 + (t1 - t0) s, never beyond t1 by a rounding; t0 if func does not look at it.

        A method with stages after the end of its step sees times after t1.
        """
        if not self.trace.uses_time:
            return self.t0
        t = self.t0 + self.span * s
        if self.beyond:
            return t
        return tree.between(t, jnp.minimum(self.t0, self.t1), jnp.maximum(self.t0, self.t1))

    def value(self, y: PyTree, s) -> PyTree:
        """What the traced function returns at s, in its own unit of time."""
        return self.trace(self.leaves, y, lax.convert_element_type(self.time(s), self.time_dtype))

    def __call__(self, y: PyTree, s) -> PyTree:
        out = self.trace(self.leaves, y, lax.convert_element_type(self.time(s), self.time_dtype))
        if isinstance(out, Parts):
            out = jax.tree.map(jnp.add, *out)
        return jax.tree.map(lambda k: tree.scale(self.span, k), out)


class AroundField(eqx.Module):
    """A field that holds another, with something beside it: arrays of that are leaves too, so that every
    adjoint has their derivatives."""

    field: Any

    @property
    def trace(self) -> Trace:
        return self.field.trace

    @property
    def parts(self) -> list:
        return [dataclasses.replace(self, field=field) for field in self.field.parts]

    def __call__(self, y: PyTree, s) -> PyTree:
        return self.field(y, s)

    def observed(self, y: PyTree, s) -> PyTree:
        """What is kept of the state y at s."""
        return self.field.observed(y, s)


class Observed(AroundField):
    """A field with the function of the state that is kept of its solution."""

    function: Field  # its `value` is what is kept

    def observed(self, y: PyTree, s) -> PyTree:
        """What is kept of the state y at s."""
        return self.function.value(y, s)


class System(AroundField):
    """M dy/ds = field(y, s), for methods that know of M: y, as one vector, has a mass matrix.

    A row of M that is 0 is an algebraic equation. With `jac` the Jacobian of the field is the user's.
    """

    # `field` is M dy/ds.
    mass: Any = None  # in the form of the method's linear algebra; None for the identity
    algebraic: Any = None  # which rows of M are 0
    jac: Any = None  # of the vector and s; None to differentiate the field


def beyond_the_end(field):
    """The same field, whose time goes on where a rounding leads after t1: held at t1 it would be a constant,
    and what func is there without its derivative in time."""
    fields = dataclasses.fields(field) if isinstance(field, Field | AroundField) else ()
    inner = {x.name: beyond_the_end(getattr(field, x.name)) for x in fields}
    inner = {name: value for name, value in inner.items() if isinstance(value, Field | AroundField)}
    more = dict(beyond=True) if isinstance(field, Field) else {}
    return dataclasses.replace(field, **inner, **more) if inner or more else field


def unravelled(field, y) -> PyTree:
    """The state as the user knows it, of a field that may be inside of others."""
    while not hasattr(field, "unravel") and hasattr(field, "field"):
        field = field.field
    return field.unravel(y) if hasattr(field, "unravel") else y


RAVELLED = 4096  # numbers of a state of several arrays, up to which it is solved as one vector


class Ravelled(AroundField):
    """A field of states of several arrays, as one of vectors: each operation of a step is then one."""

    structure: Any = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __call__(self, y, s):
        return ravel(self.field(self.unravel(y), s))

    def observed(self, y, s) -> PyTree:
        return self.field.observed(self.unravel(y), s)

    def unravel(self, y) -> PyTree:
        """A vector as the state it stands for."""
        ends = list(itertools.accumulate(map(math.prod, self.shapes)))
        parts = [y[a:b] for a, b in zip([0, *ends], ends)]
        return self.structure.unflatten([x.reshape(of) for x, of in zip(parts, self.shapes)])


def ravel(y: PyTree) -> Array:
    """A state as one vector."""
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(y)])


def several(y0: PyTree) -> bool:
    """Whether a state is of several arrays that go into one vector of no great size."""
    leaves = jax.tree.leaves(y0)
    alike = len({leaf.dtype for leaf in leaves}) == 1
    return len(leaves) > 1 and alike and sum(leaf.size for leaf in leaves) <= RAVELLED
