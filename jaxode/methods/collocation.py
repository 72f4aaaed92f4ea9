"""Gauss's collocation methods: implicit, symmetric in time, symplectic.

For those who need a structure kept for long times and have no separable problem (else
`jaxode.methods.symplectic`), or teach it. With steps of equal size: other sizes would lose both.

References: Hairer, Lubich, Wanner (2006), Geometric Numerical Integration (HLW), II.1.3, IV.2.1, V.2,
VI.4; Hairer and Wanner (1996), Solving Ordinary Differential Equations II (HW), IV.5.
"""

import dataclasses
import functools
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxode import tree
from jaxode.methods.implicit import Implicit, vectors
from jaxode.methods.linear import DENSE, Linear, in_forward_mode
from jaxode.methods.method import Method, Step
from jaxode.methods.newton import relative, simplified, solved


@dataclasses.dataclass(frozen=True)
class Collocation(Implicit):
    """A Runge-Kutta method all whose slopes are found at once, by Newton's method.

        k_i = f(y + h sum_j a_ij k_j, s + c_i h),    y1 = y + h sum_i b_i k_i.

    Equations of all stages are one system, with a block of stages x stages entries for each entry of
    df/dy. They are solved up to roundings, since what is left of them would be a drift. Dense output is the
    cubic Hermite interpolant of a step, which ends with an evaluation of func for that.

    Attributes:
        order, c, a, b: the table.
        dense_order: the order with which dense output converges.
        linear: how df/dy is found, and systems with it solved (`jaxode.methods.linear`).

    >>> from jaxode import odeint
    >>> swing = lambda y, t: jnp.stack([y[1], -jnp.sin(y[0])])
    >>> ys = odeint(swing, jnp.array([1.0, 0.0]), [0.0, 50.0, 100.0], method="gauss4", dt=0.5)
    >>> energy = ys[:, 1] ** 2 / 2 - jnp.cos(ys[:, 0])
    >>> bool(jnp.all(abs(energy - energy[0]) < 1e-3))
    True
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    dense_order: int
    iterations: int = 30
    kappa: float = 1e-4
    linear: Linear = DENSE
    error_order = None

    def step(self, f, s, y: PyTree, memory: PyTree, h) -> Step:
        field, pack, unpack = vectors(f, y)
        y0, k0 = pack(y), pack(memory)
        # The slopes of all stages as one vector, in which those of one number stand side by side.
        count = len(self.b)
        join = lambda xs: jnp.stack(xs, 1).reshape(-1)
        split = lambda xs: list(jnp.unstack(xs.reshape(-1, count), axis=1))
        linear = self.linear.of_stages(count)

        def combined(weights, ks):
            return functools.reduce(lax.add, [tree.scale(w, k) for w, k in zip(weights, ks)])

        def states(ks):
            return [y0 + tree.scale(h, combined(row, split(ks))) for row in self.a]

        def residual(ks):
            each = zip(states(ks), self.c)
            return ks - join([field(y, s + tree.scale(c, h)) for y, c in each])

        a = np.asarray(self.a, y0.dtype)
        with in_forward_mode():
            jacobian = self.linear.jacobian_of_stages(a, lambda y: field(y, s), y0)
        factors = linear.factor(lax.stop_gradient(linear.shifted(jacobian, h)))
        substitute = partial(linear.substitute, factors)
        place = lambda ks: join(states(ks))
        measure = lambda x, y: lax.convert_element_type(relative(x, y), y0.dtype)
        one = np.ones((), y0.dtype)
        newton = partial(simplified, substitute, place, measure, self.kappa, self.iterations, one)
        ks, (good, iterations, _) = solved(residual, join([k0] * count), newton, linear, factors)
        y1 = unpack(y0 + tree.scale(h, combined(self.b, split(ks))))
        k1 = f(y1, s + h)
        converged = (good > 0) & tree.all_finite(jacobian)
        evaluations = lax.convert_element_type(lax.stop_gradient(iterations), jnp.int32)
        return Step(y1, k1, k1, [], memory, converged, count * evaluations + 1)

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        """The cubic through y, y', y1, y1' (HNW eq. II.6.7)."""
        return tree.hermite(h, tree.difference(step.y, y), step.stages, step.slope)


implicit_midpoint = Collocation(2, (0.5,), ((0.5,),), (1.0,), dense_order=2)
"""The midpoint rule, of order 2 (HLW eq. I.1.7)."""

_root = 3**0.5
gauss4 = Collocation(
    4,
    (0.5 - _root / 6, 0.5 + _root / 6),
    ((0.25, 0.25 - _root / 6), (0.25 + _root / 6, 0.25)),
    (0.5, 0.5),
    dense_order=4,
)
"""Gauss, two stages, of order 4 (HW table IV.5.1)."""

methods: dict[str, Method] = {"implicit_midpoint": implicit_midpoint, "gauss4": gauss4}
"""Every method by its name."""
