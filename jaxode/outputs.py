"""What is kept of a solve, and its transpose: the states at times, every step, a fold over the steps.

An output is rows in an array, each written when the step that holds it is accepted. What a kind of
output says is for one solve and one row; `write` and `gather` below do it for one solve and for many,
forwards and backwards. Dense output of a step is y(s + theta h) = y + sum_p theta^(p+1) d_p. A fold
is linear in what each accepted step adds to it, as a sum is, and is differentiated as such.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.kernels.rules import custom_jvp
from jaxode.solution import Status
from jaxode.stepping.field import beyond_the_end
from jaxode.stepping.integrator import trial_step
from jaxode.stepping.problems import pullback


def observed(f, y, s) -> PyTree:
    """`save` of an output: the user's function of the state, which the field holds (`Observed`)."""
    return f.observed(y, s)


def with_carried(method, ys: PyTree, memory: PyTree) -> PyTree:
    """What a solve returns: ys, and what the memory of its method has carried to the end, if it does."""
    return (ys, method.carried(memory)) if method.carries else ys


def from_here(s) -> Array:
    """From where on times are of the step that begins at s, and not of the one that ends there: a few roundings
    before, since the same time is not always computed in the same way."""
    return s * (1 - 4 * float(jnp.finfo(s.dtype).eps))


@dataclasses.dataclass(frozen=True)
class Times:
    """The states at the times ss, increasing on [0, 1]; or a function of them, `save(f, y, s)`.

    The first time is the start, the last one the end. Rows at either end are filled in by `finish`:
    a solve with two times writes nothing while it runs. With a function the result is its rows, and
    the state at the end; `pushes` says whether it has derivatives in forward mode.

    A time at which two steps meet is of the one that ends there; with `after` of the one that starts there,
    with what an event has made of the state. The first row is then written as others are.
    """

    save: Callable | None = None
    pushes: bool = True
    after: bool = False
    each_step = False

    @property
    def first(self) -> int:
        """The first row that is written while the solve runs."""
        return 0 if self.after else 1

    @property
    def sees_field(self) -> bool:
        """Whether the rows depend on the leaves of the field, and not only through the states."""
        return self.save is not None

    def rows(self, ss) -> int:
        """How many rows are written while the solve runs."""
        return len(ss) if len(ss) > 2 or self.after else 0

    def needs_inside(self) -> bool:
        return True

    def last(self, ss, report) -> int:
        """The last row, which a backward pass begins with."""
        return len(ss) - 1

    def due(self, ss, row, old, new) -> Array:
        """Whether a row lies in the step that was accepted."""
        here = tree.row(ss, jnp.minimum(row, len(ss) - 1))
        reached = here < from_here(new.s) if self.after else here <= new.s
        return reached & (here < ss[-1]) & (new.accepted > old.accepted)

    def passed(self, ss, row, s, h) -> Array:
        """Whether, going back over a step of size h, a row lies after its start s."""
        of_step = lambda here: (here >= from_here(s)) & (h > 0) if self.after else here > s
        return (row >= 0) & of_step(tree.row(ss, jnp.maximum(row, 0)))

    def value(self, f, time, s, h, y, d) -> PyTree:
        """The row of a time inside the step from s to s + h."""
        theta = (time - s) / jnp.where(h == 0, 1, h)
        y = tree.polynomial(y, theta, d)
        return y if self.save is None else self.save(f, y, time)

    def step_of(self, ss, row, grid, n) -> Array:
        """The step that holds a row: `grid` says where each of the n steps began."""
        grid = jnp.where(jnp.arange(len(grid), dtype=jnp.int32) <= n, grid, jnp.inf)
        grid, side = (from_here(grid), "right") if self.after else (grid, "left")
        return jnp.searchsorted(grid, ss[row], side=side).astype(jnp.int32) - 1

    def room(self, integrator, f, y0, ss) -> PyTree:
        """An array for all rows."""
        like = y0 if self.save is None else jax.eval_shape(self.save, f, y0, ss[0])
        return tree.rooms(like, len(ss))

    def like(self, integrator, f, y0, ss) -> PyTree:
        """Something like what `finish` returns."""
        rows = self.room(integrator, f, y0, ss)
        return rows if self.save is None else (rows, y0)

    def ends(self, ss, report) -> tuple[Array, Array]:
        """Which rows are the state at the start, and which of the others that at the end."""
        end = ss[-1]
        if self.after:  # as for a time inside: that where the solve stopped is at its end
            return jnp.zeros_like(ss, bool), ss >= from_here(report.reached * end)
        return ss <= 0, ss >= end

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
        at_start, at_end = self.ends(constant, report)
        started = report.status != Status.NON_FINITE_INITIAL.value
        known = (at_start | (constant <= report.reached * end)) & started

        def along(y, slope):
            """A state for each time, moved along its slope. Products, since their transposes are
            products: long sums would not fit into one call."""
            if at is None:
                return jax.tree.map(lambda y: jnp.broadcast_to(y, (len(ss), *y.shape)), y)
            slope = jax.tree.map(lambda k: jnp.where(started & jnp.isfinite(k), k, 0), slope)
            move = ss - at
            times = lambda x, y: jnp.tensordot(
                lax.convert_element_type(x, y.dtype), y, 0, precision=tree.EXACT
            )
            both = lambda y, k: times(jnp.ones_like(move), y) + times(move, k)
            return jax.tree.map(both, y, slope)

        def saved(y, slope, s):
            """The same of the function, evaluated once: for each time it would take as many states."""
            save = partial(cast(Callable, self.save), f)
            if not self.pushes:
                return jax.vmap(save)(along(y, slope), ss)
            if at is None:
                return along(save(y, s), None)
            slope = jax.tree.map(lambda k: jnp.where(started & jnp.isfinite(k), k, 0), slope)
            return along(*jax.jvp(save, (y, s), (slope, jnp.ones_like(s))))

        if self.save is None:
            first, last = along(y0, slope0), along(y1, slope1)
        else:
            first, last = saved(y0, slope0, 0 * end), saved(y1, slope1, end)

        def leaf(first, last, *rows):
            fit = lambda x: x.reshape((len(ss),) + (1,) * (first.ndim - 1))
            inside = jnp.where(fit(at_end), last, *rows) if rows else last
            value = jnp.where(fit(at_start), first, inside)
            return tree.or_nan(fit(known), value)

        found = jax.tree.map(leaf, first, last, *(() if rows is None else (rows,)))
        return found if self.save is None else (found, y1)

    def bend(self, method, f, ss, y0, y1, report) -> PyTree:
        """The second derivative of each row in its time, where that is the start or the end; else 0.

        Of a row r(y, s): d^2 r / ds^2 along dy/ds = k(y, s), k of the state there.
        """
        f = beyond_the_end(f)
        slope = lambda y, s: method.slope(f, s, y, method.start(f, s, y))
        row = (lambda y, s: y) if self.save is None else partial(self.save, f)

        def along(function, y, s):
            return jax.jvp(function, (y, s), (slope(y, s), jnp.ones_like(s)))[1]

        of_end = lambda y, s: along(partial(along, row), y, s)
        at_start, at_end = self.ends(ss, report)

        def leaf(first, last):
            fit = lambda x: x.reshape(len(ss), *[1] * first.ndim)
            x = jnp.where(fit(at_start), first, jnp.where(fit(at_end), last, 0))
            return jnp.where(jnp.isfinite(x), x, 0)

        return jax.tree.map(leaf, of_end(y0, 0 * ss[-1]), of_end(y1, ss[-1]))


