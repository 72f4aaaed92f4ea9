"""Control signals: functions of time given by values at knots, at which steps are aligned.

A `Signal` among the args of a solve is found there, and the solve is broken at its knots, so that no
step crosses a jump or a corner of it. Gradients reach its values and its knots.
"""

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

    Args:
        ts: knots, shape (n,), increasing, n >= 2.
        us: values there, shape (n, ...).
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
        ts, us = (x if isinstance(x, Tracer) else jnp.asarray(x) for x in (ts, us))
        if ts.ndim != 1 or len(ts) < 2 or us.shape[:1] != ts.shape:
            raise ValueError(
                f"A signal needs knots of shape (n,), n >= 2, and values of shape (n, ...); got "
                f"{ts.shape} and {us.shape}."
            )
        if not isinstance(ts, Tracer) and not bool(np.all(np.diff(np.asarray(ts)) > 0)):
            raise ValueError("The knots `ts` of a signal must increase.")
        self.ts, self.us, self.kind = ts, us, kind

    def __call__(self, t) -> Float[Array, "..."]:
        """u(t)."""
        return self.piece(t)(t)

    def piece(self, t) -> "Piece":
        """The polynomial that holds around t."""
        i = jnp.searchsorted(self.ts, t, side="right") - 1
        inner = jnp.clip(i, 0, len(self.ts) - 2)
        ts, us = (x[jnp.stack([inner, inner + 1])] for x in (self.ts, self.us))
        flat = (i < 0) | (i >= len(self.ts) - 1)
        before = jnp.where(i < 0, us[0], jnp.where(flat, us[1], us[0]))
        if self.kind == "previous":
            return Piece(ts, jnp.stack([before, before]), None)
        slopes = None
        if self.kind == "cubic":
            slopes = jnp.where(flat, 0, self.slopes()[jnp.stack([inner, inner + 1])])
        return Piece(ts, jnp.where(flat, jnp.stack([before, before]), us), slopes)

    def slopes(self):
        """Of the cubic at its knots: central differences, one-sided at the ends."""
        bend = lambda x: x.reshape((-1,) + (1,) * (self.us.ndim - 1))
        inner = (self.us[2:] - self.us[:-2]) / bend(self.ts[2:] - self.ts[:-2])
        first = (self.us[1:2] - self.us[:1]) / bend(self.ts[1:2] - self.ts[:1])
        last = (self.us[-1:] - self.us[-2:-1]) / bend(self.ts[-1:] - self.ts[-2:-1])
        return jnp.concatenate([first, inner, last])


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


def is_signal(x) -> bool:
    return isinstance(x, Signal)


def signals_in(args: PyTree) -> list[Signal]:
    """The signals among some arguments."""
    return [x for x in jax.tree.leaves(args, is_leaf=is_signal) if is_signal(x)]


def piecewise(solve, func, y0: PyTree, t, args, signals: list[Signal]) -> Solution:
    """The solve from knot to knot, by a scan: `solve(func, y0, ts, *args)` with pieces for signals.

    A stretch of the solve knows all outputs; those outside it are moved onto its ends, and cost
    nothing. Costs two evaluations of func a stretch more than a solve that is not broken. Limits of
    steps hold for each stretch.
    """
    t = jnp.asarray(t, jnp.result_type(float) if not hasattr(t, "dtype") else None)
    low, high = jnp.minimum(t[0], t[-1]), jnp.maximum(t[0], t[-1])
    knots = jnp.concatenate([s.ts.astype(t.dtype) for s in signals])
    edges = jnp.sort(jnp.concatenate([jnp.clip(knots, low, high), low[None], high[None]]))
    edges = jnp.where(t[-1] < t[0], edges[::-1], edges)

    def stretch(carry, ends):
        y, status, stats, reached = carry
        a, b = ends
        inside = jnp.clip(t, jnp.minimum(a, b), jnp.maximum(a, b))
        ts = jnp.concatenate([a[None], inside, b[None]])
        middle = lax.stop_gradient((a + b) / 2)
        given = jax.tree.map(
            lambda x: x.piece(middle) if is_signal(x) else x, args, is_leaf=is_signal
        )
        part = solve(func, y, ts, *given)
        y = jax.tree.map(lambda y: y[-1], part.ys)
        fine = status == Status.SUCCESS.value
        status = jnp.where(fine, part.status, status)
        stats = jax.tree.map(jnp.add, stats, part.stats)
        reached = jnp.where(fine, part.reached, reached)
        rows = jax.tree.map(lambda y: y[1:-1], part.ys)
        return (y, status, stats, reached), (rows, part.heuristics)

    zero = jnp.zeros((), jnp.int32)
    start = (y0, zero, Stats(zero, zero, zero), t[0])
    (_, status, stats, reached), (parts, estimates) = lax.scan(
        stretch, start, (edges[:-1], edges[1:])
    )
    forward = jnp.where(t[-1] < t[0], -1, 1).astype(t.dtype)
    # Row j belongs to the last stretch that starts before it (the first one has the start).
    index = jnp.sum(forward * edges[1:-1, None] < forward * t[None], axis=0)
    rows = jnp.arange(len(t))
    ys = jax.tree.map(lambda y: y[index, rows], parts)
    return Solution(t, ys, status, stats, reached, jax.tree.map(jnp.sum, estimates))
