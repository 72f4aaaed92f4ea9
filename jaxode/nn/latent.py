"""Latent ODEs for irregular time series (Chen et al. 2018, section 5; Rubanova et al. 2019).

A batch of ragged series is three arrays: times (n, T), increasing in each row; values (n, T, d);
mask (n, T), False where a row has ended or a value is missing, or (n, T, d) where single components
are. What the mask hides is never looked at; times there may be anything finite that keeps the row from
decreasing (repeat the last one).

A likelihood is that of the components that are there. A network that reads a series reads a component
that is missing as 0, which is the mean of one that was standardised; at a point with none it does not
look at all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxode.integrate import odeint, solve
from jaxode.nn.fields import MLPField, affine, linears, perceptron


class Series(NamedTuple):
    """A ragged batch of time series; see the module."""

    times: Float[Array, "n T"]
    values: Float[Array, "n T d"]
    mask: Bool[Array, "n T"] | Bool[Array, "n T d"]


def components_seen(series: Series) -> Bool[Array, "n T d"]:
    """Which components of which values there are."""
    mask, values = series.mask, series.values
    if jnp.shape(mask) not in (jnp.shape(values), jnp.shape(values)[:2]):
        raise ValueError(
            f"The mask of a series must have the shape of its times, {jnp.shape(values)[:2]}, or that of "
            f"its values, {jnp.shape(values)}; got {jnp.shape(mask)}."
        )
    mask = jnp.asarray(mask)
    return jnp.broadcast_to(mask if mask.ndim == 3 else mask[..., None], jnp.shape(values))


def points_seen(series: Series) -> Bool[Array, "n T"]:
    """At which times there is a value, of one component at least."""
    return jnp.any(components_seen(series), axis=-1)


class RNNCell(eqx.Module):
    """h <- tanh(W (x, h) + b), on batches."""

    layer: eqx.nn.Linear

    def __init__(self, inputs: int, hidden: int, *, dtype=None, key: PRNGKeyArray):
        self.layer = eqx.nn.Linear(inputs + hidden, hidden, dtype=dtype, key=key)

    def __call__(self, x, h):
        return jnp.tanh(affine(self.layer, jnp.concatenate([x, h], axis=-1)))


class GRUCell(eqx.Module):
    """A gated recurrent unit (Cho et al. 2014, arXiv 1406.1078), on batches."""

    gates: eqx.nn.Linear
    candidate: eqx.nn.Linear

    def __init__(self, inputs: int, hidden: int, *, dtype=None, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.gates = eqx.nn.Linear(inputs + hidden, 2 * hidden, dtype=dtype, key=keys[0])
        self.candidate = eqx.nn.Linear(inputs + hidden, hidden, dtype=dtype, key=keys[1])

    def __call__(self, x, h):
        both = jax.nn.sigmoid(affine(self.gates, jnp.concatenate([x, h], axis=-1)))
        reset, update = jnp.split(both, 2, axis=-1)
        new = jnp.tanh(affine(self.candidate, jnp.concatenate([x, reset * h], axis=-1)))
        return update * h + (1 - update) * new


def gaps(times: Float[Array, "n T"]) -> Float[Array, "n T"]:
    """The time from each point to the next one in the row; 0 at the last."""
    return jnp.concatenate([jnp.diff(times, axis=1), jnp.zeros_like(times[:, :1])], axis=1)


def read_backwards(cell, series: Series, inputs, between=None):
    """The state of a cell after the series was read from its end to its start."""

    def step(h, point):
        x, seen, gap = point
        h = h if between is None else between(h, gap)
        return jnp.where(seen[:, None], cell(x, h), h), None

    hidden = jnp.zeros((len(series.times), width(cell)), series.values.dtype)
    along = lambda x: jnp.moveaxis(x, 1, 0)[::-1]
    points = along(inputs), along(points_seen(series)), along(gaps(series.times))
    return jax.lax.scan(step, hidden, points)[0]


def width(cell) -> int:
    """The size of a cell's state."""
    last: Any = cell.layer if isinstance(cell, RNNCell) else cell.candidate
    return last.out_features


