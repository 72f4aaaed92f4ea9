"""Integrals along a solution, as further components of the same solve; and rates to integrate.

A rate is a function `rate(field, y, t)` that gives one number for each sample of the batch y.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class WithIntegrals(eqx.Module):
    """The field of (y, r): dy/dt = f(y, t), dr_i/dt = rate_i(f, y, t).

    At each (y, t) f is evaluated once, for itself and for all rates, and linearised at most once.

    >>> import jax, jax.numpy as jnp
    >>> from jaxode import odeint
    >>> from jaxode.nn import WithIntegrals, kinetic_energy
    >>> field = WithIntegrals(lambda y, t: -y, [kinetic_energy])
    >>> y0 = jnp.ones((5, 2))
    >>> y, (energy,) = odeint(field, (y0, field.zeros(y0)), [0.0, 1.0], rtol=1e-5)
    >>> bool(jnp.allclose(energy[-1], (1 - jnp.exp(-2.0)) / 2, rtol=1e-3))
    True
    """

    field: Callable
    rates: Sequence[Callable]

    def __call__(self, state: PyTree, t) -> PyTree:
        y, _ = state
        if any(linearises(rate, self.field) for rate in self.rates):
            here = Here(self.field, y, t, *linearised(self.field, y, t))
        else:
            here = Here(self.field, y, t, self.field(y, t), None)
        return here.value, [rate(here, y, t) for rate in self.rates]

    def zeros(self, y0: Float[Array, "n ..."]) -> list[Float[Array, " n"]]:
        """The integrals at the start."""
        return [jnp.zeros(len(y0), y0.dtype) for _ in self.rates]


class Here(NamedTuple):
    """A field, with what it is at one (y, t): its value there, and perhaps v -> (df/dy) v."""

    field: Callable
    y: Array
    t: Any
    value: Array
    push: Callable | None

    def __call__(self, y, t):
        return self.value if self.is_at(y, t) else self.field(y, t)

    def __getattr__(self, name: str):
        return getattr(self.field, name)

    def is_at(self, y, t) -> bool:
        return y is self.y and t is self.t


def linearises(rate: Callable, field: Callable) -> bool:
    """Whether a rate multiplies with df/dy."""
    exact = rate is divergence and not hasattr(field, "divergence")
    return exact or isinstance(rate, (Hutchinson, JacobianNorm))


def linearised(field: Callable, y, t) -> tuple[Array, Callable]:
    """f(y, t), and the function v -> (df/dy) v."""
    if isinstance(field, Here) and field.is_at(y, t) and field.push:
        return field.value, field.push
    return jax.linearize(lambda y: field(y, t), y)


def pulled(field: Callable, y, t, v) -> Array:
    """v^T df/dy."""
    return jax.linear_transpose(linearised(field, y, t)[1], y)(v)[0]


def of_sample(x: Float[Array, "n ..."]) -> Float[Array, " n"]:
    """The sum over all but the first axis."""
    return jnp.sum(x.reshape(len(x), -1), axis=1)


def mean_of_sample(x: Float[Array, "n ..."]) -> Float[Array, " n"]:
    """The mean over all but the first axis."""
    return of_sample(x) / max(1, x[0].size)


def kinetic_energy(field, y, t) -> Float[Array, " n"]:
    """|f(y, t)|^2 of each sample, a mean over its components (RNODE: Finlay et al. 2020, eq. 8).

    Its integral is smallest for straight paths of constant speed, which take few steps.
    """
    return mean_of_sample(field(y, t) ** 2)


class JacobianNorm(eqx.Module):
    """An estimate of the squared Frobenius norm of df/dy, |e^T df/dy|^2 / d (RNODE, eq. 10).

    `noise` has the shape of y, mean 0 and variance 1, and is fixed for the solve.
    """

    noise: Float[Array, "n ..."]

    def __call__(self, field, y, t) -> Float[Array, " n"]:
        return mean_of_sample(pulled(field, y, t, self.noise) ** 2)


def divergence(field, y: Float[Array, "n d"], t) -> Float[Array, " n"]:
    """tr df/dy of each sample, exactly: d Jacobian-vector products.

    A field that knows a cheaper form has it as a method `divergence(y, t)`.
    """
    if hasattr(field, "divergence"):
        return field.divergence(y, t)
    d, push = y.shape[-1], linearised(field, y, t)[1]

    def entry(i):
        return push(jnp.broadcast_to(jnp.eye(d, dtype=y.dtype)[i], y.shape))[:, i]

    return functools.reduce(jnp.add, map(entry, range(d)))


class Hutchinson(eqx.Module):
    """An unbiased estimate of tr df/dy, e^T (df/dy) e (FFJORD: Grathwohl et al. 2019, eq. 7).

    `noise` has the shape of y, mean 0 and covariance 1 (`rademacher` has the least variance), and
    is fixed for the solve.
    """

    noise: Float[Array, "n ..."]

    def __call__(self, field, y, t) -> Float[Array, " n"]:
        return of_sample(pulled(field, y, t, self.noise) * self.noise)
