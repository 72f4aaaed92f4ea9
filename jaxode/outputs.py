"""What is kept of a solve, and its transpose: the states at times, every step, a fold over the steps.

An output is rows in an array, each written when the step that holds it is accepted. What a kind of
output says is for one solve and one row; `write` and `gather` below do it for one solve and for many,
forwards and backwards. Dense output of a step is y(s + theta h) = y + sum_p theta^(p+1) d_p. A fold
is linear in what each accepted step adds to it, as a sum is, and is differentiated as such.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.solution import Status


@dataclasses.dataclass(frozen=True)
class Times:
    """The states at the times ss, increasing on [0, 1]; or a function of them, `save(f, y, s)`.

    The first time is the start, the last one the end. Rows at either end are filled in by `finish`:
    a solve with two times writes nothing while it runs.
    """

    save: Callable | None = None

    def rows(self, ss) -> int:
        """How many rows are written while the solve runs."""
        return len(ss) if len(ss) > 2 else 0

    def needs_inside(self) -> bool:
        return True

    def last(self, ss) -> int:
        """The last row, which a backward pass begins with. (The first one that is written is row 1.)"""
        return len(ss) - 1

    def due(self, ss, row, old, new) -> Array:
        """Whether a row lies in the step that was accepted."""
        here = tree.row(ss, jnp.minimum(row, len(ss) - 1))
        return (here <= new.s) & (here < ss[-1]) & (new.accepted > old.accepted)

    def passed(self, ss, row, s) -> Array:
        """Whether, going back, a row lies after s."""
        return (row >= 0) & (tree.row(ss, jnp.maximum(row, 0)) > s)

    def value(self, f, time, s, h, y, d) -> PyTree:
        """The row of a time inside the step from s to s + h."""
        theta = (time - s) / jnp.where(h == 0, 1, h)
        y = tree.polynomial(y, theta, d)
        return y if self.save is None else self.save(f, y, time)

    def step_of(self, ss, row, grid, n) -> Array:
        """The step that holds a row: `grid` says where each of the n steps began."""
        grid = jnp.where(jnp.arange(len(grid), dtype=jnp.int32) <= n, grid, jnp.inf)
        return jnp.searchsorted(grid, ss[row], side="left").astype(jnp.int32) - 1

    def room(self, f, y0, ss) -> PyTree:
        """An array for all rows."""
        like = y0 if self.save is None else jax.eval_shape(self.save, f, y0, ss[0])
        return tree.rooms(like, len(ss))

    def finish(self, f, ss, at, y0, slope0, y1, slope1, rows, report) -> PyTree:
        """All rows: the start and the end as they are, NaN where the solve did not come.

        The one place that says what a failed row holds: all are NaN if y0 or its derivative is not
        finite; else those after the last accepted step.

        `at` are the times as constants, None where nothing is differentiated: moving a time that is the
        start or the end moves along the derivative there: the value of (ss - at) k is 0, its
        derivative k.
        """
        constant = ss if at is None else at
        end = constant[-1]
        at_start, at_end = constant <= 0, constant >= end
        started = report.status != Status.NON_FINITE_INITIAL.value
        known = (at_start | (constant <= report.reached * end)) & started

        def along(y, slope):
            """A state for each time, moved along its slope. Products, since their transposes are
            products: long sums would not fit into one call."""
            if at is None:
                return jax.tree.map(lambda y: jnp.broadcast_to(y, (len(ss), *y.shape)), y)
            slope = jax.tree.map(lambda k: jnp.where(started & jnp.isfinite(k), k, 0), slope)
            move = ss - at
            times = lambda x, y: jnp.tensordot(lax.convert_element_type(x, y.dtype), y, 0)
            both = lambda y, k: times(jnp.ones_like(move), y) + times(move, k)
            return jax.tree.map(both, y, slope)

        first, last = along(y0, slope0), along(y1, slope1)
        if self.save is not None:
            first, last = (jax.vmap(partial(self.save, f))(y, ss) for y in (first, last))

        def leaf(first, last, *rows):
            fit = lambda x: x.reshape((len(ss),) + (1,) * (first.ndim - 1))
            inside = jnp.where(fit(at_end), last, *rows) if rows else last
            value = jnp.where(fit(at_start), first, inside)
            return jnp.where(fit(known), value, jnp.nan)

        return jax.tree.map(leaf, first, last, *(() if rows is None else (rows,)))


@dataclasses.dataclass(frozen=True)
class EveryStep:
    """The start and the end of every accepted step, at most `count` - 1 of them; rows beyond are NaN."""

    count: int
    save = None

    def rows(self, ss) -> int:
        return self.count

    def needs_inside(self) -> bool:
        return False

    def last(self, ss) -> int:
        return self.count - 1

    def due(self, ss, row, old, new) -> Array:
        return (row == new.accepted) & (new.accepted > old.accepted) & (row < self.count)

    def value(self, f, time, s, h, y, d) -> PyTree:
        return s + h, d[0]

    def step_of(self, ss, row, grid, n) -> Array:
        return row - 1

    def room(self, f, y0, ss) -> PyTree:
        return tree.rooms((ss[0], y0), self.count)

    def finish(self, f, ss, at, y0, slope0, y1, slope1, rows, report) -> PyTree:
        rows = tree.put(0, (ss[0], y0), rows)
        known = jnp.arange(self.count, dtype=jnp.int32) <= report.accepted
        started = report.status != Status.NON_FINITE_INITIAL.value
        at = lambda x: (known & started).reshape((-1,) + (1,) * (x.ndim - 1))
        return jax.tree.map(lambda x: jnp.where(at(x), x, jnp.nan), rows)


class Estimates:
    """A fold over the steps: the sum of the solver's own estimates of its error and of stiffness."""

    def of_step(self, method, y, h, step):
        """What a step adds."""
        return method.heuristics(y, h, step)

    def begin(self, found):
        """Before the first step; `found` is something like what a step adds."""
        return jax.tree.map(jnp.zeros_like, found)

    def add(self, total, found, accepted):
        """The fold after a step."""
        return jax.tree.map(lambda x, more: x + jnp.where(accepted, more, 0), total, found)

    def total(self, found):
        """The fold of many steps, along the leading axis; those that were none have added zeros."""
        return jax.tree.map(lambda x: jnp.sum(x, 0), found)


