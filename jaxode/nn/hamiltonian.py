"""Fields that keep something: energy, or volume."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode.nn.fields import linears, perceptron


class Scalar(eqx.Module):
    """A smooth function of a vector: hidden layers of softplus, one number out, on any leading axes."""

    layers: list[eqx.nn.Linear]

    def __init__(self, size: int, *, width=64, depth=2, dtype=None, key: PRNGKeyArray):
        sizes = [size, *[width] * depth, 1]
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = linears(sizes, keys, dtype)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        return perceptron(self.layers, x, jax.nn.softplus)[..., 0]

    def gradient(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """d/dx, of each point."""
        return jax.grad(lambda x: jnp.sum(self(x)))(x)


class SeparableHamiltonian(eqx.Module):
    """dq/dt = dT/dp, dp/dt = -dV/dq, with networks T and V; a state is a pair (q, p).

    H = T(p) + V(q) is kept by the exact solution, and within a band by the symplectic methods that
    this form allows (Greydanus et al. 2019, arXiv 1906.01563; Chen et al. 2020, arXiv 1909.13334).

    >>> import jax, jax.numpy as jnp
    >>> from jaxode import odeint
    >>> from jaxode.nn import SeparableHamiltonian
    >>> field = SeparableHamiltonian(2, key=jax.random.key(0))
    >>> q, p = odeint(field, (jnp.ones(2), jnp.zeros(2)), [0.0, 1.0], method="leapfrog", dt=0.1)
    >>> q.shape
    (2, 2)
    """

    kinetic: Scalar
    potential: Scalar

    def __init__(self, size: int, *, width=64, depth=2, dtype=None, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.kinetic = Scalar(size, width=width, depth=depth, dtype=dtype, key=keys[0])
        self.potential = Scalar(size, width=width, depth=depth, dtype=dtype, key=keys[1])

    def __call__(self, state, t):
        q, p = state
        return self.kinetic.gradient(p), -self.potential.gradient(q)

    def energy(self, state):
        """H(q, p)."""
        q, p = state
        return self.kinetic(p) + self.potential(q)


class HamiltonianField(eqx.Module):
    """dq/dt = dH/dp, dp/dt = -dH/dq for any H; a state is one vector (q, p) of even length."""

    hamiltonian: Scalar

    def __init__(self, size: int, *, width=64, depth=2, dtype=None, key: PRNGKeyArray):
        if size % 2:
            raise ValueError(f"A Hamiltonian system has as many p as q; got {size} components.")
        self.hamiltonian = Scalar(size, width=width, depth=depth, dtype=dtype, key=key)

    def __call__(self, y: Float[Array, "*batch d"], t) -> Float[Array, "*batch d"]:
        dq, dp = jnp.split(self.hamiltonian.gradient(y), 2, axis=-1)
        return jnp.concatenate([dp, -dq], axis=-1)

    def energy(self, y):
        """H(q, p)."""
        return self.hamiltonian(y)


class DivergenceFreeField(eqx.Module):
    """f_i = sum_j d A_ij / d y_j with an antisymmetric matrix network A: tr df/dy = 0, exactly.

    Richter-Powell et al. (2022, arXiv 2210.01741), eq. 4. The flow keeps volume. Works on any leading
    axes; costs d Jacobian-vector products.

    >>> import jax, jax.numpy as jnp
    >>> from jaxode.nn import DivergenceFreeField
    >>> field = DivergenceFreeField(3, key=jax.random.key(0))
    >>> jacobian = jax.jacfwd(lambda y: field(y, 0.0))(jnp.ones(3))
    >>> bool(abs(jnp.trace(jacobian)) < 1e-5)
    True
    """

    layers: list[eqx.nn.Linear]
    size: int = eqx.field(static=True)

    def __init__(self, size: int, *, width=64, depth=2, dtype=None, key: PRNGKeyArray):
        self.size = size
        sizes = [size, *[width] * depth, size * (size - 1) // 2]
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = linears(sizes, keys, dtype)

    def matrix(self, y: Float[Array, "*batch d"]) -> Float[Array, "*batch d d"]:
        """A(y)."""
        entries = perceptron(self.layers, y, jnp.tanh)
        rows, columns = jnp.triu_indices(self.size, 1)
        a = jnp.zeros((*entries.shape[:-1], self.size, self.size), entries.dtype)
        a = a.at[..., rows, columns].set(entries)
        return a - jnp.swapaxes(a, -1, -2)

    def __call__(self, y: Float[Array, "*batch d"], t) -> Float[Array, "*batch d"]:
        basis = jnp.eye(self.size, dtype=y.dtype)

        def term(j):
            direction = jnp.broadcast_to(basis[j], y.shape)
            return jax.jvp(self.matrix, (y,), (direction,))[1][..., j]

        return functools.reduce(jnp.add, map(term, range(self.size)))
