"""A batch of solves as one loop: what `jax.vmap` of a solve becomes.

`vmap` of a `while_loop` runs every solve until the slowest is done, and streams the whole batch
through memory at every stage. Here some hundred solves at a time, the lanes, share a loop, each with
its own time, step size and status; their states stay in the nearest caches, and when a lane is done
the next problem of the queue takes its place.

On a CPU a whole attempt of a small system is one kernel (`scalars.of_lanes`): 8,192 Lorenz systems
took 64 ms, and 118 ms stage by stage, which is how all others are stepped: the stages of a step are
a loop, with all slopes in one array, so that a stage is a product with a row of the table, which XLA
neither fuses nor computes twice.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxode import batching, scalars, tree
from jaxode.loop import (
    Integrator,
    Pair,
    Report,
    State,
    assemble,
)
from jaxode.splittings import Splitting
from jaxode.stages import Stages, product, room_for
from jaxode.step import error, step

CACHE = 128 * 1024  # bytes that the slopes of all lanes may take
ROUND = 8  # attempts between two looks at which lanes are done


def able(solve: Integrator) -> bool:
    """Whether lanes know how to step this: every Runge-Kutta method."""
    return not isinstance(solve.table, Splitting)


# Coordinates: how the states of all lanes lie in memory.


class Coordinates:
    """A small system as a vector, lanes along its last axis; any other one as it is, lanes first.

    The components of a small system are then rows, on which the arithmetic of its field (taken apart
    by `scalars`) is done for all lanes at once.
    """

    def __init__(self, f, y0, s):
        self.y0, self.pair = y0, Pair(y0, packed=True)
        self.apart: Any = None
        if self.pair.packed:
            self.apart = scalars.components(lambda f, y, s: f(y, s), f, y0, s)
        self.small = self.apart is not None
        self.axis = -1 if self.small else 0

    def pack(self, y):
        """The state of one solve."""
        if not self.small:
            return y
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(y)])

    def open(self, y):
        """And back."""
        return self.pair.open(jnp.concatenate([y, y]))[0] if self.small else y

    def field(self, f, y, s):
        """f of one solve, packed."""
        return jnp.stack(self.scalars(f, y, s)) if self.small else f(y, s)

    def scalars(self, f, y, s):
        """The components of f of a small system."""
        return self.apart([*parts(f), *parts(y), s])

    def pull(self, f_x, f_rest, y, s, w):
        """The vjp of it: cotangents of f_x and y. Of a small system scalar by scalar."""
        if not self.small:
            _, vjp = jax.vjp(lambda f_x, y: eqx.combine(f_x, f_rest)(y, s), f_x, y)
            return vjp(w)
        missing = lambda x: x is None
        xs, structure = jax.tree.flatten(f_x, is_leaf=missing)
        rest = jax.tree.leaves(f_rest, is_leaf=missing)

        def flat(xs, y):
            leaves = [parts(r) if x is None else x for x, r in zip(xs, rest)]
            return self.apart([*(part for leaf in leaves for part in leaf), *y, s])

        _, vjp = jax.vjp(flat, [None if x is None else parts(x) for x in xs], parts(y))
        xs_bar, y_bar = vjp(parts(w))
        whole = [x if not bar else jnp.stack(bar).reshape(x.shape) for x, bar in zip(xs, xs_bar)]
        return jax.tree.unflatten(structure, whole), jnp.stack(y_bar)

    def spread(self, h, like):
        """Numbers of the lanes, so that they multiply states."""
        h = lax.convert_element_type(h, like.dtype)
        ones = (1,) * (like.ndim - 1)
        return h.reshape((*ones, -1) if self.small else (-1, *ones))


def parts(tree_) -> list:
    """The scalars of all leaves."""
    leaves = map(jnp.asarray, jax.tree.leaves(tree_))
    return [x for leaf in leaves for x in scalars.take_apart(leaf).reshape(-1)]


class Problems(NamedTuple):
    """Many solves: what each has of its own (arrays with lanes along `axis`), and what they share."""

    own: PyTree  # the batched leaves of (solve, f, ss), None elsewhere
    shared: PyTree  # the others
    coordinates: Coordinates
    table: Any

    def vmap(self, fn: Callable) -> Callable:
        """fn of one solve, for all lanes."""
        return jax.vmap(fn, self.coordinates.axis, self.coordinates.axis)

    def to_lanes(self, xs):
        """Arrays with lanes along their first axis, with lanes where they belong."""
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, self.coordinates.axis), xs)

    def each(self, fn: Callable) -> Callable:
        """(own, ...) -> fn(solve, f, ss, ...) of every lane."""
        return self.vmap(lambda own, *args: fn(*eqx.combine(own, self.shared), *args))

    def slopes(self, own, y, s):
        """f of every lane."""
        return self.each(lambda solve, f, ss, y, s: self.coordinates.field(f, y, s))(own, y, s)

    def kernel(self, fn: Callable, own, *examples):
        """(own, ...) -> fn(solve, f, end, ...) of every lane, and where that is valid, in one kernel.

        None if it is not small, or not on a CPU.
        """
        if not self.coordinates.small or jax.default_backend() != "cpu":
            return None
        given = self.each(lambda solve, f, ss, *args: (solve, f, last(ss), *args))
        first = jax.tree.map(lambda x: x[..., 0], given(own, *examples))
        many = scalars.of_lanes(fn, *first)
        return None if many is None else lambda own, *args: many(*given(own, *args))

    def stages(self, own) -> Stages:
        """The steps of all lanes."""
        slopes = lambda ks, i, y, s: self.with_slopes(ks, i, own, y, s)
        return Stages(self.table, slopes, self.coordinates.spread)

    def with_slopes(self, ks, i, own, y, s):
        """ks with these in row i: of a small system one component after another, each a kernel."""
        if not self.coordinates.small:
            return tree.put(i, self.slopes(own, y, s), ks)
        rows = self.each(lambda solve, f, ss, y, s: self.coordinates.scalars(f, y, s))(own, y, s)
        zero = jnp.zeros_like(i)
        for j, k in enumerate(rows):
            place = (i, jnp.full_like(i, j), zero)
            ks = lax.dynamic_update_slice(ks, k[None, None], place, allow_negative_indices=False)
        return ks


def prepared(size: int, flags, solve, f, y0, ss) -> tuple[Problems, PyTree]:
    """The problems, and their initial states, packed."""
    first = jax.tree.map(lambda x, flag: x[0] if flag else x, (solve, f, y0, ss), flags)
    coordinates = Coordinates(first[1], first[2], first[3][0])
    own, shared = eqx.partition((solve, f, ss), (flags[0], flags[1], flags[3]))
    own = jax.tree.map(lambda x: jnp.moveaxis(x, 0, coordinates.axis), own)
    y0 = jax.tree.map(
        lambda y, flag: y if flag else jnp.broadcast_to(y, (size, *y.shape)), y0, flags[2]
    )
    y0 = jax.vmap(coordinates.pack, 0, coordinates.axis)(y0)
    return Problems(own, shared, coordinates, solve.table), y0


def lanes_at_once(table, coordinates: Coordinates, size: int, copies: int = 1) -> int:
    """On a CPU as many as fit into a cache with their slopes; else all, since wide is fast there."""
    if jax.default_backend() != "cpu":
        return size
    state = sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(coordinates.y0))
    one = copies * len(table.c) * state
    width = 1 << max(5, min(10, (CACHE // max(one, 1)).bit_length() - 1))
    if size <= width:
        return size
    # Rows of 4,096 bytes would share the lines of a cache.
    return width - width // 32 if coordinates.small else width


# A step of all lanes.


def attempt(problems: Problems, own, state: State, inside: bool = False):
    """One attempt of every lane that is not done: its state after it, step sizes and slopes.

    The slopes with room for those of the further stages, if the solution inside is wanted.
    """
    more = inside * len(problems.table.extra_c)
    one = partial(attempt_of_one, problems.coordinates, problems.table, inside)
    alone = state._replace(extra=None)
    kernel = problems.kernel(one, own, alone)
    if kernel is None:
        return attempt_by_stages(problems, own, state, more)
    (new, h, ks), valid = kernel(own, alone)
    if inside:
        ks = jnp.concatenate([jnp.stack(ks), room_for(ks[0], more)])
    return spoiled(problems, own, new, valid)._replace(extra=state.extra), h, ks


def spoiled(problems: Problems, own, state: State, valid) -> State:
    """States that fail where they are not valid: NaN is the time, or y if steps have one size."""
    spoil = lambda x: jnp.where(valid, x, jnp.nan)
    if eqx.combine(own, problems.shared)[0].steps is None:
        return state._replace(s=spoil(state.s))
    return state._replace(pair=(spoil(state.pair[0]), state.pair[1]))


def attempt_of_one(coordinates: Coordinates, table, slopes: bool, solve, f, end, state: State):
    """An attempt of one lane: its state after it, the step size, and the slopes if these are wanted."""
    s1, h, go = next_step(solve, end, state)
    y, k = map(coordinates.open, state.pair)
    y1, ks = step(table, f, y, k, state.s, h)
    pair1 = coordinates.pack(y1), coordinates.pack(ks[-1])
    new = solve.decided(
        state, s1, h, (state.pair, pair1), (y, y1), lambda: ks[-1], error(table, h, ks), go
    )
    return new, h, list(map(coordinates.pack, ks)) if slopes else None


def next_step(solve: Integrator, end, state: State):
    """Where the next attempt ends, its size, and whether there is one: if not, its size is 0."""
    go = solve.unfinished(state, end)
    s1, h = solve.next_end(state, end)
    return jnp.where(go, s1, state.s), jnp.where(go, h, 0), go


def attempt_by_stages(problems: Problems, own, state: State, more: int):
    """The same of all lanes, stage by stage: any system, on any device."""
    table, count, steps = problems.table, len(problems.table.c), problems.stages(own)
    going = lambda solve, f, ss, state: next_step(solve, last(ss), state)
    s1, h, go = problems.each(going)(own, state)
    y, k = state.pair
    ks = tree.put(0, k, room_for(y, count + more))  # zeros: 0 times an old NaN would be NaN
    y1, ks, _ = steps.run(y, ks, state.s, h, 1, count)
    k1 = jax.tree.map(lambda k: k[count - 1], ks)
    zero = jax.tree.map(jnp.zeros_like, y)
    errors = [steps.moved(zero, h, product(e, ks)) for e in (table.e, table.e_low) if e]

    def one(solve, f, ss, state, go, s1, h, y1, k1, errors):
        open = problems.coordinates.open
        return solve.decided(
            state, s1, h, (state.pair, (y1, k1)), (open(state.pair[0]), open(y1)),
            lambda: open(k1), [open(e) for e in errors], go,
        )  # fmt: skip

    return problems.each(one)(own, state, go, s1, h, y1, k1, errors), h, ks


def unfinished(problems: Problems, own, state: State):
    return problems.each(lambda solve, f, ss, state: solve.unfinished(state, last(ss)))(own, state)


def last(ss):
    return lax.stop_gradient(ss[-1])


def started(problems: Problems, own, y0, extra=None) -> State:
    """Solves before their first attempts; `extra(ss)` is what each carries besides."""
    open = problems.coordinates.open

    def one(solve, f, end, y, k=None):
        k = problems.coordinates.field(f, y, jnp.zeros_like(end)) if k is None else k
        return solve.beginning(f, open(y), open(k), end)._replace(pair=(y, k))

    if (kernel := problems.kernel(one, own, y0)) is not None:
        state = spoiled(problems, own, *kernel(own, y0))
    else:
        lanes = jax.tree.leaves(y0)[0].shape[problems.coordinates.axis]
        s = jnp.zeros(lanes, eqx.combine(own, problems.shared)[2].dtype)
        k0 = problems.slopes(own, y0, s)
        begin = lambda solve, f, ss, y, k: one(solve, f, last(ss), y, k)
        state = problems.each(begin)(own, y0, k0)
    if extra is None:
        return state
    return state._replace(extra=problems.each(lambda solve, f, ss, s: extra(ss))(own, state.s))


# Forward.


def solved(size: int, flags, solve: Integrator, f, y0, ss):
    """`Integrator.__call__` of all: their solutions, and their reports."""
    problems, y0 = prepared(size, flags, solve, f, y0, ss)
    axis, inside = problems.coordinates.axis, ss.shape[-1] > 2
    before = lambda ss: (jnp.sum(ss <= 0, dtype=jnp.int32), jnp.zeros((), jnp.int32))
    queue = problems.own, started(problems, problems.own, y0, before if inside else None)
    rows = empty_rows(problems, size, ss.shape[-1]) if inside else None

    def once(carry):
        (own, state), who, rows = carry
        new, h, ks = attempt(problems, own, state, inside)
        if inside:
            new, rows = write_rows(problems, own, state, new, h, ks, who, rows)
        return (own, new), who, rows

    ends, rows = run(problems, size, queue, once, rows)

    def result(own, begin, end, rows):
        solve, _, ss = eqx.combine(own, problems.shared)
        y0, k0, y1 = map(problems.coordinates.open, (*begin.pair, end.pair[0]))
        report = solve.report(end, y0, k0, last(ss), end.extra and end.extra[1])
        zero = jax.tree.map(jnp.zeros_like, y0)
        return assemble(y0, zero, y1, zero, rows, ss, report), report

    out = jax.vmap(result, (axis, axis, axis, 0))(*queue, ends, rows)
    return out, jax.tree.map(lambda _: True, out)


def run(problems: Problems, size: int, queue, once, rows):
    """Attempts until all problems are done: how they ended, and `rows`, which any attempt may change.

    `once((own, states), who, rows)` is an attempt; `who` are the numbers of the problems in the lanes.
    """
    width = lanes_at_once(problems.table, problems.coordinates, size)
    if width < size:
        return from_queue(problems, width, queue, once, rows)
    busy = lambda carry: jnp.any(unfinished(problems, *carry[0]))
    start = queue, jnp.arange(size, dtype=jnp.int32), rows
    (_, ends), _, rows = lax.while_loop(busy, once, start)
    return ends, rows


def from_queue(problems: Problems, width: int, queue, once, rows):
    """The same with fewer lanes than problems."""
    together = Packing(problems.coordinates.axis)
    if problems.coordinates.small:  # rows of one array for each dtype, between attempts too
        by_dtype = Packing(problems.coordinates.axis, mixed=False)
        queue, form = by_dtype.pack(queue)
        view, hold = lambda held: by_dtype.open(held, form), lambda lanes: by_dtype.pack(lanes)[0]
    else:
        view = hold = lambda lanes: lanes
    waiting, structure = together.pack(queue)
    size = together.lanes(waiting)

    def refill(head, carry):
        """Lanes that are done give their results, and take new problems."""
        held, who, ends, _ = carry
        idle = ~unfinished(problems, *view(held)) & (who < size)
        next_one = jnp.where(idle, jnp.minimum(head - 1 + counted(idle), size), size)
        old, _ = together.pack(held)
        new = together.where(next_one < size, together.take(waiting, next_one), old)
        ends = together.put(ends, jnp.where(idle, who, size), old)
        who = jnp.where(idle, next_one, who)
        return together.open(new, structure), who, ends, jnp.array(False)

    def attempts(carry):
        n, _, (held, who, rows) = carry
        lanes, who, rows = once((view(held), who, rows))
        busy = jnp.sum(unfinished(problems, *lanes), dtype=jnp.int32)
        return n + 1, busy, (hold(lanes), who, rows)

    def several(carry):
        """Some attempts, and new problems if enough lanes are done; `live` lanes have one at all."""
        held, who, rows, head, live, ends = carry
        some = lambda carry: (carry[0] < ROUND) & (carry[1] > 0)
        begin = 0 * live, live, (held, who, rows)
        _, busy, (held, who, rows) = lax.while_loop(some, attempts, begin)
        done = live - busy
        ready = (16 * done >= width) | (busy == 0)
        begin = held, who, ends, ready
        held, who, ends, _ = lax.while_loop(lambda carry: carry[-1], partial(refill, head), begin)
        taken = jnp.clip(size - head, 0, done)
        head, live = head + jnp.where(ready, done, 0), live + jnp.where(ready, taken - done, 0)
        return held, who, rows, head, live, ends

    held = together.open(together.part(waiting, 0, width), structure)
    who, all_ = jnp.arange(width, dtype=jnp.int32), jnp.asarray(width, jnp.int32)
    carry = held, who, rows, all_, all_, jax.tree.map(jnp.zeros_like, waiting)
    *_, rows, _, _, ends = lax.while_loop(lambda carry: carry[4] > 0, several, carry)
    return view(together.open(ends, structure))[1], rows


def counted(flags):
    """How many of the flags are set, up to each: by two products, where XLA makes a cumsum of six kernels."""
    length = math.gcd(len(flags), 16)
    rows = flags.reshape(-1, length).astype(jnp.float32)
    times = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    within = times(rows, np.triu(np.ones((length, length), np.float32)))
    before = times(np.tril(np.ones((len(rows), len(rows)), np.float32), -1), within[:, -1:])
    return (within + before).reshape(-1).astype(jnp.int32)


class Packing:
    """What lanes have of their own as one array for each dtype, so that it is moved all at once.

    If `mixed`, numbers of float32 are the bits that they are, together with those of int32.
    """

    def __init__(self, axis: int, mixed: bool = True):
        self.axis, self.mixed = axis, mixed

    def stored(self, dtype):
        """The dtype of the array that such numbers are in."""
        return jnp.dtype(jnp.int32) if self.mixed and dtype == jnp.float32 else dtype

    def pack(self, xs):
        """The arrays, and what `open` needs."""
        leaves, structure = jax.tree.flatten(xs)
        groups = {}
        for leaf in leaves:
            lanes, dtype = leaf.shape[self.axis], self.stored(leaf.dtype)
            leaf = leaf.reshape((-1, lanes) if self.axis else (lanes, -1))
            groups.setdefault(dtype, []).append(as_bits(leaf, dtype))
        shapes = [(leaf.dtype, leaf.shape) for leaf in leaves]
        other = self.axis + 1
        return [jnp.concatenate(group, other) for group in groups.values()], (structure, shapes)

    def open(self, packed, structure):
        """And back."""
        structure, shapes = structure
        arrays = {array.dtype: array for array in packed}
        lanes, at, leaves = self.lanes(packed), dict.fromkeys(arrays, 0), []
        for dtype, shape in shapes:
            stored, inner = self.stored(dtype), shape[:-1] if self.axis else shape[1:]
            end = at[stored] + math.prod(inner)
            leaf = lax.slice_in_dim(arrays[stored], at[stored], end, axis=self.axis + 1)
            leaf = as_bits(leaf, dtype)
            leaves.append(leaf.reshape((*inner, lanes) if self.axis else (lanes, *inner)))
            at[stored] = end
        return jax.tree.unflatten(structure, leaves)

    def lanes(self, packed) -> int:
        return packed[0].shape[self.axis]

    def part(self, packed, start, size: int):
        return [lax.dynamic_slice_in_dim(x, start, size, self.axis) for x in packed]

    def written(self, packed, start, new):
        put = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=self.axis)
        return [put(x, n) for x, n in zip(packed, new)]

    def padded(self, packed, more: int):
        """With more lanes, which are those of the front."""
        return [jnp.concatenate([x, self.part([x], 0, more)[0]], self.axis) for x in packed]

    def take(self, packed, i):
        return [jnp.take(x, i, axis=self.axis, mode="clip") for x in packed]

    def put(self, packed, i, new):
        """New values at places i; those out of range are dropped."""
        at = lambda x: x.at[..., i] if self.axis else x.at[i]
        return [at(x).set(n, mode="drop", unique_indices=True) for x, n in zip(packed, new)]

    def where(self, chosen, packed, others):
        chosen = chosen[None, :] if self.axis else chosen[:, None]
        return [jnp.where(chosen, x, y) for x, y in zip(packed, others)]


def as_bits(x, dtype):
    """The same bits, as numbers of another dtype."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def empty_rows(problems: Problems, size: int, count: int):
    """Room for all outputs of all solves."""
    y = problems.coordinates.y0
    return jax.tree.map(lambda y: jnp.zeros((size, count, *y.shape), y.dtype), y)


