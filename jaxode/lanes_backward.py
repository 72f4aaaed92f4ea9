"""Back through the steps of many solves: what `jax.vmap` of a gradient by replay becomes.

Lanes take their problems in the order of their lengths. Nothing is kept from the forward pass but
the number of steps: each chunk is solved again with a tape whose rows are the iterations that its
lanes share. A lane that was rejected, or is done, has a step of size 0 there: the identity, in value
and in gradient. So the tape is written and read in whole rows, and memory does not grow with the
batch.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxode import lanes, tree
from jaxode.lanes import Packing, Problems, attempt, prepared, started, unfinished
from jaxode.loop import Integrator, State
from jaxode.stages import room_for
from jaxode.step import powers_of, step_and_inside
from jaxode.tree import put, row

TAPE = 4 * 2**20  # bytes for a tape, where sqrt(max_steps) states need no more


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
    axis, width = coordinates.axis, lanes.lanes_at_once(problems.table, coordinates, size, copies=2)
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
        """The vjp of one step of every lane, with the outputs inside it."""
        found = self.step_in_one_kernel(own, carry, y, k, s, h, w)
        return self.step_by_stages(own, carry, y, k, s, h, w) if found is None else found

    def step_in_one_kernel(self, own, carry: Carry, y, k, s, h, w):
        """The same, of a small system on a CPU; None of any other."""
        problems, step, ends = self.problems, (y, k, s, h), (carry.y, carry.k)
        if not problems.coordinates.small:
            return None
        straight, d_bar = jnp.zeros_like(y), [y] * (self.inside * len(self.table.dense))
        back = problems.kernel(self.back, own, *step, ends, carry.f, straight, d_bar)
        slopes = self.inside and self.of_ss  # the derivatives at the outputs are asked for
        inside = problems.kernel(self.coefficients, own, *step) if slopes else None
        if back is None or (slopes and inside is None):
            return None
        row_, ss_bar = carry.row, carry.ss
        if self.inside:
            d = [y] * len(self.table.dense)
            if inside is not None:
                d, valid = inside(own, *step)
                d[0] = jnp.where(valid, d[0], jnp.nan)
            row_, ss_bar, straight, d_bar = self.outputs(own, carry, d, s, h, w)
        (f_bar, y_bar, k_bar), valid = back(own, *step, ends, carry.f, straight, list(d_bar))
        return Carry(jnp.where(valid, y_bar, jnp.nan), k_bar, f_bar, row_, ss_bar)

    def forwards(self, f, y, k, s, h):
        """y and k at the end of the step of one small system, and the d_p, packed."""
        pack, open = self.problems.coordinates.pack, self.problems.coordinates.open
        y1, k1, d = step_and_inside(self.table, f, open(y), open(k), s, h, self.inside)
        return pack(y1), pack(k1), list(map(pack, d))

    def coefficients(self, solve, f, end, y, k, s, h):
        return self.forwards(f, y, k, s, h)[2]

    def back(self, solve, f, end, y, k, s, h, ends, f_bar, straight, d_bar):
        """The vjp of `forwards`, added to f_bar and to a cotangent of y."""
        f_x, f_rest = eqx.partition(f, self.mask)
        of_x = lambda f_x, y, k: self.forwards(eqx.combine(f_x, f_rest), y, k, s, h)
        _, vjp = jax.vjp(of_x, f_x, y, k)
        f_more, y_bar, k_bar = vjp((*ends, d_bar))
        return jax.tree.map(jnp.add, f_bar, f_more), y_bar + straight, k_bar

    def step_by_stages(self, own, carry: Carry, y, k, s, h, w) -> Carry:
        """The same, of any system."""
        steps = self.problems.stages(own)
        ks, seen = steps.seen(y, k, s, h, self.inside)
        straight, d_bar, row_, ss_bar = None, None, carry.row, carry.ss
        if self.inside:
            d = steps.coefficients(y, h, ks)
            row_, ss_bar, straight, d_bar = self.outputs(own, carry, d, s, h, w)
        pull, ends = partial(self.pull, own), (carry.y, carry.k)
        y_bar, k_bar, f_bar = steps.back(pull, seen, s, h, ends, carry.f, d_bar)
        if self.inside:
            y_bar = jax.tree.map(jnp.add, y_bar, straight)
        return Carry(y_bar, k_bar, f_bar, row_, ss_bar)

    def outputs(self, own, carry: Carry, d, s, h, w):
        """Cotangents of the outputs in (s, s + h], gathered on y and on the d_p (see `step.coefficients`)."""
        problems, table = self.problems, self.table
        zero = jax.tree.map(jnp.zeros_like, d[0])

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
