"""Arguments, checked at the door: before compilation where their values are known."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxode import tree
from jaxode.adjoints import names as adjoints
from jaxode.batch.vmap_rules import not_split
from jaxode.controllers import Controller
from jaxode.functions import FUNC, JAC, SAVE, Role, explained, in_order, like_t_span, no_vector
from jaxode.kernels.traces import Trace
from jaxode.methods.compensated import Compensated
from jaxode.methods.linear import Linear
from jaxode.methods.method import Method, Parts
from jaxode.methods.names import methods, named
from jaxode.signals import asks, crowded
from jaxode.stepping.budget import Budget
from jaxode.stepping.observers import Log, Progress
from jaxode.switches import tracing
from jaxode.traced_once import not_again, once
from jaxode.tree import known
from jaxode.words import about_words, no_foreign

OR_IN_FLOAT64 = "or use float64: set jax_enable_x64, and pass `t` as a float64 array"


def method_for(name, linear, y0, dt, compensated=False) -> tuple[Method, Any]:
    """The method of this name for a state like y0, with its linear algebra if that is given; and the size of
    its steps if they are equal, whose sums may be `compensated`."""
    method = with_linear(named(name), name, linear).suited_to(y0)
    method.check(None, y0)
    dt = step_size(dt, method, name)
    if not flag("compensated", compensated):
        return method, dt
    if dt is None or not method.has_increment:
        raise ValueError(
            "`compensated` is for many steps of equal size by an explicit Runge-Kutta or a symplectic method: "
            "pass `dt` and method='rk4', 'leapfrog' or their like; or leave it out."
        )
    return Compensated(method), dt


def with_linear(method: Method, name, linear) -> Method:
    """The method, with its linear algebra if that is given."""
    if linear is None:
        return method
    if not isinstance(linear, Linear):
        raise TypeError(
            "`linear` must be the structure of the Jacobian, such as jaxode.methods.Banded(1, 1) or "
            f"Dense(); got {linear!r}."
        )
    if not hasattr(method, "linear"):
        raise ValueError(
            f"`linear` is for implicit methods such as 'rodas5p'; '{name}' solves no linear systems."
        )
    return dataclasses.replace(method, linear=linear)  # type: ignore[type-var]


def takes(method: Method, name, func, mass, jac) -> None:
    """Raise if func is a pair, or a mass matrix or a Jacobian is given, which this method cannot take."""
    pair = isinstance(func, Pair)
    if pair and not method.takes_parts:
        able = ", ".join(repr(name) for name, method in methods.items() if method.takes_parts)
        raise ValueError(
            f"func is a pair (stiff, nonstiff), which is for {able}; {name!r} has one table for all of "
            "dy/dt: choose one of these, or pass a function that adds the two."
        )
    if pair and mass is not None:
        raise ValueError(
            "`mass` is for one function: pass one that adds the two of func, and an implicit method such "
            "as 'rodas5p'. (A regular matrix may also be solved with inside of both.)"
        )
    if mass is not None and not method.takes_mass:
        raise ValueError(
            f"`mass` is for implicit methods such as 'rodas5p' or 'kvaerno5'; {name!r} takes none. (A regular "
            "matrix may also be solved with inside of func.)"
        )
    if jac is not None and not method.takes_jac:
        raise ValueError(f"`jac` is for implicit methods such as 'rodas5p'; {name!r} takes none.")
    if jac is not None and not callable(jac):
        raise TypeError(f"`jac` must be a function jac(y, t, *args); got {type(jac).__name__}.")
    if jac is not None:
        in_order(JAC, jac)


class Pair(eqx.Module):
    """dy/dt in two parts, as one function."""

    stiff: Callable
    nonstiff: Callable

    def __call__(self, y, t, *args) -> Parts:
        return Parts(self.stiff(y, t, *args), self.nonstiff(y, t, *args))


def present(unknown, func, t) -> Callable:
    """func, a pair of functions as one; an error if an argument is missing, of another library, or no
    function."""
    if unknown:
        raise TypeError(about_words(unknown))
    if t is None:
        raise TypeError("The output times `t` are missing: solve(func, y0, t, *args).")
    no_foreign("func", func)
    if callable(func):
        in_order(FUNC, func)
        return func
    if isinstance(func, tuple | list) and len(func) == 2 and all(map(callable, func)):
        for part in func:
            in_order(FUNC, part)
        return Pair(*func)
    raise TypeError(
        "`func` must be callable, as func(y, t, *args), or a pair (stiff, nonstiff) of such functions; "
        f"got {type(func).__name__}."
    )


def as_state(y0: PyTree) -> PyTree:
    """y0 as floating-point or complex arrays."""
    no_foreign("y0", y0)
    if y0 is None or isinstance(y0, str):
        raise TypeError(
            f"y0 must be an array of numbers, or a pytree of arrays, got {y0!r}: it is the state at t[0], the "
            "second argument of solve(func, y0, t, method='tsit5')."
        )

    def leaf(path, y):
        where = f"y0{jax.tree_util.keystr(path)}"
        dtype = dtype_of(where, y)
        fixed_size(where, y)
        if known(y) and not np.all(np.isfinite(np.asarray(y))):
            raise ValueError(f"{where} is NaN or infinite.")
        return lax.convert_element_type(y, dtype)

    return jax.tree_util.tree_map_with_path(leaf, y0)


def fixed_size(where: str, x) -> None:
    """Raise if the size of an array is a symbol of `jax.export`: the form of a step is chosen by it."""
    shape = jnp.shape(x)
    if not all(isinstance(n, int) for n in shape):
        raise ValueError(
            f"{where} has the symbolic shape {shape}, and a solve has to know its sizes: export it for "
            "fixed ones, a program for each. How many solves there are in a `jax.vmap` may be a symbol."
        )


def dtype_of(where: str, x, more: str = ""):
    """The dtype in which numbers are kept: integers and booleans become floats."""
    no_foreign(where, x)
    try:
        dtype = jnp.result_type(x)
    except TypeError as error:
        raise TypeError(
            f"{where} must be an array of numbers, got {type(x).__name__}{more}."
        ) from error
    if not (jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool):
        raise TypeError(f"{where} must hold numbers, got dtype {dtype}.")
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)


def as_times(t, y0) -> tuple[Array | np.ndarray, np.ndarray | None, Any]:
    """The times in the dtype that steps are counted in; the same in float64, if that dtype loses how far
    they are apart (else None); and the dtype in which func sees them.

    Times whose values are known stay numpy arrays, so that they can be looked at under `jit` too.
    """
    real = tree.widest(jnp.float32, *map(tree.real_dtype, jax.tree.leaves(y0)))
    listed = not hasattr(t, "dtype")
    if not hasattr(t, "__array__"):  # a tensor that can be read as an array is one
        no_foreign("`t`", t)
    try:
        t = np.asarray(t) if known(t) else jnp.asarray(t)
    except (TypeError, ValueError, RuntimeError) as error:
        no_foreign("`t`", t)
        raise TypeError(f"`t` must be an array of times, such as [0.0, 1.0]: {error}") from error
    fixed_size("`t`", t)
    if t.ndim != 1:
        raise ValueError(
            f"`t` must be one-dimensional, such as [0.0, 1.0]; got shape {t.shape}.{like_t_span(y0)}"
        )
    number = jnp.issubdtype(t.dtype, jnp.integer) or jnp.issubdtype(t.dtype, jnp.floating)
    if t.size and not number:
        raise TypeError(f"`t` must hold real numbers, got dtype {t.dtype}.")
    given = real if listed or not jnp.issubdtype(t.dtype, jnp.floating) else t.dtype
    seen = tree.widest(jax.dtypes.canonicalize_dtype(given), jnp.float32)
    counted = tree.widest(seen, real)
    if not known(t):
        return t.astype(counted), None, seen
    exact = np.asarray(t, np.float64)
    check_times(exact, y0)
    t = exact.astype(counted)
    if np.all(t == exact):
        return t, None, seen
    since, kept = exact - exact[0], np.asarray(t, np.float64) - float(t[0])
    lost = np.max(abs(kept - since)) > 2 * float(jnp.finfo(counted).eps) * np.max(abs(since))
    return t, exact if lost else None, seen


def is_driven(trace: Trace, exact, func_time) -> bool:
    """Whether func asks signals; an error if it sees times that its dtype cannot tell apart."""
    check_resolution(exact, func_time, trace)
    return asks(trace.jaxpr)


def check_resolution(t, dtype, trace: Trace | None, role=FUNC):
    """Raise if a function looks at the time and would be told times that are too coarse."""
    if trace is not None and trace.uses_time:
        needed = f"let {role.name} add to its time what it needs"
        check_apart(t, dtype, f"in which {role.name} gets its time", needed)


def check_apart(t, dtype, whose: str, remedy: str):
    """Raise if times, in float64, lose in this dtype how far they are apart."""
    if t is not None and crowded(t, dtype):
        raise ValueError(
            f"The times `t`, {t[0]:.17g} to {t[-1]:.17g}, cannot be told apart in "
            f"{jnp.dtype(dtype).name}, {whose}. Shift time to begin near 0 (pass t - t[0], and {remedy}), "
            f"{OR_IN_FLOAT64}."
        )


def without_lost_digits(name: str, exact, dtype):
    """Raise if times lose in their dtype how far they are apart: this option goes on from such times."""
    if exact is not None:
        raise ValueError(
            f"`{name}` goes by the times of the solve, and {jnp.dtype(dtype).name} keeps too few digits of how "
            f"far {float(exact[0])} and {float(exact[-1])} are apart: shift time to begin near 0 "
            f"(pass t - t[0]), {OR_IN_FLOAT64}."
        )


def check_times(t, y0=None):
    """Raise if times that are known are not finite, or go back and forth."""
    if not np.all(np.isfinite(t)):
        wrong = t[~np.isfinite(t)][0]
        large = (
            ""
            if np.isnan(wrong)
            else " Where a terminal event ends the solve, pass a large, finite one."
        )
        raise ValueError(f"The times `t` must be finite; got {wrong}.{large}")
    forward = t.size == 0 or t[-1] >= t[0]
    wrong = np.flatnonzero(np.diff(t) < 0 if forward else np.diff(t) > 0)
    if wrong.size:
        i = wrong[0]
        raise ValueError(
            "The times `t` must be increasing or decreasing; "
            f"t[{i}] = {t[i]} is followed by t[{i + 1}] = {t[i + 1]}.{like_t_span(y0)}"
        )


def step_size(dt, method: Method, name):
    """`dt` as a number, if there is one; None for adaptive steps."""
    if dt is None:
        if method.error_order is None:
            of = repr(name) if isinstance(name, str) else f"of class {type(method).__name__}"
            raise ValueError(
                f"Method {of} has no error estimate: pass a step size `dt=`, or choose an adaptive method "
                "such as 'tsit5'."
            )
        return None
    if not method.equal_steps:
        raise ValueError(
            f"method='{name}' finds out from steps that adapt whether a problem is stiff: with `dt` "
            "name a method, such as 'tsit5' or, if it is stiff, 'rodas5p'."
        )
    dt = number("dt", dt)
    if known(dt) and not 0 < dt < np.inf:
        raise ValueError(
            f"The step size `dt` must be positive and finite, got {dt}. Its sign follows `t`."
        )
    return dt


def known_steps(dt, t, exact, max_steps, driven: bool, happening):
    """t - t[0], if it is known better than t (from the `exact` times); how many steps of equal size, if that
    is known, and else the `dt` that says it; and how many steps there are at most."""
    max_steps = whole("max_steps", max_steps)
    since = None if exact is None else (exact - exact[0]).astype(t.dtype)
    times = t if since is None else since
    if dt is None or driven or not known(dt, times):
        return since, None, dt, max_steps
    steps = known_number_of_steps(dt, times)
    return since, steps, None, steps if happening.static is None else max_steps + steps


def known_number_of_steps(dt, t) -> int:
    """How many steps of equal size."""
    exact = abs(float(t[-1]) - float(t[0])) / float(dt)
    if not exact < 2**31 - 1:
        raise ValueError(
            f"The step size `dt` = {float(dt):g} makes {exact:.3g} steps from t = {t[0]:g} to "
            f"{t[-1]:g}, more than can be counted. Choose a larger one."
        )
    return max(1, int(np.ceil(exact * (1 - 16 * float(jnp.finfo(t.dtype).eps)))))


def number_of_steps(dt, t, max_steps):
    """The same where it is traced: -1 if `dt` is none, one too many if they are more than can be."""
    dt = lax.stop_gradient(jnp.asarray(dt, t.dtype))
    fine = (dt > 0) & (dt < jnp.inf)
    exact = jnp.abs(t[-1] - t[0]) / jnp.where(fine, dt, 1) * (1 - 1e-6)
    most = min(max_steps + 1, 2**31 - 128)  # the largest int32 that float32 holds
    return jnp.where(fine, jnp.ceil(jnp.minimum(exact, most)).astype(jnp.int32), -1)


def valid_limits(rtol, atol, mxstep, hmax):
    fine = [jnp.all(x >= 0) for x in jax.tree.leaves((rtol, atol))]
    return jnp.all(jnp.stack([*fine, mxstep > 0, hmax > 0]))


def number(name, value):
    """A real number that an argument has to be; a Python float, if it is known."""
    if not is_real(value) or np.ndim(value) != 0:
        no_foreign(f"`{name}`", value)
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    return float(value) if known(value) else jnp.asarray(value, jnp.result_type(float))


def is_real(value) -> bool:
    """Whether something is real numbers."""
    if type(value) is float:
        return True
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
        return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    except (TypeError, ValueError):  # a dtype of torch is none
        return False


def limit(name, value):
    """A positive number, or infinity."""
    value = number(name, value)
    if known(value) and not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")
    return np.asarray(value, jnp.result_type(float)) if known(value) else value


def limits(mxstep, hmax) -> tuple:
    """The most steps between two outputs, and the largest step."""
    return limit("mxstep", mxstep), limit("hmax", hmax)


def whole(name, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(
            f"`{name}` must be a positive integer, known before the program is made (an int, not an array); "
            f"got {value!r}."
        )
    if value >= 2**31:
        raise ValueError(f"`{name}` must be below 2**31, got {value}.")
    return int(value)


def controller_or_default(controller) -> Any:
    if controller is None:
        return Controller()
    if not callable(controller) or not hasattr(controller, "start"):
        no_foreign("`controller`", controller)
        raise TypeError(
            "`controller` must be a controller such as jaxode.pid(integral=0.4, proportional=0.3); "
            f"got {type(controller).__name__}."
        )
    return controller


def watched(log, progress, max_steps: int, driven: bool) -> tuple:
    """What watches the trial steps of a solve."""
    progress = flag("progress", progress)
    if log is not None:
        if isinstance(log, bool):
            raise TypeError(
                f"`log` is how many trial steps are kept, such as log=1000; got {log!r}."
            )
        log = Log(min(whole("log", log), max_steps))
    for name, value in (("log", log), ("progress", progress)):
        without_signals(
            name, bool(value) and driven,
            "Let func interpolate (jnp.interp), and pass the knots as events=[Event(times=knots)].",
        )  # fmt: skip
    return (*(() if log is None else (log,)), *((Progress(),) if progress else ()))


def budget_of(evaluations, name, method: Method, dt, kept, driven: bool, happening):
    """The budget of evaluations of a solve, if there is one. What is `kept`, the number of times, and whether
    `dense` or `save_steps`, says whether outputs lie inside of steps."""
    if evaluations is None:
        return None
    evaluations = whole("max_evaluations", evaluations)
    if driven or happening.static is not None or dt is not None:
        raise ValueError(
            "`max_evaluations` is for steps that adapt, from the first time to the last: not with events, "
            "signals, or `dt` (whose steps are a budget). Leave one of the two out."
        )
    if method.step_evaluations is None:
        raise ValueError(
            f"`max_evaluations` needs to know what a step costs, and those of {name!r} iterate or differ: pass "
            "method='tsit5', 'dop853' or, if the problem is stiff, 'rodas5p'."
        )
    times, dense, save_steps = kept
    inside = dense or (times > 2 and not save_steps)
    cost = method.step_evaluations + (method.inside_evaluations if inside else 0)
    return Budget.of(evaluations, cost, repr(name))


def wants_heuristics(heuristics, adjoint, method: Method) -> bool:
    """Whether they are wanted; an error if they cannot be had."""
    heuristics = flag("heuristics", heuristics)
    if heuristics and adjoint not in ("direct", adjoints.named["direct"]):
        raise ValueError(
            "`heuristics` are differentiated through the steps: pass adjoint='direct'."
        )
    if heuristics and not method.explains:
        raise ValueError("`heuristics` need a method such as 'tsit5' or 'dopri5'.")
    return heuristics


def for_solve_alone(options) -> None:
    """Raise if `odeint` was asked for what only a `Solution` can hold."""
    for name in ("dense", "save_steps", "fold", "log", "resumable"):
        if options.get(name):
            raise TypeError(f"odeint returns the states alone: for `{name}=` call `solve`.")


def flag(name, value) -> bool:
    """An option that is True or False."""
    if not isinstance(value, bool | np.bool_):
        no_foreign(f"`{name}`", value)
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def without_signals(name, driven: bool, instead: str) -> None:
    """Raise if func asks signals, of which a solve with this option does not know."""
    if driven:
        raise ValueError(
            f"`{name}` is for a func without signals: steps end at the knots of a `Signal`, which is a solve "
            f"for each piece. {instead}"
        )


def kept_together(dense, save, save_steps, t, exact, driven: bool) -> None:
    """Raise if what is to be kept of a solve cannot be kept, or not together."""
    for name, value in (("dense", dense), ("save_steps", save_steps)):
        instead = "Ask for as many times in `t` as are needed."
        without_signals(name, flag(name, value) and driven, instead)
    if dense and save_steps:
        raise ValueError(
            "`dense` and `save_steps` keep the same steps: pass dense=True, and evaluate `sol.dense` where "
            "it is needed; or save_steps=True."
        )
    if dense and save is not None:
        raise ValueError(
            "`dense` keeps states, and `save` is there to keep none: leave it out, and apply the function to "
            "what `sol.dense(t)` returns, by jax.vmap."
        )
    if save_steps and len(t) != 2:
        raise ValueError(
            "`save_steps` keeps the steps from the first time to the last, and no times between: pass "
            f"t=[t0, t1]; got {len(t)} times."
        )
    if dense and len(t) == 0:
        raise ValueError("`dense` is the solution from t[0] to t[-1]: pass t=[t0, t1].")
    if dense:
        without_lost_digits("dense", exact, t.dtype)


def kept(dense, save, save_steps, exact, driven: bool, y0, t, func_time, args):
    """What is to be kept of a solve, checked: `save` as a jaxpr, and the arrays that it looks at."""
    kept_together(dense, save, save_steps, t, exact, driven)
    return saved_of(save, exact, y0, t, func_time, args)


def saved_of(save, exact, y0, t, func_time, args) -> tuple[Trace | None, list | None]:
    """`save` as a jaxpr, and the arrays that it looks at; None if there is none."""
    if save is None:
        return None, None
    if not callable(save):
        raise TypeError(
            f"`save` must be a function of the state, save(y, t, *args); got {type(save).__name__}."
        )
    in_order(SAVE, save)
    trace, leaves = trace_of(save, y0, t, func_time, args, as_rows, SAVE)
    check_resolution(exact, func_time, trace, SAVE)
    return trace.needed(leaves)


def as_rows(kept: PyTree, y: PyTree) -> PyTree:
    """What `save` returned as arrays of floats; a TypeError if it is none."""

    def leaf(path, x):
        where = f"save(y, t, *args){jax.tree_util.keystr(path)}"
        return jnp.asarray(x, dtype_of(where, x, ": `save` returns a pytree of arrays"))

    if not jax.tree.leaves(kept):
        raise TypeError(
            f"`save` must return an array, or a pytree of arrays: it returned {kept!r}. Its arguments are "
            "(y, t, *args), in this order."
        )
    return jax.tree_util.tree_map_with_path(leaf, kept)


def no_varying(inputs) -> None:
    """Raise if JAX checks what varies over a mesh, or is split over it: loops that begin with zeros do not
    pass it."""
    not_split(inputs)
    for x in jax.tree.leaves(inputs):
        axes = getattr(jax.typeof(x), "manual_axis_type", None)
        if axes is not None and axes.varying:
            raise TypeError(
                "inside of jax.shard_map a solve needs check_vma=False: jax.shard_map(..., "
                "check_vma=False). A gradient of something replicated is then summed by jax.lax.psum."
            )


def named_adjoint(adjoint, method: Method) -> Callable:
    if adjoint == "backsolve":
        method.backwards()
    no_foreign("`adjoint`", adjoint)
    if callable(adjoint):
        return adjoint
    if not isinstance(adjoint, str) or adjoint not in adjoints.named:
        raise ValueError(
            f"`adjoint` must be one of {list(adjoints.named)} or a function; got {adjoint!r}."
        )
    return adjoints.named[adjoint]


def trace_of(func, y0, t, func_time, args, checked=None, role: Role = FUNC) -> tuple[Trace, list]:
    """func as a jaxpr; the arrays it depends on: what it closes over, its own, those of args.

    `checked(result, y)` is what func returned, if it may; by default a derivative of y. `role` says what
    func is for, in messages.
    """
    checked = checked or like_state
    of_numbers = lambda x: isinstance(x, jax.Array | np.ndarray | np.generic | float | complex)
    numbers, static = eqx.partition((func, args), of_numbers)
    arrays = jax.tree.map(jnp.asarray, numbers)
    origin = jax.tree.flatten(static)[::-1]
    for x in origin[1]:
        no_foreign(f"an argument of {role.name}, or what it holds,", x)

    def derivative(arrays, y, t):
        func, args = eqx.combine(arrays, static)
        with explained(role, y, args):
            result = func(y, t, *args)
        return checked(result, y)

    given = arrays, y0, jax.ShapeDtypeStruct((), func_time)
    with tracing():
        closed, trace = once(
            derivative, given, (static, role, checked), (func, y0, args),
            lambda jaxpr, out_tree: Trace(jaxpr, out_tree, origin),
        )  # fmt: skip
    return trace, [*map(jnp.asarray, closed.consts), *jax.tree.leaves(arrays)]


def like_state(k, y, role: Role = FUNC):
    """What func returned, or another function whose results are like its own, if it is a derivative of y; else
    a TypeError that says what it is."""
    if isinstance(k, Parts):
        return Parts(*(like_state(part, y) for part in k))
    one = jax.tree.structure(0)
    if jax.tree.structure(y) == one and isinstance(k, list | tuple):
        k = jnp.stack([jnp.asarray(x) for x in k]) if k else jnp.zeros(0, y.dtype)
    elif jax.tree.structure(k) == one and isinstance(y, list | tuple) and jnp.shape(k) == (len(y),):
        k = type(y)(k)
    if jax.tree.structure(k) != jax.tree.structure(y):
        raise TypeError(
            f"{role.name} must return a derivative like y0: y0 is {jax.tree.structure(y)}, {role.name} "
            f"returned {jax.tree.structure(k)}. {role.order}{no_vector(y)}"
        )
    return jax.tree_util.tree_map_with_path(partial(like_leaf, role), k, y)


def like_leaf(role: Role, path, k, y):
    name, where = role.name, jax.tree_util.keystr(path)
    k = jnp.asarray(k)
    if k.shape != y.shape:
        raise TypeError(
            f"{name} returned shape {k.shape} where y0{where} has shape {y.shape}. {role.order}"
        )
    if not jnp.issubdtype(k.dtype, jnp.inexact):
        raise TypeError(
            f"{name} returned dtype {k.dtype} where y0{where} is {y.dtype}: use floats."
        )
    if jnp.iscomplexobj(k) and not jnp.iscomplexobj(y):
        raise TypeError(
            f"{name} returned {k.dtype} where y0{where} is real: pass a complex y0, or the real part."
        )
    if jnp.finfo(k.dtype).eps > jnp.finfo(y.dtype).eps:
        not_again()  # so that it is said in every call
        warnings.warn(
            f"{name} returned {k.dtype} where y0{where} is {y.dtype}: the solution is only as accurate "
            f"as {name}.",
            stacklevel=2,
        )
    return k.astype(y.dtype)
