"""Control signals: functions of time given by values at knots, at which steps are aligned.

A solve is broken at the knots of the signals that func asks, so that no step crosses a jump or a
corner of them. It does not matter where a signal lives: among the args, in a module, in what func
closes over, or made inside of func. To know its piece every signal asks one operation, `locate`,
which is found in the jaxpr of func, together with the time for which it was asked. Between two knots
its answer is one number, so that what a solve sees of a signal is a polynomial. Gradients reach its
values and its knots.
"""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, PyTree

from jaxode import tree
from jaxode.kernels.traces import Trace, one_equation, variables, without_dead_code
from jaxode.solution import Solution, Stats, Status
from jaxode.switches import moving

KINDS = ("linear", "previous", "cubic", "backward_hermite")


class Signal(eqx.Module):
    """A function of time through the points (ts[i], us[i]); constant before the first, after the last.

    A solve ends a step at every knot, wherever func has the signal from, for `u(t)`, and for `u(s)`
    where s is affine in t: a delay `u(t - 1)`, another unit `u(60 * t)`. At any other time, such as
    `u(t % 24)` or `u(y[0])`, and inside of a `jax.lax.scan` or `while_loop` or a function with a custom
    derivative rule, u has its right value, but steps are not aligned with its knots: choose `hmax`
    below the width of what must not be missed.

    Args:
        ts: knots, shape (n,), n >= 2, not decreasing. At equal ones u jumps; so a ragged signal may be
            padded by its last knot and value. Integers become floats.
        us: values there, shape (n, ...). Integers and booleans become floats. Values that are NaN
            matter only to a solve that reaches the piece beside them.
        kind: "linear"; "previous" (u keeps its value until the next knot: a zero-order hold); "cubic"
            (Hermite, with slopes by central differences: Catmull-Rom); or "backward_hermite" (Hermite, with
            slopes by backward differences, so that no piece depends on what comes after its end).

    >>> import jax.numpy as jnp
    >>> from jaxode import Signal, odeint
    >>> u = Signal([0, 1, 2], [0, 1, 0], "previous")
    >>> float(u(0.5)), float(u(1.0))
    (0.0, 1.0)
    >>> ys = odeint(lambda y, t: u(t), jnp.array(0.0), [0.0, 1.5, 3.0])
    >>> [round(float(y), 6) for y in ys]
    [0.0, 0.5, 1.0]
    >>> ys = odeint(lambda y, t: u(t - 1), jnp.array(0.0), [0.0, 1.5, 3.0])  # a delay
    >>> [round(float(y), 6) for y in ys]
    [0.0, 0.0, 1.0]

    The cubic of kind "backward_hermite" is, on the piece of width h from knot i, with x = (t - ts[i]) / h,
    d = us[i + 1] - us[i] and m the slope of the line through the two knots before (on the first piece, and
    after a jump or a missing value, d / h: a line),

        u(t) = us[i] + x d + x (1 - x)^2 (h m - d)

    It is continuous with its derivative (Morrill et al. 2021, arXiv 2106.11028), which the line is
    not, and needs no value beyond the next knot, as the line and unlike "cubic".

    >>> u = Signal([0, 1, 2], [0, 1, 1], "backward_hermite")
    >>> float(u(1.5)), float(u.derivative(1.0)), float(u.derivative(2.0))
    (1.125, 1.0, 0.0)
    """

    ts: Float[Array, " n"]
    us: Float[Array, "n ..."]
    kind: str = eqx.field(static=True)

    def __init__(self, ts, us, kind: str = "linear"):
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}, got {kind!r}.")
        given = ts
        ts, us = as_floats("ts", ts), as_floats("us", us)
        if ts.ndim != 1 or len(ts) < 2 or us.shape[:1] != ts.shape:
            raise ValueError(
                f"A signal needs knots of shape (n,), n >= 2, and values of shape (n, ...); got "
                f"{ts.shape} and {us.shape}."
            )
        if jnp.iscomplexobj(ts):
            raise TypeError(f"The knots `ts` of a signal must be real, got dtype {ts.dtype}.")
        if tree.known(ts):
            check_knots(np.asarray(given, np.float64), ts.dtype)
        self.ts, self.us, self.kind = ts.astype(tree.widest(ts.dtype, jnp.float32)), us, kind

    def __call__(self, t) -> Float[Array, "..."]:
        """u(t); at an array of times, the values with the axes of t in front."""
        return self.at(t)

    def derivative(self, t) -> Float[Array, "..."]:
        """du/dt; at an array of times, with the axes of t in front.

        At a knot that of the piece that begins there; 0 before the first knot, and from the last one on. A
        solve is broken at the knots for it too, so that it sees one polynomial on each side.

        >>> from jaxode import Signal
        >>> u = Signal([0, 1, 3], [0, 1, 0])
        >>> [float(x) for x in u.derivative([0.5, 1.0, 4.0])]
        [1.0, -0.5, 0.0]
        """
        return self.at(t, derivative=True)

    def at(self, t, derivative: bool = False):
        """The value or the derivative at t, compiled where it is known."""
        t = jnp.asarray(t)
        if t.weak_type or not jnp.issubdtype(t.dtype, jnp.inexact):
            t = lax.convert_element_type(t, self.ts.dtype)
        return (evaluated if tree.known(self, t) else evaluate)(self, t, derivative)

    @classmethod
    def rectilinear(cls, ts, us) -> "Signal":
        """The path of (time, values) that moves along time alone, and then along the values alone.

        With s as its parameter, which is not time, X(2 i) = (ts[i], us[i]) and X(2 i + 1) = (ts[i + 1], us[i]),
        lines in between (Morrill et al. 2021, arXiv 2106.11028). A value is not known before its
        time: what is driven by the path is causal, also where missing values were filled by the last ones.

        Args:
            ts: times, shape (n, *batch), n >= 2.
            us: values, shape (n, *batch, d).

        Returns:
            A linear signal with the 2 n - 1 knots 0, 1, 2, ... and values of shape (2 n - 1, *batch, 1 + d).

        >>> from jaxode import Signal
        >>> Signal.rectilinear([0.0, 0.5, 2.0], [[1.0], [3.0], [2.0]]).us.tolist()
        [[0.0, 1.0], [0.5, 1.0], [0.5, 3.0], [2.0, 3.0], [2.0, 2.0]]
        """
        ts, us = as_floats("ts", ts), as_floats("us", us)
        if us.shape[:-1] != ts.shape or ts.ndim == 0 or len(ts) < 2:
            raise ValueError(
                "A rectilinear path needs times of shape (n, *batch), n >= 2, and values of shape "
                f"(n, *batch, d); got {ts.shape} and {us.shape}."
            )
        ts = ts[..., None].astype(us.dtype)
        points = jnp.concatenate([ts, us], axis=-1)
        corners = jnp.concatenate([ts[1:], us[:-1]], axis=-1)
        pairs = jnp.stack([points[:-1], corners], axis=1).reshape(-1, *points.shape[1:])
        path = jnp.concatenate([pairs, points[-1:]])
        return cls(np.arange(len(path), dtype=tree.real_dtype(us)), path)

    def piece(self, t) -> "Piece":
        """The polynomial that holds around t."""
        t = jnp.asarray(t)
        wide = tree.widest(self.ts.dtype, t.dtype) if not t.weak_type else self.ts.dtype
        knots = lax.convert_element_type(self.ts, wide)
        i, n = locate(knots, lax.convert_element_type(t, wide)), len(knots)
        inner = jnp.clip(i, 0, n - 2)
        ts, us = (lax.dynamic_slice_in_dim(x, inner, 2) for x in (knots, self.us))
        width = ts[1] - ts[0]
        held = jnp.where(i >= n - 1, us[1], us[0])
        held = jnp.stack([held, held])
        flat = (i < 0) | (i >= n - 1) | ~((width > 0) & (width < jnp.inf))
        if self.kind == "previous":
            flat = jnp.ones_like(flat)
        slopes = None
        if self.kind in SLOPES:
            around = jnp.clip(inner + jnp.arange(-1, 3, dtype=inner.dtype), 0, n - 1)
            slopes = SLOPES[self.kind](*(x.at[around].get(mode="clip") for x in (knots, self.us)))
            slopes = jnp.where(flat, 0, slopes)
        unit = jnp.asarray(np.arange(2), wide)
        return Piece(jnp.where(flat, unit, ts), jnp.where(flat, held, us), slopes)

    def slopes(self):
        """Of a cubic at its knots: central differences, or backward ones, one-sided at the ends."""
        around = lambda x: jnp.concatenate([x[:1], x, x[-1:]])
        return SLOPES.get(self.kind, central_slopes)(around(self.ts), around(self.us))


