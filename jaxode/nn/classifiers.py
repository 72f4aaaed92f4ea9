"""The four classifiers of table 1 of Chen et al. (2018): MLP, ResNet, RK-Net, ODE-Net."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxode.nn.fields import ConvField, affine, linears, perceptron
from jaxode.nn.layers import Conv, GroupNorm
from jaxode.nn.neural_ode import NeuralODE, last
from jaxode.nn.resnet import ResidualBlocks


class MLPClassifier(eqx.Module):
    """One hidden layer of ReLUs over the pixels."""

    layers: list[eqx.nn.Linear]

    def __init__(
        self, pixels: int, classes: int, *, width: int = 300, dtype=None, key: PRNGKeyArray
    ):
        sizes = [pixels, width, classes]
        self.layers = linears(sizes, jax.random.split(key), dtype)

    def __call__(
        self, x: Float[Array, "n h w c"]
    ) -> tuple[Float[Array, "n classes"], Int[Array, ""]]:
        """Logits, and the number of field evaluations (0)."""
        logits = perceptron(self.layers, x.reshape(len(x), -1), jax.nn.relu)
        return logits, jnp.zeros((), jnp.int32)


class Classifier(eqx.Module):
    """Convolutions down, a body, then norm, ReLU, average pool and a linear layer.

    The body maps feature maps to feature maps: residual blocks or a `NeuralODE`. The published
    network for 28 x 28 images has `strides=(1, 2, 2)` and 64 channels.
    """

    downs: list[Conv]
    down_norms: list[GroupNorm]
    body: ResidualBlocks | NeuralODE
    norm: GroupNorm
    head: eqx.nn.Linear

    def __init__(
        self, body, channels, classes, *, inputs=1, strides=(1, 2, 2), groups=None, dtype=None, key
    ):
        *keys, head_key = jax.random.split(key, len(strides) + 1)
        cins = [inputs, *[channels] * (len(strides) - 1)]
        self.downs = [
            Conv(cin, channels, stride=s, dtype=dtype, key=k)
            for cin, s, k in zip(cins, strides, keys)
        ]
        self.down_norms = [GroupNorm(channels, groups, dtype) for _ in strides[:-1]]
        self.body, self.norm = body, GroupNorm(channels, groups, dtype)
        self.head = eqx.nn.Linear(channels, classes, dtype=dtype, key=head_key)

    def features(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h1 w1 d"]:
        """What the body starts from."""
        x = self.downs[0](x)
        for norm, conv in zip(self.down_norms, self.downs[1:]):
            x = conv(jax.nn.relu(norm(x)))
        return x

    def logits(self, h: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """From what the body ends with."""
        h = jax.nn.relu(self.norm(h))
        return affine(self.head, jnp.mean(h, axis=(1, 2)))

    def __call__(
        self, x: Float[Array, "n h w c"]
    ) -> tuple[Float[Array, "n classes"], Int[Array, ""]]:
        """Logits, and the number of field evaluations of the body (0 for residual blocks)."""
        h, evaluations = self.features(x), jnp.zeros((), jnp.int32)
        if isinstance(self.body, NeuralODE):
            solution = self.body.solve(h)
            h, evaluations = last(solution), solution.stats.evaluations
        else:
            h = self.body(h)
        return self.logits(h), evaluations


def classifier(
    name: str,
    *,
    channels: int = 64,
    classes: int = 10,
    image: tuple[int, int, int] = (28, 28, 1),
    strides: tuple[int, ...] = (1, 2, 2),
    blocks: int = 6,
    groups: int | None = None,
    hidden: int = 300,
    adjoint: str = "replay",
    rtol: float = 1e-3,
    atol: float = 1e-3,
    dtype=None,
    key: PRNGKeyArray,
) -> Any:
    """A classifier of table 1 by its name: "mlp", "resnet", "rk-net" or "ode-net".

    RK-Net takes a fixed number of Runge-Kutta steps and is differentiated through the solver
    (adjoint "direct"); ODE-Net solves to the tolerance, and is differentiated by `adjoint`.

    >>> import jax, jax.numpy as jnp
    >>> net = classifier("ode-net", channels=8, strides=(1, 2), image=(8, 8, 1), key=jax.random.key(0))
    >>> logits, evaluations = net(jnp.zeros((2, 8, 8, 1)))
    >>> logits.shape
    (2, 10)
    """
    body_key, key = jax.random.split(key)
    if name == "mlp":
        height, width, depth = image
        return MLPClassifier(height * width * depth, classes, width=hidden, dtype=dtype, key=key)
    if name == "resnet":
        body = ResidualBlocks(blocks, channels, groups=groups, dtype=dtype, key=body_key)
    elif name in ("rk-net", "ode-net"):
        field = ConvField(channels, groups=groups, dtype=dtype, key=body_key)
        if name == "rk-net":
            body = NeuralODE(field, method="rk4", dt=0.5, adjoint="direct")
        else:
            body = NeuralODE(field, method="tsit5", rtol=rtol, atol=atol, adjoint=adjoint)
    else:
        raise ValueError(f"`name` must be 'mlp', 'resnet', 'rk-net' or 'ode-net', got {name!r}.")
    return Classifier(
        body,
        channels,
        classes,
        inputs=image[2],
        strides=strides,
        groups=groups,
        dtype=dtype,
        key=key,
    )
