"""Steps into solutions, forward on [0, 1], ignorant of gradients; records the tape.

An `Integrator` holds all that a solve needs beside the field, the start and the output times. It
is called by `solve` for values, and by the adjoints, which differentiate what it did.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import scalars, stages, tree
from jaxode.controllers import Controller, first_step
from jaxode.solution import Status
from jaxode.step import error, extra_stages, interpolate, step

SEGMENT = (
    64  # 64 states kept and 64 rebuilt serve 4,096 steps at the price of one more forward pass
)
NEAR = 32 * 1024  # bytes: a tape that stays in the nearest cache costs nothing
KEPT, FAR = 640, 256 * 1024  # up to this many bytes so many states are kept, rather than rebuilt


class Report(NamedTuple):
    """How a solve went: a `Status`, how far it came in [0, 1], and what it cost."""

    status: Array
    reached: Array
    evaluations: Array
    accepted: Array
    rejected: Array
    heuristics: Any = None  # sums over the steps of `step.heuristics`, if wanted


class Tape(NamedTuple):
    """What a backward pass needs: where each step began, and the states at some of those places.

    Row i of `ys` and `ks` is the state after i 2^level steps (a last row takes what is not kept);
    `grid[n]` is where step n began, `grid[steps]` where the last one ended; `k_end` is the derivative
    there.
    """

    ys: PyTree
    ks: PyTree
    k_end: PyTree
    grid: Array
    level: Array
    steps: Array


class Rows(NamedTuple):
    """Outputs inside the interval: the first `count` rows of `ys` are known; in how many steps they lay."""

    ys: PyTree
    count: Array
    visits: Array


class State(NamedTuple):
    """Between two attempts: at s, with a next step of size h."""

    s: Array
    h: Array
    pair: PyTree  # (y, k), or one vector of both: see `Pair`
    ratio: Array
    history: tuple[Array, ...]
    accepted: Array
    attempts: Array
    mark: Array | None  # attempts when the last output was passed; None without `mxstep`
    rows: Rows | None
    tape: Tape | None
    extra: Any


class Integrator(eqx.Module):
    """A method, its tolerances and its limits: what turns a field into a solution.

    `steps` is the number of steps of equal size, None for steps that the error estimate chooses.
    `hmax` and `hmin` are in units of the interval; `max_steps` bounds attempts, `mxstep` those
    between two outputs. `measured` picks the part of a state whose error counts.
    """

    table: Any = eqx.field(static=True)  # a Tableau, or a Splitting
    controller: Controller = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    steps: Any
    rtol: PyTree
    atol: PyTree
    hmax: Array
    hmin: Array
    mxstep: Any
    measured: Callable = eqx.field(static=True, default=lambda y: y)
    heuristics: bool = eqx.field(static=True, default=False)

    def __call__(self, f, y0: PyTree, ss: Array) -> tuple[PyTree, Report]:
        """The solution at ss (increasing, in [0, 1]; the first is the start), and the report."""
        ys, report, _ = self.run(f, y0, ss, tape=None)
        return ys, report

    def record(self, f, y0: PyTree, ss: Array) -> tuple[PyTree, Report, Tape]:
        """The same, and the tape."""
        ys, report, state = self.run(f, y0, ss, tape=self.empty_tape(y0, ss.dtype))
        assert state.tape is not None
        return ys, report, state.tape._replace(steps=state.accepted, k_end=state.pair[1])

    def run(self, f, y0, ss, tape):
        k0 = f(y0, jnp.zeros_like(ss[0]))
        rows = empty_rows(y0, ss) if len(ss) > 2 else None
        state, report = advance(self, f, y0, k0, lax.stop_gradient(ss[-1]), ss, rows, tape)
        inside = state.rows and state.rows.ys
        y1, k1 = state.pair
        return assemble(y0, k0, y1, k1, inside, ss, report), report, state

    @property
    def segment(self) -> int:
        """How many states a backward pass rebuilds at a time: sqrt(max_steps), at most 64."""
        return segment(self.max_steps)

    def tolerated(self, *ys):
        """atol + rtol max |y|, leaf by leaf, of what is measured of a state; never 0."""
        ys = map(self.measured, ys)
        size = jax.tree.map(lambda *y: largest(map(tree.magnitude, y)), *ys)
        scale = jax.tree.map(lambda a, r, y: a + r * y, self.atol, self.rtol, size)
        return jax.tree.map(lambda x: jnp.maximum(x, jnp.finfo(x.dtype).tiny), scale)  # no 0 / 0

    def finite(self, *ys):
        """Whether all that is measured of these states is finite."""
        return tree.all_finite(*map(self.measured, ys))

    def least(self, s):
        """The smallest step that moves time: 16 roundings of it."""
        eps = 16 * float(jnp.finfo(s.dtype).eps)
        return jnp.maximum(self.hmin, eps * jnp.maximum(s, eps))

    # One solve, attempt by attempt: what both the loop below and `lanes` are made of.

    def beginning(self, f, y0, k0, end, h0=None) -> State:
        """Before the first attempt."""
        dtype = end.dtype
        zero, one = jnp.zeros((), jnp.int32), jnp.ones((), dtype)
        history: tuple = ()
        if self.steps is not None:
            h0 = one
        else:
            history = self.controller.start(dtype)
            if h0 is None:
                order, scale = self.table.error_order + 1, self.tolerated(y0)
                h0 = first_step(f, y0, k0, order, scale, self.hmax, self.measured)
                # Where nothing happens yet its guess may be below what time can resolve.
                h0 = jnp.minimum(jnp.maximum(h0, 64 * self.least(0 * end)), self.hmax)
            h0 = jnp.where(self.finite(y0, k0), lax.stop_gradient(h0), 0 * one)
        return State(
            s=0 * one, h=h0, pair=(y0, k0), ratio=0 * one, history=history, accepted=zero,
            attempts=zero, mark=None if self.mxstep is None else zero, rows=None, tape=None, extra=None,
        )  # fmt: skip

    def places(self, end):
        """How many steps of equal size are to be taken."""
        return jnp.where(end > 0, jnp.asarray(self.steps, jnp.int32), 0)

    def unfinished(self, state: State, end):
        """Whether there is to be another attempt."""
        if self.steps is not None:
            n = self.places(end)
            return state.accepted < jnp.where(n <= self.max_steps, n, 0)
        go = (state.s < end) & (state.h > self.least(state.s)) & (state.attempts < self.max_steps)
        if state.mark is not None:
            go = go & (waited(state) < self.mxstep)
        return go

    def next_end(self, state: State, end):
        """Where the next attempt is to end, and its size."""
        if self.steps is not None:
            count = lax.convert_element_type(jnp.maximum(self.places(end), 1), end.dtype)
            i = lax.convert_element_type(state.accepted, end.dtype)
            s, s1 = end * (i / count), end * ((i + 1) / count)
            return s1, s1 - s
        s1 = jnp.where(state.s + state.h >= end, end, state.s + state.h)
        return s1, s1 - state.s  # exactly, so that the steps add up to where we are

    def decided(self, state: State, s1, h, pairs, ys, k1, errors, going=None) -> State:
        """The state after an attempt: accepted, or rejected and to be tried with a smaller step.

        `going` says whether there was one (always, without it): else the state stays what it is.
        """
        whether = lambda new, old: new if going is None else tree.where(going, new, old)
        one = 1 if going is None else going.astype(jnp.int32)
        if self.steps is not None:
            s = jnp.where(self.finite(ys[1]), s1, state.s)  # how far the solution is finite
            return state._replace(
                s=whether(s, state.s), pair=whether(pairs[1], pairs[0]),
                accepted=state.accepted + one, attempts=state.attempts + one,
            )  # fmt: skip
        scale = self.tolerated(*ys)
        ratio = error_ratio([tree.norm(self.measured(e), scale) for e in errors])
        if not self.table.e[-1]:  # then the estimate has not seen the last stage
            ratio = jnp.where(self.finite(k1()), ratio, jnp.nan)
        ratio = lax.stop_gradient(lax.convert_element_type(ratio, h.dtype))
        accept = ratio <= 1 if going is None else (ratio <= 1) & going
        factor, history = self.controller(ratio, state.history, self.table.error_order + 1)
        s, pair, history = tree.where(
            accept, (s1, pairs[1], history), (state.s, pairs[0], state.history)
        )
        return state._replace(
            s=s, pair=pair, ratio=whether(ratio, state.ratio), history=history,
            h=whether(jnp.minimum(h * factor, self.hmax), state.h),
            accepted=state.accepted + accept.astype(jnp.int32), attempts=state.attempts + one,
        )  # fmt: skip

    def report(self, state: State, y0, k0, end, visits=None) -> Report:
        """How a solve that has stopped went."""
        if self.steps is not None:
            n = self.places(end)
            return equal_steps_report(self, y0, k0, state.pair[0], n, state.s, end, visits)
        spent = state.attempts >= self.max_steps
        if state.mark is not None:
            spent = spent | (waited(state) >= self.mxstep)
        cut = jnp.where(
            jnp.isfinite(state.ratio), Status.DT_TOO_SMALL.value, Status.NON_FINITE.value
        )
        status = jnp.where(
            state.s >= end, Status.SUCCESS.value, jnp.where(spent, Status.MAX_STEPS.value, cut)
        )
        status = jnp.where(self.finite(y0, k0), status, Status.NON_FINITE_INITIAL.value)
        evaluations = 2 + state.attempts * (len(self.table.c) - 1)
        if visits is not None:
            evaluations = evaluations + visits * len(self.table.extra_c)
        return Report(
            status.astype(jnp.int32), fraction(state.s, end), evaluations, state.accepted,
            state.attempts - state.accepted,
        )  # fmt: skip

    def empty_tape(self, y0, dtype) -> Tape:
        """Room for as many states, or for more while they are small; and for those rebuilt of a segment."""
        size = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(y0))
        size = max(size, 1)
        kept = max(self.segment, NEAR // size, min(KEPT, FAR // size))
        rows = min(kept + self.segment, self.max_steps)
        room = jax.tree.map(lambda x: jnp.zeros((rows + 1, *x.shape), x.dtype), y0)
        zero = jnp.zeros((), jnp.int32)
        grid = jnp.zeros(self.max_steps + 1, dtype)
        return Tape(ys=room, ks=room, k_end=y0, grid=grid, level=zero, steps=zero)


def advance(
    integrator, f, y0, k0, end, ss=None, rows=None, tape=None, h0=None, after=None, extra=None
):
    """Steps from 0 to `end`, of equal size or of one that the error estimate chooses.

    `after(state, new) -> new` sees every attempt, and may add to what an accepted one did.
    """
    attempt, pair = embedded(integrator.table, f, y0, k0, end, fuse=after is None)

    def body(state: State) -> State:
        y, k = pair.open(state.pair)
        s1, h = integrator.next_end(state, end)
        pair1, y1, errors, inside = attempt(f, state.pair, state.s, h)
        k1 = lambda: pair.open(pair1)[1]
        new = integrator.decided(state, s1, h, (state.pair, pair1), (y, y1), k1, errors)
        passed = new.s if integrator.steps is None else s1
        new = new._replace(
            tape=write_tape(state.tape, state.accepted, (y, k), passed),
            rows=write_rows(state.rows, ss, state.s, passed, h, inside),
        )
        if state.mark is not None and state.rows is not None and new.rows is not None:
            met = new.rows.count > state.rows.count
            new = new._replace(mark=jnp.where(met, new.attempts, state.mark))
        return after(state, new) if after else new

    start = integrator.beginning(f, y0, k0, end, h0)
    start = start._replace(pair=pair.pack(y0, k0), rows=rows, tape=tape, extra=extra)
    state = while_room(lambda state: integrator.unfinished(state, end), body, start)
    state = state._replace(pair=pair.open(state.pair))
    visits = None if state.rows is None else state.rows.visits
    return state, integrator.report(state, y0, k0, end, visits)


def equal_steps_report(integrator, y0, k0, y1, n, s, end, visits=None) -> Report:
    """How n steps of equal size went: well, if the last state is finite."""
    stages, more = len(integrator.table.c) - 1, len(integrator.table.extra_c)
    too_many = n > integrator.max_steps
    finite = integrator.finite
    status = jnp.where(finite(y1), Status.SUCCESS.value, Status.NON_FINITE.value)
    status = jnp.where(too_many, Status.MAX_STEPS.value, status)
    status = jnp.where(finite(y0, k0), status, Status.NON_FINITE_INITIAL.value)
    steps = jnp.where(too_many, 0, n)
    evaluations = 1 + stages * steps + (0 if visits is None else visits * more)
    reached = fraction(s, end)
    return Report(status.astype(jnp.int32), reached, evaluations, steps, jnp.zeros_like(steps))


def error_ratio(norms):
    """Error over tolerance: of one estimate, or of two combined as in DOP853 (HNW eq. II.10.17)."""
    if len(norms) == 1:
        return norms[0]
    high, low = norms
    both = high**2 + 0.01 * low**2
    return jnp.where(both > 0, high**2 / jnp.sqrt(jnp.where(both > 0, both, 1.0)), both)


def embedded(table, f, y0, k0, s, fuse=True):
    """One attempt, and what it takes and gives a state as: fused to one kernel if it is small.

    attempt(f, pair, s, h) -> (pair at the end, y at the end, errors, the solution inside).
    """
    pair = Pair(y0, packed=fuse)

    def plain(f, both, s, h):
        y, k = pair.open(both)
        y1, ks = step(table, f, y, k, s, h)
        return pair.pack(y1, ks[-1]), y1, error(table, h, ks)

    examples = f, pair.pack(y0, k0), s, s
    fused = scalars.fuse(plain, *examples, cheap=True) if pair.packed else None
    if fused is not None:

        def small(f, both, s, h):
            y, k = pair.open(both)
            return *fused(f, both, s, h), Inside(table, f, y, s, h, k=k)

        return small, pair
    pair = Pair(y0, packed=False)
    loop = stages.which(table, f, y0, s).forward

    def with_stages(f, both, s, h):
        y, k = both
        if loop:
            y1, rows = stages.of_one(table, f).step(y, k, s, h)
            ks = [tree.row(rows, i) for i in range(len(table.c))]
        else:
            y1, ks = step(table, f, y, k, s, h)
        return (y1, ks[-1]), y1, error(table, h, ks), Inside(table, f, y, s, h, ks)

    return with_stages, pair


class Pair:
    """y and k, two pytrees alike, as a tuple, or as one vector so that one kernel computes both."""

    def __init__(self, y, packed: bool):
        leaves, self.tree = jax.tree.flatten(y)
        self.shapes = [leaf.shape for leaf in leaves]
        self.packed = packed and len({leaf.dtype for leaf in leaves}) == 1

    def pack(self, y, k):
        if not self.packed:
            return y, k
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves((y, k))])

    def open(self, both):
        if not self.packed:
            return both
        ends = [math.prod(shape) for shape in self.shapes] * 2
        starts = [sum(ends[:i]) for i in range(len(ends))]
        leaves = [
            both[start : start + size].reshape(shape)
            for start, size, shape in zip(starts, ends, self.shapes * 2)
        ]
        half = len(self.shapes)
        return tuple(jax.tree.unflatten(self.tree, part) for part in (leaves[:half], leaves[half:]))


class Inside:
    """The solution inside a step. A small step is done again, in one kernel, rather than kept."""

    def __init__(self, table, f, y, s, h, ks=None, k=None):
        self.table, self.f, self.y, self.s, self.h, self.ks, self.k = table, f, y, s, h, ks, k

    def prepare(self, wanted):
        """The further stages that dense output needs, if any output is wanted."""
        ks = self.ks
        if ks is None or not self.table.extra_c:
            return ks
        blank = jax.tree.map(jnp.zeros_like, self.y)
        more = lax.cond(
            wanted,
            lambda: extra_stages(self.table, self.f, self.y, ks, self.s, self.h)[len(ks) :],
            lambda: [blank] * len(self.table.extra_c),
        )
        return [*ks, *more]

    def at(self, ks, theta):
        if ks is not None:
            return interpolate(self.table, self.y, ks, self.h, theta)

        def again(f, y, k, s, h, theta):
            _, ks = step(self.table, f, y, k, s, h)
            ks = extra_stages(self.table, f, y, ks, s, h)
            return interpolate(self.table, y, ks, h, theta)

        args = (self.f, self.y, self.k, self.s, self.h, theta)
        return (scalars.fuse(again, *args) or again)(*args)


def waited(state: State):
    """Attempts since the last output was passed."""
    assert state.mark is not None
    return (state.attempts - state.mark).astype(state.s.dtype)


def fraction(s, end):
    """s / end; 1 if there was nowhere to go."""
    return jnp.where(end > 0, s / jnp.where(end > 0, end, 1), 1)


# Rows: outputs inside the interval.


def empty_rows(y0, ss) -> Rows:
    """Room for every output; those at the start count as written (`assemble` fills them in)."""
    room = jax.tree.map(lambda y: jnp.zeros((len(ss), *y.shape), y.dtype), y0)
    return Rows(room, jnp.sum(ss <= 0, dtype=jnp.int32), jnp.zeros((), jnp.int32))


def write_rows(rows: Rows | None, ss, s, s1, h, inside: Inside) -> Rows | None:
    """The outputs in (s, s1]; none if the step was rejected, for then s1 = s."""
    if rows is None:
        return None

    def pending(rows):
        return (rows.count < len(ss)) & (ss[jnp.minimum(rows.count, len(ss) - 1)] <= s1)

    visited = pending(rows)
    ks = inside.prepare(visited)

    def write(rows):
        theta = (ss[rows.count] - s) / h
        y = inside.at(ks, theta)
        ys = jax.tree.map(
            lambda room, y: lax.dynamic_update_index_in_dim(room, y, rows.count, 0), rows.ys, y
        )
        return rows._replace(ys=ys, count=rows.count + 1)

    rows = lax.while_loop(pending, write, rows)
    return rows._replace(visits=rows.visits + visited.astype(jnp.int32))


def assemble(y0, k0, y1, k1, inside, ss, report: Report) -> PyTree:
    """All outputs: the start and the end as they are, NaN where the solve did not come.

    Moving a time that is the start or the end moves along the derivative there: the value of
    (s - stop_gradient(s)) k is 0, its derivative k.
    """
    at_start, at_end = ss <= 0, ss >= ss[-1]
    end = lax.stop_gradient(ss[-1])
    known = at_start | (ss <= report.reached * end) & (
        report.status != Status.NON_FINITE_INITIAL.value
    )
    move = ss - lax.stop_gradient(ss)

    def leaf(y0, k0, y1, k1, *inside):
        first, last, known_, along = (
            x.reshape((len(ss),) + (1,) * y0.ndim) for x in (at_start, at_end, known, move)
        )
        along = lax.convert_element_type(along, y0.dtype)
        middle = inside[0] if inside else jnp.full_like(y0, jnp.nan)[None]
        value = jnp.where(last, y1[None] + along * k1[None], middle)
        return jnp.where(first, y0[None] + along * k0[None], jnp.where(known_, value, jnp.nan))

    return jax.tree.map(leaf, y0, k0, y1, k1, *(() if inside is None else (inside,)))


# The tape: states at about sqrt(max_steps) places, whatever the number of steps.


def write_tape(tape: Tape | None, n, pair, s1) -> Tape | None:
    """State n, where an attempt begins, and where it ends. What a rejected attempt wrote is written over.

    State n belongs into row n / 2^level, rounded up: the last state written into a row is the one
    that falls on it, and the others cost no test.
    """
    if tape is None:
        return None
    y, k = pair
    row = (n + (1 << tape.level) - 1) >> tape.level
    put = lambda room, x: lax.dynamic_update_index_in_dim(room, x, row, 0)
    return tape._replace(
        ys=jax.tree.map(put, tape.ys, y),
        ks=jax.tree.map(put, tape.ks, k),
        grid=lax.dynamic_update_index_in_dim(tape.grid, lax.stop_gradient(s1), n + 1, 0),
    )


def while_room(unfinished, body, state) -> Any:
    """The loop; whenever the tape is full, every other row is dropped and it goes on."""
    tape = state.tape
    if tape is None or slots(tape) >= len(tape.grid) - 1:
        return lax.while_loop(unfinished, body, state)

    def room_left(state):
        return state.accepted < (slots(state.tape) << state.tape.level)

    def until_full(state):
        state = state._replace(tape=thin(state.tape, ~room_left(state)))
        return lax.while_loop(lambda state: unfinished(state) & room_left(state), body, state)

    return lax.while_loop(unfinished, until_full, state)


def segment(max_steps: int) -> int:
    """sqrt(max_steps), at most 64."""
    return max(1, min(SEGMENT, math.isqrt(max_steps - 1) + 1))


def slots(tape: Tape) -> int:
    """How many states are kept: all, or as many as leaves room for a segment to be rebuilt."""
    rows, most = len(jax.tree.leaves(tape.ys)[0]) - 1, len(tape.grid) - 1
    return most if rows >= most else rows - segment(most)


def thin(tape: Tape, full) -> Tape:
    """Keep every other row, in place, if the tape is full."""
    half = jnp.where(full, slots(tape) // 2 + slots(tape) % 2, 0)

    def move(carry):
        i, ys, ks = carry
        take = lambda room: lax.dynamic_update_index_in_dim(room, room[2 * i], i, 0)
        return i + 1, jax.tree.map(take, ys), jax.tree.map(take, ks)

    _, ys, ks = lax.while_loop(
        lambda c: c[0] < half, move, (jnp.zeros_like(half), tape.ys, tape.ks)
    )
    return tape._replace(ys=ys, ks=ks, level=tape.level + full.astype(jnp.int32))


def backwards(solve, tape: Tape, again, visit, carry):
    """visit(carry, n, y_n, k_n) for n = steps - 1, ..., 0.

    The states between two rows of the tape are rebuilt, by `again(y, k, s, h)`, which is a step, into
    its last rows: so they are read from one place, whether they were kept or not.
    """
    kept, rooms = slots(tape), (tape.ys, tape.ks)
    if kept >= solve.max_steps:

        def back(state):
            n, carry = state[0] - 1, state[1]
            return n, visit(carry, n, *tree.row(rooms, n))

        return lax.while_loop(lambda state: state[0] > 0, back, (tape.steps, carry))[1]

    all_there = tape.level == 0
    length = jnp.where(all_there, kept, jnp.minimum(1 << tape.level, solve.segment))
    base = jnp.where(all_there, 0, kept + 1)  # state n is in row n - start + base

    def one_segment(state):
        end, carry, rooms = state
        start = (end - 1) // length * length

        def rebuild(state):
            n, y, k, rooms = state
            # Before start: written over.
            rooms = tree.put(jnp.maximum(n - start, 0) + base, (y, k), rooms)
            y, k = again(y, k, tape.grid[n], tape.grid[n + 1] - tape.grid[n])
            return n + 1, y, k, rooms

        row = start >> tape.level
        first = jnp.where(all_there, end - 1, row << tape.level)
        begin = first, *tree.row(rooms, row), rooms
        _, y, k, rooms = lax.while_loop(lambda st: st[0] < end - 1, rebuild, begin)
        last = jnp.where(all_there, kept, end - 1 - start + base)  # row `kept` is never read
        rooms = tree.put(last, (y, k), rooms)

        def back(state):
            n, carry = state[0] - 1, state[1]
            return n, visit(carry, n, *tree.row(rooms, n - start + base))

        _, carry = lax.while_loop(lambda state: state[0] > start, back, (end, carry))
        return start, carry, rooms

    state = (tape.steps, carry, rooms)
    return lax.while_loop(lambda state: state[0] > 0, one_segment, state)[1]


def largest(xs):
    first, *rest = xs
    for x in rest:
        first = jnp.maximum(first, x)
    return first
