"""Newton's method for the equations of a step, and the norm in which it says that they are solved.

References: Hairer and Wanner (1996), Solving Ordinary Differential Equations II (HW), IV.8.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.kernels.rules import custom_root
from jaxode.methods.linear import Linear

# What is left is taken to be so many times the last change where these do not shrink; so many kappa
# are small then: roundings of func.
SLOW, STALLED = 10.0, 30.0


def relative(error: PyTree, y: PyTree) -> Array:
    """The norm of an error for steps of equal size, which know no tolerance.

    In units of 1e-10 of the state, or 1,000 roundings of it.
    """
    leaves = jax.tree.leaves(y)
    wide = tree.widest(*map(tree.real_dtype, leaves))
    largest = tree.largest([jnp.max(abs(x), initial=0).astype(wide) for x in leaves])

    def unit(y):
        size = tree.magnitude(y)
        accuracy = max(1e-10, 1000 * float(jnp.finfo(y.dtype).eps))
        size = size + tree.scale(1e-3, lax.convert_element_type(largest, size.dtype))
        return tree.scale(accuracy, size) + jnp.finfo(size.dtype).tiny

    return tree.norm(error, jax.tree.map(unit, y))


def solved(residual: Callable, guess: Array, iterate: Callable, linear: Linear, factors: PyTree):
    """k with residual(k) = 0, and how it was found, by iterate(residual, guess).

    Its derivative is that of the implicit function, at the solution, whose equations `linear` solves;
    `factors` are those of a matrix near theirs.
    """
    tangent = lambda product, right: linear.solution(product, right, factors)
    return custom_root(residual, guess, iterate, tangent)


def simplified(solve, place, measure, kappa, iterations, factor, residual, k):
    """Newton's method with one matrix for all iterations: `solve` is by that of the start (HW sec. IV.8).

    Where the changes of the state `place(k)` shrink with the rate theta, what is left after the last
    one is theta / (1 - theta) times that; it is to have a norm below kappa. After the first change, of
    which there is no rate, the `factor` of the equations before is used, the root of it to be careful.

    Returns k; whether it was found, in how many evaluations, and the factor: as floats, since
    integers have no tangents that `custom_root` knows.
    """
    roundings, first = 16 * float(jnp.finfo(k.dtype).eps), lax.abs(place(k))

    def unfinished(carry):
        _, count, _, left, _ = carry
        return (count < iterations) & (left > kappa) & (left < jnp.inf)

    def iterate(carry):
        old, count, last, _, factor = carry
        k = old - solve(residual(old))
        y = place(k)
        scale = lax.max(first, lax.abs(y))  # that a number passes 0 makes no change large
        moved = lax.abs(y - place(old)) - tree.scale(roundings, scale)
        size = measure(lax.max(moved, jnp.zeros_like(y)), scale)
        rate = size / last
        # The second change may be larger than the first, if that was small by chance.
        slow = jnp.where((rate < 2) | (count < 2), SLOW, jnp.inf)
        from_rate = jnp.where(rate < SLOW / (1 + SLOW), rate / (1 - rate), slow)
        factor = jnp.where(count > 0, from_rate, jnp.sqrt(factor))
        return k, count + 1, size, factor * size, factor

    number = lambda x: jnp.asarray(x, k.dtype)
    start = k, number(0), number(1), number(jnp.finfo(k.dtype).max), number(factor)
    k, count, size, left, factor = lax.while_loop(unfinished, iterate, start)
    fine = (left <= kappa) | ((factor >= SLOW) & (size <= STALLED * kappa))
    return k, (lax.convert_element_type(fine, k.dtype), count, factor)
