"""Trial steps of solves with events (`jaxode.stepping.events`), of one solve or of many.

First a quiet step of all; then of those in which a condition may have a root, where that is; then of those
with an event that is due, its change. Whether any of the solves needs the second or the third is asked
outside of `jax.vmap`, which makes of a conditional, and of a loop, one that has the lanes along the first
axis of all that it reads: so the search for the roots took half of the time of 1,000 balls.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from jaxode import tree
from jaxode.methods.method import Step
from jaxode.stepping import events
from jaxode.stepping.integrator import next_end_or_event, watched
from jaxode.stepping.problems import end_of
from jaxode.stepping.stability import gently


def quiet_step(steps, own, state, h) -> Step:
    """A step at which no event happens."""
    inner, own_inner = steps.without_events(own)
    memory = state.memory
    step = inner.step(own_inner, state.s, state.y, memory.inner, h)
    nothing = steps.problems.vmap(events.nothing)(state.s, state.y, memory)
    found = step.y, memory._replace(inner=step.memory), step.slope, nothing
    return events.with_record(step, found, step)


def values_inside(steps, own, state, step: Step, h, d) -> jax.Array:
    """The values of conditions at several places of a step, in rows; d is its dense output.

    Those of many solves are written into an array, so that they are computed once, however many read them.
    """
    problems, count = steps.problems, events.PLACES
    given = lax.stop_gradient((own, state.s, h, state.y, step.y, d))

    def at(theta, own, *given):
        def one(integrator, f, ss, s, h, y, y1, d):
            there = y1 if theta == 1 else tree.polynomial(y, jnp.asarray(theta, h.dtype), d)
            return events.values_at(f, there, s + theta * h)

        return problems.each(one)(own, *given)

    rows = [at(n / count, *given) for n in range(1, count + 1)]
    if problems.axis is None:
        return jnp.stack(rows)
    axis = problems.row_axis
    room = jnp.stack([jnp.zeros_like(row) for row in rows], axis)
    for n, row in enumerate(rows):
        room = lax.dynamic_update_index_in_dim(room, row, n, axis)
    return room


def looked_at(steps, own, state, step: Step, h, cut):
    """What is known of events inside of a step: its dense output, the values of conditions in it, and whether
    one may happen."""
    if not steps.problems.of(own)[1].has_condition.any():
        return None, None, cut
    d = steps.inside(own, state.s, state.y, h, step)
    values = values_inside(steps, own, state, step, h, d)
    may = lambda integrator, f, ss, old, cut, values: events.may_happen(f, old, cut, values)
    return d, values, lax.stop_gradient(steps.problems.each(may)(own, state, cut, values))


def trial(steps, own, state):
    """A trial step: the state after it, its size, the step, and what it adds to a fold."""
    each, method, log = steps.problems.each, steps.method, state.folded
    state = state._replace(folded=None)  # no step is to move it

    def size(integrator, f, ss, old):
        s1, h, go = steps.move(integrator, f, ss, old)
        return s1, h, go, next_end_or_event(integrator, old, end_of(ss))[2], old.is_due & go

    def decide(integrator, f, ss, old, arrays, s1, h, go, due, may):
        step = eqx.combine(arrays, numbers)
        new = integrator.accept_or_reject(old, step, s1, h, go)
        return new, may & ~due & (new.accepted > old.accepted)

    s1, h, go, cut, due = each(size)(own, state)
    step = quiet_step(steps, own, state, h)
    d, values, may = looked_at(steps, own, state, step, h, cut)
    inside, nothing = step.stages
    # What is the same for all is no array; stages have lanes along an axis of their own.
    arrays, numbers = eqx.partition(step._replace(stages=None), eqx.is_array)
    new, look = each(decide)(own, state, arrays, s1, h, go, due, may)

    def search(new):
        def one(integrator, f, ss, old, new, h, cut, signs, theta, look):
            return tree.where(look, events.after_step(f, old, new, h, cut, signs, theta), new)

        signs, theta = first_roots(steps, own, state, h, d, values)
        return each(one)(own, state, new, h, cut, signs, theta, look)

    def change(given):
        def one(integrator, f, ss, old, due, h, arrays, given):
            step = eqx.combine(arrays, numbers)
            step = method.changed(steps.field(f), old.s, old.y, old.memory, step)
            new = integrator.accept_or_reject(old, step, old.s, h)
            new = gently(integrator, f, events.after_event(f, old, new, step))
            return tree.where(due, (new, step.stages[1]), given)

        return each(one)(own, state, due, h, arrays, given)

    new = tree.at_most_once(jnp.any(look), search, new)
    new, record = tree.at_most_once(jnp.any(due), change, (new, nothing))

    def seen(integrator, f, ss, old, new, h, arrays, record, go):
        step = eqx.combine(arrays, numbers)._replace(stages=(None, record))
        given = method, old.s, old.y, old.memory, h, step
        return watched(integrator, old, new, h, step, go), integrator.fold.of_step(*given)

    new, added = each(seen)(own, state, new, h, arrays, record, go)
    return new._replace(folded=log), added, h, step._replace(stages=(inside, record))


def first_roots(steps, own, old, h, d, values):
    """The signs of conditions after a step, and where in it each has its first root: right behind it, on
    [0, 1]; infinity for none. Each has a root of its own; all are looked for at the same time."""
    problems = steps.problems
    if values is None:
        return old.watch.signs, jnp.full_like(old.watch.signs, jnp.inf)
    inside = lambda integrator, f, ss, old, values: events.watch_inside(f, old, values)
    signs, found = problems.each(inside)(own, old, values)
    count = len(steps.problems.of(own)[1].events)
    own, y, s, h, d = lax.stop_gradient((own, old.y, old.s, h, d))

    def to_come(theta):
        """Each condition at a place of its own, positive where its root is yet to come."""

        def at(i: int):
            one = lambda integrator, f, ss, y, s: events.values_at(f, y, s)[i]
            here = lax.index_in_dim(theta, i, problems.row_axis, keepdims=False)
            return problems.each(one)(own, problems.polynomial(y, here, d), s + here * h)

        return found.sign * jnp.stack([at(i) for i in range(count)], problems.row_axis)

    def looked(b):
        theta = problems.vmap(events.next_place)(b)
        return b._replace(theta=theta, g=to_come(theta))

    def turn(b):
        new = problems.vmap(events.narrowed)(b)
        wide = problems.vmap(events.is_wide)(new)
        return problems.vmap(tree.where)(wide, looked(new), b)

    ends = problems.vmap(events.part)(found)
    b = looked(problems.vmap(events.bracket)(*ends, *map(to_come, ends)))
    wide = lambda b: jnp.any(problems.vmap(lambda b: events.is_wide(events.narrowed(b)))(b))
    b = lax.while_loop(wide, turn, b)
    # Not `found.there`, which every reader of this would compute again.
    return signs, jnp.where(b.high < jnp.inf, problems.vmap(events.narrowed)(b).high, jnp.inf)
