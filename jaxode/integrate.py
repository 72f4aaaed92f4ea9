"""`odeint` and `solve`: arguments checked, time mapped to [0, 1], the pieces put together."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import arguments, constraints, outputs, stiffness
from jaxode.adjoints.failed import poisoned
from jaxode.adjoints.names import having
from jaxode.controllers import Controller
from jaxode.dense import of_steps
from jaxode.events import Given, look_for, occurrences, with_events
from jaxode.kernels.traces import Trace
from jaxode.methods.linear import Linear
from jaxode.methods.method import Method
from jaxode.signals import Split, piecewise, valid_times
from jaxode.solution import Heuristics, Solution, SolveError, Stats, Status, other_end, succeeded
from jaxode.stepping.budget import Budget
from jaxode.stepping.field import Field, Observed, Ravelled, ravel, several
from jaxode.stepping.integrator import Integrator
from jaxode.stepping.observers import log_of
from jaxode.tree import known

MAX_STEPS = 2**14


def odeint(
    func: Callable,
    y0: PyTree,
    t=None,
    *args,
    rtol=None,
    atol=None,
    mxstep=jnp.inf,
    hmax=jnp.inf,
    method: str | Method = "tsit5",
    adjoint: str | Callable = "replay",
    **options,
) -> PyTree:
    """Solve dy/dt = func(y, t, *args), y(t[0]) = y0: the values of y at every time in t.

    A drop-in for `jax.experimental.ode.odeint`, and differentiable in y0, t, and every array in
    func, args and what func closes over. `solve` takes the same arguments, documents them, and
    returns the statistics and the status too; `options` are those that only `solve` lists.

    The defaults of rtol and atol are those of JAX, 1.4e-8, as far as the dtype of y0 can hold them:
    9.5e-7 in float32.

    Returns:
        The states at t: a pytree like y0 whose leaves have a new leading axis of length len(t).

    >>> import jax.numpy as jnp
    >>> from jaxode import odeint
    >>> ys = odeint(lambda y, t, rate: -rate * y, jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]), 0.5)
    >>> ys.shape
    (2, 2)
    >>> bool(jnp.allclose(ys[1], jnp.exp(-0.5) * ys[0], rtol=1e-3))
    True
    """
    arguments.for_solve_alone(options)
    given = dict(rtol=rtol, atol=atol, mxstep=mxstep, hmax=hmax, method=method, adjoint=adjoint)
    return solve(func, y0, t, *args, **given, **options).ys


def solve(
    func: Callable,
    y0: PyTree,
    t=None,
    *args,
    rtol=None,
    atol=None,
    mxstep=jnp.inf,
    hmax=jnp.inf,
    method: str | Method = "tsit5",
    adjoint: str | Callable = "replay",
    dt=None,
    controller: Controller | None = None,
    max_steps: int = MAX_STEPS,
    throw: bool | None = None,
    heuristics: bool = False,
    linear: Linear | None = None,
    mass=None,
    jac: Callable | None = None,
    dense: bool = False,
    save: Callable | None = None,
    save_steps: bool = False,
    events=None,
    log: int | None = None,
    progress: bool = False,
    max_evaluations: int | None = None,
    **unknown,
) -> Solution:
    """Solve dy/dt = func(y, t, *args), y(t[0]) = y0, and say how it went.

    `jax.vmap` of it is a loop made for many solves at once (`jaxode.batch.lanes`), with the same results.

    Args:
        func: the derivative, `func(y, t, *args)`, a pytree like y0 (a list of numbers may stand for
            a vector). Any callable, an equinox module too. Traced once. Or a pair (stiff, nonstiff) of
            such functions whose sum it is, for "kencarp3", "kencarp4" and "kencarp5" (IMEX): the first is
            solved implicitly, so that its fast modes do not limit the steps, and `linear` and `jac` are
            about it alone; the second is only evaluated, once a stage.
        y0: the initial state, a pytree of real or complex arrays of any shapes. Integers and
            booleans become floats. float16 and bfloat16 states are kept; their errors, tolerances
            and times are computed in float32.
        t: the times of the outputs, shape (n,), increasing or decreasing, equal times allowed. The
            first is that of y0. In the unit of time of func; float32 or wider. Large ones that float32
            cannot tell apart (seconds since 1970) are subtracted in float64, if they are known and
            func does not use them; else refused.
        args: further arguments of func: pytrees. Floating-point arrays and numbers in them are
            differentiated; Python ints, bools and strings, functions, integer arrays and PRNG keys
            reach func as they are. Steps end at the knots of every `jaxode.Signal` that func asks,
            among the args or wherever func has it from.
        rtol, atol: relative and absolute tolerance of the error of a step: a number, an array, or a
            pytree like y0 or a prefix of it. A step is accepted if the root mean square of
            error / (atol + rtol max(|y before|, |y after|)) is at most 1. Both default to 1.4e-8, or
            to 8 machine epsilons of y0 where that is more (float32 9.5e-7, float16 7.8e-3, bfloat16
            6.3e-2). May be traced: other values do not compile again.
        mxstep: the most steps tried between two outputs (of `jax.experimental.ode`). May be traced.
        hmax: the largest step, in units of t. May be traced.
        method: the name of a table (`jaxode.tableaus.methods`) or a table; or, for a state (q, p) of
            a separable problem, a symplectic method ("leapfrog", "yoshida4"; with `dt`); or, for a
            stiff problem, an implicit one ("rodas5p", "rodas4", "kvaerno5", ...). Outputs come from dense
            output: steps do not stop at output times.
        adjoint: how to differentiate: "replay" (exact, reverse mode), "backsolve" (the continuous
            adjoint, constant memory), "direct" (any mode and order), "forward" (forward mode), or
            a function; see `jaxode.adjoints`.
        dt: take steps of equal size, |t[-1] - t[0]| divided by the whole number that makes them at
            most dt. Needed by methods without an error estimate. May be traced: a solve with one
            that is not positive and finite is then bad input.
        controller: how an error becomes the next step size; by default `Controller()`.
        max_steps: the most steps tried. Gradients by "replay" keep states at about
            2 sqrt(max_steps) places, whatever the number of steps taken.
        throw: raise an error if the solve fails. By default, if called outside of any
            transformation; under `jit`, `grad` and `vmap` failed solves then only have NaN outputs,
            NaN gradients and a status (gradients of 0 where a loss does not depend on the outputs,
            `jnp.where(solution.status == 0, solution.ys, 0)`). True raises there too, by a host
            callback. False never does.
        heuristics: give `Solution.heuristics` too, the solver's estimates of its own error and of
            stiffness, to be used as penalties. Needs adjoint="direct", and a method whose last two
            stages are at the end of the step ("tsit5", "dopri5").
        linear: the structure of df/dy, for an implicit method: `jaxode.methods.Banded(lower, upper)`,
            `BlockDiagonal(size)`, `Diagonal()`, `Sparse(pattern)`, `Krylov()`, or `Dense()`, the default. Of
            the state as one vector. Entries that it leaves out are an error where y0, t and args are known,
            and found once for each problem; under `jit` nothing looks for them.
        mass: M of M dy/dt = func(y, t, *args), for the Rosenbrock and the diagonally implicit methods:
            constant, an array of n x n numbers that acts on the state as one vector, or its diagonal: n
            numbers, or a pytree like y0. May be traced. Where a row is 0 the equation is algebraic: a DAE of
            index 1. Its part of y0 has to fulfil it to the tolerance (see `jaxode.consistent`); where values
            are not known, as under `jit`, it is the first guess of what does.
        jac: df/dy, for the same methods, as `jac(y, t, *args)`: an array of n x n
            numbers, or what `jax.jacfwd(func)` returns. By default it is derived from func.
        dense: give `Solution.dense` too, the solution as a function of time between t[0] and t[-1]:
            `sol.dense(t)`, `sol.dense.derivative(t)`; `jaxode.dense.Dense` says what memory it takes.
        save: a function `save(y, t, *args)` of the state, any pytree of arrays (integers become floats): its
            rows are `ys`, and states are not kept. Differentiated in y, t, args, and what it closes over.
        save_steps: give the start and the end of every accepted step, in place of the states at times: `t`
            is then [t0, t1], and `ts` and `ys` have max_steps + 1 rows, of which `Solution.mask` says which
            are real; the others are NaN. With `save`, a function of these states.
        events: a list of `jaxode.Event`: conditions whose sign is watched, or known times, at which the state
            is recorded or changed, or the solve ends. Then `Solution.events`, in the same order. Not with
            "backsolve", and not with signals. Every event is an accepted step more, of size 0.
        log: give `Solution.log` too, the last so many trial steps, accepted or not, as
            `jaxode.solution.TrialSteps`: when, how long, with which error, and which component decided. Not
            differentiated; not with signals. `jaxode.explain` reads it.
        progress: show a bar of tqdm, for one long solve: a host callback each time that another hundredth of
            the interval is done. Under `jax.vmap` it is off, with a warning. Not with signals.
        max_evaluations: a budget of evaluations of func, which the solve never exceeds: errors may be larger
            than tolerated, and steps longer (than `hmax`, too), where what is left of it asks for that, so that
            the last time is reached. The status is then `Status.BUDGET`, no failure, and `Solution.error` the
            largest error of a step over what is tolerated. With plenty (up to twice of what the solve takes:
            it is not known in advance) the steps are those without a budget. With so few steps that they are
            not stable the solution may not be finite, which is a failure. For methods whose steps cost the
            same: explicit ones, and "rodas5p" and its like, whose Jacobians are not counted. Not with events,
            signals, or `dt`.

    The adjoint "backsolve" has no derivatives of `dense` and `save_steps`. With these two `mxstep` bounds the
    steps of the whole solve.

    Returns:
        A `Solution`: ts, ys, status, stats, reached; and what else was asked for.

    Raises:
        TypeError: func does not return a derivative of y0 (structure, shape or dtype), or an
            argument is of the wrong kind or there is none of that name.
        ValueError: an argument is out of its range, for example times that go back and forth.
        SolveError: the solve failed; the error has its `solution`.

    >>> import jax.numpy as jnp
    >>> from jaxode import solve
    >>> sol = solve(lambda y, t: {"x": y["v"], "v": -y["x"]}, {"x": 1.0, "v": 0.0}, [0.0, 1.0, 0.0])
    Traceback (most recent call last):
    ...
    ValueError: The times `t` must be increasing or decreasing; t[1] = 1.0 is followed by t[2] = 0.0.
    >>> sol = solve(lambda y, t: {"x": y["v"], "v": -y["x"]}, {"x": 1.0, "v": 0.0}, [0.0, 1.0])
    >>> sol.status.item(), sol.ys["x"].shape
    (0, (2,))
    """
    func, y0 = arguments.present(unknown, func, t), arguments.as_state(y0)
    t, exact, func_time = arguments.as_times(t, y0)
    name, method, dt = arguments.method_and_step(method, linear, dt, y0)
    rtol, atol = arguments.tolerances(rtol, atol, y0, method)
    at, limits = (y0, t, func_time, args), arguments.limits(mxstep, hmax)
    func, beside, of_jac = constraints.told(func, at, method, name, mass, jac)
    trace, leaves = arguments.trace_of(func, *at)
    driven = arguments.is_driven(trace, exact, func_time)
    saved, watched = arguments.kept(dense, save, save_steps, exact, driven, *at)
    if len(t) == 0:
        return no_times(y0 if saved is None else saved.like(), t)
    happening = look_for(events, func, *at, (adjoint, heuristics, mass, driven))
    extra = watched, happening.arrays
    arguments.no_varying(arrays := (leaves, y0, t, rtol, atol, limits, beside, extra))
    problem = constraints.Problem(trace, of_jac, method, func_time)
    y0, consistent = constraints.check(problem, leaves, beside, y0, t, rtol, atol, driven)
    kept = len(t), dense, save_steps
    budget = arguments.budget_of(max_evaluations, name, method, dt, kept, driven, happening)
    since, steps, dt, most = arguments.known_steps(dt, t, exact, max_steps, driven, happening)
    static = Static(
        trace=trace, method=method, controller=arguments.controller_or_default(controller), jac=of_jac,
        adjoint=arguments.named_adjoint(adjoint, method), max_steps=most, steps=steps, saved=saved,
        func_time=func_time, bounded=not (isinstance(mxstep, float) and mxstep == np.inf), budget=budget,
        heuristics=arguments.wants_heuristics(heuristics, adjoint, method), consistent=consistent,
        throw=throw is True and not known(arrays), events=happening.static,
        seen=not driven and dt is None and known(t, rtol, atol, limits),
        output=output_of(dense, saved, save_steps, most),
        observers=arguments.watched(log, progress, most, driven),
    )  # fmt: skip
    given = static, (leaves, y0), (t, since), (rtol, atol, *limits, dt, beside, *extra)
    return answer(from_knot_to_knot if driven else compiled, *given, throw)


def answer(program, static, given, times, limits, throw: bool | None) -> Solution:
    """The solution; or an error, with what there is to know of the failure."""
    solution = run(program, static, *given, *times, *limits)
    if static.saved is not None and not static.output.each_step:
        solution = solution._replace(ys=solution.ys[0])
    *options, dt, beside, _, of_events = limits
    method, plain = static.method, dataclasses.replace(static, output=outputs.Times(), saved=None)
    end = times[0][-1]
    chosen_steps = method.error_order and static.steps is None and dt is None
    parts = static.trace.parts
    if (method.implicit and len(parts) == 1) or not chosen_steps:
        return checked(solution, end, throw)
    slope = lambda y, t: parts[-1](given[0], y, t.astype(static.func_time))
    again = lambda *times: run(
        program, plain, *given, *times, *options, dt, beside, None, of_events
    )
    remedy = stiffness.EXPLICIT if len(parts) == 1 else stiffness.OF_PAIR
    hint = lambda: stiffness.hint(solution, again, times, slope, remedy)
    return checked(solution, end, throw, hint)


def run(program: Callable, *args) -> Solution:
    """The solution, with JAX's own error for forward mode put in our words."""
    try:
        return program(*args)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "can't apply forward-mode differentiation (jvp) to a solve with this `adjoint`: pass "
            f"{having(forward=True)}."
        ) from error


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
    observers: tuple
    budget: Budget | None


