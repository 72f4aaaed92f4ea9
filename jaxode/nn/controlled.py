"""Neural controlled differential equations (Kidger et al. 2020, arXiv 2005.08926).

A series becomes a path X, a `jaxode.Signal` whose channels are time, values, and how often each value
has been observed so far; the state follows dz = f(z) dX. A recurrent network is a difference equation of that
kind. Which path: see `control_path`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxode import tree
from jaxode.integrate import solve
from jaxode.nn.fields import affine, linears, perceptron
from jaxode.nn.latent import Series, components_seen
from jaxode.nn.neural_ode import last
from jaxode.signals import Signal
from jaxode.solution import Solution

INTERPOLATIONS = ("backward_hermite", "linear", "rectilinear")


class ControlledField(eqx.Module):
    """A multilayer perceptron of z whose output is a matrix of shape (hidden, channels).

    ReLU layers, and tanh at the end, as in the experiments of the paper: without it the state grows out of
    bounds over long series. On any leading axes.

    >>> import jax, jax.numpy as jnp
    >>> from jaxode.nn import ControlledField
    >>> field = ControlledField(4, 3, key=jax.random.key(0))
    >>> field(jnp.ones((5, 4))).shape
    (5, 4, 3)
    """

    layers: list[eqx.nn.Linear]
    channels: int = eqx.field(static=True)

    def __init__(
        self, hidden: int, channels: int, *, width=32, depth=1, dtype=None, key: PRNGKeyArray
    ):
        sizes = [hidden, *[width] * depth, hidden * channels]
        self.layers = linears(sizes, jax.random.split(key, len(sizes) - 1), dtype)
        self.channels = channels

    def __call__(self, z: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden channels"]:
        flat = jnp.tanh(perceptron(self.layers, z, jax.nn.relu))
        return flat.reshape(*z.shape, self.channels)


class NeuralCDE(eqx.Module):
    """z(t0) = initial(X(t0)), dz = f(z) dX: a state that is driven by a path, and read at its end.

    z(t) = z(t0) + integral from t0 to t of f(z(s)) dX/ds ds (section 3 of the paper): an ODE with the
    derivative of a signal in it. The solve is broken at the knots of the path. How fast the path is gone
    along does not matter, so that a batch of series, each with times of its own as a channel, shares the
    knots 0, 1, 2, ... and is one state, of shape (n, hidden), of one solve.

    Attributes:
        initial: from the channels of X(t0) to z(t0), linear.
        field: f, from states of shape (..., hidden) to matrices of shape (..., hidden, channels).
        head: from a state to the outputs, linear.
        options: of `jaxode.solve`. One step of a method of order 4 for each knot, as in the paper, is
            `method="rk4", dt=1.0, max_steps=2`.

    >>> import jax, jax.numpy as jnp
    >>> from jaxode.nn import NeuralCDE, Series, control_path
    >>> times = jnp.array([[0.0, 0.3, 1.0], [0.0, 2.0, 2.0]])
    >>> series = Series(times, jnp.ones((2, 3, 2)), jnp.array([[1, 1, 1], [1, 1, 0]], bool))
    >>> path = control_path(series)
    >>> path.us.shape  # knots, series, channels: time, two values, two counts
    (3, 2, 5)
    >>> model = NeuralCDE(5, 4, key=jax.random.key(0))
    >>> model(path).shape
    (2, 4)
    """

    initial: eqx.nn.Linear
    field: Callable
    head: eqx.nn.Linear
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(
        self, channels: int, outputs: int, *, hidden=16, width=32, depth=1, field=None, dtype=None,
        key: PRNGKeyArray, **options,
    ):  # fmt: skip
        keys = jax.random.split(key, 3)
        self.initial = eqx.nn.Linear(channels, hidden, dtype=dtype, key=keys[0])
        self.field = field or ControlledField(
            hidden, channels, width=width, depth=depth, dtype=dtype, key=keys[1]
        )
        self.head = eqx.nn.Linear(hidden, outputs, dtype=dtype, key=keys[2])
        options = {"rtol": 1e-3, "atol": 1e-4, "max_steps": 256, **options}
        self.options = tuple(sorted(options.items()))

    def solve(self, control: Signal, ts=None) -> Solution:
        """z at ts, by default at the first and the last knot, with the statistics of the solve.

        Raises:
            ValueError: the path has another number of channels.
        """
        channels = self.initial.in_features
        if control.us.shape[-1:] != (channels,):
            raise ValueError(
                f"This NeuralCDE was made for paths of {channels} channels, and gets values of shape "
                f"{control.us.shape}: NeuralCDE(channels, outputs, ...) wants the last of these numbers."
            )
        ts = jnp.stack([control.ts[0], control.ts[-1]]) if ts is None else jnp.asarray(ts)

        def velocity(z, t, control):
            return jnp.sum(self.field(z) * control.derivative(t)[..., None, :], axis=-1)

        z0 = affine(self.initial, control(ts[0]))
        return solve(velocity, z0, ts, control, **dict(self.options))

    def __call__(self, control: Signal) -> Float[Array, "*batch outputs"]:
        """The outputs at the last knot."""
        return affine(self.head, last(self.solve(control)))


def control_path(
    series: Series, interpolation: str = "backward_hermite", *, counts: float = 1.0
) -> Signal:
    """The path of each series of a batch: channels time, values, and counts of observations.

    What the mask hides, and what is NaN, is missing. A series that has ended stays where it is: from there
    on its path does nothing.

    Args:
        series: a batch of n series of d components at T times.
        interpolation: between the knots 0, 1, 2, ..., which are points of the series.
            "backward_hermite": cubics with slopes by backward differences, smooth. "linear": lines. Both
            fill a missing value by the line between those around it (the next one where there is none
            before, the last one where there is none after), and so look ahead where values are missing.
            "rectilinear": along time, then along the values, on 2 T - 1 knots; a missing value is the last
            one before it, or 0: nothing is known before its time.
        counts: the weight of the channels that count the observations of each component so far, which tell
            a value that was observed from one that was filled in ("observational intensity"); 1 / T makes
            them as large as a time from 0 to 1. 0 leaves these channels out.

    Returns:
        A signal with values of shape (T, n, 1 + 2 d), or (T, n, 1 + d) without counts.

    Raises:
        ValueError: there is no such interpolation, or the mask has another shape.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"`interpolation` must be one of {INTERPOLATIONS}, got {interpolation!r}.")
    path = points(Series(*map(jnp.asarray, series)), interpolation, counts)
    kind = "linear" if interpolation == "rectilinear" else interpolation
    # After a series has ended, the first piece of its cubic goes out and comes back along one line: a state
    # that is driven by it comes back too, to where it was.
    return Signal(np.arange(len(path), dtype=tree.real_dtype(path)), path, kind)