class RecognitionRNN(eqx.Module):
    """A recurrent network that reads values, and the gap to the next one, backwards in time.

    Returns the mean and the logarithm of the standard deviation of q(z(t0) | series). The cell is that
    of the paper, or with `gated` a GRU, which learns in fewer steps.
    """

    cell: Any
    head: eqx.nn.Linear

    def __init__(self, size: int, latent: int, *, hidden=25, gated=False, dtype=None, key):
        keys = jax.random.split(key)
        self.cell = (GRUCell if gated else RNNCell)(size + 1, hidden, dtype=dtype, key=keys[0])
        self.head = eqx.nn.Linear(hidden, 2 * latent, dtype=dtype, key=keys[1])

    def __call__(self, series: Series):
        inputs = jnp.concatenate([clean(series), gaps(series.times)[..., None]], axis=-1)
        return jnp.split(affine(self.head, read_backwards(self.cell, series, inputs)), 2, axis=-1)


class ODERNN(eqx.Module):
    """The same, its hidden state following an ODE between observations (arXiv 1907.03907).

    Each gap is solved in `steps` steps of RK4, all series of the batch in one solve.
    """

    cell: Any
    field: MLPField
    head: eqx.nn.Linear
    steps: int = eqx.field(static=True)

    def __init__(
        self, size: int, latent: int, *, hidden: int = 25, steps: int = 1, dtype=None, key
    ):
        keys = jax.random.split(key, 3)
        self.cell = GRUCell(size, hidden, dtype=dtype, key=keys[0])
        self.field = MLPField(
            hidden, width=2 * hidden, depth=1, time=False, dtype=dtype, key=keys[1]
        )
        self.head = eqx.nn.Linear(hidden, 2 * latent, dtype=dtype, key=keys[2])
        self.steps = steps

    def between(self, h, gap):
        """The hidden state carried back over gaps that differ from series to series."""
        field = lambda h, s, gap: -gap[:, None] * self.field(h, s)
        return odeint(field, h, [0.0, 1.0], gap, method="rk4", dt=1 / self.steps, adjoint="direct")[
            -1
        ]

    def __call__(self, series: Series):
        h = read_backwards(self.cell, series, clean(series), self.between)
        return jnp.split(affine(self.head, h), 2, axis=-1)


def clean(series: Series):
    """The values, 0 where the mask hides them."""
    return jnp.where(components_seen(series), series.values, 0)


def log_normal(error, noise: float):
    """The logarithm of the density of Normal(0, noise^2), of each number."""
    constant = jnp.log(noise * (2 * jnp.pi) ** 0.5).astype(error.dtype)
    return -0.5 * (error / noise) ** 2 - constant


