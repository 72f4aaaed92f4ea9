"""Events inside of a solve: where they are, and the change of the state that they make.

A condition g(y, s) is watched at several places of the dense output of every accepted step. A step with a
root inside is rejected, and the next one ends just behind the root. What happens there is a step of its
own, of size 0: it finds the root to rounding, records it, changes the state, and starts the method again.
So to every adjoint an event is one more step.

With d the time from the root to where the step ended, the step of size 0 is, for a change c,

    y -> flow_d(c(flow_-d(y))),   g(flow_-d(y)) = 0.

Its derivative has that of the root by the implicit function rule, and times of steps stay fixed: it is
the saltation matrix (Hiskens and Pai 2000, doi 10.1109/81.828574).
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.kernels.traces import Trace
from jaxode.methods.method import Around, Method, Step, chosen, for_inside
from jaxode.solution import Status
from jaxode.stepping.field import AroundField, unravelled

PLACES = 8  # of a step at which conditions are watched
NEAR = 0.4  # the power of a rounding, times a step, that is near a root: Heun's method is exact over that
AT_ONCE = 256  # roundings of time within which an event that happens again will do so for ever


class Watched(eqx.Module):
    """One event, on the unit interval: a condition, or known times in increasing order.

    `change` is None for one that only records; `terminal` is the number of times after which it ends the
    solve, 0 for never; `keep` how many times are recorded. `values` has a row for each known time.
    """

    condition: Trace | None = eqx.field(static=True)
    change: Trace | None = eqx.field(static=True)
    direction: int = eqx.field(static=True)
    terminal: int = eqx.field(static=True)
    keep: int = eqx.field(static=True)
    of_condition: Any
    of_change: Any
    times: Any
    values: Any


class Eventful(AroundField):
    """A field with its events."""

    events: tuple[Watched, ...]
    t0: Array
    span: Array
    time_dtype: Any = eqx.field(static=True)

    def unravel(self, y) -> PyTree:
        """The state as the user knows it."""
        return unravelled(self.field, y)

    def ravel_like(self, state: PyTree, y) -> PyTree:
        """The reverse, for a state like y."""
        if jax.tree.structure(state) == jax.tree.structure(y):
            return state
        return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(state)])

    def time(self, s):
        """t0 + span s, as the user's functions see it."""
        return lax.convert_element_type(self.t0 + self.span * s, self.time_dtype)

    def condition(self, i: int, y, s) -> Array:
        """The value of a condition, in the dtype of time; of a boolean one 1 or -1."""
        event = self.events[i]
        assert event.condition is not None
        g = event.condition(event.of_condition, self.unravel(y), self.time(s))
        return jnp.where(g, 1, -1).astype(s.dtype) if g.dtype == bool else g.astype(s.dtype)

    def change(self, i: int, y, s, count) -> PyTree:
        """The state after an event that happens for the `count`-th time, from 0."""
        event, given = self.events[i], self.unravel(y)
        assert event.change is not None
        if event.values is not None:
            given = given, jax.tree.map(lambda v: v[count], event.values)
        return self.ravel_like(event.change(event.of_change, given, self.time(s)), y)

    @property
    def has_condition(self) -> np.ndarray:
        """Which events have a condition."""
        return np.array([event.condition is not None for event in self.events])

    def next_times(self, counts) -> Array:
        """When each event with known times happens next; infinity for others."""
        return jnp.stack([
            jnp.inf * jnp.ones_like(counts[i])
            if event.times is None
            else event.times[jnp.minimum(counts[i].astype(jnp.int32), len(event.times) - 1)]
            for i, event in enumerate(self.events)
        ])  # fmt: skip


class Memory(NamedTuple):
    """That of the method; and of each event, as numbers along which a cotangent can go: how far back its
    root may be if it is due, else 0; and how often it happened."""

    inner: PyTree
    due: Array
    counts: Array


class Watch(NamedTuple):
    """What decides: the sign of each condition, where the next step is to end, and what ended the solve.

    `last` is where each event happened last, `cuts` the number of accepted steps that are none of those
    of equal size, `status` that of a solve which an event has ended, else 0.
    """

    signs: Array
    target: Array
    last: Array
    cuts: Array
    status: Array


class Record(NamedTuple):
    """What a step adds to the log: into a row, 0 for none."""

    row: Array
    s: Array
    y: PyTree
    counts: Array


