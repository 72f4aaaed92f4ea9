"""Backsolve: the adjoint as an ordinary differential equation, solved backwards.

Under `jax.vmap` it is one more batch of solves in lanes. What each solve has of its own is integrated
with it; the gradient of what all of them share, such as the weights of a network, is one sum over
lanes and steps, never an array for each lane.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxode import batching, lanes, tree
from jaxode.cotangents import (
    Cotangents,
    join,
    only,
    outputs,
    rows_where,
    slopes,
    with_vjp,
)
from jaxode.lanes import Problems
from jaxode.loop import State, advance
from jaxode.solution import Status
from jaxode.stages import matrix, product
from jaxode.step import step_and_inside

CARRIED = 64  # numbers that solves share: up to here each lane integrates a gradient of its own


@functools.cache
def backsolve(rtol=None, atol=None):
    """The adjoint of Chen et al. (2018, arXiv 1806.07366, algorithm 1): one more ODE, solved backwards.

    With a(t) = dL/dy(t) and p(t) the gradient of the parameters collected so far,

        dy/dt = f,   da/dt = -a^T df/dy,   dp/dt = -a^T df/dtheta,   from t1 back to t0;

    nothing of the forward solve is kept. `rtol` and `atol` are those of the backward solve (those
    of the forward one by default). The error of p is left out of the error norm (Kidger et al.
    2020, arXiv 2009.09457): it only ever is a quadrature. The cotangents of outputs inside a step
    are moved to its end by the vjp of dense output, so that the steps do not shrink with the
    distance between outputs. y(t) is computed backwards, too, and drifts from the forward solution
    where that is unstable backwards in time (dissipative and stiff problems): use `replay` there.

    The string "backsolve" is `backsolve()`.
    """
    back = batching.batched(solve_backwards, each_back, lanes.able_to)
    of_one = continuous(
        lanes.solve_batched, lambda solve, *args: back(retolerated(solve, rtol, atol), *args)
    )

    def of_many(size, flags) -> batching.Solver:
        forwards = lambda *args: lanes.solved(size, flags, *args)[0]
        of_all = alike(flags[0], flags[0].rtol, flags[0].atol), *flags[1:]
        backwards = lambda solve, *args: all_backwards(
            size, of_all, retolerated(solve, rtol, atol), *args
        )
        return batching.Solver(forwards, continuous(forwards, backwards))

    return batching.InLanes(
        batching.Solver(lanes.solve_one, of_one), of_many, lanes.able_to, lanes.like_results
    )


def each_back(size, flags, solve, x, rest, ys, ys_bar):
    """Under a `vmap` outside of the derivative: everyone's gradient is its own."""
    every = partial(batching.spread, size)
    of_given = eqx.combine(jax.tree.map(lambda _: True, x), flags[2])
    args = every(x, flags[1]), rest, every(ys, flags[3]), every(ys_bar, flags[4])
    out = all_backwards(size, (flags[0], *of_given), solve, *args)
    return out, jax.tree.map(lambda _: True, out)


def continuous(forwards: Callable, backwards: Callable) -> Callable:
    """The differentiable solve of these two; of the first nothing is kept but its outputs."""

    def and_kept(x, rest):
        solve, given = join(x, rest)
        ys, report = forwards(solve, *given)
        return ys, report, ys

    def with_solve(x, rest, ys, ys_bar):
        return backwards(rest[0], x, rest[1], ys, ys_bar)

    return with_vjp(forwards, and_kept, with_solve)


def retolerated(solve, rtol, atol):
    """The integrator of (y, a, p): its own tolerances, and p outside the error norm."""
    if not isinstance(solve.steps, int) and solve.steps is not None:
        solve = dataclasses.replace(solve, steps=jnp.asarray(solve.steps))
    given = lambda new, old: jax.tree.map(lambda x: jnp.full_like(x, new), old) if new else old
    return alike(solve, given(rtol, solve.rtol), given(atol, solve.atol))


def alike(solve, rtol, atol):
    """With these for y, and for a."""
    return dataclasses.replace(
        solve, rtol=(rtol, rtol), atol=(atol, atol), mxstep=None, measured=state_and_adjoint
    )


def state_and_adjoint(state):
    return state[:2]


