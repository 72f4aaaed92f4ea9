"""Residual layers, h <- h + f(h): what an ODE is the limit of."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode.nn.layers import Conv, GroupNorm


class ResidualBlock(eqx.Module):
    """h + conv(relu(norm(conv(relu(norm(h)))))), pre-activated (He et al. 2016, arXiv 1603.05027).

    >>> import jax, jax.numpy as jnp
    >>> ResidualBlock(8, key=jax.random.key(0))(jnp.ones((2, 4, 4, 8))).shape
    (2, 4, 4, 8)
    """

    norms: list[GroupNorm]
    convs: list[Conv]

    def __init__(self, channels: int, *, groups=None, dtype=None, key: PRNGKeyArray):
        self.norms = [GroupNorm(channels, groups, dtype) for _ in range(2)]
        self.convs = [Conv(channels, channels, dtype=dtype, key=k) for k in jax.random.split(key)]

    def __call__(self, h: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        change = h
        for norm, conv in zip(self.norms, self.convs):
            change = conv(jax.nn.relu(norm(change)))
        return h + change


class ResidualBlocks(eqx.Module):
    """Residual blocks one after another, each with weights of its own."""

    blocks: list[ResidualBlock]

    def __init__(self, count: int, channels: int, *, groups=None, dtype=None, key: PRNGKeyArray):
        keys = jax.random.split(key, count)
        self.blocks = [ResidualBlock(channels, groups=groups, dtype=dtype, key=k) for k in keys]

    def __call__(self, h: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        for block in self.blocks:
            h = block(h)
        return h
