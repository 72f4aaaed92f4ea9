"""Events of a solve: a condition that changes its sign, or known times; to record, to change, or to stop.

What a user says of them, checked at the door; `jaxode.stepping.events` finds them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import arguments, tree
from jaxode.functions import CHANGE, CHANGE_BY, CONDITION, Role, in_order
from jaxode.stepping.events import Eventful, Log, Watched, WithEvents
from jaxode.tree import known
from jaxode.words import EVENT_WORDS, answers, no_foreign

DIRECTIONS = {"up": 1, "down": -1, "both": 0}
KEEP = 16  # times recorded of a condition, by default


@answers(EVENT_WORDS)
@dataclasses.dataclass(frozen=True, eq=False)
class Event:
    """Something that happens in a solve: `solve(..., events=[Event(...), ...])`.

    Either where a condition changes its sign, which is found on the dense output of each accepted step, at
    eight places of it, and then to rounding; or at known times. Every step ends at an event, and the next
    one starts there with what `change` has made of the state. Of several the first in time is taken
    first; at the same time, the first in the list.

    An output at the time of an event is the state *before* it, and so is what is recorded; with
    `solve(..., after_events=True)` both are the state *after* it. On which side of the root of a condition an
    output at just that time is, rounding decides: take what is recorded. Known times count from t[0] on, and
    before t[-1]; a condition that changes its sign at t[-1] is recorded, without its change. A condition that
    is at its root at t[0], or right after its own change, is not found there again; one that touches its root
    without crossing it may be missed, and so may two roots within an eighth of a step (bound it by `hmax`). A
    change of the state that takes another condition over its root is no event of that one.

    Times, states, and all that comes after have derivatives, with respect to y0, args, known times and values,
    and whatever the functions depend on, by every adjoint but "reversible": that of a root by the implicit
    function rule, first and second ones. Those by "backsolve" are NaN if there are more events in all than the
    `keep` of all together.

    Args:
        condition: `condition(y, t, *args)`, a number whose sign is watched, or a boolean, which has no
            derivative, and whose time is found to a millionth of a step in float64 (a number that jumps
            as well).
        times: known times instead, in any order; NaN pads. May be traced, and differ per sample under
            `jax.vmap`.
        change: `change(y, t, *args)`, the state right after: a pytree like y. With `values`:
            `change(y, t, value, *args)`.
        direction: of the sign that counts: "up", "down" or "both".
        terminal: whether the solve ends here, with `Status.EVENT`. Rows of ys after that are NaN; the state
            where it ended is the last of the `states` recorded of this event.
        count: how many times it has to happen to end the solve.
        keep: how many times and states are recorded; by default all known times, `count` of a terminal
            condition, and 16 of others. Memory: so many states; twice as many in a gradient by "backsolve".
        values: a pytree of arrays with one row for each of `times`, such as doses.
        change_args: `change_args(y, t, *args)`, the arguments of func from there on, a tuple like args, of
            which floats and arrays of floats may change: a heater that is switched, a rate after a dose. With
            `values`: `change_args(y, t, value, *args)`. It is given the state before the event, as `change`
            is. Every other function of the solve sees the changed ones too. Not with `mass`, `jac` or `linear`.

    Raises:
        TypeError: neither or both of `condition` and `times` are given; an argument is of the wrong kind.
        ValueError: an argument is out of its range.

    >>> import jax.numpy as jnp
    >>> from jaxode import Event, solve
    >>> fall = lambda y, t: jnp.stack([y[1], -9.81])
    >>> floor = Event(lambda y, t: y[0], direction="down", change=lambda y, t: y * jnp.array([0.0, -0.5]))
    >>> sol = solve(fall, jnp.array([1.0, 0.0]), [0.0, 1.0], events=[floor])
    >>> int(sol.events[0].count), [round(float(t), 3) for t in sol.events[0].times[:2]]
    (2, [0.452, 0.903])
    >>> heat = lambda y, t, power: power - 0.1 * y
    >>> off = Event(lambda y, t, power: y - 5.0, direction="up", change_args=lambda y, t, power: (0.0,))
    >>> sol = solve(heat, jnp.array(0.0), [0.0, 10.0], 1.0, events=[off])
    >>> round(float(sol.events[0].times[0]), 3), round(float(sol.ys[-1]), 3)
    (6.931, 3.679)
    """

    condition: Callable | None = None
    times: Any = None
    change: Callable | None = None
    direction: str = "both"
    terminal: bool = False
    count: int = 1
    keep: int | None = None
    values: PyTree = None
    change_args: Callable | None = None

    def __post_init__(self):
        if (self.condition is None) == (self.times is None):
            raise TypeError(
                "An Event has a condition(y, t, *args), or known `times`: pass one of the two."
            )
        for name in ("condition", "change", "change_args"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(
                    f"`{name}` must be a function {name}(y, t, *args); got {type(value).__name__}."
                )
        if self.direction not in DIRECTIONS:
            raise ValueError(f"`direction` must be 'up', 'down' or 'both'; got {self.direction!r}.")
        if not isinstance(self.terminal, bool):
            raise TypeError(f"`terminal` must be True or False; got {self.terminal!r}.")
        arguments.whole("count", self.count)
        if self.count > 1 and not self.terminal:
            raise ValueError(
                "`count` says when a terminal event ends the solve: pass terminal=True."
            )
        if self.keep is not None:
            arguments.whole("keep", self.keep)
        if self.times is None and self.values is not None:
            raise TypeError("`values` are rows for known `times`; a condition has none.")
        if self.values is not None and self.change is None and self.change_args is None:
            raise TypeError("`values` are for change(y, t, value, *args): pass `change` with them.")
        if self.times is not None and self.direction != "both":
            raise ValueError("`direction` is that of a condition; known times have none.")


class Occurrences(NamedTuple):
    """When an event happened: `times` and the `states` right before (with `after_events` right after), NaN
    beyond `count`.

    `count` may be more than there are rows: see `Event.keep`.
    """

    times: Array
    states: PyTree
    count: Array


def listed(events) -> list | tuple:
    """The events that are given, of which one may stand for a list of it."""
    return [] if events is None else events if isinstance(events, list | tuple) else [events]


class Given(NamedTuple):
    """Events with times in the unit of func: what is static of them, and their arrays."""

    static: Any
    arrays: Any

    @property
    def events(self) -> tuple[Watched, ...]:
        return jax.tree.unflatten(self.static, self.arrays)


def look_for(events, exact, y0, t, func_time, args, other) -> Given:
    """The events of a solve, traced: `Given(None, None)` if there are none.

    `exact` are its times in float64, if their dtype loses how far they are apart. `other` is what else was
    asked for: heuristics, a mass matrix, whether func asks signals, and whether states after events are wanted.
    Raises errors that say what to do.
    """
    heuristics, mass, driven, after = other
    events = listed(events)
    for event in events:
        if not isinstance(event, Event):
            no_foreign("one of `events`", event)
            kinds = ", ".join(type(event).__name__ for event in events)
            raise TypeError(
                f"`events` must be a list of jaxode.Event(condition, ...); got {kinds}."
            )
    if arguments.flag("after_events", after) and not events:
        raise ValueError(
            "`after_events` says that states after `events` are wanted: pass events=[...] with it."
        )
    if not events:
        return Given(None, None)
    if heuristics:
        raise ValueError("`heuristics` and `events` are not to be had in the same solve.")
    if mass is not None and any(event.change is not None for event in events):
        raise ValueError(
            "An Event cannot change the state of a problem with `mass`: end the solve there "
            "(terminal=True), change the state, and solve on."
        )
    if driven:
        raise ValueError(
            "A solve has either events or a jaxode.Signal: let func interpolate (jnp.interp), and pass the "
            "knots as Event(times=knots)."
        )
    if any(event.times is not None for event in events):
        known = "in which the known `times` of an Event are", "times - t[0] for an Event"
        arguments.check_apart(exact, t.dtype, *known)
    all_of_them = tuple(traced(event, y0, t, func_time, args) for event in events)
    for event in all_of_them:
        for role, function in ((CONDITION, event.condition), (CHANGE, event.change)):
            arguments.check_resolution(exact, func_time, function, role)
    return Given(*jax.tree.flatten(all_of_them)[::-1])


def traced(event: Event, y0, t, func_time, args) -> Watched:
    """One event, with times in the unit of func."""
    condition = change = times = values = None
    of_condition: list = []
    of_change: list = []
    real = jnp.asarray(t).dtype

    def trace(role, func, checked, given=y0):
        return arguments.trace_of(func, given, t, func_time, args, checked, role)

    if event.condition is not None:
        in_order(CONDITION, event.condition)
        without_attributes(event)
        condition, of_condition = trace(CONDITION, event.condition, as_condition)
        keep = event.keep or (event.count if event.terminal else KEEP)
    else:
        times = known_times(event, t, real)
        values, rows = event.values, len(times)
        if values is not None:
            values = as_rows(values)
            if any(jnp.ndim(v) == 0 or len(v) != rows for v in jax.tree.leaves(values)):
                raise ValueError(
                    f"`values` must have a row for each of the {rows} times; got shapes "
                    f"{jax.tree.map(jnp.shape, values)}."
                )
        keep = event.keep or max(rows, 1)
    if event.change is not None:
        given = y0 if values is None else (y0, jax.tree.map(lambda v: v[0], values))
        role, func = (
            (CHANGE, event.change) if values is None else (CHANGE_BY, WithValue(event.change))
        )
        in_order(role, event.change)
        change, of_change = trace(role, func, lambda k, given: as_change(k, y0, role), given)
    return Watched(
        condition=condition, change=change, direction=DIRECTIONS[event.direction],
        terminal=event.count if event.terminal else 0, keep=keep, of_condition=of_condition,
        of_change=of_change, times=times, values=values,
    )  # fmt: skip


def without_attributes(event: Event) -> None:
    """Raise if a function has the attributes in which SciPy's `solve_ivp` looks for what an Event is told."""
    function = event.condition
    if not (hasattr(function, "__name__") or isinstance(function, functools.partial)):
        return  # an object of the user's own, whose attributes may mean something else
    for name, default in (("terminal", False), ("direction", "both")):
        if getattr(function, name, None) and getattr(event, name) == default:
            raise TypeError(
                f"The condition of an Event has SciPy's attribute `{name}`, at which nothing looks: pass it to "
                'the Event, such as Event(hit, terminal=True, direction="down").'
            )


