"""Diagonally implicit Runge-Kutta methods with an explicit first stage (ESDIRK), for stiff problems.

References: Hairer and Wanner (1996), Solving Ordinary Differential Equations II (HW), IV.6 and IV.8;
Kennedy and Carpenter (2016), Diagonally implicit Runge-Kutta methods for ordinary differential
equations, a review.
"""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.methods.implicit import Implicit, parts_of, square, vectors
from jaxode.methods.linear import DENSE, Linear
from jaxode.methods.method import Method, Parts, Step
from jaxode.methods.newton import relative, simplified, solved


@dataclasses.dataclass(frozen=True)
class Esdirk(Implicit):
    """A stiffly accurate ESDIRK method, whose slopes are found by a simplified Newton's method.

        k_i = f(y + h sum_(j < i) a_ij k_j + h gamma k_i, s + c_i h),    k_0 = f(y, s);

    y1 is the argument of the last k_i, and this k_i is the slope there: the k_0 of the next step. Each
    is differentiated as the implicit function that it is, so that no derivative knows of iterations.

    For M dy/ds = f(y, s), M constant, singular or not, M k_i stands in the place of k_i: every stage, the
    last one too, fulfils the algebraic equations (HW sec. VI.1).

    For dy/ds = f(y, s) + g(y, s), g not stiff, a method with an `explicit` table takes the slopes of g in
    the same stages by it, and those of f by the other one:

        Y_i = y + h sum_(j < i) (a_ij f_j + A_ij g_j) + h gamma f_i,    y1 = y + h sum_i b_i (f_i + g_i),

    b the last row of a, with gamma (Kennedy and Carpenter 2003, see `jaxode.methods.kencarp`).

    Attributes:
        order, error_order: of y1, and of the embedded solution.
        gamma, c, a: the coefficients; row i of a has i entries, without gamma.
        e: weights of the error, h sum_i e_i k_i; `filtered` by (M - h gamma J)^-1 where it would be large
            for fast modes that have died out (HW eq. IV.8.20).
        guess: weights of the slopes before in the first guess of k_i.
        dense_order: the order with which dense output converges: the cubic Hermite interpolant, or for
            order 1 the straight line.
        explicit: the table A of the part that is not stiff; none where the method has no such part.
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
    explicit: tuple[tuple[float, ...], ...] = ()
    iterations: int = 10
    kappa: float = 1e-2
    linear: Linear = DENSE
    looks: tuple[float, ...] = ()
    # Errors of the slopes at both ends cancel somewhere, in each step at another place.
    places = (0.3, 0.8)
    takes_jac = True
    takes_mass = True
    iterates = True

    @property
    def beyond(self) -> bool:  # type: ignore[override]
        return max(self.c) > 1

    @property
    def takes_parts(self) -> bool:  # type: ignore[override]
        return bool(self.explicit)

    def start(self, f, s, y: PyTree) -> PyTree:
        """dy/ds, of each part."""
        ks = [part(y, s) for part in parts_of(f)]
        if getattr(f, "mass", None) is not None:
            return self.slope_of_system(f, s, y, *ks)
        return memory_of(ks)

    def slope(self, f, s, y: PyTree, memory: PyTree) -> PyTree:
        """dy/ds. In algebraic equations the slope of a stage is of a lower order than y is."""
        if getattr(f, "mass", None) is not None:
            return self.slope_of_system(f, s, y, f(y, s))
        return whole(memory)

    def step(self, f, s, y: PyTree, memory: PyTree, h, norm=relative) -> Step:
        stiff, *others = parts_of(f)
        field, pack, unpack = vectors(stiff, y)
        explicit = [vectors(other, y)[0] for other in others]
        y0, *k0s = map(pack, (y, *(memory if others else [memory])))
        width = tree.scale(self.gamma, h)
        jacobian, solve, substitute, weigh = self.equations(stiff, field, s, y0, k0s[0], h)
        measure = lambda x, y: lax.convert_element_type(norm(unpack(x), unpack(y)), y0.dtype)
        tables, guess = tables_of(self, bool(others), y0.dtype), square(self.guess, y0.dtype)

        def stage(carry, given):
            ys, guesses, (good, count, factor) = carry
            i, c, columns, guess = given
            begin, first = (lax.dynamic_index_in_dim(x, i, 0, False) for x in (ys, guesses))
            place = lambda k: begin + tree.scale(width, k)
            time = s + tree.scale(c, h)
            k, found = solve(lambda k: field(place(k), time), place, measure, first, factor)
            ks = [k, *(other(place(k), time) for other in explicit)]
            for k, column in zip(ks, columns):
                ys = added(ys, tree.scale(h, k), column)
            guesses = added(guesses, ks[0], guess)
            return (ys, guesses, (good * found[0], count + found[1], found[2])), (ks, begin)

        ys = jnp.broadcast_to(y0, (len(tables[0]), *y0.shape))
        for k0, table in zip(k0s, tables):
            ys = added(ys, tree.scale(h, k0), table[:, 0])
        guesses = jnp.zeros((len(self.c), *y0.shape), y0.dtype)
        counted = tuple(jnp.asarray(x, y0.dtype) for x in (1, 0, 1))
        begin = ys, added(guesses, k0s[0], guess[:, 0]), counted
        columns = [jnp.asarray(table.T[1:]) for table in tables]
        rest = jnp.asarray(self.c[1:], h.dtype), columns, jnp.asarray(guess.T[1:])
        given = jnp.arange(1, len(self.c), dtype=jnp.int32), *rest
        (ys, _, (good, count, _)), (kss, begins) = lax.scan(stage, begin, given)
        if others:
            y1 = unpack(ys[-1])
            memory1 = memory_of([part(y1, s + h) for part in (stiff, *others)])
        else:
            y1 = unpack(begins[-1] + tree.scale(width, kss[0][-1]))
            memory1 = unpack(kss[0][-1])
        e = np.asarray(self.e[1:], y0.dtype)
        total = partial(jnp.tensordot, axes=1, precision=tree.EXACT)
        weighed = [tree.scale(self.e[0], k0) + total(e, ks) for k0, ks in zip(k0s, kss)]
        error = tree.scale(h, functools.reduce(jnp.add, weighed))
        error = unpack(substitute(weigh(error)) if self.filtered else error)
        # The inverse of an infinite matrix is 0: Newton's method would stop where it began.
        converged = (good > 0) & tree.all_finite(jacobian)
        evaluations = lax.convert_element_type(lax.stop_gradient(count), jnp.int32)
        ends = whole(memory), whole(memory1)
        step = Step(y1, memory1, ends[1], [error], ends[0], converged, evaluations)
        inside = self.errors_inside(f, s, y, h, step, substitute, weigh)
        return step._replace(inside_errors=inside, evaluations=evaluations + len(self.looks))

    def equations(self, f, field, s, y0, k0, h):
        """df/dy; what solves M k = slope(k) from a first guess of k (the other arguments are those of
        `simplified`); b -> x with (M - h gamma J) x = b; and x -> M x."""
        mass = getattr(f, "mass", None)
        jacobian = self.jacobian(f, field, s, y0)
        weigh, regular = self.weights(mass, y0, h)
        matrix = self.linear.shifted(jacobian, tree.scale(self.gamma, h), regular)
        factors = self.linear.factor(lax.stop_gradient(matrix))
        substitute = partial(self.linear.substitute, factors)

        def solve(slope, place, measure, first, factor):
            def residual(k):
                if mass is None:
                    return k - slope(k)
                return jnp.where(h == 0, k - k0, weigh(k) - slope(k))

            limits = self.kappa, self.iterations, factor
            newton = partial(simplified, substitute, place, measure, *limits)
            return solved(residual, first, newton, self.linear, factors)

        return jacobian, solve, substitute, weigh

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        """The cubic through y, y', y1, y1' (HNW eq. II.6.7); the straight line for a method of order 1."""
        moved = tree.difference(step.y, y)
        if self.order == 1:
            return [moved]
        if getattr(f, "mass", None) is None:
            return tree.hermite(h, moved, step.stages, step.slope)
        # The slopes of stages would make it of order 3 in what algebraic equations say.
        return tree.hermite(h, moved, self.slope(f, s, y, None), self.slope(f, s + h, step.y, None))


def tables_of(method: Esdirk, several: bool, dtype) -> list[np.ndarray]:
    """The tables of the parts, as matrices; of several with y1 as one more stage."""
    if not several:
        return [square(method.a, dtype)]
    b = (*method.a[-1], method.gamma)
    return [square((*rows, b), dtype)[:, :-1] for rows in (method.a, method.explicit)]


def memory_of(slopes: list) -> PyTree:
    """What a step hands to the next: the slope, or that of each part."""
    return Parts(*slopes) if len(slopes) > 1 else slopes[0]


def whole(memory: PyTree) -> PyTree:
    """dy/ds."""
    return jax.tree.map(jnp.add, *memory) if isinstance(memory, Parts) else memory


def added(sums: Array, x: Array, weights) -> Array:
    """What all stages need, with a new slope added to each."""
    return sums + jnp.asarray(weights)[:, None] * x[None, :]


def esdirk(
    order, *, gamma, c, a, e, guess, dense_order, error_order=None, filtered=False, caution=1.0,
    explicit=(),
) -> Esdirk:  # fmt: skip
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
        dense_order, filtered, rows(explicit),
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

methods: dict[str, Method] = {
    "implicit_euler": implicit_euler,
    "trbdf2": trbdf2,
    "kvaerno3": kvaerno3,
    "kvaerno5": kvaerno5,
}
"""Every method by its name."""
