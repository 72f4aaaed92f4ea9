"""Back through the steps of many solves: what `jax.vmap` of a gradient by replay becomes.

Lanes take their problems in the order of their lengths. Nothing is kept from the forward pass but its
ends and the number of steps: each chunk is solved again with a tape whose rows are the iterations that
its lanes share. A lane that was rejected, or is done, has a step of size 0 there: the identity, in
value and in gradient. So the tape is written and read in whole rows, and memory does not grow with the
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

from jaxode import tree
from jaxode.adjoints.ends import from_the_end, of_the_field, to_the_start
from jaxode.adjoints.inputs import is_asked, join, only, present
from jaxode.batch import lanes
from jaxode.batch.lanes import first_of
from jaxode.batch.layout import column, columns, from_lanes, put_column, put_columns, to_lanes
from jaxode.batch.plans import Plan, plan
from jaxode.batch.vmap_rules import Form, axes_of, spread, summed
from jaxode.kernels.forms import ONE_CALL
from jaxode.kernels.one_call import one_call
from jaxode.kernels.stepper import Stepper, stepper
from jaxode.outputs import Cotangents, gather, passed
from jaxode.stepping import checkpoints
from jaxode.stepping.integrator import State, unwatched
from jaxode.stepping.loop import Recorded
from jaxode.stepping.problems import Problems

TAPE = 4 * 2**20  # bytes for a tape, where sqrt(max_steps) states need no more


def record(form: Form, x, rest):
    """The solutions of all, their reports, and their ends; the tape is left empty but for the counts."""
    of_x, (of_integrator, of_rest) = form.flags
    integrator, given = join(x, rest)
    of_given = eqx.combine(of_x, of_rest)
    form = form._replace(flags=(of_integrator, *of_given))
    ys, report, end, slope0 = lanes.solve(form, integrator, *given, copies=2)
    pair = jax.tree.map(lambda x: x[0], (end.y, end.memory))
    tape = checkpoints.empty(integrator.max_steps, pair, given[2].dtype)
    tape = tape._replace(steps=report.accepted + report.rejected)
    return ys, report, Recorded(tape, slope0, end.y, end.memory, report)


def pull(form: Form, x, rest, recorded: Recorded, bars):
    """The vjp of the steps of all solves: cotangents of x, the differentiated part of (f, y0, ss).

    Those of leaves that have no axis of their own are sums over all solves.
    """
    of_x, (of_integrator, of_rest), _, of_bars = form.flags
    of_integrator, rest = unwatched(of_integrator), (unwatched(rest[0]), rest[1])
    integrator, given = join(x, rest)
    of_given = eqx.combine(of_x, of_rest)
    form = form._replace(flags=(of_integrator, *of_given))
    bars = spread(form.size, bars, of_bars)
    how = plan(form, *first_of((integrator, *given), form.flags), copies=2)
    args = x, rest, recorded._replace(tape=recorded.tape.steps), bars
    flags = of_x, (of_integrator, of_rest)
    in_lanes = partial(pull_in_lanes, form.size, flags)
    if how.width == 1:
        plain = partial(in_lanes, Plan(form.size, 0, False))
        return one_call(partial(one_after_another, form.size, flags), plain)(*args)
    return in_lanes(how, *args)


def one_after_another(size: int, flags, x, rest, recorded: Recorded, bars):
    """Each by itself, solved again."""
    from jaxode.adjoints.replay import pull, record

    of_x = flags[0]
    own, shared = eqx.partition((x, rest), flags)
    total = jax.tree.map(lambda x, flag: None if flag else jnp.zeros_like(x), x, of_x)

    def one(total, given):
        own, bars = given
        x, rest = eqx.combine(own, shared)
        found = pull(x, rest, record(x, rest, ONE_CALL)[2], bars, ONE_CALL)
        mine, more = eqx.partition(found, of_x)
        return jax.tree.map(jnp.add, total, more), mine

    total, mine = lax.scan(one, total, (own, bars), length=size)
    return eqx.combine(mine, total)


class Batch(NamedTuple):
    """What a chunk of lanes needs: with lanes along the axis, and (rows) problem by problem."""

    own: PyTree
    y0: PyTree
    asked: PyTree
    carry: Cotangents
    starts: PyTree
    who: PyTree
    steps: PyTree  # how many there were, where each is an output


def pull_in_lanes(size: int, flags, how: Plan, x, rest, recorded: Recorded, bars):
    """All in lanes, a chunk at a time."""
    of_x, (of_integrator, of_rest) = flags
    integrator, axis, width = rest[0], how.axis, how.width
    chunks = -(-size // width)
    axes = *axes_of(flags), 0, 0
    carry, rows_bar, starts = jax.vmap(from_the_end, axes)(x, rest, recorded, bars)
    asked = jax.vmap(is_asked)(bars)
    # The solves of a chunk are about equally long. One that is left out may have failed: it is
    # replaced by another, of which nothing is asked.
    counts: Any = recorded.tape  # the steps of each are all that was kept of it
    order = jnp.argsort(jnp.where(asked, counts, 0)).astype(jnp.int32)
    order = jnp.concatenate([order, jnp.broadcast_to(order[-1:], (chunks * width - size,))])
    real = asked[order] & (jnp.arange(chunks * width) < size)
    who = jnp.where(real, order, order[-1])
    # Few numbers are differentiated lane by lane, and summed at last.
    lane_by_lane = axis == -1
    x_given = spread(size, x, of_x) if lane_by_lane else x
    of_mine = jax.tree.map(lambda flag: flag or lane_by_lane, of_x)
    of_field = eqx.combine(of_mine, of_rest)
    f, y0, ss = eqx.combine(x_given, rest[1])
    own, shared = eqx.partition((integrator, f, ss), (of_integrator, of_field[0], of_field[2]))
    y0 = spread(size, y0, of_field[1])
    zeroed = partial(jax.tree.map, lambda x: jnp.where(fit(real, x), x, 0))
    picked = partial(jax.tree.map, lambda x: x[who])
    bars_of = zeroed(picked((carry._replace(row=None), starts)))
    carry = bars_of[0]._replace(row=picked(carry.row))
    mask, at_ends = present(x[0]), None
    if integrator.output.sees_field:
        given = own, y0, recorded, bars
        at_ends, mine = of_own_and_shared(Problems(shared, 0), mask, who, real, *given)
        # One of which nothing is asked has the rows of another: none of them is met.
        carry = carry._replace(f=mine, row=jnp.where(real, carry.row, -1))
    counted = recorded.report.steps if integrator.output.each_step else None
    batch = Batch(picked(own), picked(y0), real, carry, bars_of[1], who, picked(counted))
    batch = to_lanes(batch, axis)
    core = partial(chunk_by_chunk, how, chunks, mask)
    if how.fused:
        otherwise = partial(chunk_by_chunk, how._replace(fused=False), chunks, mask)
        core = one_call(core, otherwise)
    mine, total = core(batch, shared, rows_bar)
    total = total if at_ends is None else jax.tree.map(jnp.add, total, at_ends)
    # Back to the order of the problems.
    place = jnp.where(real, order, size)
    put = lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype).at[place].set(x, mode="drop")
    f_bar, y0_bar, ss_bar = jax.tree.map(put, from_lanes(mine, axis))
    f_bar = eqx.combine(f_bar, jax.tree.map(lambda x: jnp.where(jnp.any(asked), x, 0), total))
    found = f_bar, only(x[1], y0_bar), ss_bar
    is_sum = jax.tree.map(lambda flag, mine: flag or not mine, of_x, of_mine)
    # What is of each solve, but shared by all, is summed here.
    y0_and_ss = jax.tree.map(lambda flag: flag, (of_x[1], of_x[2]))
    f_bar = summed(found[0], is_sum[0])
    return f_bar, *summed(found[1:], y0_and_ss)


def of_own_and_shared(problems: Problems, mask, who, real, own, y0, recorded, bars):
    """Cotangents of the leaves of the fields of many solves, from rows at their ends: of the leaves that
    they share, summed; and of those that each has of its own. Of the solves `who`, where they are `real`."""
    if problems.of(own)[0].output.sees_field:
        own, y0, recorded, bars = jax.tree.map(lambda x: x[who], (own, y0, recorded, bars))
        bars = jax.tree.map(lambda x: jnp.where(fit(real, x), x, 0), bars)
    found = of_the_field(problems, own, mask, y0, recorded, bars)
    return eqx.partition(found, present_in(problems.shared[1], mask))


def fit(flags, x):
    return flags.reshape((-1,) + (1,) * (x.ndim - 1))


def chunk_by_chunk(how: Plan, chunks: int, mask, batch: Batch, shared, rows_bar):
    """Cotangents of what solves have of their own, with lanes; and of what of f they share, summed."""
    axis, width = how.axis, how.width
    first = columns(batch, 0, width, axis)
    problems = Problems(shared, axis)
    steps = stepper(problems, first.own, first.y0, how.kernel)
    back = Back(steps, mask, how)
    rooms = back.rooms(first)
    mine = eqx.filter(batch.own[1], mask), batch.y0, batch.carry.ss
    mine, total = jax.tree.map(jnp.zeros_like, (mine, eqx.filter(shared[1], mask)))

    def chunk(i, carry):
        rooms, total, mine = carry
        lanes = columns(batch, i * width, width, axis)
        rooms, new, more = back(lanes, rows_bar, rooms)
        mine = put_columns(i * width, new, mine, axis)
        return rooms, jax.tree.map(jnp.add, total, more), mine

    _, total, mine = lax.fori_loop(0, chunks, chunk, (rooms, total, mine))
    return mine, total


class Tape(NamedTuple):
    """A stretch of iterations: where each began, with the state there; `grid` has the end, too."""

    pairs: PyTree
    grid: Any


class Back(NamedTuple):
    """Backwards through a chunk."""

    steps: Stepper
    mask: PyTree
    how: Plan

    def rooms(self, lanes: Batch) -> tuple[Tape, State]:
        """Room for a tape, and for the states of the lanes at the begin of each of its stretches.

        Stretches have as many iterations as the budget allows, but at least sqrt(max_steps).
        """
        state, _ = jax.eval_shape(self.steps.start, lanes.own, lanes.y0)
        max_steps = self.steps.problems.of(lanes.own)[0].max_steps
        pair = state.y, state.memory
        length = math.isqrt(max_steps) + 1
        if isinstance(self.how.width, int):  # else for any number of solves, by `jax.export`
            length = max(length, TAPE // tree.size_in_bytes(pair))
        length = min(length, max_steps)
        grid = jnp.zeros((length + 1, *state.s.shape), state.s.dtype)
        return Tape(tree.rooms(pair, length), grid), tree.rooms(state, -(-max_steps // length) + 1)

    def __call__(self, lanes: Batch, rows_bar, rooms):
        """The rooms; cotangents of what solves have of their own (f, y0, ss), and of what they share (f)."""
        steps, own = self.steps, lanes.own
        tape, marks = rooms
        begin, _ = steps.start(own, lanes.y0)
        begin = begin._replace(h=jnp.where(lanes.asked, begin.h, 0))
        both = (eqx.filter(part[1], self.mask) for part in (own, steps.problems.shared))
        f_bar = jax.tree.map(jnp.zeros_like, eqx.combine(*both))
        if lanes.carry.f is not None:
            f_bar = eqx.combine(lanes.carry.f, f_bar)
        carry = lanes.carry._replace(f=f_bar)

        def stretch(state):
            """The next one forwards, until all are done; then each one again, backwards.

            It is one program for both, so that both take the same steps, to the last bit.
            """
            i, back, tape, marks, carry, ended = state
            end, n, tape = self.recorded(own, tree.row(marks, i), tape)
            ended = jnp.where(back, ended, end.steps)
            more = ~back & jnp.any(steps.unfinished(own, end))
            marks = tree.put(jnp.where(more, i + 1, len(marks.s) - 1), end, marks)
            visit = partial(self.visit, lanes, tape, rows_bar)
            _, carry = lax.while_loop(lambda st: st[0] > 0, visit, (jnp.where(more, 0, n), carry))
            return jnp.where(more, i + 1, i - 1), ~more, tape, marks, carry, ended

        zero = jnp.zeros((), jnp.int32)
        state = zero, jnp.array(False), tape, tree.put(zero, begin, marks), carry, begin.steps
        *_, tape, marks, carry, ended = lax.while_loop(lambda st: st[0] >= 0, stretch, state)
        f_bar, y_bar, ss_bar = to_the_start(steps, own, self.mask, lanes.y0, carry, lanes.starts)
        total, mine = eqx.partition(f_bar, present_in(steps.problems.shared[1], self.mask))
        mine = mine, y_bar, ss_bar
        return (tape, marks), *self.of_same_steps(lanes, ended, mine, total)

    def of_same_steps(self, lanes: Batch, ended, mine, total):
        """The cotangents; NaN where each step is an output, and the second solve took another number of them.

        Two programs may round differently, so that one accepts a step that the other rejects: rows would be
        taken for others. Outputs at times are right with either steps.
        """
        if lanes.steps is None:
            return mine, total
        same = (ended == lanes.steps) | ~lanes.asked
        hidden = lambda same, tree_: jax.tree.map(partial(tree.or_nan, same), tree_)
        of_each = lambda integrator, f, ss, same, mine: hidden(same, mine)
        mine = self.steps.problems.each(of_each)(lanes.own, same, mine)
        return mine, hidden(jnp.all(same), total)

    def recorded(self, own, state, tape: Tape):
        """Iterations until all lanes are done or the tape is full: the states, how many, the tape."""

        def once(carry):
            n, state, tape = carry
            new, _, _ = self.steps.trial(own, state)
            pairs = tree.put(n, (state.y, state.memory), tape.pairs)
            return n + 1, new, Tape(pairs, tree.put(n + 1, new.s, tape.grid))

        def busy(carry):
            n, state, tape = carry
            return (n < len(tape.grid) - 1) & jnp.any(self.steps.unfinished(own, state))

        zero = jnp.zeros((), jnp.int32)
        begin = zero, state, tape._replace(grid=tree.put(zero, state.s, tape.grid))
        n, state, tape = lax.while_loop(busy, once, begin)
        return state, n, tape

    def visit(self, lanes: Batch, tape: Tape, rows_bar, state):
        """One iteration back."""
        n, carry = state[0] - 1, state[1]
        s, s1 = tree.row(tape.grid, n), tree.row(tape.grid, n + 1)
        y, memory = tree.row(tape.pairs, n)
        collect = gather_lane_by_lane if self.how.fused else gather_together
        gathered = partial(collect, self.steps, lanes, self.mask, rows_bar, s, s1 - s, y)
        inside = rows_bar is not None
        return n, self.steps.back(
            lanes.own, self.mask, carry, s, y, memory, s1 - s, gathered, inside
        )


def present_in(shared, mask):
    """The differentiated leaves that solves share."""
    return jax.tree.map(lambda m, x: m and x is not None, mask, shared, is_leaf=lambda x: x is None)


def gather_together(steps: Stepper, lanes: Batch, mask, rows_bar, s, h, y, carry, inside):
    """Cotangents of the rows of all lanes, one of each at a time."""
    axis = steps.problems.axis
    pick = lambda row, rows_bar: to_lanes(jax.tree.map(lambda w: w[lanes.who, row], rows_bar), axis)
    return gather(steps.problems, lanes.own, mask, carry, rows_bar, s, h, y, inside, pick)


def gather_lane_by_lane(steps: Stepper, lanes: Batch, mask, rows_bar, s, h, y, carry, inside):
    """The same inside of one call: a row is read where it is, by itself."""
    problems, axis = steps.problems, steps.problems.axis
    alone = problems._replace(axis=None)
    output = problems.of(lanes.own)[0].output

    some_passed = lambda state: jnp.any(passed(problems, lanes.own, state[0], s, h))

    def visit(state):
        d = inside()

        def lane(j, state):
            row, ss_bar, f_bar = state[:3]
            pick = lambda x: column(x, j, axis)
            who = lanes.who[j]

            def of_row(row, rows_bar):
                zero = jnp.zeros_like(row)
                part = lambda w: lax.dynamic_slice(
                    w, (who, row, *[zero] * (w.ndim - 2)), (1, 1, *w.shape[2:])
                )
                return jax.tree.map(lambda w: part(w).reshape(w.shape[2:]), rows_bar)

            # All leaves of the fields are a solve's own here.
            mine = Cotangents(None, None, pick(f_bar), pick(row), pick(ss_bar))
            at = pick(s), pick(h), pick(y)
            mine, *bars = gather(
                alone, pick(lanes.own), mask, mine, rows_bar, *at, lambda: pick(d), of_row
            )
            return put_column(j, (mine.row, mine.ss, mine.f, *bars), state, axis)

        return lax.fori_loop(0, len(lanes.who), lane, state)

    zero = jax.tree.map(jnp.zeros_like, y)
    f_bar = None if output.save is None else carry.f
    begin = carry.row, carry.ss, f_bar, zero, [zero] * len(jax.eval_shape(inside))
    found = visit(begin) if output.each_step else lax.while_loop(some_passed, visit, begin)
    row, ss_bar, f_bar, y_bar, d_bar = found
    carry = carry._replace(row=row, ss=ss_bar, f=carry.f if f_bar is None else f_bar)
    return carry, y_bar, d_bar