def bent(method, output, f, ss, y0, y1, report, rows: PyTree) -> PyTree:
    """Rows whose second derivatives in times that are the start or the end are right, too.

    `Times.finish` moves them along the slopes there, a line. What is added is 0, and so is its derivative
    (s - at) d^2 r / ds^2; that of the second derivative is found when it is asked for, and not before.
    """

    if (
        not isinstance(output, Times) or len(ss) == 2
    ):  # of two times those are t0 and t1 of the field
        return rows

    @custom_jvp
    def parabola(given):
        return jax.tree.map(jnp.zeros_like, given[-1])

    @parabola.defjvp
    def parabola_jvp(primals, tangents):
        (given,), (given_dot,) = primals, tangents
        f, ss, y0, y1, report, _ = given
        move = (ss - lax.stop_gradient(ss)) * given_dot[1]
        found = output.bend(method, f, ss, y0, y1, report)
        return parabola(given), jax.tree.map(lambda x: rowwise(move, x), found)

    value, *rest = (rows,) if output.save is None else rows
    more = parabola((f, ss, y0, y1, report, value))
    value = jax.tree.map(jnp.add, value, more)
    return value if output.save is None else (value, *rest)


def bent_back(method, output, f, ss, y0, y1, report, bars: PyTree, ss_bar) -> Array:
    """The same of the cotangents of the times: bars are those of the rows."""
    if not isinstance(output, Times):
        return ss_bar
    bars = bars if output.save is None else bars[0]

    @custom_jvp
    def curvature(given):
        return jnp.zeros_like(given[1])

    @curvature.defjvp
    def curvature_jvp(primals, tangents):
        (given,), (given_dot,) = primals, tangents
        f, ss, y0, y1, report, bars = given
        found = output.bend(method, f, ss, y0, y1, report)
        dot = lambda x, y: jnp.sum((x * y).reshape(len(ss), -1), 1).real.astype(ss.dtype)
        total = sum(jax.tree.leaves(jax.tree.map(dot, bars, found)))
        return curvature(given), total * given_dot[1]

    return ss_bar + curvature((f, ss, y0, y1, report, bars))


