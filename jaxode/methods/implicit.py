"""What families of implicit methods share: what they hand to the next step, and states as vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.methods.linear import Linear
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
            return self.linear.jacobian(lambda y: field(y, s), y)
        return self.linear.matrix(jac(y, s))

    def backwards(self) -> Method:
        raise ValueError(
            "adjoint='backsolve' has no implicit methods: it solves y(t) backwards in time, where the "
            "fast modes of a stiff problem explode. Use 'replay'."
        )


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