@dataclasses.dataclass(frozen=True)
class WithEvents(Around):
    """A method whose fields are `Eventful`: where an event is due, a step of size 0 makes its change.

    A `quiet` one is for steps at which none is. `after` says that the states recorded are those after it.
    """

    quiet: bool = False
    after: bool = False

    def backwards(self) -> Method:
        """That of a stretch between events (`jaxode.adjoints.stretches`)."""
        return self.method.backwards()

    def start(self, f: Eventful, s, y: PyTree) -> Memory:
        none = jnp.zeros(len(f.events), jnp.result_type(s))
        return Memory(self.method.start(f.field, s, y), none, none)

    def carried(self, memory: Memory) -> PyTree:
        return self.method.carried(memory.inner)

    def inside(self, f: Eventful, s, y: PyTree, h, step: Step) -> list[PyTree]:
        return self.method.inside(f.field, s, y, h, step.stages[0])

    def step(self, f: Eventful, s, y: PyTree, memory: Memory, h, *norm) -> Step:
        inner = self.method.step(f.field, s, y, memory.inner, h, *norm)
        none = nothing(s, y, memory)
        plain = inner.y, memory._replace(inner=inner.memory), inner.slope, none
        if self.quiet:
            return with_record(inner, plain, inner)
        is_due = jnp.any(memory.due > 0)
        change = lambda: self.change(f, s, y, memory)
        found = chosen(is_due, change, lambda: plain)
        return with_record(of_change(inner, is_due), found, inner)

    def changed(self, f: Eventful, s, y: PyTree, memory: Memory, quiet: Step) -> Step:
        """The step of size 0 of an event that is due, from the quiet step that would be taken there."""
        y1, memory1, slope, record = self.change(f, s, y, memory)
        step = of_change(quiet)._replace(y=y1, memory=memory1, slope=slope)
        return step._replace(stages=(None, record))

    def change(self, f: Eventful, s, y: PyTree, memory: Memory):
        """The change of the first event that is due: the state, the memory, the slope, the record."""
        due, counts = memory.due, lax.stop_gradient(memory.counts)
        which = jnp.argmax(due > 0)
        y1, s_at, y_at, changed = happen(f, which, s, y, due[which], counts[which])
        seen = lambda: ((y_at, s_at), (tree.where(s < 1, changed, y_at), s_at))
        inner = self.method.restarted(f.field, s, y1, memory.inner, seen)
        y_kept = seen()[1][0] if self.after else y_at
        one = (jnp.arange(len(due)) == which).astype(due.dtype)
        keep = np.array([event.keep for event in f.events], counts.dtype)
        first = np.cumsum([0, *keep[:-1]], dtype=counts.dtype)
        row = jnp.sum(one * (first + counts)) + 1
        kept = jnp.sum(one * counts) < jnp.sum(one * keep)
        row = jnp.where(kept, row, 0).astype(jnp.int32)
        counts = counts + one
        due = jnp.where(one > 0, 0, due)
        again = f.next_times(counts) <= s
        due = jnp.where(again & (s < 1), jnp.ones_like(due), due)
        memory1 = Memory(inner, lax.stop_gradient(due), counts)
        return y1, memory1, self.method.slope(f.field, s, y1, inner), Record(row, s_at, y_kept, one)


def nothing(s, y: PyTree, memory: Memory) -> Record:
    """What a step adds to the log at which nothing happens."""
    return Record(jnp.zeros((), jnp.int32), jnp.zeros_like(s), y, jnp.zeros_like(memory.due))


def of_change(step: Step, is_due: Any = True) -> Step:
    """A step that has no error and costs one evaluation where it is the change of an event."""
    none = lambda e: jnp.where(is_due, jnp.zeros_like(e), e)
    return step._replace(
        errors=[jax.tree.map(none, error) for error in step.errors],
        converged=True if step.converged is True else step.converged | is_due,
        evaluations=jnp.where(is_due, 1, jnp.asarray(step.evaluations, jnp.int32)),
        inside_errors=[jax.tree.map(none, error) for error in step.inside_errors],
    )


def with_record(step: Step, found, inner: Step) -> Step:
    """A step with what was found; `inner` is that of the method, for dense output."""
    y, memory, slope, record = found
    return step._replace(y=y, memory=memory, slope=slope, stages=(for_inside(inner), record))