def write_rows(problems: Problems, own, old: State, new: State, h, ks, who, rows):
    """The outputs that steps have passed, by dense output."""
    table, open, steps = problems.table, problems.coordinates.open, problems.stages(own)
    y, size, count = old.pair[0], *jax.tree.leaves(rows)[0].shape[:2]
    times = problems.each(lambda solve, f, ss, at: ss[jnp.minimum(at, count - 1)])

    def pending(at):
        return (
            (at < count) & (times(own, at) <= new.s) & (who < size) & (new.accepted > old.accepted)
        )

    def write(rows):
        stop = len(table.c) + len(table.extra_c)
        all_ks = steps.run(y, ks, old.s, h, len(table.c), stop)[1]
        d = [product(weights, all_ks) for weights in table.dense]

        def one_each(state):
            at, rows = state
            here = pending(at)
            theta = (times(own, at) - old.s) / jnp.where(h > 0, h, 1)
            total = d[-1]
            for term in d[-2::-1]:  # Horner's rule
                total = steps.moved(term, theta, total)
            value = steps.moved(y, theta * h, total)
            value = jax.vmap(open, problems.coordinates.axis)(value)
            place = jnp.where(here, who, size), at
            rows = jax.tree.map(lambda room, v: room.at[place].set(v, mode="drop"), rows, value)
            return at + here.astype(jnp.int32), rows

        return lax.while_loop(lambda st: jnp.any(pending(st[0])), one_each, (at, rows))

    at = new.extra[0]
    met = pending(at)
    after, rows = lax.cond(jnp.any(met), write, lambda rows: (at, rows), rows)
    mark = new.mark if new.mark is None else jnp.where(after > at, new.attempts, new.mark)
    return new._replace(extra=(after, new.extra[1] + met.astype(jnp.int32)), mark=mark), rows


# One solve, which `jax.vmap` turns into many.


def solve_one(solve: Integrator, f, y0, ss):
    return solve(f, y0, ss)


def like_results(solve: Integrator, f, y0, ss):
    """Zeros like what `solve_one` returns, found without tracing it; and the effects of the field."""
    ys = jax.tree.map(lambda y: jnp.zeros((len(ss), *y.shape), y.dtype), y0)
    count = jnp.zeros((), jnp.int32)
    report = Report(count, jnp.zeros((), ss.dtype), count, count, count)
    return (ys, report), f.trace.jaxpr.effects


def able_to(flags, solve: Integrator, *_) -> bool:
    return able(solve)


solve_batched = batching.batched(solve_one, solved, able_to)
