"""The program of a solve: time mapped to [0, 1], the pieces put together, a solution made of what they find."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import arguments, constraints, outputs, tree
from jaxode.adjoints.failed import poisoned
from jaxode.controllers import Controller
from jaxode.corrections import with_correction
from jaxode.dense import of_steps
from jaxode.events import Given, occurrences, with_events
from jaxode.folds import Fold, with_fold
from jaxode.kernels.traces import Trace
from jaxode.methods.method import Method
from jaxode.signals import Split, piecewise, valid_times
from jaxode.solution import Heuristics, Solution, Stats, Status, other_end, succeeded
from jaxode.stepping.budget import Budget
from jaxode.stepping.field import Field, Observed, Ravelled, ravel, several
from jaxode.stepping.integrator import Integrator, State
from jaxode.stepping.observers import log_of
from jaxode.stepping.resuming import OfEqualSize, OfOwnUnit, resumable


@dataclasses.dataclass(frozen=True)
class Static:
    """What a compiled solve is specialised to. `seen`: times and limits were checked at the door;
    `consistent`: y0 fulfils the algebraic equations."""

    trace: Trace
    method: Method
    controller: Controller
    adjoint: Callable
    max_steps: int
    steps: int | None
    func_time: Any
    bounded: bool
    heuristics: bool
    throw: bool
    seen: bool
    jac: Trace | None
    output: Any
    saved: Trace | None
    consistent: bool
    events: Any
    fold: Trace | None
    resumable: bool
    observers: tuple
    budget: Budget | None


def output_of(dense: bool, saved: Trace | None, save_steps: bool, max_steps: int, after: bool):
    """What is kept of a solve."""
    save = None if saved is None else outputs.observed
    if dense or save_steps:
        return outputs.EveryStep(max_steps + 1, bool(dense), save, after)
    return outputs.Times(save, saved is None or saved.pushes, after)


class Extras(NamedTuple):
    """Arrays of what else there is to a solve, None for what is not: its mass matrix and Jacobian (`system`),
    what is `saved` of the state, `events`, a `fold`, the `correction` of its steps, and the state `before`,
    from which it goes on."""

    system: constraints.Beside | None
    saved: Any
    events: Any
    fold: Any
    correction: Any
    before: State | None = None


@partial(jax.jit, static_argnums=0)
def compiled(
    static: Static, leaves, y0, t, since, rtol, atol, mxstep, hmax, dt, extras: Extras
) -> Solution:
    """The solve. `since` is t - t[0], if that is known better than t.

    With a function of the state that is saved ys are its rows, and the state at the end.
    """
    rtol, atol, mxstep, hmax = lax.stop_gradient((rtol, atol, mxstep, hmax))
    times, steps = t if since is None else since, static.steps
    ss, span = unit_times(times, static.resumable)
    given = t[0], t[-1], span, static.func_time, static.method.beyond
    field = Field(static.trace, leaves, *given)
    if static.saved is not None:
        field = Observed(field, Field(static.saved, extras.saved, *given[:4]))
    happening = None if extras.events is None else Given(static.events, extras.events)
    adjoint = adjoint_of(static, extras, happening, given)
    valid = static.seen or valid_times(t) & arguments.valid_limits(rtol, atol, mxstep, hmax)
    if_valid = lambda x, other: x if static.seen else jnp.where(valid, x, other)
    if dt is not None:
        steps = arguments.number_of_steps(dt, times, static.max_steps)
        valid = valid & (steps >= 0)
        steps = jnp.where(valid, steps, 0)
    long = lax.stop_gradient(jnp.abs(span))
    integrator = integrator_of(static, t, long, steps, dt, rtol, atol, hmax, mxstep, if_valid)
    integrator, field, start, unravel = as_one_vector(integrator, field, y0)
    rows, report = adjoint(integrator, field, start, ss)
    t_given = t
    start = None if happening is None else y0
    t, ys, mask, dense = kept_of(integrator.output, rows, t, span, ss, report, unravel, start)
    status = if_valid(report.status, Status.BAD_INPUT.value).astype(jnp.int32)
    if not static.seen:
        ys, dense = of_success((ys, dense), valid)
    folded = of_success(report.carried, succeeded(status, other_end(happening, report.error)))
    stats = Stats(report.evaluations, report.accepted, report.rejected)
    reached = report.reached * ss[-1] if static.resumable else report.reached
    reached = lax.stop_gradient(t_given[0] + jnp.where(ss[-1] > 0, span, 0) * reached)
    if extras.before is not None:  # the first time is the start of all
        t, ys = t[1:], first_row_dropped(ys, static.saved)
    estimates, happened = folds_of(report, happening, long)
    mask = None if mask is None else if_valid(mask, False)
    tried = report.accepted + report.rejected
    log = log_of(static.observers, report.seen, tried, t_given[0], span)
    solution = Solution(
        ts=t, ys=ys, status=status, stats=stats, reached=reached, heuristics=estimates, dense=dense, mask=mask,
        events=happened, folded=folded, log=log, error=report.error, resuming=report.going_on,
    )  # fmt: skip
    return ended(solution, static.throw, (leaves, y0, t_given, extras._replace(before=None)))


def adjoint_of(static: Static, extras: Extras, happening: Given | None, given) -> Callable:
    """What solves and differentiates, with all that there is beside the field."""
    t0, _, span, func_time, _ = given
    adjoint = resumable(extras.before) if static.resumable else static.adjoint
    if happening is not None:
        adjoint = with_events(adjoint, happening, t0, span, func_time)
    if extras.fold is not None:
        adjoint = with_fold(adjoint, Fold(static.fold, extras.fold), given[:4])
    if extras.correction is not None:
        method: Any = static.method
        adjoint = with_correction(adjoint, Field(method.correction, extras.correction, *given[:4]))
    if extras.system is not None:
        of_jac = None if static.jac is None else Field(static.jac, extras.system.jac, *given)
        consistent = static.consistent or extras.before is not None
        adjoint = constraints.of_systems(adjoint, extras.system, of_jac, consistent)
    return adjoint


def folds_of(report, happening: Given | None, long):
    """(heuristics, events) of a solution, from what was folded over its steps."""
    if happening is not None:
        return None, occurrences(happening, report.folded)
    if report.folded is None:
        return None, None
    error, stiffness = report.folded  # the latter per unit of [0, 1]
    long = lax.convert_element_type(long, stiffness.dtype)
    return Heuristics(error, stiffness / long), None


def integrator_of(
    static: Static, t, long, steps, dt, rtol, atol, hmax, mxstep, if_valid
) -> Integrator:
    """The method with its limits, in units of an interval that is `long`; without a step, if they are not
    valid."""
    kind: Any = Integrator
    method = static.method
    # One that can be resumed does not know yet how many times will be asked for.
    inside = static.output.needs_inside() and static.output.rows(t) > 0
    if steps is None and (inside or static.resumable or static.events is not None):
        method = method.looking_inside()
    if static.resumable:
        t = t[:1]  # what comes later is not to be seen
        kind = OfOwnUnit if dt is None else partial(OfEqualSize, size=dt.astype(t.dtype))
    eps = float(jnp.finfo(static.func_time).eps)
    hmin = 16 * eps * jnp.max(jnp.abs(t)) / long if static.trace.uses_time else 0 * long
    return kind(
        method=method,
        controller=static.controller,
        max_steps=static.max_steps,
        output=static.output,
        steps=steps,
        rtol=rtol,
        atol=atol,
        hmax=if_valid(hmax.astype(t.dtype) / long, 0),
        hmin=lax.stop_gradient(hmin),
        mxstep=mxstep.astype(t.dtype) if static.bounded else None,
        fold=outputs.estimates if static.heuristics else None,
        observers=static.observers,
        budget=static.budget,
    )


def as_one_vector(integrator: Integrator, field, y0):
    """The same solve of one vector, if the state is of several arrays and the method allows it, and what makes
    a state of a vector then."""
    if not (integrator.method.any_state and several(y0)):
        return integrator, field, y0, None
    shapes = tuple(y.shape for y in jax.tree.leaves(y0))
    ravelled = Ravelled(field, jax.tree.structure(y0), shapes)
    of_parts = lambda x: ravel(jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape), x, y0))
    tolerances = dict(rtol=of_parts(integrator.rtol), atol=of_parts(integrator.atol))
    integrator = dataclasses.replace(integrator, **tolerances)
    return integrator, ravelled, ravel(y0), ravelled.unravel


def kept_of(output, rows, t, span, ss, report, unravel: Callable | None, start):
    """(ts, ys, mask, dense) of a solution, from what its output kept; `unravel` makes a state of a vector."""
    of_states = (lambda rows: rows) if unravel is None else jax.vmap(unravel)
    if output.each_step:
        return of_steps(output, rows, t, span, ss[-1], report, of_states, start)
    if output.save is None:
        return t, of_states(rows), None, None
    rows, end = rows
    end = end if unravel is None else unravel(end)
    return t, (rows, of_success(end, report.succeeded)), None, None


def of_success(value: PyTree, fine):
    """What is known at the end alone: NaN, where it is a number, if that was not reached."""
    nan = lambda x: tree.or_nan(fine, x) if eqx.is_inexact_array(x) else x
    return jax.tree.map(nan, value)


@partial(jax.jit, static_argnums=0)
def from_knot_to_knot(static: Static, leaves, y0, t, since, *options) -> Solution:
    """The solve, broken where the signals that func asks have knots."""
    split = Split(static.trace, leaves, y0, jnp.zeros((), static.func_time))
    if not split.asked:
        return compiled(static, leaves, y0, t, since, *options)
    quiet = dataclasses.replace(static, trace=split.trace, throw=False)
    *options, extras = options
    start, *function = (None,) if extras.fold is None else extras.fold

    def stretch(leaves, given, t):
        y, value = given
        fold = None if extras.fold is None else (value, *function)
        part = compiled(quiet, leaves, y, t, None, *options, extras._replace(fold=fold))
        if static.saved is None:
            return part, (jax.tree.map(lambda y: y[-1], part.ys), part.folded)
        return part._replace(ys=part.ys[0]), (part.ys[1], part.folded)

    solution, (end, folded) = piecewise(stretch, split, (y0, start), t)
    solution = solution._replace(folded=folded)
    if static.saved is not None:
        solution = solution._replace(ys=(solution.ys, end))
    return ended(solution, static.throw, (leaves, y0, t, extras))


def ended(solution: Solution, throw: bool, inputs) -> Solution:
    """The solution, with an error (by a host callback), and derivatives that are NaN, if it failed."""
    dense, status = solution.dense, solution.status
    states = None if dense is None else dense.states
    ys = solution.ys, states, solution.events, solution.folded
    other = other_end(solution.events, solution.error)
    if throw:
        codes = [code for code in Status if not succeeded(code)]
        index = sum(i * (status == code.value).astype(jnp.int32) for i, code in enumerate(codes))
        messages = [f"The solve failed ({code.name.lower()}). {code.message}" for code in codes]
        failed = ~succeeded(status, other)
        ys, status = eqx.branched_error_if((ys, status), failed, index, messages)
    inputs = [x for x in jax.tree.leaves(inputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
    fine = succeeded(status, other)
    numbers, counts = eqx.partition(ys, eqx.is_inexact_array)
    ys, states, happened, folded = eqx.combine(poisoned(numbers, fine, inputs), counts)
    if dense is not None:
        solution = solution._replace(dense=dense.of(states))
    return solution._replace(ys=ys, status=status, events=happened, folded=folded)


def first_row_dropped(ys, saved):
    """The rows without the first one; of a function they stand beside the state at the end."""
    drop = lambda rows: jax.tree.map(lambda y: y[1:], rows)
    return drop(ys) if saved is None else (drop(ys[0]), ys[1])


def unit_times(t, resumable: bool = False) -> tuple[Array, Array]:
    """The times on [0, 1], and t1 - t0 (1 if they are equal: all times are then at the start).

    To be resumed they stay in their unit, so that steps do not depend on t1.
    """
    if resumable:
        sign = jnp.where(t[-1] < t[0], -jnp.ones_like(t[0]), 1)
        return (t - t[0]) * sign, sign
    span = t[-1] - t[0]
    span = jnp.where(span == 0, jnp.ones_like(span), span)
    return (t - t[0]) / span, span
