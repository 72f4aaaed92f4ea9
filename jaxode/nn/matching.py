"""Flow matching: a continuous flow's field by regression, without a solve in training.

The loss of Lipman et al. (2023, arXiv 2210.02747) along a probability path, and the minibatch optimal
transport of Tong et al. (2024, arXiv 2302.00482).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray


class ProbabilityPath(NamedTuple):
    """From a sample z of the base to a sample x of the data: psi_t(z) = mean(t) x + spread(t) z.

    For one x these are normal distributions with mean mean(t) x and standard deviation spread(t)
    (Lipman et al. 2023, eq. 10 and 11, with a mean that is proportional to x): all of the base at
    t = 0, where mean is 0 and spread 1, and almost only x at t = 1.

    Attributes:
        mean, spread: functions of t, differentiable.
        end: times of training are in [0, end]: 1, or a little less where spread'(1) is infinite.

    >>> import jax.numpy as jnp
    >>> path = linear_path()
    >>> y, velocity = path.at(jnp.array([0.25]), jnp.array([[0.0, 4.0]]), jnp.array([[8.0, 0.0]]))
    >>> y.tolist(), velocity.tolist()
    ([[2.0, 3.0]], [[8.0, -4.0]])
    """

    mean: Callable
    spread: Callable
    end: float = 1.0

    def at(self, t: Float[Array, " n"], z: Float[Array, "n d"], x: Float[Array, "n d"]):
        """psi_t(z), and its derivative with respect to t: each row at a time of its own."""
        coefficients = lambda t: (self.mean(t), self.spread(t))
        places, slopes = jax.jvp(coefficients, (t,), (jnp.ones_like(t),))
        combined = lambda mean, spread: mean[:, None] * x + spread[:, None] * z
        return combined(*places), combined(*slopes)


def linear_path(least: float = 0.0) -> ProbabilityPath:
    """Straight lines of constant speed: t x + (1 - (1 - least) t) z.

    Lipman et al. (2023), eq. 20 and 22, where `least` is sigma_min, the spread that is left at t = 1.
    """
    return ProbabilityPath(lambda t: t, lambda t: 1 - (1 - least) * t)


def diffusion_path(low: float = 0.1, high: float = 20.0) -> ProbabilityPath:
    """The variance-preserving path of diffusion models: a x + sqrt(1 - a^2) z.

    Lipman et al. (2023), eq. 18: log a = -(low s + (high - low) s^2 / 2) / 2 with s = 1 - t, so that the
    rate of noise falls from `high` at t = 0 to `low` at t = 1. At t = 0 a is 0.0066, not 0. Times of
    training end at 1 - 1e-5, as in theirs, since the spread falls like a square root at the end.
    """
    noise = lambda t: low * (1 - t) + (high - low) * (1 - t) ** 2 / 2
    mean = lambda t: jnp.exp(-noise(t) / 2)
    return ProbabilityPath(mean, lambda t: jnp.sqrt(-jnp.expm1(-noise(t))), 1 - 1e-5)


def flow_matching_loss(
    flow: Any,
    x: Float[Array, "n d"],
    key: PRNGKeyArray,
    *,
    path: ProbabilityPath | None = None,
    optimal: bool = False,
    context: Float[Array, "n c"] | None = None,
) -> Float[Array, ""]:
    """The mean of |field(psi_t(z), t) - d psi_t(z)/dt|^2 / d, over t, samples z and data x.

    Conditional flow matching (Lipman et al. 2023, eq. 14): its gradient is that of the distance from
    the field whose flow carries the base to the data, and costs one evaluation of the field for each
    row, whatever the solver of the flow. `jaxode.train.fit` takes it as a loss as it is.

    Args:
        flow: a `ContinuousFlow`, or whatever has a `field` and a `base` as it does; each row of x is
            given to the field alone, at a time of its own.
        x: samples of the data, one in each row.
        key: of the times and of the samples of the base.
        path: from base to data; None: `linear_path()`.
        optimal: pair x with those of the samples of the base that are near: see `optimal_pairs`.
        context: a row for each row of x, for a field that takes one.

    Raises:
        ValueError: x has other rows than the base of the flow, or the field returns another shape than
            that of its argument.

    >>> import jax, optax
    >>> from jaxode import train
    >>> from jaxode.nn import ConcatSquash, ContinuousFlow, Normal
    >>> flow = ContinuousFlow(ConcatSquash(2, depth=1, key=jax.random.key(0)), Normal(2))
    >>> optimiser = optax.sgd(0.1)
    >>> state = train.start(flow, optimiser, jax.random.key(1))
    >>> batches = lambda step: 3 + jax.random.normal(jax.random.key(step), (128, 2))
    >>> state, history = train.fit(flow_matching_loss, optimiser, state, batches, 20, progress=False)
    >>> history[-1]["loss"] < history[0]["loss"]
    True
    """
    path = linear_path() if path is None else path
    base_key, time_key, pair_key = jax.random.split(key, 3)
    z = flow.base.sample(base_key, len(x)).astype(x.dtype)
    if z.shape != x.shape:
        raise ValueError(
            f"x must have a row for each sample, like the base of the flow, whose samples here are of shape "
            f"{z.shape}; got {x.shape}."
        )
    if optimal:
        z = optimal_pairs(pair_key, z, x, context)
    t = path.end * jax.random.uniform(time_key, (len(x),), x.dtype)
    y, velocity = path.at(t, z, x)

    def of_row(y, t, *context):
        return flow.field(y[None], t, *(c[None] for c in context))[0]

    found = jax.vmap(of_row)(y, t, *(() if context is None else (context,)))
    if found.shape != velocity.shape:
        raise ValueError(
            f"The field must return one row for each row of z, of the shape {velocity.shape} in all; "
            f"it returned {found.shape}."
        )
    return jnp.mean((found - velocity) ** 2)


def optimal_pairs(
    key: PRNGKeyArray,
    z: Float[Array, "n d"],
    x: Float[Array, "n d"],
    context: Float[Array, "n c"] | None = None,
) -> Float[Array, "n d"]:
    """Samples of the base for the rows of x: rows of z, drawn from an optimal plan between the two.

    Minibatch optimal transport (Tong et al. 2024): row i has z_j with a probability that is
    proportional to P_ij, the plan that carries the rows of z to those of x with the least mean of
    |z_j - x_i|^2, but for a little entropy (Cuturi 2013, arXiv 1306.0895). Paths then seldom cross, and
    the field's lines are straighter. A z may be drawn twice, and another one not.

    With a context only rows of the same context exchange their z. Otherwise the base that belongs to a
    context would no longer be the one that samples begin with (Cheng and Schwing 2025, arXiv
    2503.10636); where every context is another one, z stays as it is.

    >>> import jax, jax.numpy as jnp
    >>> z, x = jnp.array([[3.0], [1.0], [2.0]]), jnp.array([[10.0], [20.0], [30.0]])
    >>> optimal_pairs(jax.random.key(0), z, x).ravel().tolist()
    [1.0, 2.0, 3.0]
    """
    # The half of |z_j - x_i|^2, but for terms of i or of j alone, which do not change the plan.
    cost = -x @ z.T
    same = jnp.ones(cost.shape, bool)
    if context is not None:
        same = jnp.all(context[:, None] == context[None], axis=-1)
    return z[jax.random.categorical(key, log_plan(cost, same), axis=1)]


def log_plan(cost: Float[Array, "n n"], allowed, *, halvings: int = 9, turns: int = 10):
    """The logarithm of each row of an entropic optimal plan, up to a number for each row.

    Sinkhorn's iteration for exp((f_i + g_j - cost_ij) / temperature), f and g such that rows and columns
    have equal sums. The temperature begins with the range of the costs, and is halved again and again: at
    once at its last value exp would underflow in float32, and many more turns be needed (Schmitzer 2019,
    arXiv 1610.06519). Of entries that are not allowed the logarithm is -inf.
    """
    dtype, tiny = cost.dtype, jnp.finfo(cost.dtype).tiny
    cost = cost - jnp.min(cost)
    cost = cost / jnp.maximum(jnp.max(cost), jnp.asarray(tiny, dtype))
    ones = jnp.ones(len(cost), dtype)

    def at_temperature(potentials, temperature):
        f, g = potentials
        kernel = jnp.exp((f[:, None] + g[None] - cost) / temperature)
        kernel = jnp.where(allowed, kernel, jnp.zeros((), dtype))

        def turn(_, scales):
            columns = 1 / (scales[0] @ kernel)
            return 1 / (kernel @ columns), columns

        rows, columns = lax.fori_loop(0, turns, turn, (ones, ones))
        f, g = f + temperature * jnp.log(rows), g + temperature * jnp.log(columns)
        return (f, g), None

    temperatures = 0.5 ** jnp.arange(halvings + 1, dtype=dtype)
    (_, g), _ = lax.scan(at_temperature, (jnp.zeros_like(ones),) * 2, temperatures)
    return jnp.where(allowed, (g[None] - cost) / temperatures[-1], -jnp.inf)
