"""Continuous normalizing flows (Chen et al. 2018, section 4; FFJORD), and planar flows."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode.integrate import solve
from jaxode.nn.fields import affine, linears, perceptron
from jaxode.nn.integrals import Hutchinson, WithIntegrals, divergence
from jaxode.solution import Solution


class Normal(eqx.Module):
    """The normal distribution with mean 0 and covariance scale^2 I: the usual base of a flow."""

    size: int = eqx.field(static=True)
    scale: float = eqx.field(static=True, default=1.0)

    def log_prob(self, z: Float[Array, "n d"]) -> Float[Array, " n"]:
        """The logarithm of the density at each of n points."""
        constant = self.size * (0.5 * jnp.log(2 * jnp.pi) + jnp.log(self.scale))
        return -0.5 * jnp.sum((z / self.scale) ** 2, axis=-1) - constant.astype(z.dtype)

    def sample(self, key: PRNGKeyArray, n: int, dtype=None) -> Float[Array, "n d"]:
        """n samples."""
        return self.scale * jax.random.normal(key, (n, self.size), dtype or jnp.result_type(float))


class ContinuousFlow(eqx.Module):
    """A distribution: samples of a base at t = 0, carried by dz/dt = field(z, t) to t = 1.

    The log-density follows the instantaneous change of variables (Chen et al. 2018, theorem 1),

        d log p(z(t)) / dt = -tr df/dz,

    which is one more component of the solve. The trace is exact if no key is given (a cheap form if
    the field has one; else d Jacobian-vector products), and Hutchinson's estimate with noise fixed
    for the solve if there is one.

    Attributes:
        field: `field(z, t)` on a batch z of shape (n, d), each row for itself; with contexts
            `field(z, t, context)`, context of shape (n, c).
        base: a distribution with `log_prob(z)` and `sample(key, n)`.
        gaussian: whether Hutchinson's noise is normal; else Rademacher, of smaller variance.
        options: of `jaxode.solve`.

    >>> import jax, jax.numpy as jnp
    >>> from jaxode.nn import ConcatSquash, ContinuousFlow, Normal
    >>> flow = ContinuousFlow(ConcatSquash(2, key=jax.random.key(0)), Normal(2), rtol=1e-4, atol=1e-4)
    >>> x, log_prob = flow.sample_and_log_prob(jax.random.key(1), 5)
    >>> bool(jnp.allclose(flow.log_prob(x), log_prob, atol=1e-2))
    True
    """

    field: Callable
    base: Any
    gaussian: bool = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, field: Callable, base, *, gaussian: bool = False, **options):
        self.field, self.base, self.gaussian = field, base, gaussian
        self.options = tuple(sorted(options.items()))

    def with_options(self, **options) -> "ContinuousFlow":
        """The same flow, solved differently."""
        options = {**dict(self.options), **options}
        return ContinuousFlow(self.field, self.base, gaussian=self.gaussian, **options)

    def with_field(self, field: Callable) -> "ContinuousFlow":
        """The same with another field."""
        return ContinuousFlow(field, self.base, gaussian=self.gaussian, **dict(self.options))

    def forward(self, z: Float[Array, "n d"], *, context=None) -> Float[Array, "n d"]:
        """From base to data."""
        return self.transport(z, [0.0, 1.0], context=context).ys[-1]

    def inverse(self, x: Float[Array, "n d"], *, context=None) -> Float[Array, "n d"]:
        """From data to base."""
        return self.transport(x, [1.0, 0.0], context=context).ys[-1]

    def transport(self, z, ts, *, context=None) -> Solution:
        """The paths of samples at the times ts."""
        return solve(self.given(context), z, ts, **dict(self.options))

    def log_prob(self, x: Float[Array, "n d"], *, context=None, key=None) -> Float[Array, " n"]:
        """log p(x), up to the tolerance of the solve; an estimate if a key is given."""
        return self.log_prob_and_integrals(x, context=context, key=key)[0]

    def log_prob_and_integrals(self, x, rates=(), *, context=None, key=None, end=1.0):
        """log p(x), the integrals of further rates over t in [0, end], and the solution.

        `end` is where data are: 1, or a random number near it in training (STEER: Ghosh et al. 2020,
        arXiv 2006.10711).
        """
        z, (trace, *integrals), solution = self.solved(x, (end, 0.0), rates, context, key)
        return self.base.log_prob(z) + trace, [-i for i in integrals], solution

    def sample(self, key: PRNGKeyArray, n: int, *, context=None) -> Float[Array, "n d"]:
        """n samples."""
        return self.forward(self.base.sample(key, n), context=context)

    def sample_and_log_prob(self, key: PRNGKeyArray, n: int, *, context=None, exact: bool = True):
        """n samples and their log-densities, by one solve."""
        base_key, noise_key = jax.random.split(key)
        z = self.base.sample(base_key, n)
        x, (trace,), _ = self.solved(z, (0.0, 1.0), (), context, None if exact else noise_key)
        return x, self.base.log_prob(z) - trace

    def solved(self, z, ts, rates, context, key):
        """Where z is at the end of ts, the integrals of tr df/dz and of the rates, and the solution."""
        trace = divergence if key is None else Hutchinson(self.noise(key, z))
        field = WithIntegrals(self.given(context), [trace, *rates])
        ts = jnp.stack([jnp.asarray(t, z.dtype) for t in ts])
        solution = solve(field, (z, field.zeros(z)), ts, **dict(self.options))
        z, integrals = jax.tree.map(lambda y: y[-1], solution.ys)
        return z, integrals, solution

    def noise(self, key, z):
        """Random vectors like z, of mean 0 and covariance 1, for an estimate of the trace."""
        draw = jax.random.normal if self.gaussian else jax.random.rademacher
        return draw(key, z.shape, z.dtype)

    def given(self, context):
        """The field of z and t."""
        return self.field if context is None else Given(self.field, context)


class Given(eqx.Module):
    """A field with its context filled in."""

    field: Callable
    context: Array

    def __call__(self, z, t):
        return self.field(z, t, self.context)


class PlanarField(eqx.Module):
    """dz/dt = 1/M sum_n sigma_n(t) u_n tanh(w_n . z + b_n): a planar CNF of width M.

    Chen et al. (2018), eq. 9 and section 4.2. With `hidden` units, u, w, b and the gates sigma all
    come from a network of the time, as in the released example; with hidden=0 they are constants,
    and sigma_n(t) = sigmoid(a_n t + c_n): 7 M numbers in two dimensions. The divergence needs no
    Jacobian: 1/M sum_n sigma_n (u_n . w_n) (1 - tanh^2).

    >>> import jax, jax.numpy as jnp
    >>> PlanarField(2, width=8, key=jax.random.key(0))(jnp.ones((5, 2)), 0.3).shape
    (5, 2)
    """

    hypernet: list[eqx.nn.Linear]  # of the time; the last one gives the gates, or everything
    constants: Float[Array, " c"]  # w, u and b if they do not depend on time
    size: int = eqx.field(static=True)
    width: int = eqx.field(static=True)

    def __init__(self, size: int, *, width: int = 64, hidden: int = 32, dtype=None, key):
        self.size, self.width = size, width
        count = 2 * width * size + width
        sizes = [1, hidden, hidden, count + width * size] if hidden else [1, width]
        *keys, key = jax.random.split(key, len(sizes))
        self.hypernet = linears(sizes, keys, dtype)
        self.constants = jax.random.normal(
            key, (0 if hidden else count,), dtype or jnp.result_type(float)
        )

    def parameters(self, t, dtype):
        """w and gated u, shape (M, d), and b, shape (M,)."""
        h = jnp.reshape(jnp.asarray(t), (1,)).astype(dtype)
        h = jnp.concatenate([self.constants, perceptron(self.hypernet, h, jnp.tanh)])
        cut = self.width * self.size
        w, u, b, gate = jnp.split(h, [cut, 2 * cut, 2 * cut + self.width])
        w, u = w.reshape(-1, self.size), u.reshape(-1, self.size)
        return w, u * jax.nn.sigmoid(gate).reshape(self.width, -1), b

    def __call__(self, z: Float[Array, "n d"], t) -> Float[Array, "n d"]:
        w, u, b = self.parameters(t, z.dtype)
        return jnp.tanh(z @ w.T + b.reshape(1, -1)) @ u / self.width

    def divergence(self, z: Float[Array, "n d"], t) -> Float[Array, " n"]:
        """tr df/dz of each sample."""
        w, u, b = self.parameters(t, z.dtype)
        h = jnp.tanh(z @ w.T + b.reshape(1, -1))
        return (1 - h**2) @ jnp.sum(u * w, axis=1) / self.width


class ConcatSquash(eqx.Module):
    """FFJORD's network: layers (W x + b) * sigmoid(g(t)) + v(t), tanh between them.

    Grathwohl et al. (2019, arXiv 1810.01367), appendix; g and v are linear in (t, context).

    >>> import jax, jax.numpy as jnp
    >>> field = ConcatSquash(2, context=3, key=jax.random.key(0))
    >>> field(jnp.ones((5, 2)), 0.3, jnp.ones((5, 3))).shape
    (5, 2)
    """

    layers: list[eqx.nn.Linear]
    gates: list[eqx.nn.Linear]
    shifts: list[eqx.nn.Linear]

    def __init__(self, size, *, width=64, depth=3, context: int = 0, dtype=None, key):
        sizes = [size, *[width] * depth, size]
        keys = iter(jax.random.split(key, 3 * (depth + 1)))
        make = lambda a, b, bias=True: eqx.nn.Linear(a, b, bias, dtype=dtype, key=next(keys))
        pairs = list(itertools.pairwise(sizes))
        self.layers = [make(a, b) for a, b in pairs]
        self.gates = [make(1 + context, b) for _, b in pairs]
        self.shifts = [make(1 + context, b, False) for _, b in pairs]

    def __call__(self, z: Float[Array, "n d"], t, context=None) -> Float[Array, "n d"]:
        time = jnp.reshape(jnp.asarray(t), (1, 1)).astype(z.dtype)
        if context is not None:
            time = jnp.concatenate([jnp.broadcast_to(time, (len(z), 1)), context], axis=1)
        for i, (layer, gate, shift) in enumerate(zip(self.layers, self.gates, self.shifts)):
            z = jnp.tanh(z) if i else z
            scale, move = jax.nn.sigmoid(affine(gate, time)), affine(shift, time)
            z = affine(layer, z)
            z = z * jnp.broadcast_to(scale, z.shape) + jnp.broadcast_to(move, z.shape)
        return z


class PlanarFlow(eqx.Module):
    """A planar normalizing flow of depth K (Rezende and Mohamed 2015, arXiv 1505.05770): the baseline.

    Layers z + u tanh(w . z + b), kept invertible by their appendix A.1, from base to data; where
    `log_prob` is wanted the same layers go from data to base, for they have no closed inverse:
    make one with `density=True` for maximum likelihood.
    """

    w: Float[Array, "k d"]
    u: Float[Array, "k d"]
    b: Float[Array, " k"]
    base: Any
    density: bool = eqx.field(static=True)

    def __init__(self, depth: int, base, *, density: bool = False, dtype=None, key):
        keys = jax.random.split(key)
        shape = (depth, base.size)
        w, u = (jax.random.normal(k, shape, dtype or float) for k in keys)
        self.w, self.u = w, 0.01 * u  # near the identity, however deep
        self.b, self.base, self.density = jnp.zeros(depth, self.w.dtype), base, density

    def push(self, z: Float[Array, "n d"]):
        """Through all layers, and the log-determinant of the Jacobian."""

        def layer(carry, weights):
            z, total = carry
            w, u, b = weights
            product = jnp.sum(w * u)
            u = u + (jax.nn.softplus(product) - 1 - product) * w / (jnp.sum(w**2) + 1e-8)
            h = jnp.tanh(z @ w + b)
            total = total + jnp.log(jnp.abs(1 + (1 - h**2) * jnp.sum(w * u)) + 1e-8)
            return (z + h[:, None] * u[None], total), None

        start = z, jnp.zeros(len(z), z.dtype)
        return jax.lax.scan(layer, start, (self.w, self.u, self.b))[0]

    def log_prob(self, x: Float[Array, "n d"]) -> Float[Array, " n"]:
        """log p(x), for a flow with density=True."""
        if not self.density:
            raise ValueError("This planar flow samples; make it with density=True for log_prob.")
        z, change = self.push(x)
        return self.base.log_prob(z) + change

    def sample_and_log_prob(self, key: PRNGKeyArray, n: int):
        """n samples and their log-densities, for a flow with density=False."""
        if self.density:
            raise ValueError(
                "This planar flow has densities; make it with density=False to sample."
            )
        z = self.base.sample(key, n)
        x, change = self.push(z)
        return x, self.base.log_prob(z) - change
