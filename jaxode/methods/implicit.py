"""What families of implicit methods share: what they hand to the next step, and states as vectors."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.methods.linear import Linear, in_forward_mode, solver
from jaxode.methods.method import Method, Step, for_inside


class Implicit(Method):
    """A method that solves equations in each step. Its memory is the slope, which the next step uses.

    Attributes:
        c: the nodes of its stages.
        gamma: the coefficient of the implicit part of a stage.
        places: where a step can look at its dense output. Errors there are largest in the middle, or of two
            signs and then 0 in the middle.
        looks: where it does: nowhere, or there.
    """

    c: tuple[float, ...]
    gamma: float
    places: tuple[float, ...] = (0.3,)
    looks: tuple[float, ...] = ()
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

    def fastest(self, f, s, y: PyTree, memory: PyTree):
        stiff = parts_of(f)[0]
        field, pack, _ = vectors(stiff, y)
        jac = getattr(stiff, "jac", None)
        if jac is None:
            times = lambda x: field(x, s)
        else:
            times = partial(self.linear.product, self.linear.matrix(jac(lax.stop_gradient(y), s)))
        return geometric(begin_to_follow(times, pack(y), s.dtype)[1])

    def looking_inside(self) -> Method:
        if self.error_order is None:
            return self
        return dataclasses.replace(self, looks=self.places)  # type: ignore[type-var]

    def errors_inside(
        self, f, s, y: PyTree, h, step: Step, solve: Callable, weigh: Callable
    ) -> list:
        """The errors of `inside` where a step looks at it.

        A component that is held to a curve by fast modes is found without error at the end of a step, however
        long that is; what lies between is a polynomial p that knows nothing of the curve (in the problem of
        Prothero and Robinson it is wrong by 1.4 at a tolerance of 1e-3, and that of SciPy's Radau by 1.5). It
        fulfils p' = f(p) + r, so its error e has e' = J e + r: e is about (1 / (gamma h) - J)^-1 r, which is
        right for fast modes, and of a right size for slow ones. `solve` is b -> x with (M - gamma h J) x = b,
        and `weigh` x -> M x.
        """
        if not self.looks:
            return []
        y, h, step = lax.stop_gradient((y, h, for_inside(step)))
        d, (pack, unpack) = self.inside(f, s, y, h, step), vectors(f, y)[1:]

        def at(theta):
            place = theta * jnp.ones_like(h)
            within, moves = tree.polynomial(y, place, d), tree.slope(place, jnp.ones_like(h), d)
            ks = [pack(part(within, s + place * h)) for part in parts_of(f)]
            missed = weigh(pack(moves)) - tree.scale(h, functools.reduce(jnp.add, ks))
            return lax.stop_gradient(unpack(solve(tree.scale(self.gamma, missed))))

        return list(map(at, self.looks))

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


def parts_of(f) -> list:
    """The fields of which a field is the sum."""
    return getattr(f, "parts", [f])


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


def begin_to_follow(f, y: PyTree, dtype):
    """A direction that has been multiplied with df/dy twice, and the rates: what `followed` goes on with."""
    direction, rates = tree.unit(tree.any_direction(y)), jnp.zeros((2,), dtype)
    for _ in range(2):
        direction, rates = followed(f, lax.stop_gradient(y), direction, rates)
    return direction, rates


def followed(f, y: PyTree, direction: PyTree, rates: Array):
    """The direction after a product with df/dy, with a root mean square of 1, and the last two rates."""
    with in_forward_mode():
        product = jax.jvp(f, (y,), (direction,))[1]
    rate = tree.length(product)
    usable = lax.is_finite(rate) & (rate > 0)
    direction = tree.where(usable, tree.unit(product), direction)
    rate = jnp.where(usable, lax.convert_element_type(rate, rates.dtype), 0)
    return direction, jnp.stack([rates[1], rate])


def geometric(rates: Array):
    """About the largest |lambda| of df/dy: the geometric mean of two rates."""
    return jnp.sqrt(rates[0]) * jnp.sqrt(rates[1])
