"""Explicit Runge-Kutta methods: what a table of coefficients does.

A table is kept closed: its last stage is the derivative at the end of the step (c = 1, a = b), and
serves as the first stage of the next one. So one short function serves every table: the last k is
both the slope that dense output needs and the memory of the next step.

References: Hairer, Norsett, Wanner (1993), Solving Ordinary Differential Equations I (HNW).
"""

import dataclasses
import functools
import itertools
import math
from fractions import Fraction

import numpy as np
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
    has_increment = True

    @property
    def estimate_sees_end(self) -> bool:  # type: ignore[override]
        return bool(self.e and self.e[-1])

    @property
    def step_evaluations(self) -> int:  # type: ignore[override]
        return len(self.c) - 1

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
    def stability(self) -> float:  # type: ignore[override]
        return radius(self)

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
        return Step(y1, ks[-1], ks[-1], errors, ks, evaluations=self.step_evaluations)

    def inside(self, f, s, y: PyTree, h, step: Step) -> list[PyTree]:
        """d_p = h sum_i B_pi k_i; some tables have further stages for that (three in dop853)."""
        ks = list(step.stages)
        for c, row in zip(self.extra_c, self.extra_a):
            ks.append(f(tree.combine(y, h, row, ks), s + tree.scale(c, h)))
        return [tree.weighted_sum(h, [(b, k) for b, k in zip(row, ks) if b]) for row in self.dense]

    def with_increment(self, f, s, y: PyTree, memory: PyTree, h) -> tuple[Step, PyTree]:
        """A step, and h sum_i b_i k_i."""
        step = self.step(f, s, y, memory, h)
        return step, tree.wide_sum(h, [(b, k) for b, k in zip(self.b, step.stages) if b])

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


