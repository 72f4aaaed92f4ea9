"""Augmented neural ODEs (Dupont, Doucet, Teh 2019, arXiv 1904.01681)."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode.nn.neural_ode import NeuralODE


class Augmented(eqx.Module):
    """A neural ODE on the input and `extra` zeros beside it.

    Paths of an ODE cannot cross, so that a plain one cannot map x to -x on the line, nor separate a
    disc from a ring around it; with more dimensions they pass beside each other. `layer.field` is of
    size d + extra.

    >>> import jax, jax.numpy as jnp
    >>> from jaxode.nn import Augmented, MLPField, NeuralODE
    >>> layer = NeuralODE(MLPField(3, key=jax.random.key(0)), rtol=1e-3, atol=1e-3)
    >>> Augmented(layer, 1)(jnp.ones((5, 2))).shape
    (5, 3)
    """

    layer: NeuralODE
    extra: int = eqx.field(static=True)

    def augment(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch e"]:
        """x, and zeros."""
        return jnp.concatenate([x, jnp.zeros((*x.shape[:-1], self.extra), x.dtype)], axis=-1)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch e"]:
        """All of y(t1), the extra components too."""
        return self.layer(self.augment(x))

    def solve(self, x, ts=None):
        """The solution, with its statistics."""
        return self.layer.solve(self.augment(x), ts)
