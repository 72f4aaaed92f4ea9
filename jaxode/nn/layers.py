"""Layers over batches of images in NHWC order, which is the fastest on CPU and on TPU."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray


class Conv(eqx.Module):
    """A 3 x 3 convolution with bias, NHWC; `with_time` appends the time as one more input channel.

    The concat-time convolution of Chen et al. (2018). The initial weights are uniform in
    +-1/sqrt(9 channels), those of the released example.

    >>> import jax, jax.numpy as jnp
    >>> conv = Conv(4, 8, with_time=True, key=jax.random.key(0))
    >>> conv(jnp.zeros((2, 8, 8, 4)), 0.5).shape
    (2, 8, 8, 8)
    """

    weight: Float[Array, "3 3 cin cout"]
    bias: Float[Array, " cout"]
    stride: int = eqx.field(static=True)
    with_time: bool = eqx.field(static=True)

    def __init__(
        self, cin: int, cout: int, *, stride=1, with_time=False, dtype=None, key: PRNGKeyArray
    ):
        wkey, bkey = jax.random.split(key)
        cin = cin + with_time
        bound = 1 / (9 * cin) ** 0.5
        dtype = jnp.result_type(float) if dtype is None else dtype
        # Drawn as a row: numbers of four axes take ten times as long to compile, and are the same.
        row = jax.random.uniform(wkey, (9 * cin * cout,), dtype, -bound, bound)
        self.weight = row.reshape(3, 3, cin, cout)
        self.bias = jax.random.uniform(bkey, (cout,), dtype, -bound, bound)
        self.stride, self.with_time = stride, with_time

    def __call__(self, x: Float[Array, "n h w c"], t=None) -> Float[Array, "n h1 w1 d"]:
        if self.with_time:
            t = as_channel(t, x)
            y = by_rows(jnp.concatenate([x, t], axis=-1), self.weight, self.stride)
        else:
            stride, order = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
            y = lax.conv_general_dilated(x, self.weight, stride, "SAME", dimension_numbers=order)
        return y + self.bias.reshape(1, 1, 1, -1)


def by_rows(
    x: Float[Array, "n h w c"], weight: Float[Array, "3 3 c d"], stride: int
) -> Float[Array, "n h1 w1 d"]:
    """A 3 x 3 convolution as three matrix products, one for each row of the kernel.

    XLA's own convolution is faster by itself, but several times slower in the body of a loop on CPU
    (jax 0.10.2), which is where a field with time is evaluated: the gradient of an ODE-Net took
    240 ms with matrix products and 1,150 ms with it. One product of all nine neighbours runs as
    fast as three of three, but its gradient takes three times as long to compile (9.5 and 3.6 s).
    """
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.concatenate([x[:, :, j : j + w : stride] for j in range(3)], axis=-1)
    rows = weight.reshape(3, -1, weight.shape[-1])
    return sum((x[:, i : i + h : stride] @ rows[i] for i in (1, 2)), x[:, :h:stride] @ rows[0])


def as_channel(number, like):
    """A number, such as a time, as one more channel of an array: along its last axis, of size 1."""
    return jnp.broadcast_to(jnp.asarray(number).astype(like.dtype), (*like.shape[:-1], 1))


class GroupNorm(eqx.Module):
    """Group normalisation of each image (Wu and He 2018, arXiv 1803.08494), NHWC.

    >>> import jax.numpy as jnp
    >>> GroupNorm(8)(jnp.ones((2, 4, 4, 8))).shape
    (2, 4, 4, 8)
    """

    scale: Float[Array, " c"]
    shift: Float[Array, " c"]
    groups: int = eqx.field(static=True)

    def __init__(self, channels: int, groups: int | None = None, dtype=None):
        groups = min(32, channels) if groups is None else groups
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} groups.")
        dtype = jnp.result_type(float) if dtype is None else dtype
        self.scale, self.shift, self.groups = (
            jnp.ones(channels, dtype),
            jnp.zeros(channels, dtype),
            groups,
        )

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        x = x - self.mean(x)
        variance = lax.optimization_barrier(self.mean(x * x) + 1e-5)
        factor = lax.rsqrt(variance) * self.scale.reshape(1, 1, 1, -1)
        return x * factor + self.shift.reshape(1, 1, 1, -1)

    def mean(self, x: Float[Array, "n h w c"]) -> Float[Array, "n 1 1 c"]:
        """That of its group, for each channel.

        Pixels first: with channels as the last axis that is eight times faster than all at once.
        """
        n, c = x.shape[0], x.shape[-1]
        mean = jnp.mean(x, axis=(1, 2)).reshape(n, self.groups, -1)
        mean = jnp.broadcast_to(jnp.mean(mean, axis=2, keepdims=True), mean.shape)
        return mean.reshape(n, 1, 1, c)