def output_of(dense: bool, saved: Trace | None, save_steps: bool, max_steps: int):
    """What is kept of a solve."""
    save = None if saved is None else outputs.observed
    if dense or save_steps:
        return outputs.EveryStep(max_steps + 1, bool(dense), save)
    return outputs.Times(save, saved is None or saved.pushes)


@partial(jax.jit, static_argnums=0)
def compiled(
    static: Static, leaves, y0, t, since, rtol, atol, mxstep, hmax, dt, beside, watched, of_events
) -> Solution:
    """The solve. `since` is t - t[0], if that is known better than t.

    With a function of the state (whose arrays are `watched`) ys are its rows, and the state at the end.
    """
    rtol, atol, mxstep, hmax = lax.stop_gradient((rtol, atol, mxstep, hmax))
    times, steps = t if since is None else since, static.steps
    ss, span = unit_times(times)
    given = t[0], t[-1], span, static.func_time, static.method.beyond
    field, adjoint = Field(static.trace, leaves, *given), static.adjoint
    if static.saved is not None:
        field = Observed(field, Field(static.saved, watched, *given[:4]))
    happening = None if of_events is None else Given(static.events, of_events)
    if happening is not None:
        adjoint = with_events(adjoint, happening, t[0], span, static.func_time)
    if beside is not None:
        of_jac = None if static.jac is None else Field(static.jac, beside.jac, *given)
        adjoint = constraints.of_systems(adjoint, beside, of_jac, static.consistent)
    valid = static.seen or valid_times(t) & arguments.valid_limits(rtol, atol, mxstep, hmax)
    if_valid = lambda x, other: x if static.seen else jnp.where(valid, x, other)
    if dt is not None:
        steps = arguments.number_of_steps(dt, times, static.max_steps)
        valid = valid & (steps >= 0)
        steps = jnp.where(valid, steps, 0)
    long = lax.stop_gradient(jnp.abs(span))
    eps = float(jnp.finfo(static.func_time).eps)
    hmin = 16 * eps * jnp.max(jnp.abs(t)) / long if static.trace.uses_time else 0 * long
    integrator = Integrator(
        method=static.method,
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
    integrator, field, start, unravel = as_one_vector(integrator, field, y0)
    rows, report = adjoint(integrator, field, start, ss)
    t_given = t
    before = None if happening is None else y0
    t, ys, mask, dense = kept_of(integrator.output, rows, t, span, ss, report, unravel, before)
    status = if_valid(report.status, Status.BAD_INPUT.value).astype(jnp.int32)
    ys, dense = jax.tree.map(lambda y: if_valid(y, jnp.nan), (ys, dense))
    stats = Stats(report.evaluations, report.accepted, report.rejected)
    reached = lax.stop_gradient(t_given[0] + jnp.where(ss[-1] > 0, span, 0) * report.reached)
    estimates, happened = folds_of(report, happening, long)
    mask = None if mask is None else if_valid(mask, False)
    tried = report.accepted + report.rejected
    log = log_of(static.observers, report.seen, tried, t_given[0], span)
    solution = Solution(
        t, ys, status, stats, reached, estimates, dense, mask, happened, log, report.error
    )
    return ended(solution, static.throw, (leaves, y0, t_given, beside, watched, of_events))


def folds_of(report, happening: Given | None, long):
    """(heuristics, events) of a solution, from what was folded over its steps."""
    if happening is not None:
        return None, occurrences(happening, report.folded)
    if report.folded is None:
        return None, None
    error, stiffness = report.folded  # the latter per unit of [0, 1]
    long = lax.convert_element_type(long, stiffness.dtype)
    return Heuristics(error, stiffness / long), None


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
    fine = report.succeeded
    return t, (rows, jax.tree.map(lambda y: jnp.where(fine, y, jnp.nan), end)), None, None


@partial(jax.jit, static_argnums=0)
def from_knot_to_knot(static: Static, leaves, y0, t, since, *options) -> Solution:
    """The solve, broken where the signals that func asks have knots."""
    split = Split(static.trace, leaves, y0, jnp.zeros((), static.func_time))
    if not split.asked:
        return compiled(static, leaves, y0, t, since, *options)
    quiet = dataclasses.replace(static, trace=split.trace, throw=False)

    def stretch(leaves, y, t):
        part = compiled(quiet, leaves, y, t, None, *options)
        if static.saved is None:
            return part, jax.tree.map(lambda y: y[-1], part.ys)
        return part._replace(ys=part.ys[0]), part.ys[1]

    solution, end = piecewise(stretch, split, y0, t)
    if static.saved is not None:
        solution = solution._replace(ys=(solution.ys, end))
    return ended(solution, static.throw, (leaves, y0, t, options[-3:]))


def ended(solution: Solution, throw: bool, inputs) -> Solution:
    """The solution, with an error (by a host callback), and derivatives that are NaN, if it failed."""
    dense, status = solution.dense, solution.status
    states = None if dense is None else dense.states
    ys, other = (solution.ys, states, solution.events), other_end(solution.events, solution.error)
    if throw:
        codes = [code for code in Status if not succeeded(code)]
        index = sum(i * (status == code.value).astype(jnp.int32) for i, code in enumerate(codes))
        messages = [f"The solve failed ({code.name.lower()}). {code.message}" for code in codes]
        failed = ~succeeded(status, other)
        ys, status = eqx.branched_error_if((ys, status), failed, index, messages)
    inputs = [x for x in jax.tree.leaves(inputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
    fine = succeeded(status, other)
    numbers, counts = eqx.partition(ys, eqx.is_inexact_array)
    ys, states, happened = eqx.combine(poisoned(numbers, fine, inputs), counts)
    if dense is not None:
        solution = solution._replace(dense=dense.of(states))
    return solution._replace(ys=ys, status=status, events=happened)


def unit_times(t) -> tuple[Array, Array]:
    """The times on [0, 1], and t1 - t0 (1 if they are equal: all times are then at the start)."""
    span = t[-1] - t[0]
    span = jnp.where(span == 0, jnp.ones_like(span), span)
    return (t - t[0]) / span, span


# Results.


def no_times(y0, t) -> Solution:
    """The solution at no times at all."""
    ys = jax.tree.map(lambda y: jnp.zeros((0, *y.shape), y.dtype), y0)
    zero = jnp.zeros((), jnp.int32)
    t = jnp.asarray(t)
    return Solution(t, ys, zero, Stats(zero, zero, zero), jnp.zeros((), t.dtype))


def checked(solution: Solution, end, throw: bool | None, hint=lambda: "") -> Solution:
    """Raise if the solve failed, where that is known; `hint()` is what else there is to say of that."""
    if throw is False or not known(solution) or np.all(succeeded(np.asarray(solution.status))):
        return solution
    status = Status(int(solution.status))
    raise SolveError(
        f"The solve failed ({status.name.lower()}) at t = {float(solution.reached):g} of "
        f"{np.asarray(end):g}, after {int(solution.stats.evaluations)} evaluations of func. "
        f"{status.message}{hint()}\n(Pass throw=False to get NaN and a status instead.)",
        solution,
    )