class Piece(eqx.Module):
    """What a signal is between two knots: what func sees of it."""

    ts: Float[Array, "2"]
    us: Float[Array, "2 ..."]
    slopes: Float[Array, "2 ..."] | None

    def __call__(self, t):
        width = self.ts[1] - self.ts[0]
        x = ((t - self.ts[0]) / width).astype(self.us.dtype)
        if self.slopes is None:
            return self.us[0] + x * (self.us[1] - self.us[0])
        h = width.astype(self.us.dtype)
        d = self.us[1] - self.us[0]
        a, b = h * self.slopes[0] - d, d - h * self.slopes[1]
        return self.us[0] + x * d + x * (1 - x) * ((1 - x) * a + x * b)

    def derivative(self, t):
        """The derivative of the polynomial."""
        width = self.ts[1] - self.ts[0]
        h, d = width.astype(self.us.dtype), self.us[1] - self.us[0]
        if self.slopes is None:
            return d / h
        x = ((t - self.ts[0]) / width).astype(self.us.dtype)
        a, b = h * self.slopes[0] - d, d - h * self.slopes[1]
        return (d + (1 - 2 * x) * ((1 - x) * a + x * b) + x * (1 - x) * (b - a)) / h


def evaluate(signal: Signal, t, derivative: bool = False):
    """u(t), or du/dt."""
    if t.ndim:
        return jax.vmap(partial(evaluate, signal, derivative=derivative))(t)
    piece = signal.piece(t)
    t = lax.convert_element_type(t, piece.ts.dtype)
    return piece.derivative(t) if derivative else piece(t)


