"""Dynamics networks: right-hand sides f(y, t) as equinox modules, with time as an input."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode.nn.layers import Conv, GroupNorm, as_channel


class MLPField(eqx.Module):
    """A multilayer perceptron of (y, t): tanh layers, the last one linear.

    Works on any leading axes, so that a whole batch can be one state. With time=False it is one of
    y alone: what it learns in one stretch of time then holds in every other (extrapolation).

    >>> import jax, jax.numpy as jnp
    >>> field = MLPField(2, width=16, depth=2, key=jax.random.key(0))
    >>> field(jnp.ones((5, 2)), 0.1).shape
    (5, 2)
    """

    layers: list[eqx.nn.Linear]
    time: bool = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        *,
        width: int = 64,
        depth: int = 2,
        time=True,
        dtype=None,
        key: PRNGKeyArray,
    ):
        self.time = time
        sizes = [size + time, *[width] * depth, size]
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = linears(sizes, keys, dtype)

    def __call__(self, y: Float[Array, "*batch size"], t) -> Float[Array, "*batch size"]:
        h = y
        if self.time:
            h = jnp.concatenate([y, as_channel(t, y)], axis=-1)
        return perceptron(self.layers, h, jnp.tanh)


def linears(sizes, keys, dtype=None) -> list[eqx.nn.Linear]:
    """The layers of a perceptron from sizes[0] to sizes[-1]."""
    return [eqx.nn.Linear(a, b, dtype=dtype, key=k) for a, b, k in zip(sizes, sizes[1:], keys)]


def perceptron(layers, x, activation):
    """The layers one after another, over the last axis; the last one linear."""
    for layer in layers[:-1]:
        x = activation(affine(layer, x))
    return affine(layers[-1], x)


def affine(layer: eqx.nn.Linear, x):
    """W x + b over the last axis."""
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias.reshape((1,) * (y.ndim - 1) + (-1,))


class ConvField(eqx.Module):
    """The field of the ODE-Net (Chen et al. 2018, released example), on batches of feature maps:
    norm, ReLU, concat-time convolution, norm, ReLU, concat-time convolution, norm.

    >>> import jax, jax.numpy as jnp
    >>> field = ConvField(8, key=jax.random.key(0))
    >>> field(jnp.ones((2, 4, 4, 8)), 0.1).shape
    (2, 4, 4, 8)
    """

    norms: list[GroupNorm]
    convs: list[Conv]

    def __init__(self, channels: int, *, groups=None, dtype=None, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.norms = [GroupNorm(channels, groups, dtype) for _ in range(3)]
        self.convs = [Conv(channels, channels, with_time=True, dtype=dtype, key=k) for k in keys]

    def __call__(self, y: Float[Array, "n h w c"], t) -> Float[Array, "n h w c"]:
        for norm, conv in zip(self.norms, self.convs):
            y = conv(jax.nn.relu(norm(y)), t)
        return self.norms[-1](y)