def happen(f: Eventful, which, s, y: PyTree, slack, count):
    """The state after an event; when and where it happened, and what was made of the state there. s is at
    most `slack` later than that."""
    d = delay(f, which, s, y, slack, count)
    y_at, s_at = along(f, y, s, d), s + d
    index = count.astype(jnp.int32)

    def changed(i: int):
        return y_at if f.events[i].change is None else f.change(i, y_at, s_at, index)

    if all(event.change is None for event in f.events):
        return y, s_at, y_at, y_at
    made = one_of(f, which, changed)
    y1 = along(f, made, s_at, -d)
    changes = one_of(f, which, lambda i: jnp.array(f.events[i].change is not None))
    return tree.where(changes & (s < 1), y1, y), s_at, y_at, made  # at the end nothing goes on


def one_of(f: Eventful, which, fn):
    """fn(i) of one event."""
    if len(f.events) == 1:
        return fn(0)
    return lax.switch(which, [partial(fn, i) for i in range(len(f.events))])


def delay(f: Eventful, which, s, y: PyTree, slack, count):
    """The time to the root of a condition, by Newton's method; its derivative is that of the root.

    Two iterations, so that second derivatives are right, too. Where the condition has no slope, 0. To a
    known time it is 0, with the derivative of that time.
    """
    times = f.next_times(jnp.full(len(f.events), count))[which]
    known = jnp.where(jnp.isfinite(times), times - lax.stop_gradient(times), 0)
    if not f.has_condition.any():
        return known

    def g(d):
        there = along(f, y, s, d)
        value = lambda i: f.condition(i, there, s + d) if f.has_condition[i] else jnp.zeros_like(d)
        return one_of(f, which, value)

    d = jnp.zeros_like(s)
    for _ in range(2):  # written out: `vmap` of a loop would transpose all that it reads
        value, rate = jax.jvp(g, (d,), (jnp.ones_like(d),))
        d = d - jnp.where(rate == 0, 0, value / jnp.where(rate == 0, 1, rate))
    far = ~(jnp.abs(d) <= 2 * slack)
    return d - jnp.where(far, lax.stop_gradient(d), 0) + known


def along(f: Eventful, y: PyTree, s, d) -> PyTree:
    """The solution a little later, to third order: by Heun's method."""
    k = f(y, s)
    k1 = f(tree.combine(y, d, [1.0], [k]), s + d)
    return tree.combine(y, d, [0.5, 0.5], [k, k1])


# What decides.


def begin(f: Eventful, state):
    """The state of a solve before its first step, with its events."""
    s, memory = state.s, state.memory
    counts, last = memory.counts, jnp.full_like(memory.due, -1)
    now = f.next_times(counts) <= s
    memory = memory._replace(due=lax.stop_gradient(now.astype(s.dtype)))
    watch = Watch(
        signs=signs_of(f, state.y, s, 0 * memory.due), target=jnp.full_like(s, jnp.inf), last=last,
        cuts=jnp.zeros((), jnp.int32), status=jnp.zeros((), jnp.int32),
    )  # fmt: skip
    watch = with_next(f, watch, counts, s)
    return state._replace(memory=memory, watch=lax.stop_gradient(watch))


def with_next(f: Eventful, watch: Watch, counts, s) -> Watch:
    """The next step ends at the next known time, if it comes so far."""
    times = f.next_times(counts)
    return watch._replace(target=jnp.min(jnp.where(times > s, times, jnp.inf)))


def signs_of(f: Eventful, y: PyTree, s, slack) -> Array:
    """The sign of each condition; where it is at its root, that which it has a little later."""
    few = 16 * float(jnp.finfo(s.dtype).eps)

    def sign(i: int, slack):
        if f.events[i].condition is None:
            return jnp.zeros_like(s)
        g = lambda d: f.condition(i, tree.combine(y, d, [1.0], [k]), s + d)
        value, rate = jax.jvp(g, (jnp.zeros_like(s),), (jnp.ones_like(s),))
        at_root = jnp.abs(value) <= jnp.maximum(4 * slack, few) * jnp.abs(rate)
        return jnp.sign(jnp.where(at_root, rate, value))

    k = f(y, s)
    return jnp.stack([sign(i, slack[i]) for i in range(len(f.events))])


def quiet(integrator):
    """The integrator of steps at which nothing happens."""
    return dataclasses.replace(
        integrator, method=dataclasses.replace(integrator.method, quiet=True)
    )


def may_happen(f: Eventful, old, cut, values: Array) -> Array:
    """Whether there is an event in a step, or it ends at one: or at least a condition changes its sign
    between the places of `values`."""
    changed = jnp.sign(values) * old.watch.signs[None] <= 0  # not if NaN
    return cut | jnp.any(changed & f.has_condition[None])