evaluated = jax.jit(evaluate, static_argnums=2)  # so that an eager call compiles once


def as_floats(name, x):
    """Numbers as an array of floats."""
    try:
        with moving():
            x = np.asarray(x) if tree.known(x) else jnp.asarray(x)
            if x.dtype.kind in "OSUMm":
                raise ValueError(f"got dtype {x.dtype}")
            x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` of a signal must be an array of numbers: {error}") from error
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))


def check_knots(ts, dtype):
    """Raise if these (in float64) decrease, or if they cannot be told apart in the dtype of knots."""
    if not np.all(ts[1:] >= ts[:-1]):
        raise ValueError("The knots `ts` of a signal must increase (equal ones make a jump).")
    if crowded(ts[np.isfinite(ts)], dtype):
        raise ValueError(
            f"The knots `ts` of a signal, {ts[0]:.17g} to {ts[-1]:.17g}, cannot be told apart in "
            f"{jnp.dtype(dtype).name}. Count time from a moment nearby: subtract the same number from "
            "the knots and from the times `t` of the solve; or set jax_enable_x64."
        )


def crowded(ts: np.ndarray, dtype) -> bool:
    """Whether these times lose what tells them apart in this dtype, and would not if they began at 0.

    That is, a rounding is more than 1 % of the least distance, and 8 times that of ts - ts[0].
    """
    gaps = np.abs(np.diff(ts))
    if not np.any(gaps > 0):
        return False
    rounding = lambda ts: np.max(np.abs(ts.astype(dtype).astype(np.float64) - ts))
    lost = rounding(ts)
    return bool(lost > 0.01 * np.min(gaps[gaps > 0]) and lost > 8 * rounding(ts - ts[0]))


def differences(ts, us):
    """The widths and rises between knots: 0 where there is a jump, the end, or what is no number."""
    bend = lambda x: x.reshape((-1,) + (1,) * (us.ndim - 1))
    dtype = tree.real_dtype(us) if us.dtype.itemsize > 2 else us.dtype
    widths = ts[1:] - ts[:-1]
    finite = jnp.isfinite(us[1:]) & jnp.isfinite(us[:-1])
    sound = bend((widths > 0) & (widths < jnp.inf)) & finite
    # Zero where it is not sound, before anything is divided: then no derivative is 0 times NaN.
    widths = jnp.where(sound, bend(widths).astype(dtype), 0)
    rises = jnp.where(sound, us[1:] - us[:-1], 0)
    return widths, rises


def central_slopes(ts, us):
    """At each knot but the first and last: a central difference, one-sided beside what is no number,
    a jump or the end."""
    widths, rises = differences(ts, us)
    return ratio(rises[1:] + rises[:-1], widths[1:] + widths[:-1])


def backward_slopes(ts, us):
    """At each knot but the first and last: the difference to the one before, or, where there is none that
    is sound, to the one after."""
    widths, rises = differences(ts, us)
    before = widths[:-1] > 0
    return ratio(*(jnp.where(before, x[:-1], x[1:]) for x in (rises, widths)))


def ratio(rise, width):
    """The slope of a line; 0 where it has no width."""
    return rise / jnp.where(width > 0, width, 1).astype(rise.dtype)


SLOPES = {"cubic": central_slopes, "backward_hermite": backward_slopes}
# Outputs of a stretch there is room for: at least so many, and so many times as there are on average.
FEW, ROOM = 8, 8


# The one operation that a signal asks.


def index(ts, t):
    """The last i with ts[i] <= t; -1 before all. `ts` has the first axes of `t`, and knots last."""
    find = lambda ts, t: jnp.searchsorted(ts, t, side="right").astype(jnp.int32) - 1
    for _ in ts.shape[:-1]:
        find = jax.vmap(find)
    return find(ts, t)


def batch(args, axes):
    (ts, t), (d_ts, d_t) = args, axes
    if d_ts is None:  # the new axis of t goes behind those that it shares with the knots
        shared = ts.ndim - 1
        return locate(ts, jnp.moveaxis(t, d_t, shared)), shared
    ts = jnp.moveaxis(ts, d_ts, 0)
    t = jnp.broadcast_to(t, (len(ts), *t.shape)) if d_t is None else jnp.moveaxis(t, d_t, 0)
    return locate(ts, t), 0


def jvp(primals, _tangents):
    i = locate(*primals)
    return i, ad.Zero(jax.typeof(i).to_tangent_aval())


primitive = core.Primitive("locate")
locate = primitive.bind
primitive.def_impl(jax.jit(index))
primitive.def_abstract_eval(lambda ts, t: ShapedArray(t.shape, jnp.dtype("int32")))
mlir.register_lowering(primitive, mlir.lower_fun(index, multiple_results=False))
ad.primitive_jvps[primitive] = jvp
batching.primitive_batchers[primitive] = batch


# func, taken apart at the signals that it asks.

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
SHORT = 8  # equations of a call such as `jnp.clip`, which is looked into
# Which operands may depend on an affine time, so that the result is affine in it, too.
LINEAR = "neg convert_element_type reshape broadcast_in_dim squeeze slice copy copy_p div".split()
AFFINE = {"mul": [[0], [1]], **{name: [[0]] for name in LINEAR}}
SUMS = ("add", "sub", "concatenate", "add_any")  # any of them
# Where these cut the time off, it has a value that it has anyway: they add no piece.
CUTS = {"max": [[0], [1]], "min": [[0], [1]], "clamp": [[1]]}


def asks(jaxpr) -> bool:
    """Whether a jaxpr asks a signal."""
    inside = lambda eqn: any(map(asks, core.jaxprs_in_params(eqn.params)))
    return any(eqn.primitive is primitive or inside(eqn) for eqn in jaxpr.eqns)


def inlined(jaxpr: core.Jaxpr, *args, ask=locate) -> list:
    """The values of a jaxpr. Calls that ask a signal are no calls: its question stands on top, and is
    for `ask`."""
    values = dict(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else values[v]
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, list(core.jaxprs_in_params(eqn.params))
        xs = list(map(read, eqn.invars))
        if eqn.primitive is primitive:
            outs = [ask(*xs)]
        elif name in CALLS and any(asks(x) or len(x.eqns) <= SHORT for x in inner):
            called = lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)
            outs = inlined(*opened(next(filter(called, eqn.params.values())), xs), ask=ask)
        elif name == "cond" and any(map(asks, inner)):
            outs = chosen(eqn.params["branches"], *xs, ask=ask)
        else:
            one, ins = one_equation(jaxpr, eqn)
            outs = one(*map(read, ins))
        values.update(zip(eqn.outvars, outs, strict=True))
    return list(map(read, jaxpr.outvars))


def opened(jaxpr: core.Jaxpr | core.ClosedJaxpr, args, all_given: bool = False) -> tuple:
    """A jaxpr whose constants are its first arguments, and all arguments; `all_given`: args begins with the
    constants (in JAX 0.12 every jaxpr is a closed one, and so has values of its own for them)."""
    closed = isinstance(jaxpr, core.ClosedJaxpr)
    consts = jaxpr.consts if closed and not all_given else []
    inner = jaxpr.jaxpr if closed else jaxpr
    return inner.replace(constvars=(), invars=[*inner.constvars, *inner.invars]), *consts, *args


def chosen(branches, i, *args, ask):
    """`cond` with the questions of its branches on top of it: an answer is only a number."""

    def with_answers(branch):
        jaxpr, *given = opened(branch, args)
        told = [ask(*question) for question in questions(jaxpr, given)]

        def taken():
            answers = iter(told)
            return inlined(jaxpr, *given, ask=lambda *_: next(answers))

        return taken

    return lax.switch(i, list(map(with_answers, branches)))


def questions(jaxpr, args):
    """What a jaxpr asks of signals, in turn: knots and times. Nothing else of it is done."""

    def asked(*args):
        found = []
        inlined(jaxpr, *args, ask=lambda *question: found.append(question) or locate(*question))
        return found

    flat, *args = opened(jax.make_jaxpr(asked)(*args), args)
    found = values_of(flat, flat.outvars, dict(zip(flat.invars, args)), flat.eqns)
    return zip(found[::2], found[1::2])


def values_of(jaxpr, outs, values: dict, eqns) -> list:
    """Variables of a jaxpr by these equations, without effects, where others have these values."""
    eqns = [e for e in eqns if not e.effects and values.keys().isdisjoint(e.outvars)]
    part = jaxpr.replace(constvars=(), invars=list(values), outvars=list(outs), eqns=eqns)
    return core.jaxpr_as_fun(core.ClosedJaxpr(without_dead_code(part), ()))(*values.values())


class Split:
    """What func asks of its signals, and func when they have answered.

    Every equation has a level: 0 if it depends neither on an answer nor on y and t; 1 if it depends on
    answers; 2 if on y or t. `asked` are the questions with one answer between two knots: the knots are
    of level 0, and the time is affine in t. Their answers are of level 1.

    Args:
        trace: func, as the solver has it: a jaxpr of (leaves, y, t).
    """

    def __init__(self, trace: Trace, leaves, y0, t):
        func, *args = opened(trace.jaxpr, [*leaves, *jax.tree.leaves(y0), t], all_given=True)
        self.jaxpr, *args = opened(jax.make_jaxpr(partial(inlined, func))(*args), args)
        *given, self.t = self.jaxpr.invars
        y = given[len(given) - len(jax.tree.leaves(y0)) :]
        self.values = dict(zip(given[: -len(y) or None], args))
        self.asked: list = []
        self.uncut: list = []  # the equations, without those that cut an affine time off
        self.level: dict = dict.fromkeys([*y, self.t], 2)
        own = self.levelled({self.t: self.t})
        # The equations that stay in func; it is given what they need of the others.
        held = without_dead_code(self.jaxpr.replace(eqns=own))
        bound = {*y, self.t, *(v for eqn in held.eqns for v in eqn.outvars)}
        used = variables([*(v for eqn in held.eqns for v in eqn.invars), *held.outvars])
        self.leaves = [v for v in dict.fromkeys(used) if v not in bound]
        held = held.replace(invars=[*self.leaves, *y, self.t])
        self.trace = Trace(held, trace.out_tree, trace.key)

    def levelled(self, affine: dict) -> list:
        """The equations of levels 0 and 2. `affine` are the affine variables, and the same not cut off."""
        own = []
        for eqn in self.jaxpr.eqns:
            name, levels = eqn.primitive.name, list(map(self.of, eqn.invars))
            moving = [i for i, level in enumerate(levels) if level == 2]
            straight = moving and all(eqn.invars[i] in affine for i in moving)
            ins = [v if isinstance(v, core.Literal) else affine.get(v, v) for v in eqn.invars]
            self.uncut.append(eqn.replace(invars=ins))
            level = 2 if eqn.effects else max(levels, default=0)
            if eqn.primitive is primitive and straight and levels[0] == 0:
                self.asked.append(self.uncut[-1])
                level = 1
            elif eqn.primitive is primitive:
                level = max(level, 1)  # of a known time: not to be asked again and again
            elif straight and moving in CUTS.get(name, ()):
                affine[eqn.outvars[0]] = ins[moving[0]]
            elif straight and (name in SUMS or moving in AFFINE.get(name, ())):
                real = [v for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
                affine |= dict(zip(real, real))
            self.level.update(dict.fromkeys(eqn.outvars, level))
            own += [eqn] if level != 1 else []
        return own

    def of(self, v) -> int:
        """The level of a variable."""
        return 0 if isinstance(v, core.Literal) else self.level.get(v, 0)

    def at(self, t, outs, eqns=None) -> list:
        """The values of variables that do not depend on y, at t."""
        values = {**self.values, self.t: lax.convert_element_type(t, self.t.aval.dtype)}
        return values_of(self.jaxpr, outs, values, eqns or self.jaxpr.eqns)

    def knots(self, dtype) -> tuple[Array, Array]:
        """Where pieces meet, as times of func, and whether the knots are in order."""
        knots, times = zip(*(eqn.invars for eqn in self.asked))
        zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
        lines = jax.jvp(lambda t: self.at(t, times, self.uncut), (zero,), (one,))
        found, valid = [], jnp.array(True)
        for ts, at_zero, slope in zip(self.at(zero, knots), *lines):
            valid = valid & jnp.all(ts[..., 1:] >= ts[..., :-1])
            shared = (1,) * (slope.ndim - ts.ndim + 1)
            ts = ts.reshape(*ts.shape[:-1], *shared, ts.shape[-1])
            still = slope[..., None] == 0
            ts = (ts - at_zero[..., None]) / jnp.where(still, 1, slope[..., None])
            found.append(jnp.where(still, jnp.inf, ts).reshape(-1).astype(dtype))
        return jnp.concatenate(found), valid

    def held(self, t) -> list:
        """The leaves of `trace`, func where signals answer as at t: what depends on the answers is known."""
        asked = [eqn.outvars[0] for eqn in self.asked]
        values = {**self.values, **dict(zip(asked, self.at(t, asked)))}
        return values_of(self.jaxpr, self.leaves, values, self.jaxpr.eqns)


def piecewise(solve: Callable, split: Split, y0: PyTree, t: Array) -> tuple[Solution, PyTree]:
    """The solve from knot to knot, by a scan, and the state at its end.

    `solve(leaves, y0, ts)`, the solve of `split.trace`, returns that of a stretch.

    A stretch of the solve has room for so many outputs (`most_inside`), those outside it moved onto its ends.
    It ends, too, where that many outputs are over: with room for all of them in each of as many
    stretches memory was quadratic (8,760 hours: 1.2 GiB). Costs two evaluations of func a stretch more than
    a solve that is not broken. Limits of steps hold for each stretch.
    """
    knots, valid = split.knots(t.dtype)
    t_given = t
    # NaN in a sum: the solve is refused, and derivatives are those of a failed one.
    t = t + lax.stop_gradient(jnp.where(valid & valid_times(t), 0, jnp.nan).astype(t.dtype))
    low, high = jnp.minimum(t[0], t[-1]), jnp.maximum(t[0], t[-1])
    most = most_inside(len(t), len(knots))
    full = lax.stop_gradient(t[most::most])
    knots = jnp.sort(jnp.concatenate([tree.between(knots, low, high), full]))
    knots = jnp.where(t[-1] < t[0], knots[::-1], knots)
    # Not sorted with the others: the solve begins at t[0], and not at a knot that equals it.
    edges = jnp.concatenate([t[:1], knots, t[-1:]])
    forward = jnp.where(t[-1] < t[0], -1, 1).astype(t.dtype)
    # Row j belongs to the last stretch that starts before it (the first one has the start).
    index = jnp.searchsorted(forward * edges[1:-1], forward * t)
    numbers = partial(jnp.arange, dtype=index.dtype)
    first_of = lambda index: jnp.searchsorted(index, numbers(len(edges) - 1))
    # More than there is room for are at its end, where as many empty stretches follow.
    index = index + (numbers(len(t)) - first_of(index)[index]) // most
    first = first_of(index)

    def stretch(carry, ends):
        y, status, stats, reached = carry
        a, b, middle, first = ends
        rows = jnp.minimum(first + numbers(most), len(t) - 1)
        within = tree.between(t[rows], jnp.minimum(a, b), jnp.maximum(a, b))
        ts = jnp.concatenate([a[None], within, b[None]])
        part, y = solve(split.held(middle), y, ts)
        fine = status == Status.SUCCESS.value
        status = jnp.where(fine, part.status, status)
        stats = jax.tree.map(jnp.add, stats, part.stats)
        reached = jnp.where(fine, part.reached, reached)
        rows = jax.tree.map(lambda y: y[1:-1], part.ys)
        return (y, status, stats, reached), (rows, part.heuristics)

    zero = jnp.zeros((), jnp.int32)
    start = (y0, zero, Stats(zero, zero, zero), lax.stop_gradient(t[0]))
    ends = edges[:-1], edges[1:], middles(lax.stop_gradient(edges)), first
    (end, status, stats, reached), (parts, estimates) = lax.scan(stretch, start, ends)
    rows = numbers(len(t)) - first[index]
    ys = jax.tree.map(lambda y: y[index, rows], parts)
    estimates = jax.tree.map(jnp.sum, estimates)
    return Solution(t_given, ys, status, stats, reached, estimates), end


def most_inside(outputs: int, knots: int) -> int:
    """For how many outputs there is room in a stretch: a few times as many as there are on average, so that few
    stretches end because of it; at least `FEW`."""
    return min(outputs, max(FEW, -(-ROOM * outputs // (knots + 1))))


def middles(edges) -> Array:
    """A time inside of each stretch; of an empty one that of the last before it that is not, or of the
    first, so that it has a piece which somebody sees."""
    middle = (edges[:-1] + edges[1:]) / 2
    full = edges[:-1] != edges[1:]
    numbers = jnp.arange(len(middle))
    last = lax.cummax(jnp.where(full, numbers, -1))
    return middle[jnp.where(last < 0, jnp.argmax(full), last)]


def valid_times(t):
    """Whether these times are finite and go one way."""
    steps = jnp.diff(t) * jnp.sign(t[-1] - t[0])
    back_and_forth = (t[-1] == t[0]) & jnp.any(t != t[0])
    return jnp.all(jnp.isfinite(t)) & jnp.all(steps >= 0) & ~back_and_forth
