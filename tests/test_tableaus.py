"""Every table against the theory: rooted trees, and the slope of its error."""

import math
from collections import Counter
from functools import cache

import numpy as np
import pytest

from jaxode import tableaus
from jaxode.tableaus import methods, named, tableau

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
        field, (0, 2), [0.5, 1.0], "DOP853", rtol=1e-13, atol=1e-14, dense_output=True
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


def test_tables_agree_with_other_libraries():
    from scipy.integrate._ivp import rk

    for ours, theirs in [
        (tableaus.dopri5, rk.RK45),
        (tableaus.bosh3, rk.RK23),
        (tableaus.dop853, rk.DOP853),
    ]:
        np.testing.assert_allclose(ours.b[: len(theirs.B)], theirs.B, rtol=1e-14)
        np.testing.assert_allclose(ours.c[: len(theirs.C)], theirs.C, rtol=1e-14)
    np.testing.assert_allclose(np.abs(tableaus.dopri5.e), np.abs(rk.RK45.E), rtol=1e-13)
    np.testing.assert_allclose(np.array(tableaus.dopri5.dense).T, rk.RK45.P, rtol=1e-10, atol=1e-12)


def test_a_table_of_ones_own_needs_only_what_is_printed_in_the_book():
    heun = tableau(2, c=[0, 1], a=[[], [1]], b=[1 / 2, 1 / 2], e=[-1 / 2, 1 / 2])
    assert heun == methods["heun"]
    assert named(heun) is heun


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(b=[0.5, 0.6]), "weights `b` must sum to 1"),
        (dict(a=[[], [0.9]]), "must sum to c"),
        (dict(a=[[], [0.5, 0.5]]), "must have 1 entries"),
        (dict(e=[0.5, 0.5]), "sum to 0"),
        (dict(c=[0]), "as many rows"),
        (dict(dense=[[1, 0, 0, 0]]), "Every row of `dense`"),
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


def test_only_methods_without_an_estimate_lack_one():
    without = Counter(table.e is None for table in methods.values())
    assert without[True] == 3  # euler, rk4, rk4_38
