"""Diagonally implicit Runge-Kutta methods with an explicit first stage (ESDIRK), for stiff problems.

References: Hairer and Wanner (1996), Solving Ordinary Differential Equations II (HW), IV.6 and IV.8;
Kennedy and Carpenter (2016), Diagonally implicit Runge-Kutta methods for ordinary differential
equations, a review.
"""

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.methods.implicit import Implicit, square, vectors
from jaxode.methods.linear import DENSE, Linear
from jaxode.methods.method import Method, Step
from jaxode.methods.newton import relative, simplified, solved


@dataclasses.dataclass(frozen=True)
class Esdirk(Implicit):
    """A stiffly accurate ESDIRK method, whose slopes are found by a simplified Newton's method.

        k_i = f(y + h sum_(j < i) a_ij k_j + h gamma k_i, s + c_i h),    k_0 = f(y, s);

    y1 is the argument of the last k_i, and this k_i is the slope there: the k_0 of the next step. Each
    is differentiated as the implicit function that it is, so that no derivative knows of iterations.

    Attributes:
        order, error_order: of y1, and of the embedded solution.
        gamma, c, a: the coefficients; row i of a has i entries, without gamma.
        e: weights of the error, h sum_i e_i k_i; `filtered` by (I - h gamma J)^-1 where it would be large
            for fast modes that have died out (HW eq. IV.8.20).
        guess: weights of the slopes before in the first guess of k_i.
        dense_order: the order with which dense output converges: the cubic Hermite interpolant, or for
            order 1 the straight line.
        iterations: the most iterations for a stage; a step in which one needs more is rejected.
        kappa: a stage is solved when what is left of it has a norm below this; the error of a step may
            have 1.
        linear: how df/dy is found, and systems with it solved (`jaxode.methods.linear`).
    """

    order: int
    error_order: int
    gamma: float
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    e: tuple[float, ...]
    guess: tuple[tuple[float, ...], ...]
    dense_order: int
    filtered: bool = False
    iterations: int = 10
    kappa: float = 1e-2
    linear: Linear = DENSE
    takes_jac = True
    iterates = True

    @property
    def beyond(self) -> bool:  # type: ignore[override]
        return max(self.c) > 1

    def step(self, f, s, y: PyTree, memory: PyTree, h, norm=relative) -> Step:
        field, pack, unpack = vectors(f, y)
        y0, k0 = pack(y), pack(memory)
        jacobian = self.jacobian(f, field, s, y0)
        width = tree.scale(self.gamma, h)
        matrix = self.linear.shifted(jacobian, width)
        substitute = partial(self.linear.substitute, self.linear.factor(lax.stop_gradient(matrix)))
        a, guess = square(self.a, y0.dtype), square(self.guess, y0.dtype)
        measure = lambda x, y: lax.convert_element_type(norm(unpack(x), unpack(y)), y0.dtype)

        def stage(carry, given):
            ys, guesses, (good, count, factor) = carry
            i, c, a, guess = given
            begin, first = (lax.dynamic_index_in_dim(x, i, 0, False) for x in (ys, guesses))
            place = lambda k: begin + tree.scale(width, k)
            residual = lambda k: k - field(place(k), s + tree.scale(c, h))
            newton = partial(
                simplified, substitute, place, measure, self.kappa, self.iterations, factor
            )
            k, found = solved(residual, first, newton, self.linear)
            ys, guesses = added(ys, tree.scale(h, k), a), added(guesses, k, guess)
            return (ys, guesses, (good * found[0], count + found[1], found[2])), (k, begin)

        wide = jnp.broadcast_to(y0, (len(self.c), *y0.shape))
        begin = (
            added(wide, tree.scale(h, k0), a[:, 0]),
            added(jnp.zeros_like(wide), k0, guess[:, 0]),
            tuple(jnp.asarray(x, y0.dtype) for x in (1, 0, 1)),
        )
        rest = jnp.asarray(self.c[1:], h.dtype), jnp.asarray(a.T[1:]), jnp.asarray(guess.T[1:])
        given = jnp.arange(1, len(self.c), dtype=jnp.int32), *rest
        (_, _, (good, count, _)), (ks, begins) = lax.scan(stage, begin, given)
        y1 = begins[-1] + tree.scale(width, ks[-1])
        error = tree.scale(self.e[0], k0) + jnp.tensordot(np.asarray(self.e[1:], y0.dtype), ks, 1)
        error = tree.scale(h, error)
        if self.filtered:
            error = substitute(error)
        k1 = unpack(ks[-1])
        # The inverse of an infinite matrix is 0: Newton's method would stop where it began.
        converged = (good > 0) & tree.all_finite(jacobian)
        evaluations = lax.convert_element_type(lax.stop_gradient(count), jnp.int32)
        return Step(unpack(y1), k1, k1, [unpack(error)], memory, converged, evaluations)

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        """The cubic through y, y', y1, y1' (HNW eq. II.6.7); the straight line for a method of order 1."""
        moved = tree.difference(step.y, y)
        if self.order == 1:
            return [moved]
        return tree.hermite(h, moved, step.stages, step.slope)


def added(sums: Array, x: Array, weights) -> Array:
    """What all stages need, with a new slope added to each."""
    return sums + jnp.asarray(weights)[:, None] * x[None, :]