class LatentODE(eqx.Module):
    """z(t0) ~ q(. | series), dz/dt = field(z, t), x(t) ~ Normal(decoder(z(t)), noise^2).

    Every series has its own times: they are solved together, each with its own steps, by `jax.vmap`
    of a solve. t0 is the first time of each series.

    Attributes:
        encoder: from a `Series` to mean and log standard deviation of z(t0).
        field: of the latent state, on arrays of shape (latent,).
        decoder: from latent states, shape (..., latent), to values.
        options: of `jaxode.solve`.

    >>> import jax, jax.numpy as jnp
    >>> from jaxode.nn import LatentODE, Series
    >>> model = LatentODE.make(2, latent=4, key=jax.random.key(0))
    >>> times = jnp.array([[0.0, 0.3, 1.0], [0.0, 2.0, 2.0]])
    >>> series = Series(times, jnp.ones((2, 3, 2)), jnp.array([[1, 1, 1], [1, 1, 0]], bool))
    >>> model.predict(series, jnp.array([[1.5], [3.0]]), key=jax.random.key(1)).shape
    (2, 1, 2)
    """

    encoder: Callable
    field: Callable
    decoder: Callable
    noise: float = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, encoder, field, decoder, *, noise: float = 0.1, **options):
        self.encoder, self.field, self.decoder, self.noise = encoder, field, decoder, noise
        self.options = tuple(sorted(options.items()))

    @classmethod
    def make(
        cls, size: int, *, latent=4, hidden=25, width=20, depth=1, encoder=RecognitionRNN, noise=0.1,
        dtype=None, key: PRNGKeyArray, **options,
    ):  # fmt: skip
        """The networks of the paper: RNN of 25 units, field and decoder with 20 hidden units."""
        keys = jax.random.split(key, 3)
        options = {"rtol": 1e-3, "atol": 1e-4, "max_steps": 512, **options}
        return cls(
            encoder(size, latent, hidden=hidden, dtype=dtype, key=keys[0]),
            MLPField(latent, width=width, depth=depth, time=False, dtype=dtype, key=keys[1]),
            Decoder(latent, size, width=width, dtype=dtype, key=keys[2]),
            noise=noise,
            **options,
        )

    def encode(self, series: Series, key: PRNGKeyArray | None = None):
        """A sample of z(t0) (the mean without a key), and KL(q || Normal(0, 1)) of each series."""
        mean, log_spread = self.encoder(series)
        spread = jnp.exp(log_spread)
        noise = 0 if key is None else jax.random.normal(key, mean.shape, mean.dtype)
        kl = jnp.sum(0.5 * (mean**2 + spread**2 - 1) - log_spread, axis=-1)
        return mean + spread * noise, kl

    def paths(self, z0: Float[Array, "n latent"], times: Float[Array, "n T"]):
        """The latent states at the times of each series, the first of which is that of z0."""
        each = lambda z0, times: solve(self.field, z0, times, **dict(self.options))
        return jax.vmap(each)(z0, times)

    def elbo(self, series: Series, *, key: PRNGKeyArray, consistency: float = 0.0, read=None):
        """A bound on log p(series), of each series, from one sample of z; and the statistics.

        log p(x | z) - KL(q(z0 | x) || p(z0)), over observed components only. With `consistency` > 0, so
        many times log q(z(t) | what is seen from t on) is added, at a random t of the series: the
        path then goes through the states that the encoder itself gives to what is seen there. It
        is what lets a path be continued beyond what was seen (on spirals the error of that fell to
        a third and less).

        With `read`, a mask of shape (n, T), the encoder reads only those points, for instance the first
        half of each series. That is a bound all the same, for any q gives one, and it asks for a
        forecast (compare the extrapolation of Rubanova et al. 2019).
        """
        key, split_key = jax.random.split(key)
        seen = components_seen(series)
        first = series if read is None else series._replace(mask=seen & read[..., None])
        z0, kl = self.encode(first, key)
        solution = self.paths(z0, series.times)
        terms = log_normal(self.decoder(solution.ys) - clean(series), self.noise)
        likelihood = jnp.sum(jnp.where(seen, terms, 0), axis=(1, 2))
        if consistency:
            kl = kl - consistency * self.rejoined(series, solution.ys, split_key)
        return likelihood - kl, solution.stats

    def rejoined(self, series: Series, path, key) -> Float[Array, " n"]:
        """log q(z(t) | what is seen from t on) at a time between the first and the last third."""
        length = series.times.shape[1]
        cut = jax.random.randint(key, (), length // 3, max(length // 3 + 1, 2 * length // 3))
        after = (jnp.arange(length, dtype=cut.dtype) >= cut)[None, :, None]
        later = series._replace(mask=components_seen(series) & after)
        seen = points_seen(later)
        first = jnp.argmax(seen, axis=1)[:, None, None]
        here = jnp.take_along_axis(path, first, axis=1)[:, 0]
        mean, log_spread = self.encoder(later)
        density = -0.5 * ((here - mean) * jnp.exp(-log_spread)) ** 2 - log_spread
        return jnp.where(jnp.any(seen, axis=1), jnp.sum(density, axis=-1), 0)

    def predict(self, series: Series, times: Float[Array, "n S"], *, key=None):
        """Values at other times, increasing in each row; before the first time of a series too."""
        z0, _ = self.encode(series, key)
        start = series.times[:, :1]
        after = self.paths(z0, jnp.concatenate([start, jnp.maximum(times, start)], axis=1))
        back = jnp.minimum(times, start)[:, ::-1]
        before = self.paths(z0, jnp.concatenate([start, back], axis=1))
        z = jnp.where((times < start)[..., None], before.ys[:, :0:-1], after.ys[:, 1:])
        return self.decoder(z)


class Decoder(eqx.Module):
    """One hidden layer (of ReLUs, as in the paper), on any leading axes."""

    layers: list[eqx.nn.Linear]
    activation: Callable = eqx.field(static=True)

    def __init__(
        self,
        latent: int,
        size: int,
        *,
        width=20,
        activation=jax.nn.relu,
        dtype=None,
        key: PRNGKeyArray,
    ):
        self.activation = activation
        sizes, keys = [latent, width, size], jax.random.split(key)
        self.layers = linears(sizes, keys, dtype)

    def __call__(self, z):
        return perceptron(self.layers, z, self.activation)


class RNN(eqx.Module):
    """The baseline: a recurrent network that predicts each value from those before it.

    With `time_gaps`, the time since the last value is an input of the cell, and the time to the
    value to be predicted one of the decoder. Values are Normal(mean, noise^2).

    >>> import jax, jax.numpy as jnp
    >>> from jaxode.nn import RNN, Series
    >>> model = RNN(2, time_gaps=True, key=jax.random.key(0))
    >>> times = jnp.array([[0.0, 0.3, 1.0], [0.0, 2.0, 2.0]])
    >>> series = Series(times, jnp.ones((2, 3, 2)), jnp.array([[1, 1, 1], [1, 1, 0]], bool))
    >>> model.predict(series, jnp.array([[1.5], [3.0]])).shape
    (2, 1, 2)
    """

    cell: RNNCell
    decoder: Decoder
    time_gaps: bool = eqx.field(static=True)

    def __init__(self, size: int, *, hidden=25, width=20, time_gaps=False, dtype=None, key):
        keys = jax.random.split(key)
        self.cell = RNNCell(size + time_gaps, hidden, dtype=dtype, key=keys[0])
        self.decoder = Decoder(hidden + time_gaps, size, width=width, dtype=dtype, key=keys[1])
        self.time_gaps = time_gaps

    def take(self, h, x, gap):
        """The state after a value that came `gap` after the one before."""
        return self.cell(self.timed(x, gap), h)

    def next(self, h, gap):
        """The mean of the value that comes `gap` later."""
        return self.decoder(self.timed(h, gap))

    def timed(self, x, gap):
        """The input of the cell: with the time since the last value, if the network has `time_gaps`."""
        return jnp.concatenate([x, gap[:, None]], axis=-1) if self.time_gaps else x

    def read(self, series: Series):
        """The state after the last value of each series, and the mean of every next value."""

        def step(h, point):
            x, seen, gap, ahead = point
            h = jnp.where(seen[:, None], self.take(h, x, gap), h)
            return h, self.next(h, ahead)

        along = lambda x: jnp.moveaxis(x, 1, 0)
        ahead = gaps(series.times)
        gap = jnp.roll(ahead, 1, axis=1).at[:, 0].set(0)
        hidden = jnp.zeros((len(series.times), width(self.cell)), series.values.dtype)
        h, means = jax.lax.scan(
            step, hidden, tuple(map(along, (clean(series), points_seen(series), gap, ahead)))
        )
        return h, along(means)

    def squared_error(self, series: Series):
        """Of each next value, a mean over those of the series.

        Here the mask may only end a row, or hide components of a value.
        """
        _, means = self.read(series)
        there = components_seen(series)[:, 1:]
        seen = jnp.any(there, axis=-1)
        misses = jnp.where(there, means[:, :-1] - clean(series)[:, 1:], 0)
        error = jnp.sum(misses**2, axis=-1)
        count = jnp.maximum(jnp.sum(seen, axis=1, dtype=error.dtype), 1)
        return jnp.sum(error, axis=1) / count

    def predict(self, series: Series, times: Float[Array, "n S"]):
        """Values at times after the last one, each prediction read as if it were a value."""
        h, _ = self.read(series)
        seen = points_seen(series)
        last = jnp.max(jnp.where(seen, series.times, -jnp.inf), axis=1, keepdims=True)

        def step(h, gap):
            x = self.next(h, gap)
            return self.take(h, x, gap), x

        _, values = jax.lax.scan(
            step, h, jnp.diff(jnp.concatenate([last, times], axis=1), axis=1).T
        )
        return jnp.moveaxis(values, 0, 1)