class WithValue(eqx.Module):
    """change(y, t, value, *args) as a function of ((y, value), t, *args)."""

    change: Callable

    def __call__(self, given, t, *args):
        y, value = given
        return self.change(y, t, value, *args)


def as_rows(values: PyTree) -> PyTree:
    """The `values` of an event as arrays; a list of numbers is one."""
    if isinstance(values, list | tuple) and all(np.ndim(v) == 0 for v in values):
        values = jnp.stack(list(map(jnp.asarray, values)))
    return jax.tree.map(jnp.asarray, values)


def known_times(event: Event, t, dtype):
    """The times of an event: an array of shape (n,)."""
    times = event.times
    if isinstance(times, list | tuple) and not known(times):
        times = jnp.stack([jnp.asarray(time, dtype) for time in times])
    if not arguments.is_real(times) or np.ndim(times) > 1:
        no_foreign("`times` of an Event", times)
        raise TypeError(f"`times` of an Event must be real numbers of shape (n,); got {times!r}.")
    times = jnp.atleast_1d(jnp.asarray(times, dtype))
    most = len(times)
    if known(times, t) and len(t):
        low, high = np.min(t), np.max(t)
        beyond = ~((np.asarray(times) >= low) & (np.asarray(times) <= high))
        beyond &= ~np.isnan(np.asarray(times))
        if np.all(beyond) and len(times):
            raise ValueError(
                f"None of the `times` of an Event is from t[0] to t[-1], {low:g} to {high:g}; they are from "
                f"{float(jnp.nanmin(times)):g} to {float(jnp.nanmax(times)):g}."
            )
        most -= np.sum(beyond)
    if event.terminal and most < event.count:
        raise ValueError(
            f"A terminal Event with count={event.count} never ends the solve: of its `times` only {most} can "
            "be from t[0] to t[-1]."
        )
    return times