@partial(jax.jit, static_argnames=("interpolation", "counts"))
def points(series: Series, interpolation: str, counts: float) -> Float[Array, "K n channels"]:
    """The values of a path at its knots: one program, where it is not made inside of another."""
    seen = components_seen(series) & ~jnp.isnan(series.values)
    channels = [filled(series, seen, last_one=interpolation == "rectilinear")]
    if counts:
        channels.append(counts * jnp.cumsum(seen, axis=1, dtype=series.values.dtype))
    along = lambda x: jnp.moveaxis(x, 1, 0)
    times, values = along(held_times(series, seen)), along(jnp.concatenate(channels, axis=-1))
    if interpolation == "rectilinear":
        return Signal.rectilinear(times, values).us
    return jnp.concatenate([times[..., None].astype(values.dtype), values], axis=-1)


def held_times(series: Series, seen: Bool[Array, "n T d"]) -> Float[Array, "n T"]:
    """The times of each series, which stand still after its last observation."""
    there, start = jnp.any(seen, axis=-1), series.times[:, :1]
    end = jnp.max(jnp.where(there, series.times, start), axis=1, keepdims=True)
    return jnp.minimum(series.times, end)


def filled(series: Series, seen: Bool[Array, "n T d"], last_one: bool) -> Float[Array, "n T d"]:
    """The values, missing ones filled: by `last_one` before, or by lines between neighbours."""
    values, count = jnp.where(seen, series.values, 0), seen.shape[1]
    place = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None, :, None], seen.shape)
    before = lax.cummax(jnp.where(seen, place, -1), axis=1)
    at = lambda x, place: jnp.take_along_axis(x, jnp.clip(place, 0, count - 1), axis=1)
    if last_one:
        return jnp.where(before < 0, 0, at(values, before))
    after = lax.cummin(jnp.where(seen, place, count), axis=1, reverse=True)
    times = jnp.broadcast_to(series.times[..., None], seen.shape)
    left, right = at(values, before), at(values, after)
    left, right = jnp.where(before < 0, right, left), jnp.where(after == count, left, right)
    width = at(times, after) - at(times, before)
    part = (times - at(times, before)) / jnp.where(width > 0, width, 1)
    part = jnp.where((width > 0) & (before >= 0) & (after < count), part, 0)
    return left + part.astype(values.dtype) * (right - left)