class Reversed(eqx.Module):
    """The field of (y, a, p) in r = end - s, the time still to go back from the end."""

    f_x: PyTree
    f_rest: PyTree
    end: PyTree

    def __call__(self, state, r):
        y, a, _ = state
        k, vjp = jax.vjp(lambda f_x, y: eqx.combine(f_x, self.f_rest)(y, self.end - r), self.f_x, y)
        f_bar, y_bar = vjp(a)
        return jax.tree.map(jnp.negative, k), y_bar, f_bar


# One solve.


def solve_backwards(solve, x, rest, ys, ys_bar):
    """Cotangents of (f, y0, ss) by one solve from the last output to the first."""
    ss = eqx.combine(x, rest)[2]
    y1, a, met = beginning(ss, ys, ys_bar)
    start = (y1, a, jax.tree.map(jnp.zeros_like, x[0]))
    field = Reversed(x[0], rest[0], ss[-1])
    k = field(start, jnp.zeros_like(ss[-1]))
    after, extra = None, None
    if len(ss) > 2:
        extra = met, None if x[2] is None else jnp.zeros_like(ss)
        after = partial(collect, solve.table, field, ss, ys_bar)
    state, report = advance(solve, field, start, k, ss[-1], after=after, extra=extra)
    out = state.pair[0][1:], k[0], extra and state.extra[1], report.status
    fine, cotangents = ending(x, rest, ys_bar, *out)
    return jax.tree.map(partial(poisoned, is_asked(ys_bar), fine), cotangents)


def beginning(ss, ys, ys_bar):
    """The last state and its cotangent, and the last output before the end."""
    at_end = (ss >= ss[-1]) & (ss > 0)
    y1 = jax.tree.map(lambda y: y[-1], ys)
    return y1, rows_where(at_end, ys_bar), jnp.sum(~at_end, dtype=jnp.int32) - 1


def ending(x, rest, ys_bar, adjoints, k1, ss_bar, status):
    """Whether all went well, and the cotangents of (f, y0, ss)."""
    f, y0, ss = eqx.combine(x, rest)
    a, p = adjoints
    at_start, at_end = ss <= 0, (ss >= ss[-1]) & (ss > 0)
    y0_bar = jax.tree.map(jnp.add, a, rows_where(at_start, ys_bar))
    if x[2] is not None:
        back = jax.tree.map(jnp.negative, k1)
        rows = jnp.zeros_like(ss) if ss_bar is None else ss_bar
        ss_bar = jnp.where(at_end, slopes(ys_bar, back, ss.dtype), rows)
        k0 = f(y0, jnp.zeros_like(ss[-1]))
        ss_bar = jnp.where(at_start, slopes(ys_bar, k0, ss.dtype), ss_bar)
    return status == Status.SUCCESS.value, (p, only(x[1], y0_bar), ss_bar)


def is_asked(ys_bar):
    """Whether there is anything to go back for."""
    return jnp.any(jnp.stack([jnp.any(w != 0) for w in jax.tree.leaves(ys_bar)]))


def poisoned(asked, fine, x):
    """A failed solve has no gradient, unless it is left out: then that is 0."""
    return jnp.where(asked, tree.scale(jnp.where(fine, 1.0, jnp.nan), x), 0)


def collect(table, field, ss, ys_bar, state, new):
    """After a step back from s1 to s: the outputs between them, moved to s."""
    s = field.end - new.s
    h = new.s - state.s
    row, ss_bar = new.extra

    def moved():
        y, a, p = new.pair[0]

        def dense(f_x, y):
            f = eqx.combine(f_x, field.f_rest)
            return step_and_inside(table, f, y, f(y, s), s, h, True)[2]

        d, vjp = jax.vjp(dense, field.f_x, y)
        zeros = jax.tree.map(jnp.zeros_like, y)
        carry = Cotangents(None, p, ss_bar, row)
        carry, straight, d_bar = outputs(carry, d, zeros, [zeros] * len(d), s, h, ss, ys_bar)
        f_bar, y_bar = vjp(d_bar)
        a = jax.tree.map(lambda *x: sum(x), a, straight, y_bar)
        there = (y, a, jax.tree.map(jnp.add, p, f_bar))
        return (there, field(there, new.s)), (carry.row, carry.ss)

    met = (row >= 0) & (ss[jnp.maximum(row, 0)] > s)
    pair, extra = lax.cond(met, moved, lambda: (new.pair, new.extra))
    return new._replace(pair=pair, extra=extra)


