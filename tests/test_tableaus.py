"""Every table against the theory: rooted trees, and the slope of its error."""

import math
from collections import Counter
from functools import cache

import numpy as np
import pytest

from jaxode.methods import named, tableau
from jaxode.methods.tables import dop853, dopri5, methods

tables = pytest.mark.parametrize("table", methods.values(), ids=methods)
embedded = pytest.mark.parametrize(
    "table", [t for t in methods.values() if t.e], ids=[n for n, t in methods.items() if t.e]
)


@cache
def rooted_trees(order):
    """All rooted trees with so many nodes; a tree is the sorted tuple of its branches."""
    return [()] if order == 1 else sorted(set(forests(order - 1, order - 1)))


def forests(nodes, largest):
    if nodes == 0:
        return [()]
    return [
        tuple(sorted((tree, *rest)))
        for size in range(1, min(nodes, largest) + 1)
        for tree in rooted_trees(size)
        for rest in forests(nodes - size, size)
    ]


def nodes(tree):
    return 1 + sum(map(nodes, tree))


def density(tree):
    """gamma(t), HNW definition II.2.10."""
    return nodes(tree) * math.prod(map(density, tree))


def elementary_weights(a, tree):
    """Phi_i(t), HNW definition II.2.9."""
    return math.prod((a @ elementary_weights(a, branch) for branch in tree), start=np.ones(len(a)))


def matrix(table):
    rows = [*table.a, *table.extra_a]
    return np.array([[*row, *[0] * (len(rows) - len(row))] for row in rows])


def defect(a, weights, order, theta=1.0):
    """The largest violation of the conditions of that order, sum_i b_i Phi_i(t) = theta^r / gamma(t)."""
    return max(
        abs(weights @ elementary_weights(a, tree)[: len(weights)] - theta**order / density(tree))
        for tree in rooted_trees(order)
    )


