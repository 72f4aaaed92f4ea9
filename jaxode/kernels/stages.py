"""A step as a loop over its stages, with all slopes in one array; and the way back through it.

A stage is then a product of a row of the table with the slopes, and the program has the field once,
where the written-out step has it for every stage. Which form is faster depends on the field
(`jaxode.kernels.forms`). Of one solve or of many: the arrays may have lanes, of which only
`Problems.each` knows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxode import tree
from jaxode.kernels.calls import apart
from jaxode.kernels.forms import CALLS, ONE_CALL
from jaxode.kernels.one_call import REDUCED
from jaxode.methods.explicit import Tableau, matrix
from jaxode.methods.method import Step
from jaxode.stepping.problems import Problems


def product(weights, ks, fused: bool):
    """sum_i w_i k_i over the leading axis, in float32 or better; weights that are missing are 0.

    A matrix product is computed once, whatever reads it; in one call a sum is as good, and is fused.
    """

    def leaf(k):
        k = tree.wide(k)
        w = jnp.asarray(weights, k.dtype)
        w = jnp.pad(w, (0, len(k) - len(w)))
        if fused and k.size > REDUCED:
            terms = [lax.mul(k[i], lax.broadcast(w[i], k.shape[1:])) for i in range(len(k))]
            return functools.reduce(lax.add, terms)
        if fused:
            return jnp.sum(lax.mul(k, lax.broadcast_in_dim(w, k.shape, (0,))), 0)
        return jnp.tensordot(w, k, 1, precision=tree.EXACT)

    return jax.tree.map(leaf, ks)


class Stages(NamedTuple):
    """The steps of a table, of one solve or of many; `kernel` is one of `jaxode.kernels.forms`."""

    table: Tableau
    problems: Problems
    kernel: str

    def product(self, weights, ks):
        return product(weights, ks, self.kernel == ONE_CALL)

    def run(self, own, s, y, ks, h, start: int, stop: int, seen=None):
        """Stages `start` to `stop` - 1 of a step: the last y_i, and slopes in the rows of ks.

        Every y_i goes into a row of `seen`, if that is given.
        """
        a, c = matrix(self.table, stop > len(self.table.c))
        slopes = apart(self.problems.slopes) if self.kernel == CALLS else self.problems.slopes

        def stage(state):
            i, _, ks, seen = state
            y1 = self.problems.moved(y, h, self.product(tree.row(jnp.asarray(a), i), ks))
            k = slopes(own, y1, s + tree.row(jnp.asarray(c, h.dtype), i) * h)
            return i + 1, y1, tree.put(i, k, ks), seen if seen is None else tree.put(i, y1, seen)

        begin = jnp.asarray(start, jnp.int32), y, ks, seen
        _, y1, ks, seen = lax.while_loop(lambda state: state[0] < stop, stage, begin)
        return y1, ks, seen

    def put(self, i, k, ks):
        """Cotangents in row i: of a small system in lanes one component after another, each a loop over
        the lanes, which takes a tenth less time."""
        if self.problems.axis != -1:
            return tree.put(i, k, ks)

        def leaf(k, ks):
            whole = k.reshape(-1, k.shape[-1])
            for j, place in enumerate(np.ndindex(*k.shape[:-1])):
                zero = jnp.zeros_like(i)
                at = (i, *[zero + n for n in place], zero)
                ks = lax.dynamic_update_slice(
                    ks, whole[j].reshape((1,) * (ks.ndim - 1) + (-1,)), at
                )
            return ks

        return jax.tree.map(leaf, k, ks)

    def step(self, own, s, y, memory, h) -> Step:
        """A step, with all slopes in rows."""
        count = len(self.table.c)
        ks = tree.put(0, memory, tree.rooms(y, count))  # zeros: 0 times an old NaN would be NaN
        y1, ks, _ = self.run(own, s, y, ks, h, 1, count)
        k1 = tree.row(ks, count - 1)
        zero = jax.tree.map(jnp.zeros_like, y)
        errors = [self.problems.moved(zero, h, self.product(e, ks)) for e in self.table.estimates]
        return Step(y1, k1, k1, errors, ks, evaluations=count - 1)

    def inside(self, own, s, y, h, step: Step) -> list[PyTree]:
        """The d_p of dense output, and the stages that only it needs."""
        ks, count, more = step.stages, len(self.table.c), len(self.table.extra_c)
        if more:
            pad = lambda k: jnp.concatenate([k, jnp.zeros((more, *k.shape[1:]), k.dtype)])
            ks = self.run(own, s, y, jax.tree.map(pad, ks), h, count, count + more)[1]
        return self.coefficients(y, h, ks)

    def coefficients(self, y, h, ks) -> list[PyTree]:
        """d_p = h sum_i B_pi k_i."""
        zero = jax.tree.map(jnp.zeros_like, y)
        return [
            self.problems.moved(zero, h, self.product(weights, ks)) for weights in self.table.dense
        ]

    def seen(self, own, s, y, memory, h, inside: bool):
        """The slopes and the y_i of a step, all in rows: what `back` needs."""
        total = len(self.table.c) + inside * len(self.table.extra_c)
        ks, seen = tree.put(0, memory, tree.rooms(y, total)), tree.rooms(y, total)
        return self.run(own, s, y, ks, h, 1, total, seen)[1:]

    def back(self, pull: Callable, seen, s, h, ends, f_bar, d_bar=None):
        """The vjp of a step, stage by stage: cotangents of y and of its first slope, and f_bar with
        those of f added.

        With y_i = y + h sum_j a_ij k_j and k_i = f(y_i), the cotangents from the last stage to the
        first are k_i' = h sum_(j > i) a_ji y_j' and y_i' = (df/dy)^T k_i'. The step ends at its last
        y_i, and k of the next step is its last k_i: `ends` are the cotangents of these two. `d_bar`
        are those of the d_p; `pull(y, s, w)` is the vjp of f.
        """
        table = self.table
        total, last = len(jax.tree.leaves(seen)[0]), len(table.c) - 1
        a, c = matrix(table, total > len(table.c))
        zero = jax.tree.map(jnp.zeros_like, ends[0])
        dense = np.zeros((len(table.dense), total))
        for p, weights in enumerate(table.dense):
            dense[p, : len(weights)] = weights[:total]
        if d_bar is not None:
            d_bar = jax.tree.map(lambda *d: jnp.stack(d), *d_bar)

        def slope_bar(i, ys_bar):
            """The cotangent of k_i, but for that of the next step."""
            k_bar = self.problems.moved(
                zero, h, self.product(tree.row(jnp.asarray(a.T), i), ys_bar)
            )
            if d_bar is None:
                return k_bar
            weights = tree.row(jnp.asarray(dense.T), i)
            return self.problems.moved(k_bar, h, self.product(weights, d_bar))

        def stage(state):
            i, f_bar, ys_bar = state
            at_last = lambda x: jax.tree.map(lambda x: jnp.where(i == last, x, 0), x)
            k_bar = jax.tree.map(jnp.add, slope_bar(i, ys_bar), at_last(ends[1]))
            s_i = s + tree.row(jnp.asarray(c, h.dtype), i) * h
            f_more, y_bar = pull(tree.row(seen, i), s_i, k_bar)
            y_bar = jax.tree.map(jnp.add, y_bar, at_last(ends[0]))
            return i - 1, jax.tree.map(jnp.add, f_bar, f_more), self.put(i, y_bar, ys_bar)

        state: Any = jnp.asarray(total - 1, jnp.int32), f_bar, tree.rooms(zero, total)
        first, f_bar, ys_bar = lax.while_loop(lambda state: state[0] > 0, stage, state)
        narrow = lambda x, like: lax.convert_element_type(x, like.dtype)
        y_bar: PyTree = jax.tree.map(narrow, self.product(np.ones(total), ys_bar), zero)
        return y_bar, slope_bar(first, ys_bar), f_bar
