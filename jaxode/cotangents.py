"""What goes backwards, whichever way: which inputs are differentiated, and the cotangents of outputs."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import PyTree

from jaxode import tree
from jaxode.step import powers_of

# Which inputs are differentiated.


def with_vjp(plain: Callable, forwards: Callable, backwards: Callable) -> Callable:
    """The solve `plain(solve, f, y0, ss) -> (ys, report)`, differentiated by two functions.

    `forwards(x, rest) -> (ys, report, kept)` is given the inputs that are differentiated, and the
    others; `backwards(x, rest, kept, ys_bar)` returns cotangents of the former.
    """

    @jax.custom_vjp
    def solved(solve, f, y0, ss):
        return plain(solve, f, y0, ss)

    def forward_pass(solve, f, y0, ss):
        x, rest = perturbed((f, y0, ss))
        rest = (values(solve), rest)
        ys, report, kept = forwards(x, rest)
        return (ys, report), (x, rest, kept)

    def backward_pass(residuals, cotangents):
        ys_bar = jax.tree.map(dense_cotangent, cotangents[0], is_leaf=is_symbolic_zero)
        return None, *backwards(*residuals, ys_bar)

    solved.defvjp(forward_pass, backward_pass, symbolic_zeros=True)
    return solved


def perturbed(inputs):
    """Split custom_vjp's inputs into what is differentiated and the rest, with None for the other."""
    is_primal = lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
    mask = jax.tree.map(
        lambda x: bool(x.perturbed) and jnp.issubdtype(jnp.result_type(x.value), jnp.inexact),
        inputs,
        is_leaf=is_primal,
    )
    return eqx.partition(values(inputs), mask)


def values(inputs):
    return jax.custom_derivatives.custom_vjp_primal_tree_values(inputs)


def join(x, rest):
    return rest[0], eqx.combine(x, rest[1])


def only(mask, tree_):
    """tree_ where the mask has a leaf, None elsewhere."""
    return jax.tree.map(
        lambda m, x: None if m is None else x, mask, tree_, is_leaf=lambda m: m is None
    )


def no_tangent(x):
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def is_symbolic_zero(x):
    return isinstance(x, SymbolicZero)


def dense_cotangent(x):
    return jnp.zeros(x.aval.shape, x.aval.dtype) if is_symbolic_zero(x) else x


# Cotangents of the outputs.


class Cotangents(eqx.Module):
    """What is carried backwards: cotangents, and the next output row to be met."""

    pair: PyTree
    f: PyTree
    ss: PyTree
    row: jax.Array


def outputs(carry, d, straight, d_bar, s, h, ss, ys_bar):
    """Cotangents of the outputs in (s, s + h], gathered on y and on the d_p."""

    def meet(state):
        row, ss_bar, straight, d_bar = state
        theta = (ss[row] - s) / h
        w = jax.tree.map(lambda w: w[row], ys_bar)
        powers = powers_of(theta, len(d_bar))
        straight = jax.tree.map(jnp.add, straight, w)
        d_bar = [tree.combine(b, 1.0, [p], [w]) for b, p in zip(d_bar, powers)]
        if ss_bar is not None:
            rates = [jnp.ones_like(theta), *powers[:-1]]
            slope = tree.weighted_sum(
                1 / h, [((p + 1) * r, d) for p, (r, d) in enumerate(zip(rates, d))]
            )
            ss_bar = ss_bar.at[row].set(tree.dot(w, slope).astype(ss_bar.dtype))
        return row - 1, ss_bar, straight, d_bar

    def met(state):
        return (state[0] >= 0) & (ss[jnp.maximum(state[0], 0)] > s)

    state = (carry.row, carry.ss, straight, d_bar)
    row, ss_bar, straight, d_bar = lax.while_loop(met, meet, state)
    return Cotangents(carry.pair, carry.f, ss_bar, row), straight, d_bar


def rows_where(rows, ys_bar):
    """Sum of the cotangents of some of the rows."""

    def leaf(w):
        chosen = rows.reshape((len(rows),) + (1,) * (w.ndim - 1))
        return jnp.sum(jnp.where(chosen, w, 0), axis=0)

    return jax.tree.map(leaf, ys_bar)


def slopes(ys_bar, k, dtype):
    """<w_j, k> for every row j."""
    return jax.vmap(lambda w: tree.dot(w, k))(ys_bar).astype(dtype)
