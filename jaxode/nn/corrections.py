"""Corrections of a `jaxode.methods.Hypersolver`: a network, and what it is fitted to.

Reference: Poli et al. (2020), Hypersolvers: Toward Fast Continuous-Depth Models, arXiv 2007.09601.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode.methods import Hypersolver, Method
from jaxode.nn.fields import linears, perceptron
from jaxode.nn.layers import as_channel


class MLPCorrection(eqx.Module):
    """g(y, t, h, slope) of a `jaxode.methods.Hypersolver`: a perceptron with tanh layers, the last one linear
    and 0 at first, so that what is trained begins as the method that it corrects.

    Works on any leading axes, so that a whole batch can be one state. With time=False it is one of y, h and
    slope alone, for fields that do not depend on time. Arguments of func after these are not looked at.

    >>> import jax, jax.numpy as jnp
    >>> from jaxode import odeint
    >>> from jaxode.methods import Hypersolver
    >>> correction = MLPCorrection(2, width=16, key=jax.random.key(0))
    >>> method = Hypersolver("heun", correction)
    >>> odeint(lambda y, t: -y, jnp.ones((5, 2)), [0.0, 1.0], method=method, dt=0.25).shape
    (2, 5, 2)
    """

    layers: list[eqx.nn.Linear]
    time: bool = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        *,
        width: int = 32,
        depth: int = 2,
        time=True,
        dtype=None,
        key: PRNGKeyArray,
    ):
        self.time = time
        sizes = [2 * size + 1 + time, *[width] * depth, size]
        layers = linears(sizes, jax.random.split(key, len(sizes) - 1), dtype)
        self.layers = [*layers[:-1], jax.tree.map(jnp.zeros_like, layers[-1])]

    def __call__(
        self, y: Float[Array, "*batch size"], t, h, slope: Float[Array, "*batch size"], *args
    ) -> Float[Array, "*batch size"]:
        numbers = [h, t] if self.time else [h]
        columns = [as_channel(x, y) for x in numbers]
        return perceptron(self.layers, jnp.concatenate([y, slope, *columns], axis=-1), jnp.tanh)


class Residuals(NamedTuple):
    """Steps of a method, and what would have made them exact: one of each, in the order of `correction`."""

    y: PyTree
    t: Array
    h: Array
    slope: PyTree
    residual: PyTree


def residuals(func: Callable, ys: PyTree, ts, *args, method: str | Method) -> Residuals:
    """What the correction of a method should be, at the rows of an accurate solution:

        (y(t + h) - y(t) - h psi(t, y(t))) / h^(p+1)

    (residual fitting, Poli et al. 2020), for steps from each row to the next. A correction g is fitted to it,
    by mean |residual - g(y, t, h, slope)|^2. An error of the solution is divided by h^(p+1), too: solve in
    float64, at a tolerance of 1e-9 for instance, where steps are short.

    Args:
        func, args: the derivative func(y, t, *args).
        ys: states at the times ts, with a leading axis for these; rows between may be left out, such as
            ys[::4] with ts[::4] for steps of four times the size.
        method: the explicit method that is corrected, or its name.

    Returns:
        `Residuals`: y, t, h, slope and residual, a row for each step.

    Raises:
        ValueError: the method has no explicit table.

    >>> import jax.numpy as jnp
    >>> ts = jnp.array([0.0, 0.1, 0.2])
    >>> found = residuals(lambda y, t: -y, jnp.exp(-ts), ts, method="euler")
    >>> print(jnp.round(found.residual, 3))  # nearly y'' / 2
    [0.484 0.438]
    """
    solver = Hypersolver(method, lambda *given: None)
    f = lambda y, t: func(y, t, *args)
    ts = jnp.asarray(ts)

    def one(y, y1, t, h):
        slope = f(y, t)
        return slope, solver.residual(f, t, y, slope, h, y1)

    begin, end = (jax.tree.map(pick, ys) for pick in (lambda y: y[:-1], lambda y: y[1:]))
    t, h = ts[:-1], ts[1:] - ts[:-1]
    return Residuals(begin, t, h, *jax.vmap(one)(begin, end, t, h))
