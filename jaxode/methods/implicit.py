"""What families of implicit methods share: what they hand to the next step, and states as vectors."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.methods.linear import Linear, in_forward_mode, solver
from jaxode.methods.method import Method


class Implicit(Method):
    """A method that solves equations in each step. Its memory is the slope, which the next step uses.

    Attributes:
        c: the nodes of its stages.
    """

    c: tuple[float, ...]
    linear: Linear
    any_state = True
    implicit = True

    @property
    def stage_count(self) -> int:  # type: ignore[override]
        return len(self.c)

    def start(self, f, s, y: PyTree) -> PyTree:
        return f(y, s)

    def jacobian(self, f, field, s, y: Array) -> PyTree:
        """df/dy of the field as one of vectors: the user's own, or by derivatives of the field."""
        jac = getattr(f, "jac", None)
        if jac is None:
            with in_forward_mode():
                return self.linear.jacobian(lambda y: field(y, s), y)
        return self.linear.matrix(jac(y, s))

    def slope_of_system(self, f, s, y: PyTree, known: PyTree) -> PyTree:
        """dy/ds for M dy/ds = f: known = f in the rows of M that are not 0; in the others, which are
        algebraic equations, 0 = df/dy dy/ds + df/ds."""
        field, pack, unpack = vectors(f, y)
        x = pack(y)
        of_time = time_derivative(f, field, s, x)
        still = jnp.zeros_like(x) if of_time is None else -of_time
        algebraic = lax.convert_element_type(f.algebraic, x.dtype)
        solve = solver(self.linear, self.jacobian(f, field, s, x), -algebraic, f.mass)
        return unpack(solve(jnp.where(f.algebraic, still, pack(known))))

    def weights(self, mass, y: Array, h):
        """x -> M x, and what stands in the place of M in the matrix of the stages."""
        if mass is None:
            return lambda x: x, None
        one = self.linear.matrix(np.ones(len(y), y.dtype))
        # A step of size 0 is the identity: a singular M alone could not be solved with.
        regular = jax.tree.map(lambda one, m: jnp.where(h == 0, one, m), one, mass)
        return partial(self.linear.product, mass), regular

    def backwards(self) -> Method:
        raise ValueError(
            "adjoint='backsolve' has no implicit methods: it solves y(t) backwards in time, where the "
            "fast modes of a stiff problem explode. Use 'replay'."
        )


def time_derivative(f, field, s, y):
    """df/ds, or None where the field does not look at the time."""
    trace = getattr(f, "trace", None)
    if trace is not None and not trace.uses_time:
        return None
    return jax.jvp(lambda s: field(y, s), (s,), (jnp.ones_like(s),))[1]


def vectors(f, y: PyTree) -> tuple[Callable, Callable, Callable]:
    """A field as one of real vectors, and how states become vectors and come back.

    A complex number is two real ones; half precision is computed in float32.
    """
    leaves, structure = jax.tree.flatten(y)
    dtype = tree.widest(*map(tree.real_dtype, leaves)) if leaves else jnp.dtype(jnp.float32)
    plain = structure == jax.tree.structure(0) and leaves[0].ndim == 1 and leaves[0].dtype == dtype
    if plain:
        return f, lambda y: y, lambda x: x
    widths = [leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in leaves]

    def real(leaf):
        leaf = leaf.reshape(-1)
        parts = [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]
        return [lax.convert_element_type(part, dtype) for part in parts]

    def pack(y):
        return jnp.concatenate([part for leaf in jax.tree.leaves(y) for part in real(leaf)])

    def unpack(x):
        ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        parts = [x[end - width : end] for end, width in zip(ends, widths)]
        made = []
        for part, leaf in zip(parts, leaves):
            if jnp.iscomplexobj(leaf):
                part = lax.complex(part[: leaf.size], part[leaf.size :])
            made.append(lax.convert_element_type(part.reshape(leaf.shape), leaf.dtype))
        return structure.unflatten(made)

    return lambda x, s: pack(f(unpack(x), s)), pack, unpack


def square(rows, dtype):
    """Rows of a table as a matrix."""
    return np.array([[*row, *[0.0] * (len(rows) - len(row))] for row in rows], dtype)