# Many solves.


def all_backwards(size, flags, solve, x, rest, ys, ys_bar):
    """`solve_backwards` of many. Cotangents of what they share of f are sums over all of them.

    `flags` are those of (solve, f, y0, ss); ys and ys_bar have the axis.
    """
    f_own, f_sum = parted(size, x[0], only(x[0], flags[1]))
    field = f_own, f_sum, rest[0]
    problems, begin = queued(size, flags, solve, field, (x, rest), ys, ys_bar)
    f_bar = jax.tree.map(jnp.zeros_like, f_sum)
    back = Back(problems, f_sum)
    ends, f_bar = lanes.run(problems, size, (problems.own, begin), back.once, f_bar)

    def result(own, begin, end, x, rest, ys_bar):
        solve, _, span = eqx.combine(own, problems.shared)
        start, k, last = map(problems.coordinates.open, (*begin.pair, end.pair[0]))
        status = solve.report(end, start, k, span[-1]).status
        fine, out = ending(x, rest, ys_bar, last[1:], k[0], end.extra and end.extra[1], status)
        asked = is_asked(ys_bar)
        return jax.tree.map(partial(poisoned, asked, fine), out), fine | ~asked

    axis, of_given = problems.coordinates.axis, jax.tree.map(lambda b: 0 if b else None, flags[1:])
    axes = axis, axis, axis, only(x, of_given), only(rest, of_given), 0
    args = problems.own, begin, ends, x, rest, ys_bar
    (own_bar, y0_bar, ss_bar), fine = jax.vmap(result, axes)(*args)
    others = own_bar, y0_bar, ss_bar
    own_bar, y0_bar, ss_bar = batching.summed(others, only(others, flags[1:]))
    f_bar = jax.tree.map(partial(poisoned, True, jnp.all(fine)), f_bar)
    return eqx.combine(own_bar, f_bar), y0_bar, ss_bar


def parted(size, f_x, flags):
    """What each lane integrates a gradient of, with an axis; and what has one gradient for all."""
    shared = [x for x, flag in zip(jax.tree.leaves(f_x), jax.tree.leaves(flags)) if not flag]
    few = sum(x.size for x in shared) <= CARRIED
    f_own, f_sum = eqx.partition(f_x, jax.tree.map(lambda flag: flag or few, flags))
    return batching.spread(size, f_own, only(f_own, flags)), f_sum


def queued(size, flags, solve, field, given, ys, ys_bar):
    """The backward solves before their first attempts."""
    (f_own, f_sum, f_rest), ss = field, eqx.combine(*given)[2]
    each, of_ss = partial(jax.vmap, axis_size=size), 0 if flags[3] else None
    y1, a, met = each(beginning, (of_ss, 0, 0))(ss, ys, ys_bar)
    # A solve that is left out is not solved backwards. It may have failed: it starts as another.
    asked = each(is_asked)(ys_bar)
    one = jnp.argmax(asked)
    y1 = jax.tree.map(lambda y: each(jnp.where, (0, 0, None))(asked, y, y[one]), y1)
    end = jnp.where(asked, ss[..., -1], 0)
    start = y1, a, jax.tree.map(jnp.zeros_like, f_own)
    all_of = partial(jax.tree.map, lambda _: True)
    of_rest = eqx.combine(only(f_sum, flags[1]), only(f_rest, flags[1]))
    of_field = Reversed(all_of(f_own), of_rest, True)
    field = Reversed(f_own, eqx.combine(f_sum, f_rest), end)
    span = jnp.stack([jnp.zeros_like(end), end], -1)
    of_start = flags[0], of_field, all_of(start), True
    problems, start = lanes.prepared(size, of_start, solve, field, start, span)
    begin = lanes.started(problems, problems.own, start)
    if ss.shape[-1] > 2:
        of_x = given[0][2]
        rows = lambda ss, w, met: (met, None if of_x is None else jnp.zeros_like(ss), ss, w)
        extra = each(rows, (of_ss, 0, 0))(ss, ys_bar, met)
        begin = begin._replace(extra=problems.to_lanes(extra))
    return problems, begin


