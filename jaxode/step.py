"""One step of an explicit Runge-Kutta method, and the solution inside it. The one place to fuse.

Tables are closed (the last stage is f at the end of the step), so that one short function serves
every method: the last k is both the slope that dense output needs and the first k of the next step.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxode import tree
from jaxode.splittings import Splitting
from jaxode.tableaus import Tableau


def step(table: Tableau | Splitting, f, y: PyTree, k: PyTree, s, h) -> tuple[PyTree, list[PyTree]]:
    """y(s + h) and every stage derivative, from y(s) = y with k = f(y, s).

    y_i = y + h sum_j a_ij k_j,  k_i = f(y_i, s + c_i h)   (Hairer, Norsett, Wanner, eq. II.1.8);
    the last y_i is y(s + h), the last k_i its derivative.
    """
    if isinstance(table, Splitting):
        return drifts_and_kicks(table, f, y, k, s, h)
    ks = [k]
    for c, row in zip(table.c[1:], table.a[1:]):
        y1 = tree.combine(y, h, row, ks)
        ks.append(f(y1, s + tree.scale(c, h)))
    return y1, ks


def drifts_and_kicks(table: Splitting, f, y: PyTree, k: PyTree, s, h) -> tuple[PyTree, list]:
    """The same for a symplectic method: q += drift h v(p), p += kick h g(q), in turn.

    Both have a time of their own, which moves with them.
    """
    (q, p), tq, tp = y, s, s
    for drift, kick in zip(table.drift, table.kick):
        if drift:
            q = tree.combine(q, h, [drift], [f((q, p), tp)[0]])
            tq = tq + tree.scale(drift, h)
        if kick:
            p = tree.combine(p, h, [kick], [f((q, p), tq)[1]])
            tp = tp + tree.scale(kick, h)
    mean = jax.tree.map(lambda y1, y: (y1 - y) / lax.convert_element_type(h, y.dtype), (q, p), y)
    return (q, p), [k, mean, f((q, p), s + h)]


def error(table: Tableau, h, ks) -> list[PyTree]:
    """h sum_i e_i k_i, the difference of the two solutions of an embedded pair; or of two pairs."""
    estimates = [e for e in (table.e, table.e_low) if e]
    return [tree.weighted_sum(h, [(w, k) for w, k in zip(e, ks) if w]) for e in estimates]


def heuristics(table: Tableau, y: PyTree, y1: PyTree, ks, h):
    """The error estimate and the stiffness estimate of a step, as smooth numbers.

    |h sum_i e_i k_i| (root mean square), and |k_s - k_(s-1)| / |y_s - y_(s-1)| for the last two
    stages, which are both at the end of the step: about the largest eigenvalue of df/dy (HNW eq.
    IV.2.26; Pal et al. 2021, arXiv 2105.03918).
    """
    y2 = tree.combine(y, h, table.a[-2], ks)
    difference = lambda a, b: jax.tree.map(lax.sub, a, b)
    slope, distance = length(difference(ks[-1], ks[-2])), length(difference(y1, y2))
    far = distance > 0
    stiffness = jnp.where(far, slope / jnp.where(far, distance, 1), 0)
    return length(error(table, h, ks)[0]), stiffness


def length(x: PyTree):
    """The root mean square, differentiable at 0 too."""
    squares = tree.dot(x, jax.tree.map(jnp.conj, x))
    size = sum(leaf.size for leaf in jax.tree.leaves(x))
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1) / size), 0)


def extra_stages(table: Tableau, f, y: PyTree, ks, s, h) -> list[PyTree]:
    """The stages that only dense output needs (three in dop853, none in most tables)."""
    ks = list(ks)
    for c, row in zip(table.extra_c, table.extra_a):
        ks.append(f(tree.combine(y, h, row, ks), s + tree.scale(c, h)))
    return ks


def interpolate(table: Tableau, y: PyTree, ks, h, theta) -> PyTree:
    """y(s + theta h) = y + h sum_i b_i(theta) k_i: dense output, for 0 <= theta <= 1."""
    powers = powers_of(theta, len(table.dense))
    weights = [
        sum((tree.scale(d, p) for d, p in zip(column, powers) if d), jnp.zeros_like(theta))
        for column in zip(*table.dense)
    ]
    used = [any(column) for column in zip(*table.dense)]
    terms = [(w, k) for w, k, u in zip(weights, ks, used) if u]
    return jax.tree.map(tree.moved, y, tree.wide_sum(h, terms))


def powers_of(theta, count: int) -> list:
    """theta, theta^2, ..., theta^count."""
    powers = [theta]
    while len(powers) < count:
        powers.append(lax.mul(powers[-1], theta))
    return powers


def coefficients(table: Tableau, f, y: PyTree, ks, s, h) -> list[PyTree]:
    """d_p = h sum_i B_pi k_i, so that y(s + theta h) = y + sum_p theta^(p+1) d_p."""
    ks = extra_stages(table, f, y, ks, s, h)
    return [tree.weighted_sum(h, [(b, k) for b, k in zip(row, ks) if b]) for row in table.dense]


def step_and_inside(table: Tableau, f, y: PyTree, k: PyTree, s, h, inside: bool):
    """y1, k1, and (if wanted) the d_p of the polynomial inside: the form that backward passes use."""
    y1, ks = step(table, f, y, k, s, h)
    if not inside:
        return y1, ks[-1], []
    return y1, ks[-1], coefficients(table, f, y, ks, s, h)
