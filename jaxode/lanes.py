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
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend import core
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from jaxode import scalars, tree
from jaxode.loop import (
    Integrator,
    Pair,
    State,
    assemble,
    put,
)
from jaxode.splittings import Splitting
from jaxode.step import powers_of

CACHE = 64 * 1024  # bytes that the slopes of all lanes may take
TAPE = 4 * 2**20  # bytes for a tape, backwards, where sqrt(max_steps) states need no more
ROUND = 8  # attempts between two looks at which lanes are done


# The way in: functions of one solve that, under `jax.vmap`, become loops over all of them.


def batched(single: Callable, many: Callable, able: Callable) -> Callable:
    """`single`, which `jax.vmap` turns into `many(size, flags, *args)`, where `able(flags, *args)`.

    `flags` says which leaves of the args have a leading axis of that size; `many` returns the
    results, and the same of them. Under another `vmap` the two axes become one, and it is asked
    again: a vmap of cotangents alone may be inside of one of the solves.
    """

    def along(size, flags):
        has: Any = None

        def one_axis(*args):
            nonlocal has
            if able(flags, *args):
                out, has = many(size, flags, *args)
            else:
                axes = jax.tree.map(lambda flag: 0 if flag else None, flags)
                out = jax.vmap(single, axes, axis_size=size)(*args)
                has = jax.tree.map(lambda _: True, out)
            return out

        call = custom_vmap(one_axis)

        @call.def_vmap
        def two_axes(more, outer, *args):
            outer = tuple(outer)
            both = jax.tree.map(lambda a, b: a or b, outer, flags)
            join = lambda x, a, b: joined(x, a, b, more, size)
            out, has = along(more * size, both)(*jax.tree.map(join, args, outer, flags))
            split = lambda x, h: x.reshape(more, size, *x.shape[1:]) if h else x
            return jax.tree.map(split, out, has), has

        return lambda *args: (call(*args), has)

    call = custom_vmap(single)
    call.def_vmap(lambda size, flags, *args: along(size, tuple(flags))(*args))
    return call


class Solver(NamedTuple):
    """A function of (solve, f, y0, ss), as values and with derivatives."""

    plain: Callable
    differentiable: Callable


def in_lanes(one: Solver, many: Callable, able: Callable) -> Callable:
    """`one`, which `jax.vmap` turns into the solver `many(size, flags)`.

    Unlike `batched` it is seen before any derivative is taken, if the `vmap` is inside of the
    derivative: then `many` knows what the solves share, and its cotangents may be sums. A primitive,
    because that is the only thing in JAX with rules of its own for both.
    """
    primitive = Primitive("solve")
    primitive.multiple_results = True

    def run(*leaves, program, **_):
        return core.jaxpr_as_fun(program)(*leaves)

    def bind(leaves, structure, size, flags):
        args = jax.tree.unflatten(structure, leaves)
        program, shape = jax.make_jaxpr(solver(structure, size, flags).plain, return_shape=True)(
            *args
        )
        outs = primitive.bind(
            *leaves, program=program, structure=structure, size=size, flags=tuple(flags)
        )
        return outs, jax.tree.structure(shape)

    def solver(structure, size, flags) -> Solver:
        return many(size, jax.tree.unflatten(structure, flags)) if size else one

    def jvp(primals, tangents, *, structure, size, flags, **_):
        moving = [i for i, x_dot in enumerate(tangents) if not isinstance(x_dot, ad.Zero)]

        def of_moving(*xs):
            leaves = list(primals)
            for i, x in zip(moving, xs):
                leaves[i] = x
            fn = solver(structure, size, flags).differentiable
            return jax.tree.leaves(fn(*jax.tree.unflatten(structure, leaves)))

        xs, xs_dot = ([of[i] for i in moving] for of in (primals, tangents))
        outs, outs_dot = jax.jvp(of_moving, xs, xs_dot)
        still = lambda x_dot: getattr(x_dot, "dtype", None) == jax.dtypes.float0
        zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
        return outs, [zero(x) if still(x_dot) else x_dot for x, x_dot in zip(outs, outs_dot)]

    def batch(leaves, axes, *, structure, size, flags, **_):
        new = [axis is not None for axis in axes]
        more = next(x.shape[axis] for x, axis in zip(leaves, axes) if axis is not None)
        leaves = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, axes)]
        given = jax.tree.unflatten(structure, leaves)
        if not size and not able(jax.tree.unflatten(structure, new), *given):
            lanes = jax.tree.unflatten(structure, [0 if b else None for b in new])
            outs = jax.tree.leaves(jax.vmap(one.differentiable, lanes)(*given))
            return outs, [0] * len(outs)
        if not size:
            outs, _ = bind(leaves, structure, more, new)
            return outs, [0] * len(outs)
        both = [a or b for a, b in zip(new, flags)]
        leaves = [joined(x, a, b, more, size) for x, a, b in zip(leaves, new, flags)]
        outs, _ = bind(leaves, structure, more * size, both)
        return [x.reshape(more, size, *x.shape[1:]) for x in outs], [0] * len(outs)

    primitive.def_impl(run)
    primitive.def_effectful_abstract_eval(
        lambda *_, program, **__: (program.out_avals, program.effects)
    )
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch

    def call(*args):
        leaves, structure = jax.tree.flatten(args)
        leaves = list(map(jnp.asarray, leaves))
        outs, shape = bind(leaves, structure, 0, [False] * len(leaves))
        return jax.tree.unflatten(shape, outs)

    return call


