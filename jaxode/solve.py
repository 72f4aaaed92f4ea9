"""`odeint` and `solve`: arguments checked, time mapped to [0, 1], the pieces put together."""

import dataclasses
import difflib
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from jaxode import adjoints, tableaus, tree
from jaxode.controllers import Controller
from jaxode.field import Field, Trace
from jaxode.loop import Integrator
from jaxode.poison import poisoned
from jaxode.signals import Pieces, asks, crowded, piecewise, valid_times
from jaxode.solution import Heuristics, Solution, SolveError, Stats, Status
from jaxode.splittings import Splitting, splittings
from jaxode.tableaus import Tableau

MAX_STEPS = 2**14
TOLERANCE = 1.4e-8  # the default of rtol and atol, that of `jax.experimental.ode`


def odeint(
    func: Callable,
    y0: PyTree,
    t=None,
    *args,
    rtol=None,
    atol=None,
    mxstep=jnp.inf,
    hmax=jnp.inf,
    method: str | Tableau | Splitting = "tsit5",
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
    arguments = dict(rtol=rtol, atol=atol, mxstep=mxstep, hmax=hmax, method=method, adjoint=adjoint)
    return solve(func, y0, t, *args, **arguments, **options).ys


def solve(
    func: Callable,
    y0: PyTree,
    t=None,
    *args,
    rtol=None,
    atol=None,
    mxstep=jnp.inf,
    hmax=jnp.inf,
    method: str | Tableau | Splitting = "tsit5",
    adjoint: str | Callable = "replay",
    dt=None,
    controller: Controller | None = None,
    max_steps: int = MAX_STEPS,
    throw: bool | None = None,
    heuristics: bool = False,
    **unknown,
) -> Solution:
    """Solve dy/dt = func(y, t, *args), y(t[0]) = y0, and say how it went.

    `jax.vmap` of it is a loop made for many solves at once (`jaxode.lanes`), with the same results.

    Args:
        func: the derivative, `func(y, t, *args)`, a pytree like y0 (a list of numbers may stand for
            a vector). Any callable, an equinox module too. Traced once.
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
            a separable problem, a symplectic method ("leapfrog", "yoshida4"; with `dt`). Outputs
            come from dense output: steps do not stop at output times.
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

    Returns:
        A `Solution`: ts, ys, status, stats, reached.

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
    if unknown:
        raise TypeError(about_words(unknown))
    if t is None:
        raise TypeError("The output times `t` are missing: solve(func, y0, t, *args).")
    if not callable(func):
        raise TypeError(
            f"`func` must be callable, as func(y, t, *args); got {type(func).__name__}."
        )
    y0 = as_state(y0)
    t, exact, func_time = as_times(t, y0)
    table = named_method(method, y0)
    max_steps = whole("max_steps", max_steps)
    dt = step_size(dt, table, method)
    rtol, atol = tolerances(rtol, atol, y0)
    limits = limit("mxstep", mxstep), limit("hmax", hmax)
    trace, leaves, origin = trace_of(func, y0, t, func_time, args)
    if exact is not None and trace.uses_time:
        check_resolution(exact, func_time)
    if isinstance(table, Splitting):
        separable(trace, y0)
        if adjoint == "backsolve":
            raise ValueError("adjoint='backsolve' has no symplectic methods: use 'replay'.")
    if len(t) == 0:
        return no_times(y0, t)
    unchecked((leaves, y0, t, rtol, atol, limits))
    pieces = Pieces(trace, origin) if asks(trace.jaxpr) else None
    since = None if exact is None else (exact - exact[0]).astype(t.dtype)
    times = t if since is None else since
    steps = None if pieces or dt is None else number_of_steps(dt, times, max_steps)
    static = Static(
        trace=trace,
        table=table,
        controller=controller_or_default(controller),
        adjoint=named_adjoint(adjoint),
        max_steps=steps if isinstance(steps, int) else max_steps,
        steps=steps if isinstance(steps, int) else None,
        func_time=func_time,
        bounded=not (isinstance(mxstep, float) and mxstep == np.inf),
        heuristics=wants_heuristics(heuristics, adjoint, table),
        throw=throw is True and not known(leaves, y0, t, rtol, atol, limits),
    )
    dynamic = leaves, y0, t, since, rtol, atol, *limits
    try:
        if pieces:
            solution = from_knot_to_knot(static, pieces, *dynamic, dt)
        else:
            solution = compiled(static, *dynamic, None if isinstance(steps, int) else steps)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "can't apply forward-mode differentiation (jvp) to a solve with this `adjoint`: pass "
            "adjoint='forward' (forward mode only) or adjoint='direct' (both modes)."
        ) from error
    return checked(solution, throw)


@dataclasses.dataclass(frozen=True)
class Static:
    """What a compiled solve is specialised to."""

    trace: Trace
    table: Tableau | Splitting
    controller: Controller
    adjoint: Callable
    max_steps: int
    steps: int | None
    func_time: Any
    bounded: bool
    heuristics: bool
    throw: bool


@partial(jax.jit, static_argnums=0)
def compiled(static: Static, leaves, y0, t, since, rtol, atol, mxstep, hmax, steps) -> Solution:
    """The solve. `since` is t - t[0], if that is known better than t."""
    rtol, atol, mxstep, hmax = lax.stop_gradient((rtol, atol, mxstep, hmax))
    ss, span = unit_times(t if since is None else since)
    field = Field(static.trace, leaves, t[0], t[-1], span, static.func_time)
    valid = valid_times(t) & valid_limits(rtol, atol, mxstep, hmax)
    if steps is not None:
        valid = valid & (steps >= 0)
    long = lax.stop_gradient(jnp.abs(span))
    eps = float(jnp.finfo(static.func_time).eps)
    hmin = 16 * eps * jnp.max(jnp.abs(t)) / long if static.trace.uses_time else 0 * long
    integrator = Integrator(
        table=static.table,
        controller=static.controller,
        max_steps=static.max_steps,
        steps=static.steps if steps is None else jnp.where(valid, steps, 0),
        rtol=rtol,
        atol=atol,
        hmax=jnp.where(valid, hmax.astype(t.dtype) / long, 0),
        hmin=lax.stop_gradient(hmin),
        mxstep=mxstep.astype(t.dtype) if static.bounded else None,
        heuristics=static.heuristics,
    )
    ys, report = static.adjoint(integrator, field, y0, ss)
    status = jnp.where(valid, report.status, Status.BAD_INPUT.value).astype(jnp.int32)
    ys = jax.tree.map(lambda y: jnp.where(valid, y, jnp.nan), ys)
    inputs = [x for x in (*leaves, *jax.tree.leaves(y0), t) if jnp.issubdtype(x.dtype, jnp.inexact)]
    if static.throw:
        ys, status = raising(ys, status)
    ys = poisoned(ys, status == Status.SUCCESS.value, inputs)
    stats = Stats(report.evaluations, report.accepted, report.rejected)
    reached = lax.stop_gradient(t[0] + (t[-1] - t[0]) * report.reached)
    estimates = None
    if report.heuristics is not None:
        error, stiffness = report.heuristics  # the latter per unit of [0, 1]
        estimates = Heuristics(error, stiffness / lax.convert_element_type(long, stiffness.dtype))
    return Solution(t, ys, status, stats, reached, estimates)


@partial(jax.jit, static_argnums=(0, 1))
def from_knot_to_knot(
    static: Static, pieces: Pieces, leaves, y0, t, since, rtol, atol, mxstep, hmax, dt
):
    """The solve, broken where the signals that func asks have knots."""
    split = pieces.split(leaves, y0, jnp.zeros((), static.func_time))
    if not split.asked:
        steps = None if dt is None else number_of_steps(dt, t, static.max_steps)
        return compiled(static, leaves, y0, t, since, rtol, atol, mxstep, hmax, steps)

    def stretch(trace, leaves, y, t):
        quiet = dataclasses.replace(static, trace=trace, throw=False)
        steps = None if dt is None else number_of_steps(dt, t, static.max_steps)
        return compiled(quiet, leaves, y, t, None, rtol, atol, mxstep, hmax, steps)

    solution = piecewise(stretch, split, y0, t)
    ys, status = solution.ys, solution.status
    if static.throw:
        ys, status = raising(ys, status)
    inputs = [x for x in (*leaves, *jax.tree.leaves(y0), t) if jnp.issubdtype(x.dtype, jnp.inexact)]
    ys = poisoned(ys, status == Status.SUCCESS.value, inputs)
    return solution._replace(ys=ys, status=status)


def unit_times(t) -> tuple[Array, Array]:
    """The times on [0, 1], and t1 - t0 (1 if they are equal: all times are then at the start)."""
    span = t[-1] - t[0]
    span = jnp.where(span == 0, jnp.ones_like(span), span)
    return (t - t[0]) / span, span


# What the arguments of other libraries are called here.

TIMES = "the output times are the third argument, `t`: solve(func, y0, [0.0, 1.0])"
STEP = (
    "the first step is chosen from func; `dt` takes steps of equal size, `hmax` bounds all of them"
)
JACOBIAN = "no Jacobian is needed: every method is explicit"
EVENTS = "there are no events: solve to a time, look at the state, and solve on"
DENSE = "there is no interpolant to keep: ask for as many times in `t` as are needed"
CALLED = "func is called as func(y, t, *args); write lambda y, t: f(t, y) for a function of (t, y)"
CONTROL = "pass `rtol`, `atol` and `controller=jaxode.pid(...)`, or `dt` for steps of equal size"
GRADIENTS = "`adjoint` is a name such as 'replay' or 'backsolve', or a function of jaxode.adjoints"

WORDS = {
    "args": "pass them after t: solve(func, y0, t, *args)",
    "p": "pass parameters after t: solve(func, y0, t, *args)",
    **dict.fromkeys(
        ("fun", "f", "terms", "rhs", "term"), "the derivative is the first argument, `func`"
    ),
    **dict.fromkeys(("t_eval", "t_span", "ts", "t0", "t1", "tspan", "tlist", "saveat"), TIMES),
    **dict.fromkeys(("max_step", "hmax0", "dtmax", "dt_max"), "the largest step is `hmax`"),
    **dict.fromkeys(("min_step", "hmin", "dtmin", "dt_min"), "there is no least step to choose"),
    **dict.fromkeys(("first_step", "h0", "dt0", "step_size"), STEP),
    **dict.fromkeys(
        ("jac", "jac_sparsity", "Dfun", "col_deriv", "lband", "uband", "ml", "mu"), JACOBIAN
    ),
    **dict.fromkeys(("events", "event", "event_fn"), EVENTS),
    **dict.fromkeys(("dense_output", "dense"), DENSE),
    **dict.fromkeys(("tfirst", "vectorized"), CALLED),
    **dict.fromkeys(("stepsize_controller", "controllers", "options"), CONTROL),
    **dict.fromkeys(
        ("adjoint_method", "adjoint_rtol", "adjoint_atol", "adjoint_params"), GRADIENTS
    ),
    **dict.fromkeys(("adjoint_options", "sensealg"), GRADIENTS),
    **dict.fromkeys(
        ("solver", "alg", "integrator"), "the method is `method`, a name such as 'tsit5'"
    ),
    **dict.fromkeys(("tcrit", "tstops", "jump_ts"), "steps end at the knots of a `jaxode.Signal`"),
    **dict.fromkeys(("max_num_steps", "maxiters", "nsteps"), "the most steps are `max_steps`"),
    **dict.fromkeys(
        ("full_output", "printmessg", "stats"), "`solve` returns statistics and the status"
    ),
    **dict.fromkeys(("reltol", "rel_tol"), "the relative tolerance is `rtol`"),
    **dict.fromkeys(("abstol", "abs_tol"), "the absolute tolerance is `atol`"),
    **dict.fromkeys(
        ("ixpr", "mxhnil", "mxordn", "mxords"), "it is one of LSODA, which is not here"
    ),
    **dict.fromkeys(
        ("solver_state", "controller_state", "made_jump"), "a solve begins from y0 alone"
    ),
    "progress_meter": "there is none",
}

STIFF = (
    "it is implicit, for stiff problems; all methods here are explicit: 'tsit5' or 'dop853' do what can "
    "be done by short steps"
)
METHODS = {
    "rk45": "'dopri5' is the same method, 'tsit5' a better one",
    "dopri5": "it is 'dopri5' here",
    "rk23": "'bosh3' is the same method",
    "dop853": "it is 'dop853' here",
    "dopri8": "'dop853' is the method of that order",
    "dp5": "'dopri5' is the same method",
    "dp8": "'dop853' is the same method",
    "tsit5": "it is 'tsit5' here",
    "bosh3": "it is 'bosh3' here",
    "heun": "it is 'heun' here",
    "euler": "it is 'euler' here",
    "midpoint": "it is 'midpoint' here",
    "ralston": "it is 'ralston' here",
    "rk4": "it is 'rk4' here",
    "adams": "'dop853' suits the same problems",
    "vode": STIFF,
    "leapfrogmidpoint": "'leapfrog' is symplectic, for y0 = (q, p)",
    "semiimpliciteuler": "'leapfrog' is symplectic, for y0 = (q, p)",
    **dict.fromkeys(
        "bdf lsoda radau radauiia5 rodas4 rodas5 rosenbrock23 trbdf2 cvode zvode".split(), STIFF
    ),
    **dict.fromkeys(
        "impliciteuler kvaerno3 kvaerno4 kvaerno5 kencarp3 kencarp4 kencarp5".split(), STIFF
    ),
}


def about_words(unknown) -> str:
    """What to write instead of arguments that there are not."""
    name = next(iter(unknown))
    if name in WORDS:
        return f"There is no argument `{name}=`: {WORDS[name]}."
    options = [
        p.name for p in inspect.signature(solve).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    close = difflib.get_close_matches(name, options, 1)
    hint = f" Did you mean `{close[0]}=`?" if close else ""
    return f"There is no argument `{name}=`.{hint} Options: {', '.join(options)}."


def about_method(name: str) -> str:
    """What a method of another library is called here."""
    return f"There is no method '{name}': {METHODS[name.lower()]}."


# Arguments, checked at the door: before compilation where their values are known.


def known(*xs) -> bool:
    """Whether values are there to look at, outside of any transformation."""
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(xs))


def as_state(y0: PyTree) -> PyTree:
    """y0 as floating-point or complex arrays."""

    def leaf(path, y):
        where = f"y0{jax.tree_util.keystr(path)}"
        try:
            dtype = jnp.result_type(y)
        except TypeError as error:
            raise TypeError(
                f"{where} must be an array of numbers, got {type(y).__name__}."
            ) from error
        if not (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool):
            raise TypeError(f"{where} must hold numbers, got dtype {dtype}.")
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.result_type(float)
        if known(y) and not np.all(np.isfinite(np.asarray(y))):
            raise ValueError(f"{where} is NaN or infinite.")
        return lax.convert_element_type(y, dtype)

    return jax.tree_util.tree_map_with_path(leaf, y0)


def as_times(t, y0) -> tuple[Array | np.ndarray, np.ndarray | None, Any]:
    """The times in the dtype that steps are counted in; the same in float64, if that dtype loses how far
    they are apart (else None); and the dtype in which func sees them.

    Times whose values are known stay numpy arrays, so that they can be looked at under `jit` too.
    """
    real = tree.widest(jnp.float32, *map(tree.real_dtype, jax.tree.leaves(y0)))
    listed = not hasattr(t, "dtype")
    try:
        t = np.asarray(t) if known(t) else jnp.asarray(t)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`t` must be an array of times, such as [0.0, 1.0]: {error}") from error
    if t.ndim != 1:
        raise ValueError(f"`t` must be one-dimensional, such as [0.0, 1.0]; got shape {t.shape}.")
    number = jnp.issubdtype(t.dtype, jnp.integer) or jnp.issubdtype(t.dtype, jnp.floating)
    if t.size and not number:
        raise TypeError(f"`t` must hold real numbers, got dtype {t.dtype}.")
    given = real if listed or not jnp.issubdtype(t.dtype, jnp.floating) else t.dtype
    seen = tree.widest(jax.dtypes.canonicalize_dtype(given), jnp.float32)
    counted = tree.widest(seen, real)
    if not known(t):
        return t.astype(counted), None, seen
    exact = np.asarray(t, np.float64)
    check_times(exact)
    t = exact.astype(counted)
    if np.any(t != exact):
        since, kept = exact - exact[0], np.asarray(t, np.float64) - float(t[0])
        eps = float(jnp.finfo(counted).eps)
        if np.any(abs(kept - since) > 2 * eps * np.max(abs(since))):
            return t, exact, seen
    return t, None, seen


def check_resolution(t, dtype):
    """Raise if func, which looks at the time, would be told times that are too coarse."""
    if crowded(t, dtype):
        raise ValueError(
            f"The times `t`, {t[0]:.17g} to {t[-1]:.17g}, cannot be told apart in "
            f"{jnp.dtype(dtype).name}, in which func gets its time. Shift time to begin near 0 (pass "
            "t - t[0], and let func add to its time what it needs), or use float64: set "
            "jax_enable_x64, and pass `t` as a float64 array."
        )


def check_times(t):
    if not np.all(np.isfinite(t)):
        raise ValueError(f"The times `t` must be finite; got {t[~np.isfinite(t)][0]}.")
    forward = t.size == 0 or t[-1] >= t[0]
    wrong = np.flatnonzero(np.diff(t) < 0 if forward else np.diff(t) > 0)
    if wrong.size:
        i = wrong[0]
        raise ValueError(
            "The times `t` must be increasing or decreasing; "
            f"t[{i}] = {t[i]} is followed by t[{i + 1}] = {t[i + 1]}."
        )


def step_size(dt, table, method):
    """`dt` as a number, if there is one; None for adaptive steps."""
    if dt is None:
        if table.e is None:
            raise ValueError(
                f"Method {method if isinstance(method, str) else 'of this table'!r} has no error "
                "estimate: pass a step size `dt=`, or choose an adaptive method such as 'tsit5'."
            )
        return None
    dt = number("dt", dt)
    if known(dt) and not 0 < dt < np.inf:
        raise ValueError(
            f"The step size `dt` must be positive and finite, got {dt}. Its sign follows `t`."
        )
    return dt


def number_of_steps(dt, t, max_steps):
    """How many steps of equal size: -1 if `dt` is none, one too many if they are more than can be."""
    if known(dt, t):
        exact = abs(float(t[-1]) - float(t[0])) / float(dt)
        if not exact < 2**31 - 1:
            raise ValueError(
                f"The step size `dt` = {float(dt):g} makes {exact:.3g} steps from t = {t[0]:g} to "
                f"{t[-1]:g}, more than can be counted. Choose a larger one."
            )
        return max(1, int(np.ceil(exact * (1 - 16 * float(jnp.finfo(t.dtype).eps)))))
    dt = lax.stop_gradient(jnp.asarray(dt, t.dtype))
    fine = (dt > 0) & (dt < jnp.inf)
    exact = jnp.abs(t[-1] - t[0]) / jnp.where(fine, dt, 1) * (1 - 1e-6)
    most = min(max_steps + 1, 2**31 - 128)  # the largest int32 that float32 holds
    steps = jnp.ceil(jnp.minimum(exact, most)).astype(jnp.int32)
    return jnp.where(fine, steps, -1)


def tolerances(rtol, atol, y0) -> tuple[PyTree, PyTree]:
    """rtol and atol as pytrees like y0, never so small that rounding decides."""
    rtol, atol = per_leaf("rtol", rtol, y0), per_leaf("atol", atol, y0)

    def floor(r, a, y):
        least = 4 * float(jnp.finfo(y.dtype).eps)
        if not known(r):
            return jnp.where((r > 0) & (r < least), jnp.asarray(least, r.dtype), r)
        if known(a) and np.any((r == 0) & (a == 0)):
            raise ValueError("`rtol` and `atol` are both 0: no step can be that accurate.")
        small = (r > 0) & (r < least)
        if np.any(small):
            warnings.warn(
                f"`rtol` is below what {y.dtype.name} can hold; {least:.2g} is used instead. "
                "Pass a float64 y0 (and set jax_enable_x64) to go further.",
                stacklevel=4,
            )
        return np.where(small, np.asarray(least, r.dtype), r)

    return jax.tree.map(floor, rtol, atol, y0), atol


def per_leaf(name, value, y0) -> PyTree:
    """A tolerance for every leaf of y0; a numpy array where its value is known."""
    if value is None:
        value = jax.tree.map(lambda y: max(TOLERANCE, 8 * float(jnp.finfo(y.dtype).eps)), y0)
    try:
        value = jax.tree.broadcast(value, y0)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be a number, an array, or a pytree like y0 (or a prefix of it): {error}"
        ) from error

    def leaf(path, tolerance, y):
        if not is_real(tolerance):
            raise TypeError(f"`{name}` must hold real numbers, got {tolerance!r}.")
        array = np.asarray if known(tolerance) else jnp.asarray
        tolerance = array(tolerance, tree.real_dtype(y))
        if np.broadcast_shapes(tolerance.shape, y.shape) != y.shape:
            raise ValueError(
                f"`{name}` has shape {tolerance.shape} where y0{jax.tree_util.keystr(path)} has "
                f"shape {y.shape}."
            )
        if known(tolerance) and not np.all(tolerance >= 0):
            raise ValueError(f"`{name}` must not be negative or NaN.")
        return tolerance.reshape((1,) * (y.ndim - tolerance.ndim) + tolerance.shape)

    return jax.tree_util.tree_map_with_path(leaf, value, y0)


def valid_limits(rtol, atol, mxstep, hmax):
    fine = [jnp.all(x >= 0) for x in jax.tree.leaves((rtol, atol))]
    return jnp.all(jnp.stack([*fine, mxstep > 0, hmax > 0]))


def number(name, value):
    """A real number that an argument has to be; a Python float, if it is known."""
    if not is_real(value) or np.ndim(value) != 0:
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    return float(value) if known(value) else jnp.asarray(value, jnp.result_type(float))


def is_real(value) -> bool:
    """Whether something is real numbers."""
    if type(value) is float:
        return True
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    except (TypeError, ValueError):
        return False
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def limit(name, value):
    """A positive number, or infinity."""
    value = number(name, value)
    if known(value) and not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")
    return np.asarray(value, jnp.result_type(float)) if known(value) else value


def whole(name, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    if value >= 2**31:
        raise ValueError(f"`{name}` must be below 2**31, got {value}.")
    return int(value)


def controller_or_default(controller) -> Any:
    if controller is None:
        return Controller()
    if not callable(controller) or not hasattr(controller, "start"):
        raise TypeError(
            "`controller` must be a controller such as jaxode.pid(integral=0.4, proportional=0.3); "
            f"got {type(controller).__name__}."
        )
    return controller


def named_method(method, y0) -> Any:
    """A Runge-Kutta table, or a symplectic method, for which y0 has to be a pair."""
    splitting, catalogue = isinstance(method, Splitting), {**tableaus.methods, **splittings}
    name = method if isinstance(method, str) else type(method).__name__
    if name.lower() in METHODS and not (isinstance(method, str) and method in catalogue):
        wrong = ValueError if isinstance(method, str) else TypeError
        raise wrong(about_method(name))
    table: Any = method if splitting else tableaus.named(method, catalogue)
    if not isinstance(table, Splitting):
        return table
    if not isinstance(y0, tuple | list) or len(y0) != 2:
        raise TypeError(
            "A symplectic method needs a state y0 = (q, p), and func(y, t) = (dq/dt, dp/dt); "
            f"got {jax.tree.structure(y0)}."
        )
    return table


def wants_heuristics(heuristics, adjoint, table) -> bool:
    """Whether they are wanted; an error if they cannot be had."""
    if heuristics and adjoint != "direct":
        raise ValueError(
            "`heuristics` are differentiated through the steps: pass adjoint='direct'."
        )
    if heuristics and (table.e is None or table.c[-2] != 1):
        raise ValueError("`heuristics` need a method such as 'tsit5' or 'dopri5'.")
    return bool(heuristics)


def separable(trace: Trace, y0) -> None:
    """Raise if dq/dt depends on q, or dp/dt on p."""
    q, p = (len(jax.tree.leaves(part)) for part in y0)
    for name, outs, ins in (("dq/dt", (0, q), (0, q)), ("dp/dt", (q, q + p), (q, q + p))):
        if trace.depends(range(*outs), range(*ins)):
            raise ValueError(
                f"A symplectic method needs a separable problem, but {name} depends on "
                f"{name[1]}. Use a method such as 'dop853'."
            )


def unchecked(inputs) -> None:
    """Raise if JAX checks what varies over a mesh: loops that begin with zeros do not pass it."""
    for x in jax.tree.leaves(inputs):
        axes = getattr(jax.typeof(x), "manual_axis_type", None)
        if axes is not None and axes.varying:
            raise TypeError(
                "inside of jax.shard_map a solve needs check_vma=False: jax.shard_map(..., "
                "check_vma=False). A gradient of something replicated is then summed by jax.lax.psum."
            )


def named_adjoint(adjoint) -> Callable:
    if callable(adjoint):
        return adjoint
    if adjoint not in adjoints.named:
        raise ValueError(
            f"`adjoint` must be one of {list(adjoints.named)} or a function; got {adjoint!r}."
        )
    return adjoints.named[adjoint]


def trace_of(func, y0, t, func_time, args) -> tuple[Trace, list, Any]:
    """func as a jaxpr; the arrays it depends on: what it closes over, its own, those of args; and its
    structure and static parts."""
    flat, structure = jax.tree.flatten((func, args))
    dynamic = [isinstance(x, jax.Array | np.ndarray | np.generic | float | complex) for x in flat]
    arrays = [jnp.asarray(x) for x, d in zip(flat, dynamic) if d]

    def derivative(arrays, y, t):
        arrays = iter(arrays)
        func, args = jax.tree.unflatten(
            structure, [next(arrays) if d else x for x, d in zip(flat, dynamic)]
        )
        return like_state(func(y, t, *args), y)

    time = jax.ShapeDtypeStruct((), func_time)
    closed = jax.make_jaxpr(derivative)(arrays, y0, time)
    origin = structure, [x for x, d in zip(flat, dynamic) if not d]
    leaves = [*map(jnp.asarray, closed.consts), *arrays]
    return Trace(closed, jax.tree.structure(y0), origin), leaves, origin


def like_state(k, y):
    """What func returned, if it is a derivative of y; else a TypeError that says what it is."""
    one = jax.tree.structure(0)
    if jax.tree.structure(y) == one and isinstance(k, list | tuple):
        k = jnp.stack([jnp.asarray(x) for x in k]) if k else jnp.zeros(0, y.dtype)
    elif jax.tree.structure(k) == one and isinstance(y, list | tuple) and jnp.shape(k) == (len(y),):
        k = type(y)(k)
    if jax.tree.structure(k) != jax.tree.structure(y):
        raise TypeError(
            f"func must return a derivative like y0: y0 is {jax.tree.structure(y)}, func returned "
            f"{jax.tree.structure(k)}. Its arguments are (y, t, *args), in this order."
        )
    return jax.tree_util.tree_map_with_path(like_leaf, k, y)


def like_leaf(path, k, y):
    where = jax.tree_util.keystr(path)
    k = jnp.asarray(k)
    if k.shape != y.shape:
        raise TypeError(
            f"func returned shape {k.shape} where y0{where} has shape {y.shape}. "
            "Its arguments are (y, t, *args), in this order."
        )
    if not jnp.issubdtype(k.dtype, jnp.inexact):
        raise TypeError(f"func returned dtype {k.dtype} where y0{where} is {y.dtype}: use floats.")
    if jnp.iscomplexobj(k) and not jnp.iscomplexobj(y):
        raise TypeError(
            f"func returned {k.dtype} where y0{where} is real: pass a complex y0, or the real part."
        )
    if jnp.finfo(k.dtype).eps > jnp.finfo(y.dtype).eps:
        warnings.warn(
            f"func returned {k.dtype} where y0{where} is {y.dtype}: the solution is only as accurate "
            "as func.",
            stacklevel=2,
        )
    return k.astype(y.dtype)


# Results.


def no_times(y0, t) -> Solution:
    """The solution at no times at all."""
    ys = jax.tree.map(lambda y: jnp.zeros((0, *y.shape), y.dtype), y0)
    zero = jnp.zeros((), jnp.int32)
    t = jnp.asarray(t)
    return Solution(t, ys, zero, Stats(zero, zero, zero), jnp.zeros((), t.dtype))


def raising(ys, status):
    """The same, and an error as the program runs if the solve failed (by a host callback)."""
    codes = [code for code in Status if code != Status.SUCCESS]
    index = sum(i * (status == code.value).astype(jnp.int32) for i, code in enumerate(codes))
    messages = [f"The solve failed ({code.name.lower()}). {code.message}" for code in codes]
    failed = status != Status.SUCCESS.value
    return eqx.branched_error_if((ys, status), failed, index, messages)


def checked(solution: Solution, throw: bool | None) -> Solution:
    """Raise if the solve failed, where that is known."""
    if throw is not False and known(solution) and np.any(np.asarray(solution.status)):
        raise SolveError(failure(solution), solution)
    return solution


def failure(solution: Solution) -> str:
    status = Status(int(solution.status))
    last = np.asarray(solution.ts)[-1]
    return (
        f"The solve failed ({status.name.lower()}) at t = {float(solution.reached):g} of {last:g}, "
        f"after {int(solution.stats.evaluations)} evaluations of func. {status.message}\n"
        "(Pass throw=False to get NaN and a status instead.)"
    )
