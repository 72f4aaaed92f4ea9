"""Control signals: functions of time given by values at knots, at which steps are aligned.

A `Signal` that func calls at the time of the solve is found while func is traced, wherever it lives
(in args, in a module, closed over), and the solve is broken at its knots, so that no step crosses a
jump or a corner of it. Gradients reach its values and its knots.
"""

import contextlib
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from jaxode.solution import Solution, Stats, Status

KINDS = ("linear", "previous", "cubic")


class Signal(eqx.Module):
    """A function of time through the points (ts[i], us[i]); constant before the first, after the last.

    Steps of a solve end at the knots of a signal that func calls at its own time, `u(t)`. Called at
    another time, such as `u(t - 1)`, it has its right value there, but steps do not know of its knots.

    Args:
        ts: knots, shape (n,), not decreasing, n >= 2. Where two are equal there is a jump, to the value
            of the latter. NaN at the end pads.
        us: values there, shape (n, ...). Integers and booleans become floats.
        kind: "linear"; "previous" (u keeps its value until the next knot: a zero-order hold); or
            "cubic" (Hermite, with slopes by finite differences: Catmull-Rom).

    >>> import jax.numpy as jnp
    >>> from jaxode import Signal, odeint
    >>> u = Signal(jnp.array([0.0, 1.0, 2.0]), jnp.array([0.0, 1.0, 0.0]), "previous")
    >>> float(u(0.5)), float(u(1.0))
    (0.0, 1.0)
    >>> ys = odeint(lambda y, t, u: u(t), jnp.array(0.0), [0.0, 1.5, 3.0], u)
    >>> [round(float(y), 6) for y in ys]
    [0.0, 0.5, 1.0]
    """

    ts: Float[Array, " n"]
    us: Float[Array, "n ..."]
    kind: str = eqx.field(static=True)

    def __init__(self, ts, us, kind: str = "linear"):
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}, got {kind!r}.")
        ts, us = map(as_floats, (ts, us))
        if ts.ndim != 1 or len(ts) < 2 or us.shape[:1] != ts.shape:
            raise ValueError(
                f"A signal needs knots of shape (n,), n >= 2, and values of shape (n, ...); got "
                f"{ts.shape} and {us.shape}."
            )
        if not isinstance(ts, Tracer) and np.any(np.diff(np.asarray(ts)) < 0):
            raise ValueError("The knots `ts` of a signal must increase.")
        self.ts, self.us, self.kind = ts, us, kind
        if (trace := _trace.get()) is not None:
            trace.made.add(id(self))

    def __call__(self, t) -> Float[Array, "..."]:
        """u(t)."""
        trace = _trace.get()
        if trace is not None and trace.time is t:
            return trace.value(self, t)
        return self.piece(t)(t)

    def piece(self, t) -> "Piece":
        """The polynomial that holds around t."""
        i = jnp.searchsorted(self.ts, t, side="right") - 1
        inner = jnp.clip(i, 0, len(self.ts) - 2)
        ts, us = (x[jnp.stack([inner, inner + 1])] for x in (self.ts, self.us))
        flat = (i < 0) | (i >= len(self.ts) - 1) | jnp.isnan(ts[1])
        held = jnp.where((i >= len(self.ts) - 1) & ~jnp.isnan(ts[1]), us[1], us[0])
        if self.kind == "previous":
            return Piece(ts, jnp.stack([held, held]), None)
        slopes = None
        if self.kind == "cubic":
            slopes = jnp.where(flat, 0, self.slopes()[jnp.stack([inner, inner + 1])])
        return Piece(ts, jnp.where(flat, jnp.stack([held, held]), us), slopes)

    def slopes(self):
        """Of the cubic at its knots: central differences, one-sided at the ends."""
        fit = lambda x: x.reshape((-1,) + (1,) * (self.us.ndim - 1))
        difference = lambda a, b: (self.us[b] - self.us[a]) / fit(width(self.ts[a], self.ts[b]))
        inner = difference(slice(None, -2), slice(2, None))
        first, last = (
            difference(slice(0, 1), slice(1, 2)),
            difference(slice(-2, -1), slice(-1, None)),
        )
        return jnp.concatenate([first, inner, last])


class Piece(eqx.Module):
    """What a signal is between two knots."""

    ts: Float[Array, "2"]
    us: Float[Array, "2 ..."]
    slopes: Float[Array, "2 ..."] | None

    def __call__(self, t):
        h = width(self.ts[0], self.ts[1])
        x = ((t - self.ts[0]) / h).astype(self.us.dtype)
        if self.slopes is None:
            # Where both ends are equal it is that value, however far away the knots are.
            return self.us[0] + jnp.where(self.us[1] == self.us[0], 0, x) * (
                self.us[1] - self.us[0]
            )
        h = h.astype(self.us.dtype)
        d = self.us[1] - self.us[0]
        a, b = h * self.slopes[0] - d, d - h * self.slopes[1]
        return self.us[0] + x * d + x * (1 - x) * ((1 - x) * a + x * b)


def width(a, b):
    """b - a; 1 where that is 0, at a jump, or NaN, beyond the last knot: nothing is between them."""
    return jnp.where(b - a > 0, b - a, jnp.ones_like(a))


def as_floats(x):
    """An array of floating-point (or complex) numbers."""
    x = x if isinstance(x, Tracer) else jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))


def is_signal(x) -> bool:
    """Whether x is a signal with which no steps are aligned yet."""
    return isinstance(x, Signal) and not isinstance(x, Aligned)


