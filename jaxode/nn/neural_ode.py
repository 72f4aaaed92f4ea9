"""A field and how to solve it, as one layer."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from jaxode.integrate import solve
from jaxode.solution import Solution


class NeuralODE(eqx.Module):
    """y(t0) -> y(t1) along dy/dt = field(y, t) (Chen et al. 2018).

    `options` are those of `jaxode.solve`: method, rtol, atol, adjoint, dt, max_steps ... The
    same weights solved differently are `layer.with_options(rtol=1e-6)`.

    >>> import jax, jax.numpy as jnp
    >>> from jaxode.nn import MLPField, NeuralODE
    >>> layer = NeuralODE(MLPField(2, key=jax.random.key(0)), rtol=1e-3, atol=1e-3)
    >>> layer(jnp.ones((5, 2))).shape
    (5, 2)
    """

    field: Callable
    t0: float = eqx.field(static=True)
    t1: float = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, field: Callable, *, t0: float = 0.0, t1: float = 1.0, **options):
        self.field, self.t0, self.t1 = field, t0, t1
        self.options = tuple(sorted(options.items()))

    def __call__(self, y0: PyTree) -> PyTree:
        """y(t1)."""
        return last(self.solve(y0))

    def solve(self, y0: PyTree, ts=None) -> Solution:
        """The solution at ts ([t0, t1] by default), with its statistics."""
        ts = [self.t0, self.t1] if ts is None else ts
        return solve(self.field, y0, ts, **dict(self.options))

    def with_options(self, **options) -> "NeuralODE":
        """The same field, solved differently."""
        options = {**dict(self.options), **options}
        return NeuralODE(self.field, t0=self.t0, t1=self.t1, **options)


def last(solution: Solution) -> PyTree:
    """The state at the last time."""
    return jax.tree.map(lambda y: y[-1], solution.ys)