# Forwards.


def write(problems, inside: Callable, own, old, new, h, rows, put):
    """The rows that a step from `old` to `new` has passed: the state after it, and the rows.

    `inside()` are the d_p; `put(row, values, rows, due)` writes a row of every solve in which one is due.
    """

    def is_due(integrator, f, ss, row, old, new):
        return integrator.output.due(ss, row, old, new)

    def value_of(integrator, f, ss, row, s, h, y, d):
        return integrator.output.value(f, tree.row(ss, jnp.minimum(row, len(ss) - 1)), s, h, y, d)

    integrator = problems.of(own)[0]
    due = lambda row: problems.each(is_due)(own, row, old, new)
    some_due = lambda carry: jnp.any(due(carry[0]))

    def visit(carry):
        d = inside() if integrator.output.needs_inside() else [new.y]

        def one_each(carry):
            row, rows = carry
            here = due(row)
            value = problems.each(value_of)(own, row, old.s, h, old.y, d)
            return row + here.astype(jnp.int32), put(row, value, rows, here)

        return lax.while_loop(some_due, one_each, carry)

    # A loop that turns at most once: unlike a conditional it leaves the rows where they are.
    row, rows = lax.while_loop(some_due, visit, (new.output, rows))
    met = row > new.output
    more = met.astype(jnp.int32) * integrator.method.inside_evaluations
    evaluations = new.evaluations + more
    since = new.since if new.since is None else jnp.where(met, 0, new.since)
    return new._replace(output=row, evaluations=evaluations, since=since), rows


# Backwards.


class Cotangents(NamedTuple):
    """What is carried backwards: cotangents of y, of the memory, of f, of the fold; the next row to
    be met, and the cotangents of the times."""

    y: PyTree
    memory: PyTree
    f: PyTree
    row: Array
    ss: Any
    folded: Any = None


def passed(problems, own, row, s):
    """Whether, going back to s, a row of every solve has been passed."""
    return problems.each(lambda integrator, f, ss, row, s: integrator.output.passed(ss, row, s))(
        own, row, s
    )


def gather(problems, own, carry: Cotangents, rows_bar, s, h, y, inside: Callable, pick):
    """Cotangents of the rows inside a step, gathered on y and on the d_p, which are `inside()`.

    `pick(row, rows_bar)` is the cotangent of a row of every solve. Returns the carry with those of
    the times added, and the next row to be met.
    """

    def one(integrator, f, ss, row, s, h, y, d, w, y_bar, d_bar, ss_bar):
        here = integrator.output.passed(ss, row, s)
        time = tree.row(ss, jnp.maximum(row, 0))
        value = lambda time, y, d: integrator.output.value(f, time, s, h, y, d)
        _, vjp = jax.vjp(value, time, y, d)
        time_bar, y_more, d_more = vjp(jax.tree.map(lambda w: jnp.where(here, w, 0), w))
        if ss_bar is not None:
            place = jnp.maximum(row, 0)
            ss_bar = tree.put(place, tree.row(ss_bar, place) + time_bar, ss_bar)
        add = lambda x, more: jax.tree.map(jnp.add, x, more)
        return row - here.astype(jnp.int32), add(y_bar, y_more), add(d_bar, d_more), ss_bar

    some_passed = lambda state: jnp.any(passed(problems, own, state[0], s))

    def visit(state):
        d = inside()

        def one_each(state):
            w = pick(jnp.maximum(state[0], 0), rows_bar)
            return problems.each(one)(own, state[0], s, h, y, d, w, *state[1:])

        return lax.while_loop(some_passed, one_each, state)

    zero = jax.tree.map(jnp.zeros_like, y)
    begin = carry.row, zero, [zero] * len(jax.eval_shape(inside)), carry.ss
    # At most one turn, as in `write`: most steps have no row.
    row, y_bar, d_bar, ss_bar = lax.while_loop(some_passed, visit, begin)
    return carry._replace(row=row, ss=ss_bar), y_bar, d_bar