def as_condition(g, y):
    """What a condition returned: one real number, or a boolean."""
    shape = jnp.shape(g) if jax.tree.structure(g) == jax.tree.structure(0) else None
    if shape != () or jnp.iscomplexobj(g):
        what = type(g).__name__ if shape is None else f"an array of shape {shape}"
        what = "a complex number" if shape == () else what
        raise TypeError(
            f"The condition of an Event must return one real number; it returned {what}. For the first of "
            "several pass several events, or jnp.min of them."
        )
    return jnp.asarray(g)


def as_change(k, y, role: Role):
    """What a change returned: a state like y."""
    try:
        return arguments.like_state(k, y, role)
    except TypeError as error:
        message = str(error).replace("must return a derivative", "must return a state")
        raise TypeError(message.replace(role.name, "`change`") + " (in an Event)") from error


def with_events(adjoint: Callable, given: Given, t0, span, time_dtype) -> Callable:
    """The adjoint, for a solve with events."""
    events = tuple(on_the_unit_interval(event, t0, span) for event in given.events)
    log = Log(sum(event.keep for event in events))

    def solve(integrator, field, y0, ss):
        f = Eventful(field, events, t0, span, time_dtype)
        method = WithEvents(integrator.method, after=integrator.output.after)
        integrator = dataclasses.replace(integrator, method=method, fold=log)
        ys, report = adjoint(integrator, f, y0, ss)
        (s, states), counts = report.folded
        states = jax.vmap(f.unravel)(states)
        return ys, report._replace(folded=((t0 + span * s, states), counts))

    return solve


def on_the_unit_interval(event: Watched, t0, span) -> Watched:
    """Its known times on [0, 1], in increasing order; infinity for those that are never."""
    if event.times is None:
        return event
    s = (event.times - t0) / span
    s = jnp.where(s >= 0, s, jnp.inf)  # NaN too
    order = jnp.argsort(lax.stop_gradient(s))
    s = jnp.concatenate([s[order], jnp.full(1, jnp.inf, s.dtype)])
    values = jax.tree.map(lambda v: v[order], event.values)
    return dataclasses.replace(event, times=s, values=values)


def occurrences(given: Given, folded) -> tuple[Occurrences, ...]:
    """The log of a solve, event by event."""
    rows, counts = folded
    first = np.cumsum([1, *(event.keep for event in given.events)])

    def one(start: int, event: Watched, count):
        there = jnp.arange(event.keep, dtype=count.dtype) < count

        def mine(x):
            x = x[start : start + event.keep]
            return tree.or_nan(there.reshape((-1,) + (1,) * (x.ndim - 1)), x)

        count = lax.stop_gradient(count).astype(jnp.int32)
        times, states = jax.tree.map(mine, rows)
        return Occurrences(times, states, count)

    return tuple(map(one, first, given.events, counts))