def rowwise(factors, rows: Array) -> Array:
    """Each row times its factor."""
    factors = lax.convert_element_type(factors, rows.dtype)
    return factors.reshape(-1, *[1] * (rows.ndim - 1)) * rows


class Steps(NamedTuple):
    """Steps in rows: where each begins, its size, the state there (or a function of it), and the d_p."""

    s: Array
    h: Array
    y: PyTree
    d: list[PyTree]


@dataclasses.dataclass(frozen=True)
class EveryStep:
    """Every accepted step, as `Steps` of `count` rows; with the d_p of dense output, if `dense`.

    Those of events, which have size 0, are left out. The row after the last step is the end, as a step of
    size 1 along the slope there. Rows beyond are NaN; of dense output their s is infinite, and the others
    mean nothing.
    """

    count: int
    dense: bool = False
    save: Callable | None = None
    after: bool = False  # for dense output: rows begin with what an event has made in any case
    first = 0
    each_step = True

    @property
    def sees_field(self) -> bool:
        return self.save is not None or self.dense

    def rows(self, ss) -> int:
        return self.count

    def needs_inside(self) -> bool:
        return self.dense

    def last(self, ss, report) -> Array:
        return report.steps - 1

    def due(self, ss, row, old, new) -> Array:
        return (row == old.steps) & (new.steps > old.steps)

    def passed(self, ss, row, s, h) -> Array:
        return (row >= 0) & (h > 0)

    def value(self, f, time, s, h, y, d) -> Steps:
        y = y if self.save is None else self.save(f, y, s)
        return Steps(s, h, y, d if self.dense else [])

    def step_of(self, ss, row, grid, n) -> Array:
        sized = jnp.cumsum((grid[1:] > grid[:-1]).astype(jnp.int32))
        return jnp.searchsorted(sized, row + 1).astype(jnp.int32)

    def room(self, integrator, f, y0, ss) -> Steps:
        s, method = ss[0], integrator.method

        def row(f, y, s):
            step = lambda: trial_step(integrator, f, s, y, method.start(f, s, y), s)
            return self.value(
                f, s, s, s, y, method.inside(f, s, y, s, step()) if self.dense else []
            )

        return tree.rooms(jax.eval_shape(row, f, y0, s), self.count)

    like = room

    def finish(self, f, ss, at, y0, slope0, y1, slope1, rows, report) -> Steps:
        started = report.status != Status.NON_FINITE_INITIAL.value
        known = (jnp.arange(self.count, dtype=jnp.int32) <= report.steps) & started
        s = report.reached * lax.stop_gradient(ss[-1])
        d = [slope1, *[jax.tree.map(jnp.zeros_like, slope1)] * (len(rows.d) - 1)]
        rows = tree.put(report.steps, self.value(f, s, s, jnp.ones_like(s), y1, d), rows)
        if self.dense:
            return rows._replace(s=jnp.where(known, rows.s, jnp.inf))
        fit = lambda x: known.reshape((-1,) + (1,) * (x.ndim - 1))
        return jax.tree.map(lambda x: tree.or_nan(fit(x), x), rows)


@dataclasses.dataclass(frozen=True)
class Sum:
    """A fold over the steps: the sum of `of_step(method, s, y, memory, h, step)`, what a step adds."""

    of_step: Callable

    def begin(self, found):
        """Before the first step; `found` is something like what a step adds."""
        return jax.tree.map(jnp.zeros_like, found)

    def add(self, total, found):
        """The fold after a step."""
        return jax.tree.map(jnp.add, total, found)

    def add_accepted(self, problems, put, total, found, accepted):
        """The fold of one solve or of many after a trial step, that of those in which it was accepted.

        `put(rows, xs, rooms)` writes into a row of each solve.
        """
        more = lambda found, accepted: jax.tree.map(lambda x: jnp.where(accepted, x, 0), found)
        return problems.vmap(self.add)(total, problems.vmap(more)(found, accepted))

    def total(self, found):
        """The fold of many steps, along the leading axis; those that were none have added zeros."""
        return jax.tree.map(lambda x: jnp.sum(x, 0), found)