def signals_in(tree: PyTree) -> list[Signal]:
    """The signals among some arguments."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_signal) if is_signal(x)]


# While func is traced: which signals does it call at its own time, and what are they on this stretch?


class Tracing:
    """The time at which func is traced, the pieces that hold there, and the signals that it calls then."""

    def __init__(self, time, pieces: dict[int, Piece]):
        self.time, self.pieces = time, pieces
        self.called: list[Signal] = []
        self.made: set[int] = set()

    def value(self, signal: Signal, t):
        """The value of a signal at the time of the trace."""
        if id(signal) in self.pieces:
            return self.pieces[id(signal)](t)
        if id(signal) in self.made:
            warnings.warn(
                "func makes a Signal: steps cannot be aligned with its knots. Make it outside of func, "
                "and pass it as an argument.",
                stacklevel=4,
            )
        elif all(signal is not other for other in self.called):
            self.called.append(signal)
        return signal.piece(t)(t)


_trace: ContextVar[Any] = ContextVar("trace", default=None)
_pieces: ContextVar[Any] = ContextVar("pieces", default=None)


@contextlib.contextmanager
def tracing(time):
    """In here signals that are called at this time are collected."""
    trace = Tracing(time, _pieces.get() or {})
    token = _trace.set(trace)
    try:
        yield trace
    finally:
        _trace.reset(token)


@contextlib.contextmanager
def holding(pieces: dict[int, Piece]):
    """In here, on this stretch, these signals are these pieces."""
    token = _pieces.set({**(_pieces.get() or {}), **pieces})
    try:
        yield
    finally:
        _pieces.reset(token)


class Aligned(Signal):
    """A signal among the arguments of func, with the piece of it that holds on this stretch."""

    now: Piece

    def __init__(self, signal: Signal, now: Piece):
        self.ts, self.us, self.kind, self.now = signal.ts, signal.us, signal.kind, now

    def __call__(self, t):
        trace = _trace.get()
        return (self.now if trace is not None and trace.time is t else self.piece(t))(t)


def piecewise(
    solve: Callable, func, y0: PyTree, t, args, signals: list[Signal], closed_over: list[Signal]
) -> Solution:
    """The solve from knot to knot, by a scan: `solve(func, y0, ts, *args)` with pieces for signals.

    `signals` are those among func and args, `closed_over` are others. A stretch of the solve knows all
    outputs; those outside it are moved onto its ends, and cost nothing. Costs two evaluations of func a
    stretch more than a solve that is not broken. Limits of steps hold for each stretch.
    """
    t = jnp.asarray(t, jnp.result_type(float) if not hasattr(t, "dtype") else None)
    low, high = jnp.minimum(t[0], t[-1]), jnp.maximum(t[0], t[-1])
    knots = jnp.concatenate([s.ts.astype(t.dtype) for s in (*signals, *closed_over)])
    knots = jnp.where(jnp.isnan(knots), high, knots)
    edges = jnp.sort(jnp.concatenate([jnp.clip(knots, low, high), low[None], high[None]]))
    edges = jnp.where(t[-1] < t[0], edges[::-1], edges)

    def stretch(carry, ends):
        y, status, stats, reached = carry
        a, b = ends
        inside = jnp.clip(t, jnp.minimum(a, b), jnp.maximum(a, b))
        ts = jnp.concatenate([a[None], inside, b[None]])
        middle = lax.stop_gradient((a + b) / 2)
        align = lambda x: Aligned(x, x.piece(middle)) if is_signal(x) else x
        func_now, given = jax.tree.map(align, (func, args), is_leaf=is_signal)
        with holding({id(s): s.piece(middle) for s in closed_over}):
            part = solve(func_now, y, ts, *given)
        # Between two equal knots there is nothing to solve, and no piece that holds.
        empty = a == b
        ys = jax.tree.map(lambda before, rows: jnp.where(empty, before[None], rows), y, part.ys)
        y = jax.tree.map(lambda y: y[-1], ys)
        now = jnp.where(empty, Status.SUCCESS.value, part.status)
        fine = status == Status.SUCCESS.value
        status = jnp.where(fine, now, status)
        stats = jax.tree.map(lambda s, more: s + jnp.where(empty, 0, more), stats, part.stats)
        reached = jnp.where(fine & ~empty, part.reached, reached)
        rows = jax.tree.map(lambda y: y[1:-1], ys)
        return (y, status, stats, reached), (rows, part.heuristics)

    zero = jnp.zeros((), jnp.int32)
    start = (y0, zero, Stats(zero, zero, zero), t[0])
    (_, status, stats, reached), (parts, estimates) = lax.scan(
        stretch, start, (edges[:-1], edges[1:])
    )
    forward = jnp.where(t[-1] < t[0], -1, 1).astype(t.dtype)
    # Row j belongs to the last stretch that starts before it (the first one has the start).
    before = forward * edges[1:-1, None] < forward * t[None]
    index = jnp.sum(before, axis=0)
    rows = jnp.arange(len(t))
    valid = valid_times(t)
    ys = jax.tree.map(lambda y: jnp.where(valid, y[index, rows], jnp.nan), parts)
    status = jnp.where(valid, status, Status.BAD_INPUT.value)
    return Solution(t, ys, status, stats, reached, jax.tree.map(jnp.sum, estimates))


def valid_times(t):
    """Whether the times are finite and increase, or decrease."""
    steps = jnp.diff(t) * jnp.sign(t[-1] - t[0])
    back_and_forth = (t[-1] == t[0]) & jnp.any(t != t[0])
    return jnp.all(jnp.isfinite(t)) & jnp.all(steps >= 0) & ~back_and_forth
