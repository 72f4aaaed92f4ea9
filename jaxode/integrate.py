"""`odeint` and `solve`: arguments checked at the door, the program run, its failure made an error."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxode import arguments, constraints, outputs, stiffness, switches, switching, tolerances
from jaxode.controllers import Controller
from jaxode.corrections import correction_of
from jaxode.events import look_for
from jaxode.folds import fold_of
from jaxode.methods.linear import Linear
from jaxode.methods.method import Method
from jaxode.program import Extras, Static, compiled, from_knot_to_knot, output_of
from jaxode.resuming import Resuming, wanted
from jaxode.solution import Solution, SolveError, Stats, Status, succeeded
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
    after_events: bool = False,
    fold=None,
    resumable: bool = False,
    log: int | None = None,
    progress: bool = False,
    max_evaluations: int | None = None,
    compensated: bool = False,
    **unknown,
) -> Solution:
    """Solve dy/dt = func(y, t, *args), y(t[0]) = y0, and say how it went.

    `jax.vmap` of it is a loop made for many solves at once (`jaxode.batch.lanes`), with the same results.
    Matrix products of func have the precision that `jax.default_matmul_precision` asks for where `solve` is
    called, forwards and backwards; those of the solver always have that of their dtype.

    Args:
        func: the derivative, `func(y, t, *args)`, a pytree like y0 (a list of numbers may stand for
            a vector). The state comes first, and then the time: a function whose first parameters are named t
            and y, or u, p and t, is refused. Any callable, an equinox module too. Traced once: it can choose
            by `jnp.where` and `jax.lax.cond`, but not by Python's `if`. Or a pair (stiff, nonstiff) of
            such functions whose sum it is, for "kencarp3", "kencarp4" and "kencarp5" (IMEX): the first is
            solved implicitly, so that its fast modes do not limit the steps, and `linear` and `jac` are
            about it alone; the second is only evaluated, once a stage. What drives a fast mode, as a
            boundary value or a source does, belongs into the first too: where large terms of the second
            balance large ones of the first, many times as many steps are needed (-100 y first and
            100 cos(t) second: 1,010 in place of 60; see `jaxode.methods.kencarp`).
        y0: the initial state, a pytree of real or complex arrays of any shapes. Integers and
            booleans become floats. float16 and bfloat16 states are kept; their errors, tolerances
            and times are computed in float32. A list of numbers is a pytree, and then y and `ys` are
            lists, too: pass an array for a vector.
        t: the times of the outputs, shape (n,), increasing or decreasing, equal times allowed. The
            first is that of y0. In the unit of time of func; float32 or wider. Large ones that float32
            cannot tell apart (seconds since 1970) are subtracted in float64, if they are known and
            func does not use them; else refused. Derivatives with respect to t take func to be continuous in
            t: where it jumps, let a signal, or the `change` of an event, do that. With times between the first
            and the last, implicit methods keep steps so short that their dense output is right, too.
        args: further arguments of func: pytrees. Floating-point arrays and numbers in them are
            differentiated; Python ints, bools and strings, functions, integer arrays and PRNG keys
            reach func as they are. Steps end at the knots of every `jaxode.Signal` that func asks,
            among the args or wherever func has it from.
        rtol, atol: relative and absolute tolerance of the error of a step: a number, an array, or a
            pytree like y0 or a prefix of it (for a y0 that is an array, an array or a list of a number for
            each component). A step is accepted if the root mean square of
            error / (atol + rtol max(|y before|, |y after|)) is at most 1. Both default to 1.4e-8, or
            to 8 machine epsilons of y0 where that is more (float32 9.5e-7, float16 7.8e-3, bfloat16
            6.3e-2). May be traced: other values do not compile again.
        mxstep: the most steps tried between two outputs (of `jax.experimental.ode`). May be traced.
        hmax: the largest step, in units of t. May be traced. func is asked at the stages of steps, and nowhere
            else: where nothing happens at first, so that the first step is long, it may go straight over a
            pulse, without an error. A pulse that is no shorter than `hmax` is not missed; nor is one that a
            `jaxode.Signal` makes, or with an `Event` at the known time when it begins: there a step ends.
        method: the name of a table (`jaxode.methods.methods`) or a table; or, for a state (q, p) of
            a separable problem, a symplectic method ("leapfrog", "yoshida4"; with `dt`); or, for a
            stiff problem, an implicit one ("rodas5p", "rodas4", "kvaerno5", ...); or a
            `jaxode.methods.Hypersolver`, which corrects an explicit one (with `dt`). Outputs come from dense
            output: steps do not stop at output times.
        adjoint: how to differentiate: "replay" (reverse mode), "backsolve" (the continuous adjoint, constant
            memory), "reversible" (steps that can be taken back, constant memory), "direct" (any mode and
            order), "forward" (forward mode), or a function; see `jaxode.adjoints`. All but "backsolve" are
            exact for the steps that were taken, sizes held fixed.
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
            signals. Every event is an accepted step more, of size 0. By "backsolve" the derivatives are NaN
            if there are more events than the `keep` of all together.
        after_events: whether outputs at the time of an event, `dense` there, and the states recorded of events
            are those right after it, with its change, and not those right before.
        fold: a pair (start, function), for minima, integrals and counts over the accepted steps: at the end
            of each a value, at first `start`, any pytree of arrays, becomes `function(value, y, t, *args)`;
            y0 is not seen. Where a step ends at an event it sees the state right before the event and then
            the one right after it, at its time. `Solution.folded` is the last value. It chooses no steps, and
            is differentiated in all that it depends on, event times too, with other steps held fixed, but for
            integers and booleans. Not with "backsolve".
        resumable: keep the state of the solver, so that `Solution.resume` can go on to later times. Time is
            then counted in the unit of func, so that steps do not depend on where a solve ends; steps of size
            `dt` all have that size, but for the last. Without derivatives, a plain loop under `jax.vmap`; not
            with signals, events, `dense`, `save_steps`, `heuristics`, `log`, `progress` or `max_evaluations`.
        log: give `Solution.log` too, the last so many trial steps, accepted or not, as
            `jaxode.solution.TrialSteps`: when, how long, with which error, and which component decided. Not
            differentiated; not with signals. `jaxode.explain` reads it.
        progress: show a bar of tqdm, for one long solve: a host callback each time that another hundredth of
            the interval is done. Under `jax.vmap` it is off, with a warning. Not with signals.
        max_evaluations: a budget of evaluations of func, which the solve never exceeds: errors may be larger
            than tolerated, and steps longer (than `hmax`, too), where what is left of it asks for that, so that
            the last time is reached. The status is then `Status.BUDGET`, no failure, and `Solution.error` the
            largest error of a step over what is tolerated. With plenty (up to twice of what the solve takes:
            it is not known in advance) the steps are those without a budget. So few steps that they
            are not stable make numbers of any size, with an `error` of many powers of ten, or are a failure:
            look at it, and pass "rodas5p" where a problem is stiff. For methods whose steps cost the same:
            explicit ones, and "rodas5p" and its like, whose Jacobians are not counted. Not with events,
            signals, or `dt`.
        compensated: with `dt`, whether what rounding takes from the state in a step is kept, and added to the
            next one (`jaxode.methods.compensated`): a million steps in float32 are then as exact as a few. For
            explicit Runge-Kutta and symplectic methods, and all adjoints but "reversible". It takes the memory
            of a state more.

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
    given = dict(locals())
    if switching.asked(events):
        return switching.solve(solve, given)
    with switches.moving():
        func, y0 = arguments.present(unknown, func, t), arguments.as_state(y0)
        throw = None if throw is None else arguments.flag("throw", throw)
        t, exact, func_time = arguments.as_times(t, y0)
        name, (method, dt) = method, arguments.method_for(method, linear, y0, dt, compensated)
        rtol, atol = tolerances.of_leaves(rtol, atol, y0, method)
        at, limits = (y0, t, func_time, args), arguments.limits(mxstep, hmax)
        func, beside, of_jac = constraints.told(func, at, method, name, mass, jac)
        trace, leaves = arguments.trace_of(func, *at)
        driven = arguments.is_driven(trace, exact, func_time)
        saved, watched = arguments.kept(dense, save, save_steps, exact, driven, *at)
        folding = fold_of(fold, exact, *at)
        resumable = wanted(
            resumable,
            t,
            exact,
            driven,
            (dense, save_steps, heuristics, max_evaluations, log, progress, events),
        )
        if len(t) == 0:
            return no_times(y0 if saved is None else saved.like(), t, folding.start)
        happening = look_for(events, exact, *at, (heuristics, mass, driven, after_events))
        method, correction = correction_of(method, exact, *at)
        extras = Extras(beside, watched, happening.arrays, folding.arrays, correction)
        arguments.no_varying(arrays := (leaves, y0, t, rtol, atol, limits, extras))
        problem = constraints.Problem(trace, of_jac, method, func_time)
        y0, consistent = constraints.check(problem, leaves, beside, y0, t, rtol, atol, driven)
        kept = len(t), dense, save_steps
        budget = arguments.budget_of(max_evaluations, name, method, dt, kept, driven, happening)
        since, steps, dt, most = arguments.known_steps(
            dt, t, exact, max_steps, driven or resumable, happening
        )
        static = Static(
            trace=trace, method=method, controller=arguments.controller_or_default(controller), steps=steps,
            adjoint=arguments.named_adjoint(adjoint, method), max_steps=most, func_time=func_time,
            bounded=not (isinstance(mxstep, float) and mxstep == np.inf), consistent=consistent, jac=of_jac,
            heuristics=arguments.wants_heuristics(heuristics, adjoint, method), events=happening.static,
            throw=throw is True and not known(arrays), saved=saved, fold=folding.trace, resumable=resumable,
            seen=not driven and dt is None and known(t, rtol, atol, limits),
            budget=budget, output=output_of(dense, saved, save_steps, most, bool(after_events)),
            observers=arguments.watched(log, progress, most, driven),
        )  # fmt: skip
        of = static, (leaves, y0), (t, since), (rtol, atol, *limits, dt), extras
        return answer(from_knot_to_knot if driven else compiled, *of, throw)


