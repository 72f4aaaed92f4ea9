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
from jaxode.methods.linear import DENSE
from jaxode.methods.method import Method, Step
from jaxode.methods.newton import relative, simplified, solved


@dataclasses.dataclass(frozen=True)
class Collocation(Implicit):
    """A Runge-Kutta method all whose slopes are found at once, by Newton's method.

        k_i = f(y + h sum_j a_ij k_j, s + c_i h),    y1 = y + h sum_i b_i k_i.

    Equations of all stages are one dense system of stages times numbers of the state. They are solved
    up to roundings, since what is left of them would be a drift. Dense output is the cubic Hermite
    interpolant of a step, which ends with an evaluation of func for that.

    Attributes:
        order, c, a, b: the table.
        dense_order: the order with which dense output converges.

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
    error_order = None

    def step(self, f, s, y: PyTree, memory: PyTree, h) -> Step:
        field, pack, unpack = vectors(f, y)
        y0, k0 = pack(y), pack(memory)
        jacobian = DENSE.jacobian(lambda y: field(y, s), y0)
        matrix = DENSE.shifted(jnp.kron(jnp.asarray(self.a, y0.dtype), jacobian), h)
        factors = DENSE.factor(lax.stop_gradient(matrix))  # type: ignore[arg-type]
        substitute = partial(DENSE.substitute, factors)

        def combined(weights, ks):
            terms = [tree.scale(w, k) for w, k in zip(weights, ks.reshape(len(self.b), -1))]
            return functools.reduce(lax.add, terms)

        def place(ks):
            return jnp.concatenate([y0 + tree.scale(h, combined(row, ks)) for row in self.a])

        def residual(ks):
            ys = place(ks).reshape(len(self.b), -1)
            found = [field(y, s + tree.scale(c, h)) for y, c in zip(ys, self.c)]
            return ks - jnp.concatenate(found)

        measure = lambda x, y: lax.convert_element_type(relative(x, y), y0.dtype)
        one = np.ones((), y0.dtype)
        newton = partial(simplified, substitute, place, measure, self.kappa, self.iterations, one)
        guess = jnp.concatenate([k0] * len(self.b))
        ks, (good, count, _) = solved(residual, guess, newton, DENSE)
        y1 = unpack(y0 + tree.scale(h, combined(self.b, ks)))
        k1 = f(y1, s + h)
        converged = (good > 0) & tree.all_finite(jacobian)
        evaluations = lax.convert_element_type(lax.stop_gradient(count), jnp.int32)
        return Step(y1, k1, k1, [], memory, converged, len(self.b) * evaluations + 1)

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