# The solver's own estimates of its error and of stiffness.
estimates = Sum(lambda method, s, y, memory, h, step: method.heuristics(y, h, step))


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
    needs_inside = integrator.output.needs_inside()
    due = lambda row: problems.each(is_due)(own, row, old, new)
    some_due = lambda carry: jnp.any(due(carry[0]))

    def visit(carry):
        d = inside() if needs_inside else []

        def one_each(carry):
            row, rows = carry
            here = due(row)
            value = problems.each(value_of)(own, row, old.s, h, old.y, d)
            return row + here.astype(jnp.int32), put(row, value, rows, here)

        return lax.while_loop(some_due, one_each, carry)

    # A loop that turns at most once: unlike a conditional it leaves the rows where they are.
    row, rows = lax.while_loop(some_due, visit, (new.output, rows))
    met = row > new.output
    new = new._replace(output=row)
    if needs_inside:
        more = met.astype(jnp.int32) * integrator.method.inside_evaluations
        new = new._replace(evaluations=new.evaluations + more)
    if new.since is not None and not integrator.output.each_step:
        new = new._replace(since=jnp.where(met, 0, new.since))
    return new, rows


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


def passed(problems, own, row, s, h):
    """Whether, going back to s over a step of size h, a row of every solve has been passed."""
    one = lambda integrator, f, ss, row, s, h: integrator.output.passed(ss, row, s, h)
    return problems.each(one)(own, row, s, h)


def gather(problems, own, mask, carry: Cotangents, rows_bar, s, h, y, inside: Callable, pick):
    """Cotangents of the rows inside a step, gathered on y and on the d_p, which are `inside()`.

    `pick(row, rows_bar)` is the cotangent of a row of every solve. Returns the carry with those of
    the times added, and of the leaves of the field that `mask` says, and the next row to be met.
    """
    output = problems.of(own)[0].output
    saves = output.save is not None
    some_passed = lambda state: jnp.any(passed(problems, own, state[0], s, h))
    once = (
        (lambda turn, state: turn(state))
        if output.each_step
        else partial(lax.while_loop, some_passed)
    )

    def visit(state):
        d = inside()

        def one_each(state):
            w = pick(jnp.maximum(state[0], 0), rows_bar)
            if saves:
                return of_saved(problems, own, mask, s, h, y, d, w, *state)
            *state, f_bar = state
            return *problems.each(of_state)(own, state[0], s, h, y, d, w, *state[1:]), f_bar

        return once(one_each, state)

    zero = jax.tree.map(jnp.zeros_like, y)
    begin = carry.row, zero, [zero] * len(jax.eval_shape(inside)), carry.ss
    # At most one turn, as in `write`: most steps have no row.
    row, y_bar, d_bar, ss_bar, f_bar = once(visit, (*begin, carry.f if saves else None))
    return carry._replace(row=row, ss=ss_bar, f=f_bar if saves else carry.f), y_bar, d_bar


def of_state(integrator, f, ss, row, s, h, y, d, w, y_bar, d_bar, ss_bar):
    """Cotangents of one solve with that of a row, w, added."""
    here = integrator.output.passed(ss, row, s, h)
    time = tree.row(ss, jnp.maximum(row, 0))
    value = lambda time, y, d: integrator.output.value(f, time, s, h, y, d)
    _, vjp = jax.vjp(value, time, y, d)
    time_bar, y_more, d_more = vjp(jax.tree.map(lambda w: jnp.where(here, w, 0), w))
    row, ss_bar = next_row(here, row, time_bar, ss_bar)
    return row, added(y_bar, y_more), added(d_bar, d_more), ss_bar


def of_saved(problems, own, mask, s, h, y, d, w, row, y_bar, d_bar, ss_bar, f_bar):
    """The same of a function of the state, which depends on leaves of the field: of one solve, or of
    many, that share some of them."""

    def place(integrator, f, ss, row, s, h, w):
        here = integrator.output.passed(ss, row, s, h)
        # Where no row is, at a state that there is: 0 times an infinite derivative would be NaN.
        time = jnp.where(here, tree.row(ss, jnp.maximum(row, 0)), s)
        return here, time, jax.tree.map(lambda w: jnp.where(here, w, 0), w)

    def value(integrator, f, ss, time, y, d, s, h):
        return integrator.output.value(f, time, s, h, y, d)

    here, time, w = problems.each(place)(own, row, s, h, w)
    values = lambda problems, own, *args: problems.each(value)(own, *args)
    f_more, time_bar, y_more, d_more = pullback(problems, own, mask, values, (time, y, d), (s, h))[
        1
    ](w)
    row, ss_bar = problems.vmap(next_row)(here, row, time_bar, ss_bar)
    return row, added(y_bar, y_more), added(d_bar, d_more), ss_bar, added(f_bar, f_more)


def next_row(here, row, time_bar, ss_bar):
    """The next row to be met, and the cotangents of the times."""
    if ss_bar is not None:
        place = jnp.maximum(row, 0)
        ss_bar = tree.put(place, tree.row(ss_bar, place) + time_bar, ss_bar)
    return row - here.astype(jnp.int32), ss_bar


def added(x, more):
    return jax.tree.map(jnp.add, x, more)
