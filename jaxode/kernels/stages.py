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
from jaxode.stepping.problems import Problems, pullback


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
        a = a[:, : len(jax.tree.leaves(ks)[0])]
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
        errors = self.sums(y, h, ks, self.table.estimates)
        return Step(y1, k1, k1, errors, ks, evaluations=count - 1)

    def inside(self, own, s, y, h, step: Step) -> list[PyTree]:
        """The d_p of dense output, and the stages that only it needs."""
        ks, count, more = step.stages, len(self.table.c), len(self.table.extra_c)
        if more:
            pad = lambda k: jnp.concatenate([k, jnp.zeros((more, *k.shape[1:]), k.dtype)])
            ks = self.run(own, s, y, jax.tree.map(pad, ks), h, count, count + more)[1]
        return self.sums(y, h, ks, self.table.dense)

    def sums(self, y, h, ks, weights) -> list[PyTree]:
        """h sum_i w_i k_i for each row of weights."""
        zero = jax.tree.map(jnp.zeros_like, y)
        return [self.problems.moved(zero, h, self.product(w, ks)) for w in weights]

    def seen(self, own, s, y, h, total: int, memory=None):
        """The slopes and the y_i of so many stages, all in rows: what `back` needs.

        `memory` is the first slope, where that is known.
        """
        ks = rooms = tree.rooms(y, total)
        if memory is not None:
            ks = tree.put(0, memory, ks)
        return self.run(own, s, y, ks, h, int(memory is not None), total, rooms)[1:]

    def pull_of_slopes(self, own, mask) -> Callable:
        """The vjp of f, (y, s, k_bar) -> (f_bar, y_bar), which `back` asks for."""
        fn = lambda problems, own, *args: problems.slopes(own, *args)
        return lambda y, s, w: pullback(self.problems, own, mask, fn, (y,), (s,))[1](w)

    def back(self, pull: Callable, seen, s, h, f_bar, weights, sums_bar, ends=None):
        """The vjp of stages, one after another: cotangents of y and of the first slope, and f_bar with those of
        f added.

        With y_i = y + h sum_j a_ij k_j and k_i = f(y_i), the cotangents from the last stage to the
        first are k_i' = h sum_(j > i) a_ji y_j' and y_i' = (df/dy)^T k_i'. To k_i' comes h sum_p w_pi d_p',
        where `sums_bar` are the cotangents d_p' of h sum_i w_pi k_i. Of a whole step `ends` are the cotangents
        of its last y_i, where it ends, and its last k_i, which is the first of the next step; its own first
        slope is of the step before. Without them that slope is one of the stages, and has no cotangent.
        """
        total, first = len(jax.tree.leaves(seen)[0]), int(ends is not None)
        a, c = matrix(self.table, total > len(self.table.c))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), seen)
        columns = [np.pad(w, (0, max(0, total - len(w))))[:total] for w in weights]
        of_sums = jax.tree.map(lambda *d: jnp.stack(d), *sums_bar) if sums_bar else None

        def slope_bar(i, ys_bar):
            """The cotangent of k_i, but for that of the next step."""
            column = tree.row(jnp.asarray(a[:total, :total].T), i)
            k_bar = self.problems.moved(zero, h, self.product(column, ys_bar))
            if of_sums is None:
                return k_bar
            column = tree.row(jnp.asarray(np.stack(columns, 1)), i)
            return self.problems.moved(k_bar, h, self.product(column, of_sums))

        def stage(state):
            i, f_bar, ys_bar = state
            at_last = lambda x: jax.tree.map(lambda x: jnp.where(i == last, x, 0), x)
            k_bar = slope_bar(i, ys_bar)
            if ends is not None:
                k_bar = jax.tree.map(jnp.add, k_bar, at_last(ends[1]))
            s_i = s + tree.row(jnp.asarray(c, h.dtype), i) * h
            f_more, y_bar = pull(tree.row(seen, i), s_i, k_bar)
            if ends is not None:
                y_bar = jax.tree.map(jnp.add, y_bar, at_last(ends[0]))
            return i - 1, jax.tree.map(jnp.add, f_bar, f_more), self.put(i, y_bar, ys_bar)

        last = len(self.table.c) - 1
        state: Any = jnp.asarray(total - 1, jnp.int32), f_bar, tree.rooms(zero, total)
        i, f_bar, ys_bar = lax.while_loop(lambda state: state[0] >= first, stage, state)
        narrow = lambda x, like: lax.convert_element_type(x, like.dtype)
        y_bar: PyTree = jax.tree.map(narrow, self.product(np.ones(total), ys_bar), zero)
        return y_bar, None if ends is None else slope_bar(i, ys_bar), f_bar


def vjp_of_added(stages: Stages, own, mask, s, y, h, inside: bool):
    """What a step of the table adds to y; the d_p, `d()`, if there are rows `inside`; and the vjp of both.

    That is (f_bar, [cotangents of what is added, and of the d_p]) -> (y_bar, f_bar). The last slope of a step,
    at its end, is one that only the d_p need.
    """
    table, pull = stages.table, stages.pull_of_slopes(own, mask)
    weights = [table.b[:-1], *(table.dense if inside else ())]
    total = len(table.c) + len(table.extra_c) if inside else len(table.c) - 1
    ks, seen = stages.seen(own, s, y, h, total)
    sums = lambda weights: stages.sums(y, h, ks, weights)
    back = lambda f_bar, bars: stages.back(pull, seen, s, h, f_bar, weights, bars)[::2]
    return sums(weights[:1])[0], lambda: sums(weights[1:]), back