def test_there_are_as_many_rooted_trees_as_there_should_be():
    assert [len(rooted_trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]


@tables
def test_every_table_has_the_order_it_declares_and_no_more(table):
    a, b = matrix(table), np.array(table.b)
    assert max(defect(a, b, order) for order in range(1, table.order + 1)) < 1e-13
    assert defect(a, b, table.order + 1) > 1e-6


@embedded
def test_the_embedded_solution_has_the_order_it_declares(table):
    a, b_hat = matrix(table), np.array(table.b) - np.array(table.e)
    order = 5 if table.e_low else table.error_order  # two estimates together act as one of order 7
    assert max(defect(a, b_hat, p) for p in range(1, order + 1)) < 1e-13
    assert defect(a, b_hat, order + 1) > 1e-6
    if table.e_low:
        b_hat = np.array(table.b) - np.array(table.e_low)
        assert max(defect(a, b_hat, p) for p in range(1, 4)) < 1e-13
        assert defect(a, b_hat, 4) > 1e-6


def interior_order(table):
    """The order of the polynomial itself; errors at the ends of steps add one that is no smaller."""
    return table.dense_order - 1 if table.dense_order > 1 else 1


@tables
@pytest.mark.parametrize("theta", [0.2, 0.5, 0.9])
def test_dense_output_satisfies_its_order_conditions(table, theta):
    a = matrix(table)
    weights = theta ** np.arange(1, len(table.dense) + 1) @ np.array(table.dense)
    for order in range(1, interior_order(table) + 1):
        assert defect(a, weights, order, theta) < 1e-12
    if table.dense_order < table.order or len(table.dense) > 3:  # else the next is met at the ends
        assert defect(a, weights, interior_order(table) + 1, theta) > 1e-7


@tables
def test_dense_output_meets_the_ends_of_the_step_with_their_slopes(table):
    dense, b = np.array(table.dense), np.array(table.b)
    np.testing.assert_allclose(dense.sum(0)[: len(b)], b, atol=1e-12)
    first, last = np.eye(dense.shape[1])[[0, len(b) - 1]]
    np.testing.assert_allclose(dense[0], first, atol=1e-12)
    np.testing.assert_allclose(np.arange(1, len(dense) + 1) @ dense, last, atol=2e-11)


@tables
def test_a_table_is_closed(table):
    assert table.c[-1] == 1 and table.b[-1] == 0
    np.testing.assert_allclose(table.a[-1], table.b[:-1], atol=1e-15)


def field(t, y):
    """y1' = y1 cos t + y2, y2' = y2 - y1 y2: nonlinear and non-autonomous."""
    return np.array([y[0] * np.cos(t) + y[1], y[1] - y[0] * y[1]])


@cache
def reference():
    from scipy.integrate import solve_ivp

    return solve_ivp(
        field,
        (0, 2),
        [0.5, 1.0],
        "DOP853",
        rtol=1e-13,
        atol=1e-14,
        max_step=0.01,
        dense_output=True,
    ).sol


def largest_errors(table, n):
    """With n steps of equal size: the largest error at the ends of steps, and inside them."""
    h, y, ends, inside = 2 / n, np.array([0.5, 1.0]), [], []
    a, c = matrix(table), [*table.c, *table.extra_c]
    for i in range(n):
        t, ks = i * h, np.zeros((len(c), 2))
        for j in range(len(c)):
            ks[j] = field(t + c[j] * h, y + h * a[j] @ ks)
        for theta in (0.15, 0.35, 0.5, 0.7, 0.85):
            weights = theta ** np.arange(1, len(table.dense) + 1) @ np.array(table.dense)
            inside.append(y + h * weights @ ks - reference()(t + theta * h))
        y = y + h * np.array(table.b) @ ks[: len(table.b)]
        ends.append(y - reference()(t + h))
    return np.abs(ends).max(), np.abs(inside).max()


@tables
def test_errors_fall_with_the_declared_order_at_the_ends_and_inside(table):
    n = {1: 400, 2: 100, 3: 60, 4: 40, 5: 24, 8: 6}[table.order]
    coarse, fine = np.array([largest_errors(table, n), largest_errors(table, 2 * n)])
    ends, inside = np.log2(coarse / fine)
    assert abs(ends - table.order) < 0.6
    assert table.dense_order - 0.35 < inside < table.dense_order + 0.7


@pytest.mark.parametrize(
    "ours, theirs", [("dopri5", "RK45"), ("bosh3", "RK23"), ("dop853", "DOP853")]
)
def test_tables_agree_with_scipy(ours, theirs):
    from scipy.integrate._ivp import rk

    table, theirs = methods[ours], getattr(rk, theirs)
    s = len(theirs.C)
    np.testing.assert_allclose(table.c[:s], theirs.C, rtol=1e-14)
    np.testing.assert_allclose(matrix(table)[:s, : theirs.A.shape[1]], theirs.A[:s], rtol=1e-14)
    np.testing.assert_allclose(table.b[:s], theirs.B, rtol=1e-14)
    if ours == "dop853":
        np.testing.assert_allclose(table.e, theirs.E5, rtol=1e-14)
        np.testing.assert_allclose(table.e_low, theirs.E3, rtol=1e-14)
    else:  # scipy's E is b_hat - b
        np.testing.assert_allclose(table.e, -theirs.E, rtol=1e-12, atol=1e-16)


def test_dense_output_agrees_with_scipy_inside_one_step():
    from scipy.integrate import DOP853, RK45

    for table, solver in [(dopri5, RK45), (dop853, DOP853)]:
        theirs = solver(field, 0.0, [0.5, 1.0], 2.0, first_step=0.5, rtol=1, atol=1)
        theirs.step()
        a, c, y = matrix(table), [*table.c, *table.extra_c], np.array([0.5, 1.0])
        ks = np.zeros((len(c), 2))
        for j in range(len(c)):
            ks[j] = field(c[j] * 0.5, y + 0.5 * a[j] @ ks)
        for theta in (0.1, 0.5, 0.8, 1.0):
            weights = theta ** np.arange(1, len(table.dense) + 1) @ np.array(table.dense)
            ours = y + 0.5 * weights @ ks
            np.testing.assert_allclose(ours, theirs.dense_output()(0.5 * theta), rtol=1e-12)


# Not its Dopri8, which is another method of order 8: Prince and Dormand's, of 13 stages.
@pytest.mark.parametrize("name", ["midpoint", "heun", "ralston", "bosh3", "dopri5", "tsit5"])
def test_tables_agree_with_diffrax(name):
    diffrax = pytest.importorskip("diffrax")
    table, theirs = methods[name], getattr(diffrax, name.capitalize()).tableau
    s = len(theirs.b_sol)
    for ours, row in zip(table.a[1:], theirs.a_lower):
        np.testing.assert_allclose(ours, row, rtol=1e-14)
    np.testing.assert_allclose(table.b[:s], theirs.b_sol, rtol=1e-14)
    # Signs differ in the pairs of order 2. In dopri5 theirs (as JAX's own) is 2/3 of b - b_hat of
    # Dormand and Prince, which is ours and scipy's: also a pair of order 4, with larger tolerance.
    scale = {"midpoint": -1, "heun": -1, "ralston": -1, "dopri5": 2 / 3}.get(name, 1)
    np.testing.assert_allclose(
        scale * np.array(table.e[:s]), theirs.b_error, rtol=1e-11, atol=1e-15
    )


def test_a_table_of_ones_own_needs_only_what_is_printed_in_the_book():
    heun = tableau(2, c=[0, 1], a=[[], [1]], b=[1 / 2, 1 / 2], e=[-1 / 2, 1 / 2])
    assert heun == methods["heun"]
    assert named(heun) is heun
    arrays = tableau(
        2, c=np.array([0, 1]), a=[[], np.ones(1)], b=np.ones(2) / 2, e=np.array([-0.5, 0.5])
    )
    assert arrays == heun and hash(arrays) == hash(heun)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(b=[0.5, 0.6]), "weights `b` must sum to 1"),
        (dict(a=[[], [0.9]]), "must sum to c"),
        (dict(a=[[], [0.5, 0.5]]), "must have 1 entries"),
        (dict(e=[0.5, 0.5]), "sum to 0"),
        (dict(c=[0]), "as many rows"),
        (dict(dense=[[1, 0, 0, 0]]), "Every row of `dense`"),
        (dict(dense=[[1, 0, 0]]), "Column 0 of `dense`"),
        (dict(b=[float("nan"), 0.5]), "weights `b` must sum to 1, got nan"),
        (dict(a=[[], [float("nan")]]), "must sum to c"),
        (dict(e=[float("nan"), 0.5]), "weights `e` of the error"),
        (dict(e_low=[0.5, 0.5]), "weights `e_low` of the error"),
        (dict(e_low=[1, -1, 0, 0]), "as many rows"),
        (dict(e=None, e_low=[-0.5, 0.5]), "pass `e` as well"),
        (dict(extra_c=[0.5]), "one row for each node of `extra_c`"),
        (dict(extra_a=[[0.5, 0, 0]]), "one row for each node of `extra_c`"),
    ],
)
def test_a_wrong_table_is_refused_with_the_reason(change, message):
    good = dict(c=[0, 1], a=[[], [1]], b=[0.5, 0.5], e=[-0.5, 0.5])
    with pytest.raises(ValueError, match=message):
        tableau(2, **{**good, **change})


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="Did you mean 'dopri5'"):
        named("dopry5")
    with pytest.raises(TypeError, match="a name or a Tableau"):
        named(5)


def test_dopri8_is_another_name_of_dop853():
    assert named("dopri8") is named("dop853")


def test_only_methods_without_an_estimate_lack_one():
    without = Counter(table.e is None for table in methods.values())
    assert without[True] == 3  # euler, rk4, rk4_38
