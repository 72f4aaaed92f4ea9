"""Inhomogeneous Poisson processes whose intensity follows an ODE (Chen et al. 2018, section 5.2)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxode.integrate import solve
from jaxode.nn.fields import MLPField
from jaxode.nn.latent import Decoder, log_normal


class PointProcess(eqx.Module):
    """Events at the rate lambda(z(t)), with dz/dt = field(z, t) and z(start) = z0.

    log p(t_1 .. t_N) = sum_i log lambda(z(t_i)) - integral of lambda(z(t)) dt (eq. 12 of the paper);
    the integral is one more component of the solve. lambda = exp(rate(z)) is positive. Keep tolerances
    tight: training finds what a loose one lets through (at 1e-3, likelihoods above the true one).

    Attributes:
        field: of the latent state, shape (latent,).
        rate: from a latent state to the logarithm of the intensity, shape (1,).
        z0: the latent state at the start.
        options: of `jaxode.solve`.

    >>> import jax, jax.numpy as jnp
    >>> from jaxode.nn import PointProcess
    >>> process = PointProcess.make(latent=2, key=jax.random.key(0))
    >>> events, mask = jnp.array([0.5, 1.5, 0.0]), jnp.array([True, True, False])
    >>> process.log_prob(events, mask, 0.0, 2.0).shape
    ()
    """

    field: Callable
    rate: Callable
    z0: Float[Array, " latent"]
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, field, rate, z0, **options):
        self.field, self.rate, self.z0 = field, rate, z0
        self.options = tuple(sorted(options.items()))

    @classmethod
    def make(
        cls, *, latent=4, width=20, depth=1, time=True, dtype=None, key: PRNGKeyArray, **options
    ):
        """With networks of one hidden layer; tanh, so that the intensity is smooth."""
        keys = jax.random.split(key, 3)
        options = {"rtol": 1e-5, "atol": 1e-5, "max_steps": 1024, **options}
        return cls(
            MLPField(latent, width=width, depth=depth, time=time, dtype=dtype, key=keys[0]),
            Decoder(latent, 1, width=width, activation=jnp.tanh, dtype=dtype, key=keys[1]),
            jax.random.normal(keys[2], (latent,), dtype or jnp.result_type(float)),
            **options,
        )

    def log_intensity(self, z):
        """log lambda(z), for a state or many."""
        return self.rate(z)[..., 0]

    def along(self, times: Float[Array, " n"], z0=None):
        """z at increasing times, and the integral of lambda from the first of them; statistics."""
        z0 = self.z0 if z0 is None else z0

        def field(state, t):
            z, _ = state
            return self.field(z, t), jnp.exp(self.log_intensity(z))

        start = z0, jnp.zeros((), z0.dtype)
        solution = solve(field, start, times, **dict(self.options))
        return *solution.ys, solution.stats

    def intensity(self, times: Float[Array, " n"], z0=None) -> Float[Array, " n"]:
        """lambda at increasing times, the first of which is the start."""
        return jnp.exp(self.log_intensity(self.along(times, z0)[0]))

    def log_prob(
        self, events: Float[Array, " n"], mask: Bool[Array, " n"], start, end, z0=None
    ) -> Float[Array, ""]:
        """The log-likelihood of the events that the mask shows, seen from start to end.

        Events increase, and lie between start and end; those that the mask hides come last. Many
        sequences are one `jax.vmap` of this.
        """
        z, integral, _ = self.along(with_ends(events, mask, start, end), z0)
        return self.of_times(z, integral, mask)

    def of_times(self, z, integral, mask):
        """The log-likelihood, from the solution at the start, the events and the end."""
        return jnp.sum(jnp.where(mask, self.log_intensity(z[1:-1]), 0)) - integral[-1]

    def sample(self, key: PRNGKeyArray, start: float, end: float, z0=None, points: int = 1000):
        """The event times of one realisation, by thinning (Lewis and Shedler 1979), in numpy.

        Candidates come at a constant rate above the intensity's largest value on `points` instants
        (and a tenth more, for what lies between), and each is kept with probability lambda / rate.

        Raises:
            RuntimeError: the intensity at a candidate is above that rate; take more `points`.
        """
        grid = jnp.linspace(start, end, points)
        bound = 1.1 * float(jnp.max(self.intensity(grid, z0)))

        def rates(candidates):
            times = np.concatenate([[start], candidates]).astype(grid.dtype)
            rates = np.asarray(self.intensity(jnp.asarray(times), z0))[1:]
            if np.any(rates > bound):
                raise RuntimeError(
                    "The intensity has a sharper peak than `points` show: take more."
                )
            return rates

        return thinned(generator(key), rates, start, end, bound)


def generator(key: PRNGKeyArray) -> np.random.Generator:
    """numpy's generator, seeded by a key."""
    return np.random.default_rng(np.asarray(jax.random.bits(key, (2,))))


def thinned(rng: np.random.Generator, rates: Callable, start, end, bound) -> np.ndarray:
    """Events at `rates(times)`, at most `bound`: candidates at that rate, each kept with rate / bound."""
    candidates = np.sort(rng.uniform(start, end, rng.poisson(bound * (end - start))))
    return candidates[rng.uniform(0, bound, len(candidates)) < rates(candidates)]


def with_ends(events, mask, start, end):
    """start, the events (the end where the mask hides them), end."""
    start, end = (jnp.asarray(x).astype(events.dtype)[None] for x in (start, end))
    return jnp.concatenate([start, jnp.where(mask, events, end), end])


class JointModel(eqx.Module):
    """Observations whose times are events: times and values share one latent path (figure 7).

    The log-likelihood is that of the times plus that of the values, x(t_i) ~ Normal(decoder(z(t_i)),
    noise^2), from one solve.
    """

    process: PointProcess
    decoder: Decoder
    noise: float = eqx.field(static=True)

    def log_prob(self, events, values: Float[Array, "n d"], mask, start, end, z0=None):
        """log p(times), log p(values | times)."""
        z, integral, _ = self.process.along(with_ends(events, mask, start, end), z0)
        error = self.decoder(z[1:-1]) - jnp.where(mask[:, None], values, 0)
        of_values = jnp.sum(jnp.where(mask[:, None], log_normal(error, self.noise), 0))
        return self.process.of_times(z, integral, mask), of_values