def joined(x, outer: bool, inner: bool, more: int, size: int):
    """x with its axes of sizes `more` and `size`, as far as it has them, as one."""
    if not (outer or inner):
        return x
    if not outer:
        x = jnp.broadcast_to(x[None], (more, *x.shape))
    if not inner:
        x = jnp.broadcast_to(x[:, None], (x.shape[0], size, *x.shape[1:]))
    return x.reshape(more * size, *x.shape[2:])


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

    def each(self, fn: Callable) -> Callable:
        """(own, ...) -> fn(solve, f, ss, ...) of every lane."""
        return self.vmap(lambda own, *args: fn(*eqx.combine(own, self.shared), *args))

    def slopes(self, own, y, s):
        """f of every lane."""
        return self.each(lambda solve, f, ss, y, s: self.coordinates.field(f, y, s))(own, y, s)

    def with_slopes(self, ks, i, own, y, s):
        """ks with these in row i: of a small system one component after another, each a kernel."""
        if not self.coordinates.small:
            return put(i, self.slopes(own, y, s), ks)
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


def lanes_at_once(table, coordinates: Coordinates, size: int) -> int:
    """On a CPU as many as fit into a cache with their slopes; else all, since wide is fast there."""
    if jax.default_backend() != "cpu":
        return size
    one = len(table.c) * sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(coordinates.y0))
    return min(size, 1 << max(5, min(10, (CACHE // max(one, 1)).bit_length() - 1)))


# A step of all lanes.


def matrix(table, extra: bool) -> tuple[np.ndarray, np.ndarray]:
    """A and c of a table; with the stages of dense output, if they are wanted."""
    rows = (*table.a, *(table.extra_a if extra else ()))
    a = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        a[i, : len(row)] = row
    return a, np.array((*table.c, *(table.extra_c if extra else ())))


def product(weights, ks):
    """sum_i w_i k_i over the leading axis; weights that are missing are 0."""

    def leaf(k):
        w = jnp.asarray(weights, k.dtype)
        w = jnp.pad(w, (0, len(k) - len(w)))
        return jnp.tensordot(w, k, 1, precision=lax.Precision.HIGHEST)

    return jax.tree.map(leaf, ks)


def room_for(y, count: int):
    """An array for so many states."""
    return jax.tree.map(lambda y: jnp.zeros((count, *y.shape), y.dtype), y)


def row(ks, i):
    pick = lambda k: lax.dynamic_index_in_dim(k, i, 0, False, allow_negative_indices=False)
    return jax.tree.map(pick, ks)


def moved(problems: Problems, y, h, k):
    """y + h k."""
    spread = problems.coordinates.spread
    return jax.tree.map(lambda y, k: y + spread(h, y) * k, y, k)


def stages(problems: Problems, own, y, ks, s, h, start: int, stop: int, seen=None):
    """Stages `start` to `stop` - 1 of a step: the last y_i, and slopes in the rows of ks.

    Every y_i goes into a row of `seen`, if that is given.
    """
    a, c = matrix(problems.table, stop > len(problems.table.c))

    def stage(state):
        i, _, ks, seen = state
        y1 = moved(problems, y, h, product(row(jnp.asarray(a), i), ks))
        ks = problems.with_slopes(ks, i, own, y1, s + row(jnp.asarray(c, h.dtype), i) * h)
        return i + 1, y1, ks, seen if seen is None else put(i, y1, seen)

    begin = jnp.asarray(start, jnp.int32), y, ks, seen
    _, y1, ks, seen = lax.while_loop(lambda state: state[0] < stop, stage, begin)
    return y1, ks, seen


def attempt(problems: Problems, own, state: State, more: int = 0):
    """One attempt of every lane that is not done: its state after it, step sizes and slopes.

    With room for the slopes of so many more stages.
    """
    table, count = problems.table, len(problems.table.c)
    go = unfinished(problems, own, state)
    s1, h = problems.each(lambda solve, f, ss, state: solve.next_end(state, last(ss)))(own, state)
    s1, h = jnp.where(go, s1, state.s), jnp.where(go, h, 0)
    y, k = state.pair
    ks = put(0, k, room_for(y, count + more))  # zeros, since 0 times an old NaN would be NaN
    y1, ks, _ = stages(problems, own, y, ks, state.s, h, 1, count)
    k1 = jax.tree.map(lambda k: k[count - 1], ks)
    zero = jax.tree.map(jnp.zeros_like, y)
    errors = [moved(problems, zero, h, product(e, ks)) for e in (table.e, table.e_low) if e]

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
    """Solves before their first attempts."""
    lanes = jax.tree.leaves(y0)[0].shape[problems.coordinates.axis]
    s = jnp.zeros(lanes, eqx.combine(own, problems.shared)[2].dtype)
    k0 = problems.slopes(own, y0, s)

    def one(solve, f, ss, y, k):
        open = problems.coordinates.open
        state = solve.beginning(f, open(y), open(k), last(ss))
        return state._replace(pair=(y, k), extra=extra and extra(ss))

    return problems.each(one)(own, y0, k0)


# Forward.


def solved(size: int, flags, solve: Integrator, f, y0, ss):
    """`Integrator.__call__` of all: their solutions, and their reports."""
    problems, y0 = prepared(size, flags, solve, f, y0, ss)
    table, axis, inside = problems.table, problems.coordinates.axis, ss.shape[-1] > 2
    width = lanes_at_once(table, problems.coordinates, size)
    before = lambda ss: (jnp.sum(ss <= 0, dtype=jnp.int32), jnp.zeros((), jnp.int32))
    queue = problems.own, started(problems, problems.own, y0, before if inside else None)
    who = jnp.arange(width, dtype=jnp.int32)
    rows = empty_rows(problems, size, ss.shape[-1]) if inside else None

    def once(carry):
        (own, state), who, rows = carry
        new, h, ks = attempt(problems, own, state, inside * len(table.extra_c))
        if inside:
            new, rows = write_rows(problems, own, state, new, h, ks, who, rows)
        return (own, new), who, rows

    if width == size:  # no queue
        busy = lambda carry: jnp.any(unfinished(problems, *carry[0]))
        (_, ends), _, rows = lax.while_loop(busy, once, (queue, who, rows))
    else:
        ends, rows = from_queue(problems, width, queue, once, rows)

    def result(own, begin, end, rows):
        solve, _, ss = eqx.combine(own, problems.shared)
        y0, k0, y1 = map(problems.coordinates.open, (*begin.pair, end.pair[0]))
        report = solve.report(end, y0, k0, last(ss), end.extra and end.extra[1])
        zero = jax.tree.map(jnp.zeros_like, y0)
        return assemble(y0, zero, y1, zero, rows, ss, report), report

    out = jax.vmap(result, (axis, axis, axis, 0))(*queue, ends, rows)
    return out, jax.tree.map(lambda _: True, out)


def from_queue(problems: Problems, width: int, queue, once, rows):
    """So many lanes at a time, until all problems of the queue are done: how they ended, and `rows`."""
    together = Packing(problems.coordinates.axis)
    packed, structure = together.pack(queue)
    size = together.lanes(packed)

    def refill(carry):
        """Lanes that are done give their results, and take new problems.

        A result takes the place of its problem in the queue.
        """
        lanes, who, head, packed, idle = carry
        place = head - 1 + jnp.cumsum(idle, dtype=jnp.int32)
        next_one = jnp.where(idle, jnp.minimum(place, size), size)
        old, _ = together.pack(lanes)
        new = together.where(next_one < size, together.take(packed, next_one), old)
        packed = together.put(packed, jnp.where(idle, who, size), old)
        who = jnp.where(idle, next_one, who)
        return together.open(new, structure), who, place[-1] + 1, packed, jnp.zeros_like(idle)

    def several(carry):
        lanes, who, rows, head, packed = carry
        busy = lambda c: (c[0] < ROUND) & jnp.any(unfinished(problems, *c[1][0]))
        _, (lanes, who, rows) = lax.while_loop(
            busy, lambda c: (c[0] + 1, once(c[1])), (jnp.zeros((), jnp.int32), (lanes, who, rows))
        )
        idle = ~unfinished(problems, *lanes) & (who < size)
        enough = 16 * jnp.sum(idle, dtype=jnp.int32) >= width
        ready = enough | jnp.all(idle | (who >= size))
        lanes, who, head, packed, _ = lax.while_loop(
            lambda c: ready & jnp.any(c[-1]), refill, (lanes, who, head, packed, idle)
        )
        return lanes, who, rows, head, packed

    lanes = together.open(together.part(packed, 0, width), structure)
    carry = lanes, jnp.arange(width, dtype=jnp.int32), rows, jnp.asarray(width, jnp.int32), packed
    carry = lax.while_loop(lambda carry: jnp.any(carry[1] < size), several, carry)
    return together.open(carry[4], structure)[1], carry[2]


class Packing:
    """What lanes have of their own as one array for each dtype, so that it is moved all at once."""

    def __init__(self, axis: int):
        self.axis = axis

    def pack(self, xs):
        """The arrays, and what `open` needs."""
        leaves, structure = jax.tree.flatten(xs)
        lanes = leaves[0].shape[self.axis]
        flat = (-1, lanes) if self.axis else (lanes, -1)
        groups = {}
        for leaf in leaves:
            groups.setdefault(leaf.dtype, []).append(leaf.reshape(flat))
        shapes = [(leaf.dtype, leaf.shape) for leaf in leaves]
        other = self.axis + 1
        return [jnp.concatenate(group, other) for group in groups.values()], (structure, shapes)

    def open(self, packed, structure):
        """And back."""
        structure, shapes = structure
        arrays = dict(zip(dict(shapes), packed))
        lanes, at, leaves = self.lanes(packed), dict.fromkeys(arrays, 0), []
        for dtype, shape in shapes:
            inner = shape[:-1] if self.axis else shape[1:]
            end = at[dtype] + math.prod(inner)
            leaf = lax.slice_in_dim(arrays[dtype], at[dtype], end, axis=self.axis + 1)
            leaves.append(leaf.reshape((*inner, lanes) if self.axis else (lanes, *inner)))
            at[dtype] = end
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


def empty_rows(problems: Problems, size: int, count: int):
    """Room for all outputs of all solves."""
    y = problems.coordinates.y0
    return jax.tree.map(lambda y: jnp.zeros((size, count, *y.shape), y.dtype), y)


def write_rows(problems: Problems, own, old: State, new: State, h, ks, who, rows):
    """The outputs that steps have passed, by dense output."""
    table, open = problems.table, problems.coordinates.open
    y, size, count = old.pair[0], *jax.tree.leaves(rows)[0].shape[:2]
    times = problems.each(lambda solve, f, ss, at: ss[jnp.minimum(at, count - 1)])

    def pending(at):
        return (
            (at < count) & (times(own, at) <= new.s) & (who < size) & (new.accepted > old.accepted)
        )

    def write(rows):
        stop = len(table.c) + len(table.extra_c)
        _, all_ks, _ = stages(problems, own, y, ks, old.s, h, len(table.c), stop)
        d = [product(weights, all_ks) for weights in table.dense]

        def one_each(state):
            at, rows = state
            here = pending(at)
            theta = (times(own, at) - old.s) / jnp.where(h > 0, h, 1)
            total = d[-1]
            for term in d[-2::-1]:  # Horner's rule
                total = moved(problems, term, theta, total)
            value = moved(problems, y, theta * h, total)
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


# Backward.


class Tape(NamedTuple):
    """A stretch of iterations: where each began, with y and k there; `grid` has the end, too."""

    ys: PyTree
    ks: PyTree
    grid: Any


def pulled(size: int, flags, solve: Integrator, x, rest, steps, ys_bar):
    """The vjp of the steps of all solves: cotangents of x, the differentiated part of (f, y0, ss).

    Those of leaves of f that have no axis of their own are sums over all solves.
    """
    _, of_x, of_rest = flags[:3]
    given = eqx.combine(x, rest)
    problems, y0 = prepared(size, (flags[0], *eqx.combine(of_x, of_rest)), solve, *given)
    coordinates, dtype = problems.coordinates, given[2].dtype
    axis, width = coordinates.axis, lanes_at_once(problems.table, coordinates, size)
    chunks, together = -(-size // width), Packing(axis)
    order = jnp.argsort(steps).astype(jnp.int32)  # the solves of a chunk are about equally long
    ys_bar = jax.vmap(jax.vmap(coordinates.pack), 0, axis)(ys_bar)
    whole, structure = together.pack((problems.own, y0, ys_bar))
    whole = together.padded(together.take(whole, order), chunks * width - size)
    gradient = Gradient(problems, x, of_x[0], given[2].shape[-1])

    def chunk(i, carry):
        rooms, shared, outs = carry
        own, y, w = together.open(together.part(whole, i * width, width), structure)
        there = i * width + jnp.arange(width, dtype=jnp.int32) < size
        real = problems.vmap(lambda w, there: jax.tree.map(lambda w: jnp.where(there, w, 0), w))
        rooms, new, of_shared = gradient(own, y, real(w, there), rooms)
        outs = together.written(outs, i * width, together.pack(new)[0])
        return rooms, jax.tree.map(jnp.add, shared, of_shared), outs

    own, y, _ = together.open(together.part(whole, 0, width), structure)
    rooms = rooms_for(solve.max_steps, y, jax.eval_shape(partial(started, problems), own, y))
    f_own, shared = (eqx.filter(f[1], gradient.mask) for f in (problems.own, problems.shared))
    ss_bar = None if x[2] is None else jnp.zeros((size, given[2].shape[-1]), dtype)
    outs = f_own, y0, None if ss_bar is None else jnp.moveaxis(ss_bar, 0, axis)
    shared, outs = jax.tree.map(jnp.zeros_like, (shared, outs))
    outs, structure_of_outs = together.pack(outs)
    outs = together.padded(outs, chunks * width - size)
    _, shared, outs = lax.fori_loop(0, chunks, chunk, (rooms, shared, outs))
    outs = together.take(outs, jnp.argsort(order))
    f_own, y_bar, ss_bar = together.open(outs, structure_of_outs)
    f_own, ss_bar = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), (f_own, ss_bar))
    return eqx.combine(f_own, shared), jax.vmap(coordinates.open, axis)(y_bar), ss_bar


def rooms_for(max_steps: int, y, state: State) -> tuple[Tape, State]:
    """Room for a tape, and for the states of the lanes at the begin of each of its stretches.

    Stretches have as many iterations as the budget allows, but at least sqrt(max_steps).
    """
    one = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(y))
    length = min(max(math.isqrt(max_steps) + 1, TAPE // max(one, 1)), max_steps)
    marks = jax.tree.map(
        lambda x: jnp.zeros((-(-max_steps // length) + 1, *x.shape), x.dtype), state
    )
    grid = jnp.zeros((length + 1, *state.s.shape), state.s.dtype)
    return Tape(room_for(y, length), room_for(y, length), grid), marks


def recorded(problems: Problems, own, state: State, tape: Tape):
    """Iterations until all lanes are done or the tape is full: the states, how many, the tape."""

    def once(carry):
        n, state, tape = carry
        new, _, _ = attempt(problems, own, state)
        y, k = state.pair
        tape = Tape(put(n, y, tape.ys), put(n, k, tape.ks), put(n + 1, new.s, tape.grid))
        return n + 1, new, tape

    def busy(carry):
        n, state, tape = carry
        return (n < len(tape.grid) - 1) & jnp.any(unfinished(problems, own, state))

    zero = jnp.zeros((), jnp.int32)
    n, state, tape = lax.while_loop(
        busy, once, (zero, state, tape._replace(grid=tape.grid.at[0].set(state.s)))
    )
    return state, n, tape


class Carry(NamedTuple):
    """What goes backwards: cotangents of y, k and f; the row of the next output, and those of ss."""

    y: PyTree
    k: PyTree
    f: PyTree
    row: Any
    ss: Any


class Gradient:
    """Backwards through a chunk."""

    def __init__(self, problems: Problems, x, flags, count: int):
        self.problems, self.table = problems, problems.table
        missing = lambda x: x is None
        self.mask = jax.tree.map(lambda x: x is not None, x[0], is_leaf=missing)
        self.common = jax.tree.map(
            lambda x, flag: x is not None and not flag, x[0], flags, is_leaf=missing
        )
        self.of_ss, self.inside = x[2] is not None, count > 2

    def __call__(self, own, y0, w, rooms):
        """The rooms; cotangents of what solves have of their own (f, y0, ss), and of what they share (f)."""
        problems = self.problems
        begin = started(problems, own, y0)
        tape, marks = rooms
        y_bar, y0_bar, row_ = problems.each(self.ends)(own, w)
        zero = jax.tree.map(jnp.zeros_like, y_bar)
        shapes = jax.eval_shape(self.pull, own, y0, begin.s, zero)[0]
        ss_bar = None
        if self.of_ss:
            ss_bar = problems.each(lambda solve, f, ss: jnp.zeros_like(ss))(own)
        carry = Carry(y_bar, zero, jax.tree.map(jnp.zeros_like, shapes), row_, ss_bar)
        k_end = begin.pair[1]

        def stretch(state):
            """The next one forwards, until all are done; then each one again, backwards.

            It is one program for both, so that both take the same steps, to the last bit.
            """
            i, back, tape, marks, carry, k_end = state
            end, n, tape = recorded(problems, own, row(marks, i), tape)
            more = ~back & jnp.any(unfinished(problems, own, end))
            marks = put(jnp.where(more, i + 1, len(marks.s) - 1), end, marks)
            k_end = tree.where(back | more, k_end, end.pair[1])
            visit = partial(self.visit, own, tape, w)
            _, carry = lax.while_loop(lambda st: st[0] > 0, visit, (jnp.where(more, 0, n), carry))
            return jnp.where(more, i + 1, i - 1), ~more, tape, marks, carry, k_end

        zero = jnp.zeros((), jnp.int32)
        state = zero, jnp.array(False), tape, put(zero, begin, marks), carry, k_end
        _, _, tape, marks, carry, k_end = lax.while_loop(lambda st: st[0] >= 0, stretch, state)
        last_f, last_y = self.pull(own, y0, jnp.zeros_like(begin.s), carry.k)
        f_bar = jax.tree.map(jnp.add, carry.f, last_f)
        y_bar = jax.tree.map(lambda *x: sum(x), carry.y, last_y, y0_bar)
        ss_bar = carry.ss
        if self.of_ss:
            ss_bar = problems.each(self.at_ends)(own, w, begin.pair[1], k_end, ss_bar)
        shared, f_own = eqx.partition(f_bar, self.common)
        if problems.coordinates.small:  # summed only now
            shared = jax.tree.map(lambda x: jnp.sum(x, -1), shared)
        return (tape, marks), (f_own, y_bar, ss_bar), shared

    def ends(self, solve, f, ss, w):
        """Cotangents of the outputs at the end, of those at the start, and the last one before the end."""
        at_start, at_end = ss <= 0, (ss >= ss[-1]) & (ss > 0)

        def total(rows):
            chosen = lambda w: rows.reshape((-1,) + (1,) * (w.ndim - 1))
            return jax.tree.map(lambda w: jnp.sum(jnp.where(chosen(w), w, 0), 0), w)

        return total(at_end), total(at_start), jnp.sum(~at_end, dtype=jnp.int32) - 1

    def at_ends(self, solve, f, ss, w, k0, k1, ss_bar):
        """Cotangents of times, those at the ends filled in: the slope there is the derivative."""
        slopes = lambda k: jax.vmap(lambda w: tree.dot(w, k))(w).astype(ss.dtype)
        ss_bar = jnp.where((ss >= ss[-1]) & (ss > 0), slopes(k1), ss_bar)
        return jnp.where(ss <= 0, slopes(k0), ss_bar)

    def visit(self, own, tape: Tape, w, state):
        """One iteration back."""
        n, carry = state[0] - 1, state[1]
        s, s1 = row(tape.grid, n), row(tape.grid, n + 1)
        return n, self.step(own, carry, row(tape.ys, n), row(tape.ks, n), s, s1 - s, w)

    def pull(self, own, y, s, w):
        """The vjp of f of all lanes: cotangents of f and of y.

        What lanes share has a sum over them; or, in a small system, still a cotangent for each.
        """
        problems, coordinates = self.problems, self.problems.coordinates
        if coordinates.small:

            def one(solve, f, ss, y, s, w):
                return coordinates.pull(*eqx.partition(f, self.mask), y, s, w)

            return problems.each(one)(own, y, s, w)
        f_own, f_shared = own[1], problems.shared[1]
        (x_own, own_rest), (x_shared, shared_rest) = (
            eqx.partition(f, self.mask) for f in (f_own, f_shared)
        )

        def slopes(x_own, x_shared, y):
            mine = own[0], eqx.combine(x_own, own_rest), own[2]
            others = problems.shared[0], eqx.combine(x_shared, shared_rest), problems.shared[2]
            return problems._replace(shared=others).slopes(mine, y, s)

        _, vjp = jax.vjp(slopes, x_own, x_shared, y)
        own_bar, shared_bar, y_bar = vjp(w)
        return eqx.combine(own_bar, shared_bar), y_bar

    def step(self, own, carry: Carry, y, k, s, h, w) -> Carry:
        """The vjp of one step of every lane, stage by stage; with the outputs inside it.

        With y_i = y + h sum_j a_ij k_j and k_i = f(y_i), the cotangents from the last stage to the
        first are k_i' = h sum_(j > i) a_ji y_j' and y_i' = (df/dy)^T k_i'. The step ends at its last
        y_i, and k of the next step is its last k_i.
        """
        problems, table = self.problems, self.table
        inside = self.inside
        total, last = len(table.c) + inside * len(table.extra_c), len(table.c) - 1
        a, c = matrix(table, inside and bool(table.extra_c))
        ks, seen = put(0, k, room_for(y, total)), room_for(y, total)
        _, ks, seen = stages(problems, own, y, ks, s, h, 1, total, seen)
        zero = jax.tree.map(jnp.zeros_like, y)
        straight, d_bar, row_, ss_bar = zero, None, carry.row, carry.ss
        if inside:
            row_, ss_bar, straight, d_bar = self.outputs(own, carry, ks, s, h, w)
        dense = np.zeros((len(table.dense), total))
        for p, weights in enumerate(table.dense if inside else ()):
            dense[p, : len(weights)] = weights

        def slope_bar(i, ys_bar):
            """The cotangent of k_i, but for that of the next step."""
            k_bar = moved(problems, zero, h, product(row(jnp.asarray(a.T), i), ys_bar))
            if not inside:
                return k_bar
            return moved(problems, k_bar, h, product(row(jnp.asarray(dense.T), i), d_bar))

        def stage(state):
            i, f_bar, ys_bar = state
            at_last = lambda x: jax.tree.map(lambda x: jnp.where(i == last, x, 0), x)
            k_bar = jax.tree.map(jnp.add, slope_bar(i, ys_bar), at_last(carry.k))
            s_i = s + row(jnp.asarray(c, h.dtype), i) * h
            f_more, y_bar = self.pull(own, row(seen, i), s_i, k_bar)
            y_bar = jax.tree.map(jnp.add, y_bar, at_last(carry.y))
            return i - 1, jax.tree.map(jnp.add, f_bar, f_more), put(i, y_bar, ys_bar)

        first = jnp.asarray(total - 1, jnp.int32)
        state = first, carry.f, room_for(y, total)
        _, f_bar, ys_bar = lax.while_loop(lambda state: state[0] > 0, stage, state)
        y_bar = jax.tree.map(jnp.add, product(np.ones(total), ys_bar), straight)
        return Carry(y_bar, slope_bar(jnp.zeros_like(first), ys_bar), f_bar, row_, ss_bar)

    def outputs(self, own, carry: Carry, ks, s, h, w):
        """Cotangents of the outputs in (s, s + h], gathered on y and on the d_p (see `step.coefficients`)."""
        problems, table = self.problems, self.table
        zero = jax.tree.map(lambda k: jnp.zeros_like(k[0]), ks)
        d = [moved(problems, zero, h, product(weights, ks)) for weights in table.dense]

        def one(solve, f, ss, row_, ss_bar, straight, d_bar, s, h, w, d):
            met = (row_ >= 0) & (ss[jnp.maximum(row_, 0)] > s)
            theta = (ss[row_] - s) / jnp.where(h > 0, h, 1)
            here = jax.tree.map(lambda w: jnp.where(met, w[row_], 0), w)
            powers = powers_of(theta, len(d))
            weights = jnp.stack(powers)
            d_bar = jax.tree.map(
                lambda b, w: b + jnp.tensordot(weights.astype(w.dtype), w, 0), d_bar, here
            )
            straight = jax.tree.map(jnp.add, straight, here)
            if self.of_ss:
                rates = [(p + 1) * r for p, r in enumerate([jnp.ones_like(theta), *powers[:-1]])]
                slope = tree.weighted_sum(1 / jnp.where(h > 0, h, 1), list(zip(rates, d)))
                new = ss_bar.at[row_].set(tree.dot(here, slope).astype(ss.dtype))
                ss_bar = jnp.where(met, new, ss_bar)
            return row_ - met.astype(jnp.int32), ss_bar, straight, d_bar

        def meet(state):
            return problems.each(one)(own, *state, s, h, w, d)

        def met(state):
            some = problems.each(
                lambda solve, f, ss, row_, s: (row_ >= 0) & (ss[jnp.maximum(row_, 0)] > s)
            )
            return jnp.any(some(own, state[0], s))

        state = carry.row, carry.ss, zero, room_for(zero, len(table.dense))
        if problems.coordinates.small:
            return lax.while_loop(met, meet, state)
        swap = lambda state: (*state[:3], jax.tree.map(lambda d: jnp.moveaxis(d, 0, 1), state[3]))
        return swap(lax.while_loop(met, meet, swap(state)))