def matrix(table: Tableau, extra: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A and c of a table; with the stages of dense output, if they are wanted."""
    rows = (*table.a, *(table.extra_a if extra else ()))
    a = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        a[i, : len(row)] = row
    return a, np.array((*table.c, *(table.extra_c if extra else ())))


@functools.lru_cache(128)
def radius(table: Tableau) -> float:
    """The largest r so that |R(z)| <= 1 for |z| <= r and Re z <= -0.3 |z|, R the stability function.

    R(z) = 1 + z b^T (1 + z A + z^2 A^2 + ...) 1 (Hairer and Wanner 1996, eq. IV.2.11). Closer to the
    imaginary axis modes hardly decay, and a step that resolves them is far shorter.

    >>> from jaxode.methods.tables import dopri5
    >>> f"{radius(dopri5):.1f}"
    '3.2'
    """
    a, c = matrix(table)
    powers = list(itertools.accumulate(c, lambda v, _: a @ v, initial=np.ones(len(a))))
    coefficients = [1.0, *(np.array(table.b) @ v for v in powers)]
    r = np.arange(1, 2001) / 100
    z = r[:, None] * np.exp(1j * np.linspace(math.acos(-0.3), math.pi, 40))
    stable = np.all(np.abs(np.polyval(coefficients[::-1], z)) <= 1 + 1e-6, axis=1)
    return float(r[np.argmin(stable)]) - 0.01


def tableau(
    order, *, c, a, b, e=None, e_low=None, error_order=None,
    dense=None, d=(), dense_order=None, extra_c=(), extra_a=(),
) -> Tableau:  # fmt: skip
    """A table as the literature prints it: closed if it is not, checked, and made floats.

    `error_order` is order - 1 unless given. Without `dense`, dense output is the cubic Hermite
    interpolant of the two ends of the step, of order min(order, 4), and what `d` adds (see `hermite`).

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
    padded = lambda row, more=0: [*row, *[0] * (len(c) + more - len(row))]
    errors = {name: padded(x) for name, x in {"e": e, "e_low": e_low}.items() if x is not None}
    extra = len(extra_c)
    dense = hermite(b, d, extra) if dense is None else [padded(x, extra) for x in dense]
    check(c, a, b, errors, dense, extra_c, extra_a)
    floats = lambda xs: tuple(map(float, xs))
    return Tableau(
        order=order,
        c=floats(c),
        a=tuple(map(floats, a)),
        b=floats(b),
        error_order=None if e is None else error_order or order - 1,
        dense=tuple(map(floats, dense)),
        dense_order=dense_order or min(order, 4),
        extra_c=floats(extra_c),
        extra_a=tuple(map(floats, extra_a)),
        **{"e": None, **{name: floats(x) for name, x in errors.items()}},
    )


def printed(text: str) -> Tableau:
    """`tableau` of a text: the `order`, a line `c_i | a_i1 a_i2 ...` for each stage, the weights `b`.

    After them come those of the error, `e` and `e_low`, further stages that dense output uses, and its
    `d`. Nothing before the bar continues the line above. Fractions and decimals are read exactly.

    >>> heun = '''
    ... order | 2
    ... 0 |
    ... 1 | 1
    ... b | 1/2 1/2
    ... e | -1/2 1/2'''
    >>> printed(heun) == tableau(2, c=[0, 1], a=[[], [1]], b=[1/2, 1/2], e=[-1/2, 1/2])
    True
    """
    rows: list[tuple[str, list]] = []
    for line in text.strip().splitlines():
        head, numbers = line.split("|")
        if head.strip():
            rows.append((head.strip(), []))
        rows[-1][1].extend(map(Fraction, numbers.split()))
    main = [head for head, _ in rows].index("b")
    stages = lambda rows: zip(*[(Fraction(head), row) for head, row in rows if head[0].isdigit()])
    (c, a), (extra_c, extra_a) = stages(rows[:main]), tuple(stages(rows[main:])) or ((), ())
    orders = {name: int(row[0]) for name, row in rows if name.endswith("order")}
    weights = {name: row for name, row in rows if name in ("b", "e", "e_low")}
    d = [row for name, row in rows if name == "d"]
    return tableau(c=c, a=a, d=d, extra_c=extra_c, extra_a=extra_a, **weights, **orders)


def check(c, a, b, errors, dense, extra_c, extra_a):
    """Raise a ValueError that names what is wrong with a table."""
    stages = len(c)
    if any(len(x) != stages for x in (a, b, *errors.values())):
        raise ValueError(
            f"A table with {stages} nodes c needs as many rows a and weights b (and e, e_low)."
        )
    if len(extra_c) != len(extra_a):
        raise ValueError(
            f"`extra_a` needs one row for each node of `extra_c`: "
            f"got {len(extra_a)} rows and {len(extra_c)} nodes."
        )
    if "e_low" in errors and "e" not in errors:
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


# Coefficients of theta, theta^2, ...: of y', y1 - y and y1' in the cubic through them (HNW eq. II.6.7),
# and theta^2 (1 - theta)^2 times 1, theta, theta (1 - theta), theta^2 (1 - theta).
CUBIC = (1, -2, 1), (0, 3, -2), (0, -1, 1)
BUMPS = (0, 1, -2, 1), (0, 0, 1, -2, 1), (0, 0, 1, -3, 3, -1), (0, 0, 0, 1, -3, 3, -1)


def hermite(b, d, extra):
    """Dense output with the slopes of the solution at both ends: the cubic, and h sum_i d_ji k_i times
    the j-th of `BUMPS` (HNW sec. II.6 for dopri5, II.10 for dop853).

    `extra` stages come after those of the step.
    """
    count = len(b) + extra
    unit = lambda at: [int(i == at) for i in range(count)]
    padded = [[*row, *[0] * (count - len(row))] for row in (b, *d)]
    weights = [unit(0), padded[0], unit(len(b) - 1), *padded[1:]]
    powers = itertools.zip_longest(*(*CUBIC, *BUMPS[: len(d)]), fillvalue=0)
    return [
        [sum(x * w for x, w in zip(power, column)) for column in zip(*weights)] for power in powers
    ]
