"""Between events: the stretches over which backsolve solves backwards, and what it does where two of them meet.

Going forwards, the solve right before each event is recorded. Going back, each stretch is a solve of its own,
from right after one event to right before the one before it. There the state is set to the one recorded, so
that it is never integrated back through a jump, and the adjoint goes through the vjp of the event: with
saltation matrix S and root s*(y, theta),

    a -> S^T a + (ds*/dy)^T s_bar + ...,

s_bar the cotangent of the time that was recorded.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.batch.layout import to_lanes
from jaxode.methods.method import Method, Step
from jaxode.solution import Status
from jaxode.stepping.events import Log, Memory, happens_in
from jaxode.stepping.loop import Recorded
from jaxode.stepping.problems import Problems, end_of, pullback

# Forwards.


class Before(NamedTuple):
    """A solve right before an event: `due` and `counts` are those of its `Memory`."""

    s: Array
    y: PyTree
    due: Array
    counts: Array


@dataclasses.dataclass(frozen=True)
class Trail:
    """The log of a solve, and the solve right before each event, in the order of time; a fold over the steps.

    It has as many rows as the log, and one that takes what is not kept.
    """

    log: Log

    def of_step(self, method: Method, s, y: PyTree, memory: Memory, h, step: Step):
        record = self.log.of_step(method, s, y, memory, h, step)
        return record, Before(s, y, memory.due, memory.counts)

    def begin(self, found):
        record, before = found
        return self.log.begin(record), tree.rooms(before, self.log.rows + 1)

    def add_accepted(self, problems, put, kept, found, accepted):
        (log, rows), (record, before) = kept, found
        happens = problems.vmap(happens_in)(record, accepted)

        def place(happens, counts):
            n = jnp.minimum(jnp.sum(counts), self.log.rows).astype(jnp.int32)
            return jnp.where(happens, n, self.log.rows)

        places = problems.vmap(place)(happens, before.counts)
        rows = tree.at_most_once(jnp.any(happens), lambda rows: put(places, before, rows), rows)
        return self.log.add_accepted(problems, put, log, record, accepted), rows


def with_trail(integrator):
    """The integrator that records it, if there are events."""
    if not isinstance(integrator.fold, Log):
        return integrator
    return dataclasses.replace(integrator, fold=Trail(integrator.fold))


def taken_apart(report):
    """The report of a solve with the log alone, and its trail; None without events."""
    if report.happened is None:
        return report, None
    log, trail = report.folded
    return report._replace(folded=log), trail


# Backwards.


class Events(NamedTuple):
    """What a solve back through events needs of them: the trail, and the cotangents of the log.

    Of many solves they lie problem by problem, along the first axis.
    """

    log: Log
    trail: Before
    log_bar: PyTree

    def of(self, n, who, axis):
        """The solve right before event n, and the cotangents of the log; of the problems `who` in lanes."""
        if axis is None:
            return tree.row(self.trail, n), self.log_bar
        rows = jax.tree.map(lambda x: x[who, n], self.trail)
        return to_lanes((rows, jax.tree.map(lambda x: x[who], self.log_bar)), axis)


def events_of(integrator, recorded: Recorded, log_bar) -> Events | None:
    """The events of a solve, or of many; None if it was without."""
    trail: Any = recorded.tape  # all that was kept of the steps
    return None if trail is None else Events(integrator.fold, trail, log_bar)


def meetings(recorded: Recorded, ss):
    """Where stretches begin and end: 0, the times of the trail, and beyond them where the solve ended."""
    trail: Any = recorded.tape
    report, end = recorded.report, end_of(ss)
    n = report.happened
    s = jnp.concatenate([jnp.zeros_like(end)[None], trail.s])
    last = jnp.where(report.status == Status.EVENT.value, tree.row(s, n), end)
    return jnp.where(jnp.arange(len(s), dtype=n.dtype) > n, last, s)


def events_ahead(recorded: Recorded):
    """How many events solves back have ahead of them; -1 if there were more than the trail could hold."""
    trail: Any = recorded.tape
    happened = recorded.report.happened
    return jnp.where(happened < trail.s.shape[-1], happened, -1)


def stretch(problems: Problems, own, ahead):
    """The problem of the solve back to the event that is next of the `ahead` ones, or to the start; and where
    that is.

    `problems` and `own` are those of the whole way back, in which `meetings` stand for the output times.
    """

    def one(integrator, f, meetings, ahead):
        begin, end = tree.row(meetings, ahead + 1), tree.row(meetings, ahead)
        long, steps = begin - end, integrator.steps
        if steps is not None:  # of equal size, and at most as long as forwards
            share = long / jnp.where(f.end > 0, f.end, 1)
            steps = jnp.ceil(jnp.asarray(steps, long.dtype) * share).astype(jnp.int32)
        return steps, begin, jnp.stack([0 * long, long]), end

    steps, begin, ss, end = problems.each(one)(own, ahead)
    integrator, f, _ = own
    own = dataclasses.replace(integrator, steps=steps), dataclasses.replace(f, end=begin), ss
    return own, end


def is_at_event(problems: Problems, own, state, ahead):
    """Whether a solve back has come to the end of a stretch that is an event."""

    def one(integrator, f, ss, state, ahead):
        return (ahead > 0) & (state.s >= ss[-1]) & (state.h > 0)

    return problems.each(one)(own, state, ahead)


def back_through(problems: Problems, own, mask, events: Any, ahead, who, jumps, s, y, a):
    """The vjp of the last of the events `ahead`, from a solve that is right after it, of each that `jumps`.

    The cotangents of the leaves of the field; and the state right before it, with its cotangent.
    """
    log: Log = events.log
    before, log_bar = events.of(jnp.maximum(ahead - 1, 0), who, problems.axis)
    # Where no event is, at a state that there is: 0 times an infinite derivative would be NaN.
    none, *zero = jax.tree.map(jnp.zeros_like, (before, a, log_bar))
    other = none._replace(s=s, y=y), *zero
    before, a, log_bar = problems.vmap(tree.where)(jumps, (before, a, log_bar), other)

    def event(integrator, f, ss, y, s, due, counts):
        memory = Memory(None, due, counts)
        y1, _, _, record = integrator.method.change(f, s, y, memory)
        return y1, log.add(log.begin(record), record)

    fn = lambda problems, own, *args: problems.each(event)(own, *args)
    constant = before.s, before.due, before.counts
    f_bar, a = pullback(problems, own, mask, fn, (before.y,), constant)[1]((a, log_bar))
    return f_bar, (before.y, a)
