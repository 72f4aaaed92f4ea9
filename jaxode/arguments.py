"""Arguments, checked at the door: before compilation where their values are known."""

import difflib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.adjoints import names as adjoints
from jaxode.controllers import Controller
from jaxode.kernels.traces import Trace
from jaxode.methods.method import Method
from jaxode.signals import Signal, is_signal, tracing

TOLERANCE = 1.4e-8  # the default of rtol and atol, that of `jax.experimental.ode`

# What other libraries call an argument, and what it is here.
WORDS = {
    "args": "pass them after t: solve(func, y0, t, *args)",
    "t_span": "pass the times of the outputs as `t`, such as [t0, t1]",
    "t_eval": "pass the times of the outputs as `t`; the first is that of y0",
    "ts": "pass the times of the outputs as `t`; the first is that of y0",
    "saveat": "pass the times of the outputs as `t`; the first is that of y0",
    "t0": "pass the times as `t`, such as [t0, t1]",
    "t1": "pass the times as `t`, such as [t0, t1]",
    "max_step": "`hmax=` is the largest step",
    "dtmax": "`hmax=` is the largest step",
    "first_step": "the first step is found by itself; `dt=` takes steps of equal size",
    "dt0": "the first step is found by itself; `dt=` takes steps of equal size",
    "step_size": "`dt=` takes steps of equal size",
    "solver": "`method=` names the method",
    "stepsize_controller": "pass `rtol=` and `atol=`, and for the gains `controller=jaxode.pid(...)`",
    "reltol": "`rtol=` is the relative tolerance",
    "abstol": "`atol=` is the absolute tolerance",
    "tol": "pass `rtol=` and `atol=`",
    "maxiters": "`max_steps=` bounds the steps tried",
    "max_num_steps": "`max_steps=` bounds the steps tried",
    "mxsteps": "`mxstep=` bounds the steps tried between two outputs, `max_steps=` all of them",
    "events": "there are no events yet: solve in parts, or multiply by jnp.where",
    "dense_output": "pass all times at which the solution is wanted as `t`",
    "jac": "there are no implicit methods yet, which alone would need a Jacobian",
    "vectorized": "apply jax.vmap to the solve",
}
METHODS = {
    "rk45": "'dopri5' or 'tsit5'", "rk23": "'bosh3'", "dop853": "'dop853'", "tsit5": "'tsit5'",
    "dopri5": "'dopri5'", "dopri8": "'dop853'", "bosh3": "'bosh3'", "heun": "'heun'", "euler": "'euler'",
    "midpoint": "'midpoint'", "rk4": "'rk4' with `dt=`", "vern7": "'dop853'", "vern9": "'dop853'",
    **dict.fromkeys(
        ("bdf", "lsoda", "radau", "kvaerno3", "kvaerno5", "rodas4", "rodas5", "rosenbrock23", "cvode_bdf"),
        "an explicit method such as 'tsit5' with many steps (`max_steps=`): there are no stiff methods yet",
    ),
}  # fmt: skip


def unknown_options(options: dict) -> None:
    """Raise if there are options that no solve has; the error says what they are called here."""
    for name in options:
        known = (
            "adjoint atol controller dt heuristics hmax max_steps method mxstep rtol throw".split()
        )
        close = difflib.get_close_matches(name, known, 1)
        hint = WORDS.get(name) or (
            f"did you mean `{close[0]}`?" if close else "see help(jaxode.solve)"
        )
        raise TypeError(f"solve has no argument `{name}`: {hint}.")


def is_callable(func) -> None:
    if not callable(func):
        raise TypeError(
            f"`func` must be callable, as func(y, t, *args); got {type(func).__name__}."
        )


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


def as_times(t, y0) -> tuple[Array | np.ndarray, Any, Any]:
    """The times in the dtype that steps are counted in, the dtype in which func sees them, and (where
    the times are known) the times on [0, 1] and the span.

    Times whose values are known stay numpy arrays, so that they can be looked at under `jit` too. What
    is between them is then found in float64: seconds since 1970 differ by less than float32 can hold.
    """
    real = tree.widest(jnp.float32, *map(tree.real_dtype, jax.tree.leaves(y0)))
    listed = not hasattr(t, "dtype")
    try:
        t = np.asarray(t) if known(t) else jnp.asarray(t)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`t` must hold real numbers, such as [0.0, 1.0]: {error}") from error
    if t.ndim != 1:
        raise ValueError(f"`t` must be one-dimensional, such as [0.0, 1.0]; got shape {t.shape}.")
    if not jnp.issubdtype(t.dtype, jnp.floating) and not jnp.issubdtype(t.dtype, jnp.integer):
        raise TypeError(f"`t` must hold real numbers, got dtype {t.dtype}.")
    floating = jnp.issubdtype(t.dtype, jnp.floating)
    given = jax.dtypes.canonicalize_dtype(t.dtype) if floating and not listed else real
    seen = tree.widest(given, jnp.float32)
    counted = tree.widest(seen, real)
    if not known(t):
        return t.astype(counted), seen, None
    exact = np.asarray(t, np.float64)
    check_times(exact)
    units = None
    if len(exact):
        span = exact[-1] - exact[0]
        units = (exact - exact[0]) / (span or 1), span or 1
        units = tuple(np.asarray(x, counted) for x in units)
    return exact.astype(counted), seen, units


