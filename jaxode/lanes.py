"""A batch of solves as one loop: what `jax.vmap` of a solve becomes.

`vmap` of a `while_loop` runs every solve until the slowest is done, and streams the whole batch
through memory at every stage. Here a few hundred solves at a time, the lanes, share a loop, each
with its own time, step size and status; their states stay in the nearest caches, and when a lane
is done the next problem of the queue takes its place. The stages of a step are a loop as well, with
all slopes in one array: a stage is then a product with a row of the table, which XLA neither fuses
nor computes twice.

Backwards, lanes take their problems in the order of their lengths. Nothing is kept from the forward
pass but the number of steps: each chunk is solved again with a tape whose rows are the iterations
that its lanes share. A lane that was rejected, or is done, has a step of size 0 there: the identity,
in value and in gradient. So the tape is written and read in whole rows, and memory does not grow
with the batch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import scalars, tree
from jaxode.loop import (
    Integrator,
    Pair,
    Report,
    State,
    Tape,
    accepted_or_rejected,
    assemble,
    beginning,
    equal_steps_report,
    judged,
    next_end,
    thinned_when_full,
    unfinished,
    write_tape,
)
from jaxode.splittings import Splitting

CACHE = 128 * 1024  # bytes that the slopes of all lanes may take
TAPE = 16 * 2**20  # bytes for the tape of a chunk, backwards
ROUND = 8  # attempts between two looks at which lanes are done


def worth_it(solve: Integrator) -> bool:
    """Whether lanes know how to step this: any Runge-Kutta method."""
    return not isinstance(solve.table, Splitting)


# Coordinates: how a state lies in memory.


class Coordinates:
    """A small system as a vector, lanes along its last axis; any other one as it is, lanes first.

    The components of a small system are then rows, on which the arithmetic of its field (taken apart
    by `scalars`) is done for all lanes at once.
    """

    def __init__(self, f, y0, s):
        self.y0 = y0
        self.pair = Pair(y0, packed=True)
        size = sum(math.prod(shape) for shape in self.pair.shapes)
        self.small = self.pair.packed and 0 < size
        self.apart: Any = scalars.components(f, y0, s) if self.small else None
        self.small = self.apart is not None
        self.axis = -1 if self.small else 0
        self.size = size

    def pack(self, y):
        """Of one solve."""
        if not self.small:
            return y
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(y)])

    def open(self, y):
        """Of one solve."""
        return self.pair.open(jnp.concatenate([y, y]))[0] if self.small else y

    def field(self, f, y, s):
        """Of one solve, packed."""
        return self.apart(f, y, s) if self.small else f(y, s)

    def spread(self, h, like):
        """Numbers of the lanes, so that they multiply states."""
        if self.small:
            return lax.convert_element_type(h, like.dtype)
        wide = h.reshape(h.shape + (1,) * (like.ndim - h.ndim))
        return lax.convert_element_type(wide, like.dtype)


class Problems(NamedTuple):
    """Solves that share what is not batched. Arrays of the solves have them along `axis`."""

    own: PyTree  # the batched leaves of (solve, f, ss), None elsewhere
    shared: PyTree  # the others
    coordinates: Coordinates
    width: int  # lanes

    @property
    def axis(self):
        return self.coordinates.axis

    def vmap(self, fn: Callable, *which) -> Callable:
        """fn of one solve, for all lanes; `which` arguments (True) have lanes, by default all."""
        axes = tuple(self.axis if lanes else None for lanes in which) if which else self.axis
        return jax.vmap(fn, axes, self.axis)

    def take(self, xs, i):
        return jax.tree.map(lambda x: jnp.take(x, i, axis=self.axis), xs)

    def put(self, xs, i, new):
        """Places of xs replaced; those out of range are dropped."""

        def leaf(x, new):
            if self.axis == 0:
                return x.at[i].set(new, mode="drop")
            return x.at[..., i].set(new, mode="drop")

        return jax.tree.map(leaf, xs, new)

    def parts(self, own):
        """solve, f, ss of one solve."""
        return eqx.combine(own, self.shared)

    def slopes(self, own, y, s):
        """f of every lane."""
        shared = self.shared

        def one(own, y, s):
            return self.coordinates.field(eqx.combine(own, shared)[1], y, s)

        return self.vmap(one)(own, y, s)


def prepared(size: int, batched, solve, f, y0, ss, width=None):
    """The problems, their starts (packed, one for each solve), and a first solve as an example."""
    first = jax.tree.map(lambda x, b: x[0] if b else x, (solve, f, y0, ss), batched)
    _, f1, y1, ss1 = first
    coordinates = Coordinates(f1, y1, ss1[0])
    given, flags = (solve, f, ss), (batched[0], batched[1], batched[3])
    own, shared = eqx.partition(given, flags)
    own = jax.tree.map(lambda x: jnp.moveaxis(x, 0, coordinates.axis), own)
    if width is None:
        width = lanes_at_once(solve, coordinates, size)
    problems = Problems(own, shared, coordinates, width)
    y0 = jax.tree.map(lambda y, b: y if b else jnp.broadcast_to(y, (size, *y.shape)), y0, batched[2])
    y0 = jax.vmap(coordinates.pack, 0, coordinates.axis)(y0)
    if not jax.tree.leaves(own):  # nothing to count the lanes by
        problems = problems._replace(own=(None, None, None))
    return problems, y0, first


def lanes_at_once(solve, coordinates: Coordinates, size: int) -> int:
    """On a CPU as many as fit into a cache with their slopes; else all, since wide is fast there."""
    if jax.default_backend() != "cpu":
        return size
    leaves = jax.tree.leaves(coordinates.y0)
    one = sum(y.size * y.dtype.itemsize for y in leaves) * len(solve.table.c)
    fit = 1 << max(5, min(10, (CACHE // max(one, 1)).bit_length() - 1))
    return min(fit, size)


# A step of all lanes.


def rows_of(table, extra: bool) -> tuple[np.ndarray, np.ndarray]:
    """The matrix A and the nodes c of a table, with or without the stages of dense output."""
    rows = (*table.a, *(table.extra_a if extra else ()))
    c = (*table.c, *(table.extra_c if extra else ()))
    a = np.zeros((len(c), len(c)))
    for i, row in enumerate(rows):
        a[i, : len(row)] = row
    return a, np.array(c)


def product(weights, ks):
    """sum_i w_i k_i over the leading axis."""

    def leaf(k):
        w = lax.convert_element_type(weights, k.dtype)
        return jnp.tensordot(w, k, 1, precision=lax.Precision.HIGHEST)

    return jax.tree.map(leaf, ks)


def stages(problems: Problems, own, rows, y, ks, s, h, start, stop):
    """Stages start to stop - 1 of a step, whose slopes go into the rows of ks; the last y_i, and ks."""
    a, c = (jnp.asarray(x, h.dtype) for x in rows)

    def stage(state):
        i, _, ks = state
        y1 = moved(problems, y, h, product(a[i], ks))
        k = problems.slopes(own, y1, s + c[i] * h)
        return i + 1, y1, put_row(ks, k, i)

    start = jnp.asarray(start, jnp.int32)
    _, y1, ks = lax.while_loop(lambda state: state[0] < stop, stage, (start, y, ks))
    return y1, ks


def moved(problems, y, h, k):
    """y + h k."""
    spread = problems.coordinates.spread
    return jax.tree.map(lambda y, k: y + spread(h, y) * k, y, k)


def put_row(ks, k, i):
    return jax.tree.map(lambda room, k: lax.dynamic_update_index_in_dim(room, k, i, 0), ks, k)


def room_for(problems: Problems, y, count: int):
    """An array for the slopes of all lanes."""
    return jax.tree.map(lambda y: jnp.zeros((count, *y.shape), y.dtype), y)


def attempt(problems: Problems, own, state: State, ks, extra: bool):
    """One attempt of every lane that is not done: (state, step sizes, slopes)."""
    solve = problems.shared[0]
    table = solve.table
    rows = rows_of(table, extra)
    going = problems.vmap(lambda own, state: unfinished(*problems.parts(own)[::2], state))
    go = going(own, state)
    s1, h = problems.vmap(lambda own, state: next_end(*problems.parts(own)[::2], state))(own, state)
    s1, h = jnp.where(go, s1, state.s), jnp.where(go, h, 0)
    y, k = state.pair
    y1, ks = stages(problems, own, rows, y, put_row(ks, k, 0), state.s, h, 1, len(table.c))
    last = jax.tree.map(lambda k: k[len(table.c) - 1], ks)
    estimates = [np.array(e) for e in (table.e, table.e_low) if e]
    pad = ks_count(ks) - len(table.c)
    errors = [
        jax.tree.map(
            lambda e, y: problems.coordinates.spread(h, y) * e,
            product(np.pad(e, (0, pad)), ks), y,
        )
        for e in estimates
    ]  # fmt: skip

    def one(own, state, go, s1, h, y1, k1, errors):
        solve, _, ss = problems.parts(own)
        opened = map(problems.coordinates.open, (state.pair[0], y1))
        errors = [problems.coordinates.open(e) for e in errors]
        new = accepted_or_rejected(
            solve, state, (s1, h), (y1, k1), tuple(opened), errors, lax.stop_gradient(ss[-1])
        )
        return tree.where(go, new, state), jnp.isfinite(new.ratio)

    new, fine = problems.vmap(one)(own, state, go, s1, h, y1, last, errors)
    # 0 times a slope that is not finite would be NaN in every attempt to come.
    ks = lax.cond(jnp.all(fine), lambda ks: ks, lambda ks: cleared(problems, ks, fine), ks)
    return new, h, ks


def ks_count(ks) -> int:
    return len(jax.tree.leaves(ks)[0])


def cleared(problems, ks, fine):
    """Slopes that are zero in the lanes that are not fine."""
    spread = lambda k: fine if problems.coordinates.small else fine.reshape((-1,) + (1,) * (k.ndim - 2))
    return jax.tree.map(lambda k: jnp.where(spread(k), k, 0), ks)


# Forward.


def forward(size: int, batched, solve: Integrator, f, y0, ss):
    """The solution of every solve at its ss, and the reports: `Integrator.__call__`, batched."""
    problems, y0, first = prepared(size, batched, solve, f, y0, ss)
    own, axis = problems.own, problems.axis
    example, count = first[0], len(first[3])
    inside = count > 2
    state = started(problems, y0, inside)
    k0 = state.pair[1]
    width, table = problems.width, solve.table
    extra = inside and bool(table.extra_c)
    lanes = problems.take((own, state), jnp.arange(width))
    ks = room_for(problems, lanes[1].pair[0], len(table.c) + len(table.extra_c) * extra)
    who = jnp.arange(width, dtype=jnp.int32)
    rows = empty_rows(problems, y0, size, count) if inside else None

    def one_attempt(_, carry):
        (own, state), ks, who, rows = carry
        new, h, ks = attempt(problems, own, state, ks, extra)
        if inside:
            new, ks, rows = write_rows(problems, own, state, new, h, ks, who, rows, count, size)
        return (own, new), ks, who, rows

    def refill(carry):
        """The lanes that are done give their results and take new problems, an eighth of them at a time."""
        (own, now), who, head, ends = carry
        some = max(1, width // 8)
        i = jnp.nonzero(done(own, now, who), size=some, fill_value=width)[0].astype(jnp.int32)
        there = i < width
        leaving = jnp.where(there, jnp.take(who, i, mode="clip"), size)
        ends = problems.put(ends, leaving, problems.take(now, jnp.minimum(i, width - 1)))
        following = head + jnp.arange(some, dtype=jnp.int32)
        coming = there & (following < size)
        new = problems.take((problems.own, state), jnp.minimum(following, size - 1))
        lanes = problems.put((own, now), jnp.where(coming, i, width), new)
        who = who.at[i].set(jnp.where(coming, following, size), mode="drop")
        return lanes, who, head + jnp.sum(there, dtype=jnp.int32), ends

    def done(own, state, who):
        go = problems.vmap(lambda own, state: unfinished(*problems.parts(own)[::2], state))
        return ~go(own, state) & (who < size)

    def several(carry):
        lanes, ks, who, rows, head, ends = carry
        lanes, ks, who, rows = lax.fori_loop(0, ROUND, one_attempt, (lanes, ks, who, rows))
        idle = done(*lanes, who)
        ready = (16 * jnp.sum(idle, dtype=jnp.int32) >= width) | jnp.all(idle | (who >= size))
        lanes, who, head, ends = lax.cond(ready, refill, lambda c: c, (lanes, who, head, ends))
        return lanes, ks, who, rows, head, ends

    ends = state
    carry = lanes, ks, who, rows, jnp.asarray(width, jnp.int32), ends
    *_, rows, _, ends = lax.while_loop(lambda carry: jnp.any(carry[2] < size), several, carry)

    def result(own, y0, k0, end, rows):
        solve, _, ss = problems.parts(own)
        open = problems.coordinates.open
        report = reported(solve, open(y0), open(k0), end, ss)
        zero = jax.tree.map(jnp.zeros_like, example_state)
        return assemble(open(y0), zero, open(end.pair[0]), zero, rows, ss, report), report

    example_state = first[2]
    return jax.vmap(result, (axis, axis, axis, axis, 0))(own, y0, k0, ends, rows)


def started(problems: Problems, y0, inside: bool) -> State:
    """Every solve before its first attempt."""
    own = problems.own
    s = jnp.zeros(jax.tree.leaves(y0)[0].shape[problems.axis], time_dtype(problems))
    k0 = problems.slopes(own, y0, s)

    def one(own, y, k):
        solve, f, ss = problems.parts(own)
        coordinates = problems.coordinates
        packed = lambda y, s: coordinates.pack(f(coordinates.open(y), s))
        state = beginning(solve, f, coordinates.open(y), coordinates.open(k), lax.stop_gradient(ss[-1]))
        del packed
        state = state._replace(pair=(y, k))
        if inside:
            state = state._replace(extra=(jnp.sum(ss <= 0, dtype=jnp.int32), jnp.zeros((), jnp.int32)))
        return state

    return problems.vmap(one)(own, y0, k0)


def time_dtype(problems: Problems):
    return eqx.combine(problems.own, problems.shared)[2].dtype


def reported(solve, y0, k0, end: State, ss) -> Report:
    """How one solve went."""
    last = lax.stop_gradient(ss[-1])
    visits = end.extra[1] if end.extra else None
    if solve.steps is None:
        return judged(solve, end, tree.all_finite(y0, k0), last, visits)
    n = jnp.where(last > 0, jnp.asarray(solve.steps, jnp.int32), 0)
    return equal_steps_report(solve, y0, k0, end.pair[0], n, end.s, last, visits)


# Outputs inside the interval.


def empty_rows(problems: Problems, y0, size: int, count: int):
    """Room for all outputs of all solves, one after another."""
    coordinates = problems.coordinates
    shape = jax.eval_shape(coordinates.pack, coordinates.y0)
    return jax.tree.map(lambda y: jnp.zeros((size * count, *y.shape), y.dtype), shape)


def write_rows(problems, own, old: State, new: State, h, ks, who, rows, count, size):
    """The outputs that an accepted step has passed, by dense output."""
    table = problems.shared[0].table
    dense = np.array(table.dense)
    stop = ks_count(ks)
    y = old.pair[0]

    def time_of(own, row):
        return problems.parts(own)[2][jnp.minimum(row, count - 1)]

    times = problems.vmap(time_of)

    def pending(new, at):
        return (at < count) & (times(own, at) <= new.s) & (who < size) & (new.accepted > old.accepted)

    def write(carry):
        new, ks, rows = carry
        met = pending(new, new.extra[0])
        if table.extra_c:
            _, ks = stages(
                problems, own, rows_of(table, True), y, ks, old.s, h, len(table.c), stop
            )
        d = [product(np.pad(row, (0, stop - len(row))), ks) for row in dense]
        safe = jnp.where(h > 0, h, 1)

        def one_each(state):
            at, rows = state
            here = pending(new, at)
            theta = (times(own, at) - old.s) / safe
            total = d[-1]
            for term in d[-2::-1]:  # Horner's rule
                total = jax.tree.map(
                    lambda a, t: problems.coordinates.spread(theta, a) * a + t, total, term
                )
            value = moved(problems, y, theta * h, total)
            value = jax.tree.map(lambda v: jnp.moveaxis(v, problems.axis, 0), value)
            place = jnp.where(here, who * count + at, size * count)
            rows = jax.tree.map(lambda room, v: room.at[place].set(v, mode="drop"), rows, value)
            return at + here.astype(jnp.int32), rows

        at, rows = lax.while_loop(
            lambda state: jnp.any(pending(new, state[0])), one_each, (new.extra[0], rows)
        )
        visits = new.extra[1] + met.astype(jnp.int32)
        return new._replace(extra=(at, visits)), ks, rows

    some = jnp.any(pending(new, new.extra[0]))
    return lax.cond(some, write, lambda carry: carry, (new, ks, rows))