def after_event(f: Eventful, old, new, step: Step):
    """The state after a step of size 0 that has made the change of an event."""
    f, old, seen, record = lax.stop_gradient((f, old, new, step.stages[1]))
    watch, memory, s = old.watch, seen.memory, seen.s
    one, at = record.counts > 0, record.s
    terminal = np.array([event.terminal for event in f.events], s.dtype)
    ended = jnp.any(one & (terminal > 0) & (memory.counts >= terminal))
    soon = AT_ONCE * float(jnp.finfo(s.dtype).eps) * jnp.maximum(s, watch.last)
    for_ever = jnp.any(one & f.has_condition & (watch.last >= 0) & (at - watch.last <= soon))
    status = jnp.where(for_ever, Status.EVENTS_ACCUMULATE.value, 0)
    status = jnp.where(ended, Status.EVENT.value, status).astype(jnp.int32)
    watch = watch._replace(
        signs=signs_of(f, seen.y, s, jnp.where(one, old.memory.due, 0)),
        last=jnp.where(one, at, watch.last), cuts=watch.cuts + 1, status=status,
    )  # fmt: skip
    fine = new.accepted > old.accepted
    return new._replace(
        h=jnp.where(fine & (status == 0), old.h, 0), ratio=jnp.where(fine, old.ratio, seen.ratio),
        history=old.history, watch=with_next(f, watch, memory.counts, s),
    )  # fmt: skip


class Found(NamedTuple):
    """In which part of a step each condition has its first root: whether, where it starts, and the sign
    before."""

    there: Array
    start: Array
    sign: Array


def after_step(f: Eventful, old, new, h, cut, signs, theta):
    """The state after an accepted step, at the end of which conditions have these signs, and in which they
    have their first roots at `theta`.

    If one is not at its end, that before the step, so that it is taken again and ends there.
    """
    before = old
    f, old, seen = lax.stop_gradient((f, old, new))
    watch, counts = old.watch, old.memory.counts
    slack = slack_of(h, seen.s)
    first = jnp.min(theta)
    behind = (first <= 1) & (first * h < h - slack)
    # So that it is behind the root, and yet so close that the next step ends there.
    closer = watch._replace(target=old.s + first * h + slack_of(first * h, seen.s) / 2)
    again = before._replace(
        tried=seen.tried, evaluations=seen.evaluations, since=seen.since, watch=closer
    )
    reached = (theta <= 1) & (theta * h >= h - slack)
    times = f.next_times(counts)
    due = jnp.where(reached | ((times <= seen.s) & (seen.s < 1)), slack, 0)
    on = with_next(f, watch, counts, seen.s)
    on = on._replace(signs=signs, cuts=watch.cuts + cut.astype(jnp.int32))
    h = jnp.where(cut, jnp.maximum(seen.h, old.h), seen.h)
    on = new._replace(h=h, watch=on, memory=new.memory._replace(due=due))
    return tree.where(behind, again, on)


def slack_of(h, s) -> Array:
    """How far behind a root a step of size h may end, at s."""
    eps = float(jnp.finfo(h.dtype).eps)
    return jnp.maximum(eps**NEAR * h, 64 * eps * s)


def values_at(f: Eventful, y: PyTree, s) -> Array:
    """The value of each condition; 0 for known times."""
    return jnp.stack([
        jnp.zeros_like(s) if event.condition is None else f.condition(i, y, s)
        for i, event in enumerate(f.events)
    ])  # fmt: skip


def watch_inside(f: Eventful, old, values: Array):
    """The signs after a step, and in which part of it conditions have roots in their directions: from their
    values at its places."""
    sign = old.watch.signs
    found = Found(jnp.zeros(sign.shape, bool), jnp.zeros_like(sign), sign)
    directions = np.array([event.direction for event in f.events], sign.dtype)
    for n, there in enumerate(jnp.sign(values)):
        crossed = (sign * there <= 0) & (sign != 0) & (directions * sign <= 0)  # not if NaN
        here = Found(crossed, jnp.full_like(sign, n / PLACES), sign)
        found = tree.where(found.there, found, here)
        sign = jnp.where(there * there > 0, there, sign)
    return sign, found


class Bracket(NamedTuple):
    """Where in a step each condition has its first root, on [0, 1], and its values there, positive where the
    root is yet to come; the place to look at next, and the value there. `reach` bounds how far from the
    middle that may be; it is halved in each turn.

    Where `theta` is, is decided in one turn and used in the next: so all that is computed to get there, and
    there, has one reader, and is not computed again for each of the four ends.
    """

    reach: Array
    low: Array
    high: Array
    g_low: Array
    g_high: Array
    theta: Any = None
    g: Any = None


