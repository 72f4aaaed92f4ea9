"""What decides: whether to step on, how far, to accept or reject; and the report at the end.

An `Integrator` holds all that a solve needs beside the field, the start and the outputs. Its
functions are of one solve, and pure; `jaxode.stepping.loop` runs them, for one solve or for many.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.controllers import Controller, first_step
from jaxode.methods.method import Method, Step, combined
from jaxode.solution import Status, other_end, succeeded
from jaxode.stepping import budget
from jaxode.stepping.budget import Budget, Forced
from jaxode.stepping.events import Watch
from jaxode.stepping.stability import Probe


class Report(NamedTuple):
    """How a solve went: a `Status`, how far it came in [0, 1], and what it cost."""

    status: Array
    reached: Array
    evaluations: Array
    accepted: Array
    rejected: Array
    folded: Any = None  # what `Integrator.fold` made of the steps, if there was one
    happened: Any = None  # how many events, each of which was a step of size 0
    seen: tuple = ()  # the values of the observers
    going_on: Any = None  # the `State` from which a solve that can be resumed goes on
    carried: Any = None  # what the user's fold over the steps has come to, if there was one
    error: Any = None  # with a budget, the largest error over what is tolerated

    @property
    def succeeded(self) -> Array:
        """Whether the solve ended as it should."""
        return succeeded(self.status, other_end(self.happened, self.error))

    @property
    def steps(self) -> Array:
        """How many accepted steps had a size."""
        return self.accepted if self.happened is None else self.accepted - self.happened


class State(NamedTuple):
    """Between two trial steps: at s, with a next step of size h.

    `since` counts the trial steps since the last output (None without `mxstep`), `output` is the
    next output, `folded` what a fold over the steps has come to, `watch` what events need to know, `seen`
    the values of the observers, `forced` the steps that a budget made longer, `probe` what keeps steps
    inside the stability region.
    """

    s: Array
    h: Array
    y: PyTree
    memory: PyTree
    ratio: Array
    history: tuple[Array, ...]
    accepted: Array
    tried: Array
    evaluations: Array
    since: Any
    output: Array
    folded: Any
    watch: Watch | None = None
    seen: tuple = ()
    forced: Forced | None = None
    probe: Probe | None = None

    @property
    def steps(self) -> Array:
        """How many accepted steps had a size."""
        happened = self.happened
        return self.accepted if happened is None else self.accepted - happened

    @property
    def equal_steps(self) -> Array:
        """How many steps of equal size have been taken."""
        return self.accepted if self.watch is None else self.accepted - self.watch.cuts

    @property
    def is_due(self) -> Array:
        """Whether the next step is one of size 0, which makes the change of an event."""
        return jnp.any(self.memory.due > 0)

    @property
    def happened(self) -> Array | None:
        """How many events: each was a step of size 0."""
        return None if self.watch is None else jnp.sum(self.memory.counts).astype(jnp.int32)


# So many tolerances may the error of a row inside a step be, where its method looks there.
INSIDE = 2


class Integrator(eqx.Module):
    """A method, its tolerances and its limits: what turns a field into a solution.

    `steps` is the number of steps of equal size, None for steps that the error estimate chooses.
    `hmax` and `hmin` are in units of the interval; `max_steps` bounds trial steps, `mxstep` those
    between two outputs. `controlled` picks the part of a state whose error counts. `output` and
    `fold` are what is kept of the solve (`jaxode.outputs`), and `observers` watch its trial steps
    (`jaxode.stepping.observers`). `budget` bounds the evaluations of func. With `steady` steps stay inside
    the stability region of the method, and an implicit one begins gently (`jaxode.stepping.stability`).
    """

    method: Method = eqx.field(static=True)
    controller: Controller = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    output: Any = eqx.field(static=True)
    steps: Any
    rtol: PyTree
    atol: PyTree
    hmax: Array
    hmin: Array
    mxstep: Any
    controlled: Callable = eqx.field(static=True, default=lambda y: y)
    fold: Any = eqx.field(static=True, default=None)
    observers: tuple = eqx.field(static=True, default=())
    budget: Budget | None = eqx.field(static=True, default=None)
    steady: bool = eqx.field(static=True, default=False)

    def __call__(self, f, y0: PyTree, ss: Array):
        """The solution at ss (increasing, in [0, 1]; the first is the start), and the report."""
        from jaxode.stepping.loop import solve

        return solve(self, f, y0, ss)

    @property
    def adaptive(self) -> bool:
        return self.steps is None

    @property
    def counts_since(self) -> bool:
        return self.adaptive and self.mxstep is not None

    def tolerated(self, *ys):
        """atol + rtol max |y|, leaf by leaf, of what is controlled of a state; never 0."""
        ys = map(self.controlled, ys)
        size = jax.tree.map(lambda *y: tree.largest(map(tree.magnitude, y)), *ys)
        scale = jax.tree.map(lambda a, r, y: a + r * y, self.atol, self.rtol, size)
        least = lambda x: lax.full_like(x, jnp.finfo(x.dtype).tiny)
        return jax.tree.map(lambda x: lax.max(x, least(x)), scale)  # no 0 / 0

    def finite(self, *ys):
        """Whether all that is controlled of these states is finite."""
        return tree.all_finite(*map(self.controlled, ys))

    def least(self, s):
        """The smallest step that moves time: 16 roundings of it."""
        eps = 16 * float(jnp.finfo(s.dtype).eps)
        return jnp.maximum(self.hmin, eps * jnp.maximum(s, eps))

    def initial(self, f, y0, memory, slope, end, h0=None) -> State:
        """Before the first trial step."""
        dtype = end.dtype
        zero, none = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
        history, evaluations = (), 1
        if not self.adaptive:
            h0 = zero + 1
        else:
            history, evaluations = self.controller.start(dtype), 2
            h0 = first_size(self, f, y0, slope, zero) if h0 is None else h0
        h0 = jnp.where(self.finite(y0, slope), lax.stop_gradient(h0), 0 * zero)
        return State(
            s=zero, h=h0, y=y0, memory=memory, ratio=zero, history=history, accepted=none, tried=none,
            evaluations=none + evaluations, since=none if self.counts_since else None,
            output=none + self.output.first, folded=None, seen=unseen(self, dtype),
            forced=None if self.budget is None else Forced(none, zero, zero),
        )  # fmt: skip

    def step_count(self, end):
        """How many steps of equal size are to be taken."""
        return jnp.where(end > 0, jnp.asarray(self.steps, jnp.int32), 0)

    def place(self, n, end, more=0):
        """Where step n of equal size begins; with `more` steps after it."""
        count = lax.convert_element_type(jnp.maximum(self.step_count(end), 1), end.dtype)
        i = lax.convert_element_type(n, end.dtype)
        return end * ((i + more if more else i) / count)

    def unfinished(self, state: State, end):
        """Whether there is to be another trial step."""
        go = state.h > 0
        if not self.adaptive:
            n = self.step_count(end)
            more = state.equal_steps < jnp.where(n <= self.max_steps, n, 0)
            if state.watch is None:
                return go & more
            return go & (more | state.is_due) & (state.tried < self.max_steps)
        more = state.s < end
        if state.watch is not None:
            more = more | state.is_due
        go = more & (state.h > self.least(state.s)) & (state.tried < self.max_steps)
        go = go if state.since is None else go & self.in_time(state)
        return go if self.budget is None else go & (budget.payable(self, state) > 0)

    def in_time(self, state: State):
        """Whether there are not too many trial steps since the last output."""
        return lax.convert_element_type(state.since, state.s.dtype) < self.mxstep

    def next_end(self, state: State, end):
        """Where the next trial step is to end, and its size."""
        if not self.adaptive:
            s, s1 = self.place(state.equal_steps, end), self.place(state.equal_steps, end, 1)
            return s1, s1 - s
        spare = self.budget is None
        s1 = lax.min(state.s + state.h, end) if spare else budget.next_end(self, state, end)
        return s1, s1 - state.s  # exactly, so that the steps add up to where we are

    def accept_or_reject(self, state: State, step: Step, s1, h, go=True, veto=None) -> State:
        """The state after a trial step: at its end, or back at its beginning with a smaller step.

        `go` says whether there was one: else the state stays what it is. A `veto` makes of one that is
        accepted one that is to be taken again.
        """
        tried, h_taken = jnp.asarray(go).astype(jnp.int32), h
        counted = dict(
            tried=state.tried + tried,
            evaluations=state.evaluations + tried * step.evaluations,
            since=None if state.since is None else state.since + tried,
        )
        decided = decided_by_error if self.adaptive else decided_by_finiteness
        accept, ratio, h, history = decided(self, state, step, s1, h, go, veto)
        if state.forced is not None:
            counted["forced"] = budget.counted(self, state, s1, ratio, h_taken, accept, go)
        before = state.s, state.y, state.memory, state.history
        after = s1, step.y, step.memory, history
        s, y, memory, history = tree.where(accept, after, before)
        return state._replace(
            s=s, h=h, y=y, memory=memory, ratio=ratio, history=history,
            accepted=state.accepted + accept.astype(jnp.int32), **counted,
        )  # fmt: skip

    def stopped(self, state: State, end):
        """Whether it did because its steps were spent, and whether because it is done."""
        if self.adaptive:
            spent = state.tried >= self.max_steps if self.budget is None else jnp.array(False)
            return spent, state.s >= end
        n = self.step_count(end)
        spent, done = n > self.max_steps, state.equal_steps >= n
        return spent if state.watch is None else spent | (state.tried >= self.max_steps), done

    def report(self, state: State, y0, slope0, end) -> Report:
        """How a solve that has stopped went."""
        return report_of(self, state, y0, slope0, end)


def first_size(integrator: Integrator, f, y0, slope, zero):
    """The size of the first step: where nothing happens yet not below what time can resolve."""
    order, scale = integrator.method.error_order + 1, integrator.tolerated(y0)  # type: ignore[operator]
    h0 = first_step(f, y0, slope, order, scale, integrator.hmax, integrator.controlled)
    return jnp.minimum(jnp.maximum(h0, 64 * integrator.least(zero)), integrator.hmax)


def decided_by_finiteness(self: Integrator, state: State, step: Step, s1, h, go, veto):
    """Whether a step of equal size is accepted; the ratio, the next size and the history. One that is not
    finite ends the solve where it began."""
    fine = self.finite(step.y, step.slope) & step.converged
    accept, stop = fine & go, ~fine & go
    accept = accept if veto is None else accept & ~veto
    h = jnp.where(stop, 0, state.h)
    ratio = jnp.where(stop, of_failed(jnp.nan, step.converged), state.ratio)
    return accept, ratio, h, state.history


def decided_by_error(self: Integrator, state: State, step: Step, s1, h, go, veto):
    """The same of a step whose error is estimated."""
    ratio = error_over_tolerance(self, state.y, step)
    scaled, fine = ratio, ratio <= 1
    if self.budget is not None:
        scaled = ratio / budget.allowed(self, state, ratio, h)
        finite = jnp.isfinite(ratio) & self.finite(step.y)
        fine = (scaled <= 1) | (budget.is_forced(self, state, s1) & finite)
    accept = fine = fine & go
    accept = accept if veto is None else accept & ~veto
    factor, history = self.controller(scaled, state.history, self.method.error_order + 1)  # type: ignore[operator]
    h = lax.min(h * factor, self.hmax)
    if veto is not None:
        h, history = tree.where(fine & veto, (state.h, state.history), (h, history))
    if go is not True:
        ratio, h = tree.where(go, (ratio, h), (state.ratio, state.h))
    return accept, ratio, h, history


def unseen(integrator: Integrator, dtype) -> tuple:
    """The values of the observers before the first trial step."""
    return tuple(observer.begin(dtype) for observer in integrator.observers)


def watched(integrator: Integrator, old: State, new: State, h, step: Step, go=True) -> State:
    """The state after a trial step, seen by the observers; `go` says whether there was one."""
    if not integrator.observers:
        return new
    given = lax.stop_gradient((old, new, h, step))
    pairs = zip(integrator.observers, old.seen)
    return new._replace(seen=tuple(o.after(v, integrator, *given, go) for o, v in pairs))


def unwatched(integrator: Integrator) -> Integrator:
    """The same without observers: for steps that are taken once more."""
    return dataclasses.replace(integrator, observers=()) if integrator.observers else integrator


def in_batch(integrator: Integrator) -> Integrator:
    """The same for each of many solves."""
    observers = tuple(observer.in_batch() for observer in integrator.observers)
    return dataclasses.replace(integrator, observers=observers) if observers else integrator


def next_end_or_event(integrator: Integrator, state: State, end):
    """Where the next trial step is to end, its size, and whether an event is what it ends at."""
    s1, h = integrator.next_end(state, end)
    if state.watch is None:
        return s1, h, False
    at = jnp.where(state.is_due, state.s, lax.min(s1, state.watch.target))
    return at, at - state.s, at < s1


def error_over_tolerance(integrator: Integrator, y, step: Step):
    """The error of a step over what is tolerated: at most 1 is accepted; NaN is not.

    Infinity says that the equations of an implicit step were not solved.
    """
    scale = integrator.tolerated(y, step.y)
    norm = lambda error: tree.norm(integrator.controlled(error), scale)
    ratio = combined(*map(norm, step.errors))
    for error in step.inside_errors:
        ratio = jnp.maximum(ratio, norm(error) / INSIDE)
    if not integrator.method.estimate_sees_end:
        ratio = jnp.where(integrator.finite(step.slope), ratio, jnp.nan)
    ratio = of_failed(ratio, step.converged)
    return lax.stop_gradient(lax.convert_element_type(ratio, integrator.hmax.dtype))


def of_failed(ratio, converged):
    """An error ratio that is infinite where, and only where, the equations of a step were not solved."""
    if converged is True:
        return ratio
    return jnp.where(converged, jnp.where(ratio == jnp.inf, jnp.nan, ratio), jnp.inf)


def report_of(self: Integrator, state: State, y0, slope0, end) -> Report:
    """How a solve that has stopped went."""
    spent, done = self.stopped(state, end)
    if state.since is not None:
        spent = spent | ~self.in_time(state)
    cut = jnp.where(jnp.isfinite(state.ratio), Status.DT_TOO_SMALL.value, Status.NON_FINITE.value)
    if self.method.implicit:
        cut = jnp.where(state.ratio == jnp.inf, Status.NOT_CONVERGED.value, cut)
    status = jnp.where(done, Status.SUCCESS.value, jnp.where(spent, Status.MAX_STEPS.value, cut))
    reached, error = state.s, None
    if state.forced is not None:
        steps, error, _ = state.forced
        status = jnp.where(done & (steps > 0), Status.BUDGET.value, status)
    if state.watch is not None:
        ended = state.watch.status != 0
        status = jnp.where(ended, state.watch.status, status)
        reached = jnp.where(ended, jnp.max(state.watch.last), reached)
    status = jnp.where(self.finite(y0, slope0), status, Status.NON_FINITE_INITIAL.value)
    return Report(
        status.astype(jnp.int32), fraction(reached, end), state.evaluations, state.accepted,
        state.tried - state.accepted, state.folded, state.happened, state.seen, error=error,
    )  # fmt: skip


def fraction(s, end):
    """s / end; 1 if there was nowhere to go."""
    return jnp.where(end > 0, s / jnp.where(end > 0, end, 1), 1)


def trial_step(integrator: Integrator, f, s, y, memory, h) -> Step:
    """A step of the method; one that iterates is told the norm in which its error is measured."""
    method = integrator.method
    if not (method.measures or (method.iterates and integrator.adaptive)):
        return method.step(f, s, y, memory, h)
    norm = lambda error, y: tree.norm(integrator.controlled(error), integrator.tolerated(y))
    return method.step(f, s, y, memory, h, norm)  # type: ignore[call-arg]