class Back:
    """An attempt backwards of all lanes, with what it adds to the gradient of what they share."""

    def __init__(self, problems: Problems, f_sum):
        self.problems, self.f_sum = problems, f_sum

    def once(self, carry):
        """For `lanes.run`."""
        (own, old), who, f_bar = carry
        new, h, ks = lanes.attempt(self.problems, own, old)
        f_bar = self.quadrature(own, old, new, h, ks, f_bar)
        if new.extra is not None:
            pending = self.problems.each(self.pending)(own, old, new)
            move = lambda: self.move(pending, own, old, new, f_bar)
            new, f_bar = lax.cond(jnp.any(pending), move, lambda: (new, f_bar))
        return (own, new), who, f_bar

    def quadrature(self, own, old: State, new: State, h, ks, f_bar):
        """f_bar and the integral of a^T df/dtheta over this step, if it was accepted."""
        if not jax.tree.leaves(f_bar):
            return f_bar
        problems, table, steps = self.problems, self.problems.table, self.problems.stages(own)
        a, c = matrix(table, False)
        y, lam, _ = old.pair[0]
        taken = new.accepted > old.accepted

        def stage(i, f_bar):
            pick = lambda table: tree.row(jnp.asarray(table, h.dtype), i)
            here = steps.moved((y, lam), h, product(tree.row(jnp.asarray(a), i), ks[:2]))
            y_i, a_i = problems.vmap(tree.where)(taken, here, (y, lam))
            weight = jnp.where(taken, h, 0) * pick(table.b)
            w = jax.tree.map(lambda a_i: steps.spread(weight, a_i) * a_i, a_i)
            _, vjp = jax.vjp(lambda f: self.slopes(own, f, y_i, old.s + pick(c) * h), self.f_sum)
            return jax.tree.map(jnp.add, f_bar, vjp(w)[0])

        return lax.fori_loop(0, len(table.c) - 1, stage, f_bar)

    def slopes(self, own, f_sum, y, r):
        """f of all lanes."""

        def one(solve, field, span, y, r):
            return eqx.combine(f_sum, field.f_x, field.f_rest)(y, field.end - r)

        return self.problems.each(one)(own, y, r)

    @staticmethod
    def pending(solve, field, span, old: State, new: State):
        """Whether a step went past an output."""
        met, _, ss, _ = new.extra
        return (new.s > old.s) & (met >= 0) & (ss[jnp.maximum(met, 0)] > field.end - new.s)

    def move(self, pending, own, old: State, new: State, f_bar):
        """`collect` of the lanes that are pending."""
        problems, open = self.problems, self.problems.coordinates.open
        y, a, p = problems.vmap(open)(new.pair[0])
        h = new.s - old.s

        def dense(f_own, f_sum, y):
            def one(solve, field, span, s, h, f_own, y):
                f = eqx.combine(f_sum, f_own, field.f_rest)
                return step_and_inside(problems.table, f, y, f(y, s), s, h, True)[2]

            return problems.each(one)(own, end - new.s, h, f_own, y)

        def gather(pending, d, s, h, extra, y):
            met, ss_bar, ss, w = extra
            zeros = jax.tree.map(jnp.zeros_like, y)
            carry = Cotangents(None, None, ss_bar, jnp.where(pending, met, -1))
            carry, straight, d_bar = outputs(carry, d, zeros, [zeros] * len(d), s, h, ss, w)
            met = jnp.where(pending, carry.row, met)
            return straight, d_bar, (met, carry.ss, ss, w)

        end = own[1].end
        d, vjp = jax.vjp(dense, own[1].f_x, self.f_sum, y)
        straight, d_bar, extra = problems.vmap(gather)(pending, d, end - new.s, h, new.extra, y)
        f_own, f_more, y_bar = vjp(d_bar)
        there = (
            y,
            jax.tree.map(lambda *x: sum(x), a, straight, y_bar),
            jax.tree.map(jnp.add, p, f_own),
        )
        there = problems.vmap(problems.coordinates.pack)(there)
        pair = there, problems.slopes(own, there, new.s)
        pair = problems.vmap(tree.where)(pending, pair, new.pair)
        return new._replace(pair=pair, extra=extra), jax.tree.map(jnp.add, f_bar, f_more)