def representable(trace: Trace, t, seen, units) -> None:
    """Raise if func looks at times of which it cannot tell some from one another."""
    if units is None or not trace.uses_time:
        return
    as_seen = np.asarray(t).astype(seen)
    if np.any((np.diff(units[0]) > 0) & (np.diff(as_seen) == 0)):
        i = np.flatnonzero((np.diff(units[0]) > 0) & (np.diff(as_seen) == 0))[0]
        raise ValueError(
            f"t[{i}] and t[{i + 1}] are the same time, {as_seen[i]:g}, in {jnp.dtype(seen).name}, and func "
            "depends on t. Shift time to start at 0, or use float64 (jax_enable_x64, and a float64 `t`)."
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


def number_of_steps(dt, t, method: Method, name, max_steps):
    """How many steps of equal size; None for adaptive steps."""
    if dt is None:
        if method.error_order is None:
            raise ValueError(
                f"Method {name if isinstance(name, str) else 'of this table'!r} has no error "
                "estimate: pass a step size `dt=`, or choose an adaptive method such as 'tsit5'."
            )
        return None
    if isinstance(dt, str) or np.ndim(dt) or not jnp.issubdtype(jnp.result_type(dt), jnp.number):
        raise TypeError(f"The step size `dt` must be a number, got {dt!r}.")
    if known(dt) and not (float(dt) > 0 and np.isfinite(float(dt))):
        raise ValueError(
            f"The step size `dt` must be positive and finite, got {dt}. Its sign follows `t`."
        )
    most = max_steps + 1  # more of them fail just so
    if not known(dt, t):
        count = jnp.ceil(jnp.abs(t[-1] - t[0]) / dt * (1 - 1e-6))
        valid = (dt > 0) & jnp.isfinite(dt)
        count = jnp.where(valid, jnp.clip(count, 0, most), -1)
        return count.astype(jnp.int32)
    if len(t) == 0:
        return 1
    exact = abs(float(t[-1]) - float(t[0])) / float(dt)
    exact = exact * (1 - 16 * float(jnp.finfo(t.dtype).eps))
    return max(1, int(min(np.ceil(exact), most)))


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
        array = np.asarray if known(tolerance) else jnp.asarray
        try:
            tolerance = array(tolerance, tree.real_dtype(y))
        except (TypeError, ValueError) as error:
            raise TypeError(f"`{name}` must be a number or an array, got {tolerance!r}.") from error
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


def limit(name, value):
    """A positive number, or infinity."""
    if value is None or isinstance(value, str) or np.shape(value) != ():
        raise TypeError(f"`{name}` must be a positive number, got {value!r}.")
    if not known(value):
        return jnp.asarray(value, jnp.result_type(float))
    if not float(value) > 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")
    return np.asarray(value, jnp.result_type(float))


def whole(name, value) -> int:
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not number or not 1 <= value < 2**31 - 1:
        raise ValueError(f"`{name}` must be a positive integer below 2^31 - 1, got {value!r}.")
    return int(value)


def own_name(method):
    """The method; an error for names of other libraries that says what to take."""
    if isinstance(method, str) and method != method.lower() and method.lower() in METHODS:
        raise ValueError(f"There is no method '{method}' here: use {METHODS[method.lower()]}.")
    if isinstance(method, str) and method.lower() in ("bdf", "lsoda", "radau"):
        raise ValueError(f"There is no method '{method}' here: use {METHODS[method.lower()]}.")
    return method


def controller_or_default(controller) -> Any:
    if controller is None:
        return Controller()
    if not callable(controller) or not hasattr(controller, "start"):
        raise TypeError(
            "`controller` must be a controller such as jaxode.pid(integral=0.4, proportional=0.3); "
            f"got {type(controller).__name__}."
        )
    return controller


def wants_heuristics(heuristics, adjoint, method: Method) -> bool:
    """Whether they are wanted; an error if they cannot be had."""
    if heuristics and adjoint not in ("direct", adjoints.named["direct"]):
        raise ValueError(
            "`heuristics` are differentiated through the steps: pass adjoint='direct'."
        )
    if heuristics and not method.explains:
        raise ValueError("`heuristics` need a method such as 'tsit5' or 'dopri5'.")
    return bool(heuristics)


def no_varying(inputs) -> None:
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


def trace_of(func, y0, t, func_time, args) -> tuple[Trace, list, list[Signal]]:
    """func as a jaxpr, and the arrays it depends on: what it closes over, its own, those of args; and
    the signals that it closes over."""
    flat, structure = jax.tree.flatten((func, args))
    dynamic = [isinstance(x, jax.Array | np.ndarray | np.generic | float | complex) for x in flat]
    arrays = [jnp.asarray(x) for x, d in zip(flat, dynamic) if d]
    closed_over: list[Signal] = []

    def derivative(arrays, y, t):
        arrays = iter(arrays)
        with tracing(t) as trace:
            func, args = jax.tree.unflatten(
                structure, [next(arrays) if d else x for x, d in zip(flat, dynamic)]
            )
            found = like_state(func(y, t, *args), y)
        known = {id(x) for x in jax.tree.leaves((func, args), is_leaf=is_signal)}
        closed_over.extend(x for x in trace.called if id(x) not in known)
        return found

    time = jax.ShapeDtypeStruct((), func_time)
    closed = jax.make_jaxpr(derivative)(arrays, y0, time)
    origin = structure, [x for x, d in zip(flat, dynamic) if not d]
    leaves = [*map(jnp.asarray, closed.consts), *arrays]
    return Trace(closed, jax.tree.structure(y0), origin), leaves, closed_over


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