def part(found: Found) -> tuple[Array, Array]:
    """Where the part of a step starts and ends in which each condition has its first root: infinity if none."""
    low = jnp.where(found.there, found.start, jnp.inf)
    return low, low + 1 / PLACES


def bracket(low, high, g_low, g_high) -> Bracket:
    """That of the first roots in parts of a step, with the values of conditions at both ends."""
    close = close_in(low.dtype)
    # As many turns as bisection takes, and one.
    most = int(np.ceil(np.log2(1 / (PLACES * close)))) + 1
    return Bracket(jnp.full((), close / 2 * 2.0**most, low.dtype), low, high, g_low, g_high)


def close_in(dtype) -> float:
    """How near to each other the ends of a `Bracket` are in the end."""
    return float(jnp.finfo(dtype).eps) ** NEAR / 16


def is_wide(b: Bracket) -> Array:
    """Whether a turn more is needed."""
    close = close_in(b.low.dtype)
    return (b.reach > close / 2) & jnp.any(b.high - b.low > close)


def narrowed(b: Bracket) -> Bracket:
    """With the value at the next place used."""
    low, g_low = tree.where(b.g > 0, (b.theta, b.g), (b.low, b.g_low))
    high, g_high = tree.where(b.g > 0, (b.high, b.g_high), (b.theta, b.g))
    return Bracket(b.reach / 2, low, high, g_low, g_high)


def next_place(b: Bracket) -> Array:
    """Where to look for the root: by the ITP method (Oliveira and Takahashi 2020, doi 10.1145/3423597).

    It is the secant's point, moved a little towards the middle, so that both ends come closer, and never so far
    from it that more than one turn is lost on bisection.
    """
    width, middle = b.high - b.low, (b.low + b.high) / 2
    fall = jnp.where(b.g_low > b.g_high, b.g_low - b.g_high, jnp.nan)
    secant = b.low + width * b.g_low / fall
    away = jnp.where((secant > b.low) & (secant < b.high), middle - secant, 0)
    shift = 0.2 * PLACES * width**2
    away = jnp.sign(away) * jnp.maximum(jnp.abs(away) - shift, 0)
    far = jnp.maximum(b.reach - width / 2, 0)
    return middle - jnp.clip(away, -far, far)


# What is kept.


put_row = partial(tree.put_where, True)  # of one solve


@dataclasses.dataclass(frozen=True)
class Log:
    """Times and states of all events, a fold over the steps: `rows` of them, and how many there were."""

    rows: int

    def of_step(self, method: Method, s, y: PyTree, memory: Memory, h, step: Step) -> Record:
        return step.stages[1]

    def begin(self, record: Record):
        """An empty log; row 0 takes what is not kept."""
        return tree.rooms((record.s, record.y), self.rows + 1), jnp.zeros_like(record.counts)

    def add(self, log, record: Record, put=put_row):
        """With what a step adds to it; `put(rows, xs, rooms)` writes into a row, of each of many solves too."""
        rows, counts = log
        return put(record.row, (record.s, record.y), rows), counts + record.counts

    def add_accepted(self, problems, put, log, record: Record, accepted):
        """The logs of one solve or of many after a trial step, as `jaxode.outputs.Sum.add_accepted`.

        Not by `vmap` of a loop: that would transpose all of the logs at each trial step, even where nothing is
        written. It took three quarters of the time of 1,000 Lorenz systems with room for 64 events.
        """
        happens = problems.vmap(happens_in)(record, accepted)

        def written(log):
            none = jax.tree.map(jnp.zeros_like, record)
            return self.add(log, problems.vmap(tree.where)(happens, record, none), put)

        return tree.at_most_once(jnp.any(happens), written, log)

    def total(self, records: Record):
        """The log of many steps at once; row 0 stands for those that were none."""
        blank = tree.rooms(jax.tree.map(lambda x: x[0], (records.s, records.y)), self.rows + 1)
        put = lambda room, x: room.at[records.row].set(x)
        rows = jax.tree.map(put, blank, (records.s, records.y))
        return rows, jnp.sum(records.counts, 0)


def happens_in(record: Record, accepted) -> Array:
    """Whether a trial step, which was accepted or not, was that of an event."""
    return accepted & jnp.any(record.counts > 0)