def esdirk(
    order, *, gamma, c, a, e, guess, dense_order, error_order=None, filtered=False, caution=1.0
) -> Esdirk:
    """An ESDIRK method as the literature prints it, but for the diagonal of a.

    The error is multiplied by `caution`. The published estimates are honest, but some come so close
    to the error of a step that many of them add up: with these factors every problem of
    `jaxode.problems` is solved to ten tolerances (the Oregonator, which multiplies what happens in
    its slow phase by eight, asks for most). At equal error a method takes the steps that it took.
    """
    floats: Any = lambda row: tuple(map(float, row))
    rows = lambda rows: tuple(map(floats, rows))
    return Esdirk(
        order, error_order or order - 1, float(gamma), floats(c), rows(a),
        floats([caution * w for w in e]), rows(guess),
        dense_order, filtered,
    )  # fmt: skip


implicit_euler = esdirk(
    1,
    gamma=1,
    c=[0, 1],
    a=[[], [0]],
    e=[-1 / 2, 1 / 2],
    guess=[[], [1]],
    error_order=1,
    dense_order=1,
    filtered=True,
)
"""Backward Euler, of order 1; its error by the trapezoidal rule."""

_root = 2**0.5
trbdf2 = esdirk(
    2,
    gamma=1 - _root / 2,
    c=[0, 2 - _root, 1],
    a=[[], [1 - _root / 2], [_root / 4, _root / 4]],
    e=[_root / 4, _root / 4, -_root / 2],
    guess=[[], [1], [-0.5, 1.5]],
    dense_order=2,
    filtered=True,
    caution=0.7,
)
"""Bank et al. (1985): a trapezoidal step and one of BDF2, of order 2; see Hosea and Shampine (1996).

Its error is the distance from Euler's backward step, of order 1: so the error of a solution is
proportional to the tolerance, as it is for the other methods. The estimate of order 2 of Hosea and
Shampine left 14 to 350 tolerances at 1e-4, and five times as many at 1e-6. For tolerances of 1e-2 to
1e-5: steps are as short as their root.
"""

kvaerno3 = esdirk(
    3,
    gamma=0.4358665215,
    c=[0, 0.871733043, 1, 1],
    a=[
        [],
        [0.4358665215],
        [0.4905633884191082, 0.0735700900808919],
        [0.30880996997303606, 1.490563388254108, -1.2352398797271447],
    ],
    e=[-0.18175341844607212, 1.416993298173216, -1.6711064012271446, 0.4358665215],
    guess=[
        [],
        [1],
        [-0.14714018016178376, 1.1471401801617838],
        [0.4905633884191082, 0.0735700900808919, 0.4358665215],
    ],
    dense_order=3,
    caution=2,
)
"""Kvaerno (2004), Singly diagonally implicit Runge-Kutta methods with an explicit first stage: 3(2)."""

kvaerno5 = esdirk(
    5,
    gamma=0.26,
    c=[0, 0.52, 1.230333209967908, 0.8957659843500759, 0.43639360985864756, 1, 1],
    a=[
        [],
        [0.26],
        [0.13, 0.8403332099679081],
        [0.22371961478320504, 0.476755323197997, -0.06470895363112615],
        [0.16648564323248322, 0.1045001884159172, 0.03631482272098715, -0.13090704451073998],
        [0.13855640231268224, 0, -0.04245337201752043, 0.02446657898003141, 0.6194303907248068],
        [
            0.13659751177640292,
            0,
            -0.05496908796538376,
            -0.04118626728321046,
            0.629933048990164,
            0.06962479448202728,
        ],
    ],
    e=[
        -0.0019588905362793174,
        0,
        -0.012515715947863326,
        -0.06565284626324187,
        0.010502658265357234,
        -0.1903752055179727,
        0.26,
    ],
    guess=[
        [],
        [1],
        [-1.366025403784441, 2.3660254037844357],
        [-0.19650552613122207, 0.8113579546496623, 0.38514757148155954],
        [0.10375304369958693, 0.937994698066431, -0.04174774176601781, 0],
        [-0.17281112873898072, 0.6235784481025847, 0.5492326806363959, 0, 0],
        [
            0.13855640231268224,
            0,
            -0.04245337201752043,
            0.02446657898003141,
            0.6194303907248068,
            0.26,
        ],
    ],
    dense_order=4,
    caution=3,
)
"""The same paper: order 5(4), seven stages."""

kencarp4 = esdirk(
    4,
    gamma=0.25,
    c=[0, 0.5, 0.332, 0.62, 0.85, 1],
    a=[
        [],
        [0.25],
        [0.137776, -0.055776],
        [0.14463686602698217, -0.22393190761334475, 0.4492950415863626],
        [0.09825878328356477, -0.5915442428196704, 0.8101210538282996, 0.283164405707806],
        [0.15791629516167136, 0, 0.18675894052400077, 0.6805652953093346, -0.27524053099500667],
    ],
    e=[
        0.0032044943984591845,
        0,
        -0.002446251136679456,
        -0.021480075919587227,
        0.04394686806857245,
        -0.02322503541076487,
    ],
    guess=[
        [],
        [1],
        [0.33599999999999997, 0.664],
        [-0.24, 1.24, 0],
        [-0.37096774193548376, 0, 0, 1.3709677419354838],
        [-0.17647058823529416, 0, 0, 0, 1.1764705882352942],
    ],
    dense_order=4,
    caution=14,
)
"""Kennedy and Carpenter (2003), ARK4(3)6L[2]SA, its implicit part: order 4(3), six stages."""

methods: dict[str, Method] = {
    "implicit_euler": implicit_euler,
    "trbdf2": trbdf2,
    "kvaerno3": kvaerno3,
    "kencarp4": kencarp4,
    "kvaerno5": kvaerno5,
}
"""Every method by its name."""
