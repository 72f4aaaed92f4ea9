"""A batch of solves as one loop: what `jax.vmap` of a solve becomes.

`vmap` of a `while_loop` runs every solve until the slowest is done, and streams the whole batch
through memory at every stage. Here some solves at a time, the lanes, share a loop, each with its own
time, step size and status; their states stay in the nearest caches, and when a lane is done the next
problem of the queue takes its place. `jaxode.batch.plans` says how many, and in which form.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from jaxode.batch import queue
from jaxode.batch.layout import column, from_lanes, put_column, to_lanes
from jaxode.batch.plans import Plan, plan
from jaxode.batch.vmap_rules import Form, spread
from jaxode.kernels.forms import ONE_CALL
from jaxode.kernels.one_call import one_call
from jaxode.kernels.stepper import Stepper, stepper
from jaxode.outputs import write
from jaxode.stepping import loop
from jaxode.stepping.integrator import in_batch
from jaxode.stepping.problems import Problems


def first_of(xs, flags):
    """The arguments of the first of many solves."""
    return jax.tree.map(lambda x, flag: x[0] if flag else x, xs, flags)


def solve(form: Form, integrator, f, y0, ss, copies: int = 1):
    """Of all solves: `loop.run` without the tape. `copies` as in `plan`."""
    form = form._replace(flags=(in_batch(form.flags[0]), *form.flags[1:]))
    integrator = in_batch(integrator)
    args = integrator, f, y0, ss
    how = plan(form, *first_of(args, form.flags), copies=copies)
    if how.width == 1:
        plain = partial(in_lanes, form, Plan(form.size, 0, False))
        run_one = lambda *args, kernel: loop.run(*args, kernel=kernel)[:4]
        return one_call(partial(one_after_another, form, run_one), plain)(*args)
    return in_lanes(form, how, *args)


def one_after_another(form: Form, fn, *args):
    """fn(..., kernel=) of each by itself: of a few solves, and those whose lanes would be slower."""
    own, shared = eqx.partition(args, form.flags)
    one = lambda _, own: (None, fn(*eqx.combine(own, shared), kernel=ONE_CALL))
    return lax.scan(one, None, own, length=form.size)[1]


def in_lanes(form: Form, how: Plan, integrator, f, y0, ss):
    """All in lanes."""
    of_integrator, of_f, of_y0, of_ss = form.flags
    own, shared = eqx.partition((integrator, f, ss), (of_integrator, of_f, of_ss))
    own, y0 = to_lanes((own, spread(form.size, y0, of_y0)), how.axis)
    # Not in the one call: arrays of all problems are too wide for it.
    begin, slope0 = stepper(Problems(shared, how.axis), own, y0, how.kernel).start(own, y0)
    core = partial(run, form.size, how)
    if how.fused:
        core = one_call(core, partial(run, form.size, how._replace(fused=False, width=form.size)))
    ends, rows = core(own, shared, begin)

    def result(own, y0, slope0, end, rows):
        integrator, f, ss = eqx.combine(own, shared)
        at = lax.stop_gradient(ss)
        return *loop.result(integrator, f, ss, at, y0, slope0, end, rows), end, slope0

    axis = how.axis
    return jax.vmap(result, (axis, axis, axis, axis, 0))(own, y0, slope0, ends, rows)


def run(size: int, how: Plan, own, shared, begin):
    """Trial steps until all problems are done: how they ended, and the rows."""
    problems = Problems(shared, how.axis)
    steps = stepper(problems, own, begin.y, how.kernel)
    rows = room_for_all(size, how.axis, own, shared, begin.y)
    once = partial(trial, steps, size, how)
    unfinished = lambda own, state: steps.unfinished(own, state)
    waiting = own, begin
    if how.fused and how.width < size:
        return queue.lane_by_lane(unfinished, waiting, once, rows, size, how.width, how.axis)
    return queue.together(unfinished, waiting, once, rows, size, how.width)


def room_for_all(size: int, axis: int, own, shared, y0):
    """Room for the rows of all problems, which stand one behind the other; None if none are written."""

    def room(own, y0):
        integrator, f, ss = eqx.combine(own, shared)
        given = integrator, f, y0, ss
        return integrator.output.room(*given) if integrator.output.rows(ss) else None

    like = jax.eval_shape(lambda: room(column(own, 0, axis), column(y0, 0, axis)))
    return jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), like)


def trial(steps: Stepper, size: int, how: Plan, carry):
    """A trial step of all lanes, with the rows that it has passed."""
    (own, old), who, rows = carry
    new, h, step = steps.trial(own, old)
    if rows is not None:
        put = write_lane_by_lane if how.fused else write_together
        new, rows = put(steps, size, own, old, new, h, step, who, rows)
    return (own, new), who, rows


def write_together(steps: Stepper, size, own, old, new, h, step, who, rows):
    """The rows of all lanes, one of each at a time."""
    axis = steps.problems.axis

    def put(row, values, rows, due):
        place = jnp.where(due, who, size), row
        put = lambda v, room: room.at[place].set(v, mode="drop", unique_indices=True)
        return jax.tree.map(put, from_lanes(values, axis), rows)

    inside = lambda: steps.inside(own, old.s, old.y, h, step)
    return write(steps.problems, inside, own, old, new, h, rows, put)


def write_lane_by_lane(steps: Stepper, size, own, old, new, h, step, who, rows):
    """The same inside of one call: a row is written where it belongs, by itself."""
    problems, axis = steps.problems, steps.problems.axis
    alone = problems._replace(axis=None)
    needs_inside = problems.of(own)[0].output.needs_inside()
    is_due = lambda integrator, f, ss, row, old, new: integrator.output.due(ss, row, old, new)

    def visit(carry):
        d = steps.inside(own, old.s, old.y, h, step) if needs_inside else []

        def lane(j, carry):
            output, evaluations, since, rows = carry
            pick = lambda x: column(x, j, axis)
            moved = new._replace(output=output, evaluations=evaluations, since=since)
            put = lambda row, values, rows, due: jax.tree.map(
                lambda v, room: lax.dynamic_update_slice(
                    room, v[None, None], (who[j], row, *[jnp.zeros_like(row)] * v.ndim)
                ), values, rows,
            )  # fmt: skip
            got, rows = write(
                alone, lambda: pick(d), pick(own), pick(old), pick(moved), pick(h), rows, put
            )
            found = got.output, got.evaluations, got.since
            return *put_column(j, found, carry[:3], axis), rows

        return lax.fori_loop(0, len(who), lane, carry)

    some = lambda carry: jnp.any(problems.each(is_due)(own, carry[0], old, new))
    begin = new.output, new.evaluations, new.since, rows
    output, evaluations, since, rows = lax.while_loop(some, visit, begin)
    return new._replace(output=output, evaluations=evaluations, since=since), rows