def answer(program, static, given, times, limits, extras, throw: bool | None) -> Solution:
    """The solution; or an error, with what there is to know of the failure."""
    with switches.unchecked():
        solution = program(static, *given, *times, *limits, extras)
    if static.resumable:
        of = static, given, times[0], limits, extras, throw
        solution = solution._replace(resuming=Resuming.of(solution.resuming, go_on, *of))
    if static.saved is not None and not static.output.each_step:
        solution = solution._replace(ys=solution.ys[0])
    tolerances.warn_of_unresolved(solution, static, given[1], limits[1])
    method, plain = static.method, dataclasses.replace(static, output=outputs.Times(), saved=None)
    end = times[0][-1]
    chosen_steps = method.error_order and static.steps is None and limits[-1] is None
    parts = static.trace.parts
    if (method.implicit and len(parts) == 1) or not chosen_steps:
        return checked(solution, end, throw)
    slope = stiffness.Slope(parts[-1], static.func_time)
    unsaved = extras._replace(saved=None, before=None)
    again = lambda *times: program(plain, *given, *times, *limits, unsaved)
    remedy = stiffness.EXPLICIT if len(parts) == 1 else stiffness.OF_PAIR
    hint = lambda: stiffness.hint(solution, again, times, slope, given[0], remedy)
    return checked(solution, end, throw, hint)


def go_on(*of) -> Solution:
    """The solution of a solve that goes on from the state in its extras."""
    return answer(compiled, *of)


def no_times(y0, t, folded) -> Solution:
    """The solution at no times at all."""
    ys = jax.tree.map(lambda y: jnp.zeros((0, *y.shape), y.dtype), y0)
    zero = jnp.zeros((), jnp.int32)
    t = jnp.asarray(t)
    return Solution(t, ys, zero, Stats(zero, zero, zero), jnp.zeros((), t.dtype), folded=folded)


def checked(solution: Solution, end, throw: bool | None, hint=lambda: "") -> Solution:
    """Raise if the solve failed, where that is known; `hint()` is what else there is to say of that."""
    if throw is False or not known(solution) or np.all(succeeded(np.asarray(solution.status))):
        switches.look_at(solution)
        return solution
    status = Status(int(solution.status))
    with switches.unchecked():
        more = hint()
    raise SolveError(
        f"The solve failed ({status.name.lower()}) at t = {float(solution.reached):g} of "
        f"{np.asarray(end):g}, after {int(solution.stats.evaluations)} evaluations of func. "
        f"{status.message}{more}\n(Pass throw=False to get NaN and a status instead.)",
        solution,
    )
