"""Explicit Runge-Kutta methods: what a table of coefficients does.

A table is kept closed: its last stage is the derivative at the end of the step (c = 1, a = b), and
serves as the first stage of the next one. So one short function serves every table: the last k is
both the slope that dense output needs and the memory of the next step.

References: Hairer, Norsett, Wanner (1993), Solving Ordinary Differential Equations I (HNW).
"""

import dataclasses

from jaxtyping import PyTree

from jaxode import tree
from jaxode.methods.method import Method, Step


@dataclasses.dataclass(frozen=True)
class Tableau(Method):
    """An explicit Runge-Kutta method with s stages, closed.

    Attributes:
        order: that of the solution carried on, y1 = y + h sum_i b_i k_i.
        c, a, b: nodes, rows (row i has i entries) and weights (the last is 0).
        e: b minus the weights of the embedded solution; None if there is none (fixed steps only).
        error_order: the order of the embedded solution.
        e_low: a second, lower error estimate r3 that sharpens the first, r5, to
            r5^2 / sqrt(r5^2 + 0.01 r3^2) (HNW eq. II.10.17), if there is one.
        dense: row p holds the coefficients of theta^(p+1) in b_i(theta), where
            y(t + theta h) = y + h sum_i b_i(theta) k_i.
        dense_order: the order with which that converges, uniformly over the interval.
        extra_c, extra_a: further stages that only dense output uses.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...] | None
    error_order: int | None
    dense: tuple[tuple[float, ...], ...]
    dense_order: int
    extra_c: tuple[float, ...] = ()
    extra_a: tuple[tuple[float, ...], ...] = ()
    e_low: tuple[float, ...] | None = None
    any_state = True
    sums_slopes = True

    @property
    def estimate_sees_end(self) -> bool:  # type: ignore[override]
        return bool(self.e and self.e[-1])

    @property
    def inside_evaluations(self) -> int:  # type: ignore[override]
        return len(self.extra_c)

    @property
    def explains(self) -> bool:  # type: ignore[override]
        """Whether the last two stages are at the end of the step, which the stiffness estimate needs."""
        return self.e is not None and self.c[-2] == 1

    @property
    def stage_count(self) -> int:  # type: ignore[override]
        return len(self.c)

    @property
    def estimates(self) -> list[tuple[float, ...]]:
        """The weights of the error estimates."""
        return [e for e in (self.e, self.e_low) if e]

    def start(self, f, s, y: PyTree) -> PyTree:
        return f(y, s)

    def step(self, f, s, y: PyTree, memory: PyTree, h) -> Step:
        """y_i = y + h sum_j a_ij k_j,  k_i = f(y_i, s + c_i h)   (HNW eq. II.1.8).

        The last y_i is y(s + h), the last k_i its derivative.
        """
        ks, y1 = [memory], y
        for c, row in zip(self.c[1:], self.a[1:]):
            y1 = tree.combine(y, h, row, ks)
            ks.append(f(y1, s + tree.scale(c, h)))
        errors = [
            tree.weighted_sum(h, [(w, k) for w, k in zip(e, ks) if w]) for e in self.estimates
        ]
        return Step(y1, ks[-1], ks[-1], errors, ks, evaluations=len(self.c) - 1)

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        """d_p = h sum_i B_pi k_i; some tables have further stages for that (three in dop853)."""
        ks = list(step.stages)
        for c, row in zip(self.extra_c, self.extra_a):
            ks.append(f(tree.combine(y, h, row, ks), s + tree.scale(c, h)))
        return [tree.weighted_sum(h, [(b, k) for b, k in zip(row, ks) if b]) for row in self.dense]

    def heuristics(self, y: PyTree, h, step: Step):
        """The error estimate and the stiffness estimate of a step, as smooth numbers.

        |h sum_i e_i k_i| (root mean square), and |k_s - k_(s-1)| / |y_s - y_(s-1)| for the last two
        stages, which are both at the end of the step: about the largest eigenvalue of df/dy (HNW eq.
        IV.2.26; Pal et al. 2021, arXiv 2105.03918).
        """
        ks = step.stages
        y2 = tree.combine(y, h, self.a[-2], ks)
        slope = tree.length(tree.difference(ks[-1], ks[-2]))
        return tree.length(step.errors[0]), tree.ratio(
            slope, tree.length(tree.difference(step.y, y2))
        )


def tableau(
    order,
    *,
    c,
    a,
    b,
    e=None,
    e_low=None,
    error_order=None,
    dense=None,
    dense_order=None,
    extra_c=(),
    extra_a=(),
) -> Tableau:
    """A table as the literature prints it: closed if it is not, checked, and made floats.

    `error_order` is order - 1 unless given. Without `dense`, dense output is the cubic Hermite
    interpolant of the two ends of the step (HNW eq. II.6.7), of order min(order, 4).

    Raises:
        ValueError: shapes do not fit, a row does not sum to its node, the weights do not sum to 1,
            those of the error to 0, or those of dense output at theta = 1 to b.

    >>> heun = tableau(2, c=[0, 1], a=[[], [1]], b=[1/2, 1/2], e=[-1/2, 1/2])
    >>> heun.c, heun.b
    ((0.0, 1.0, 1.0), (0.5, 0.5, 0.0))
    """
    c, a, b = list(c), [list(row) for row in a], list(b)
    closed = len(b) > 1 and c[-1] == 1 and a[-1] == b[:-1] and b[-1] == 0
    if not closed:
        c, a, b = [*c, 1], [*a, b], [*b, 0]
    stages = len(c)
    e, e_low = (None if x is None else [*x, *[0] * (stages - len(x))] for x in (e, e_low))
    dense = (
        hermite(b)
        if dense is None
        else [[*row, *[0] * (stages + len(extra_c) - len(row))] for row in dense]
    )
    check(c, a, b, e, e_low, dense, extra_c, extra_a)
    return Tableau(
        order=order,
        c=floats(c),
        a=tuple(map(floats, a)),
        b=floats(b),
        e=None if e is None else floats(e),
        error_order=None if e is None else error_order or order - 1,
        dense=tuple(map(floats, dense)),
        dense_order=dense_order or min(order, 4),
        extra_c=floats(extra_c),
        extra_a=tuple(map(floats, extra_a)),
        e_low=None if e_low is None else floats(e_low),
    )


def floats(xs) -> tuple[float, ...]:
    return tuple(map(float, xs))


def check(c, a, b, e, e_low, dense, extra_c, extra_a):
    """Raise a ValueError that names what is wrong with a table."""
    stages = len(c)
    errors = {name: x for name, x in {"e": e, "e_low": e_low}.items() if x is not None}
    if any(len(x) != stages for x in (a, b, *errors.values())):
        raise ValueError(
            f"A table with {stages} nodes c needs as many rows a and weights b (and e, e_low)."
        )
    if len(extra_c) != len(extra_a):
        raise ValueError(
            f"`extra_a` needs one row for each node of `extra_c`: "
            f"got {len(extra_a)} rows and {len(extra_c)} nodes."
        )
    if e is None and e_low is not None:
        raise ValueError("`e_low` only sharpens the estimate `e`: pass `e` as well.")
    if not near(sum(b), 1):
        raise ValueError(f"The weights `b` must sum to 1, got {float(sum(b))}.")
    for i, row in enumerate([*a, *extra_a]):
        node = [*c, *extra_c][i]
        if len(row) != i:
            raise ValueError(
                f"Row {i} of `a` must have {i} entries (the method is explicit), got {len(row)}."
            )
        if not near(sum(row), node):
            raise ValueError(f"Row {i} of `a` must sum to c[{i}] = {node}, got {float(sum(row))}.")
    for name, x in errors.items():
        if not near(sum(x), 0):
            raise ValueError(
                f"The weights `{name}` of the error must sum to 0, got {float(sum(x))}: "
                "they are b - b_hat."
            )
    columns = stages + len(extra_c)
    if any(len(row) != columns for row in dense):
        raise ValueError(f"Every row of `dense` needs an entry for each of {columns} stages.")
    for i, (column, w) in enumerate(zip(zip(*dense), [*b, *[0] * len(extra_c)])):
        if not near(sum(column), w, 1e-10):  # coefficients reach 500 in dop853
            raise ValueError(
                f"Column {i} of `dense` must sum to the weight {float(w)} of its stage, got "
                f"{float(sum(column))}: at theta = 1 dense output is the end of the step."
            )


def near(x, y, tolerance=1e-12) -> bool:
    """|x - y| <= tolerance; false where either is nan."""
    return abs(float(x) - float(y)) <= tolerance


def hermite(b):
    """The cubic through y, y', y1, y1', as weights of k (HNW eq. II.6.7)."""
    first = [int(i == 0) for i in range(len(b))]
    last = [int(i == len(b) - 1) for i in range(len(b))]
    return [
        first,
        [3 * w - 2 * i - j for w, i, j in zip(b, first, last)],
        [-2 * w + i + j for w, i, j in zip(b, first, last)],
    ]
