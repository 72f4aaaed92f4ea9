"""Networks: against the ODE's closed form, JAX's own convolution, and what the layers promise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxode.nn import (
    Conv,
    ConvField,
    GroupNorm,
    MLPField,
    NeuralODE,
    ResidualBlock,
    classifier,
)

KEY = jax.random.key(0)


def images(dtype, channels=4, n=3):
    return jax.random.normal(jax.random.key(7), (n, 4, 4, channels), dtype)


@pytest.mark.parametrize("make", [MLPField, ConvField, ResidualBlock])
def test_layers_keep_shape_and_dtype(make, dtype):
    layer = make(4, dtype=dtype, key=KEY)
    y = images(dtype)
    out = layer(y) if make is ResidualBlock else layer(y, jnp.asarray(0.5, dtype))
    assert out.shape == y.shape and out.dtype == y.dtype


@pytest.mark.parametrize("make", [MLPField, ConvField])
def test_fields_depend_on_time(make):
    field = make(4, dtype="float64", key=KEY)
    y = images("float64")
    assert not np.allclose(field(y, jnp.asarray(0.0)), field(y, jnp.asarray(1.0)))


def test_a_convolution_with_time_is_one_with_a_constant_channel_more():
    conv = Conv(4, 6, with_time=True, dtype="float64", key=KEY)
    y = images("float64")
    more = jnp.concatenate([y, jnp.full((*y.shape[:-1], 1), 0.3)], axis=-1)
    order = ("NHWC", "HWIO", "NHWC")
    plain = lax.conv_general_dilated(more, conv.weight, (1, 1), "SAME", dimension_numbers=order)
    expected = plain + conv.bias.reshape(1, 1, 1, -1)
    np.testing.assert_allclose(conv(y, jnp.asarray(0.3)), expected, rtol=1e-12, atol=1e-12)


def test_a_group_has_mean_zero_and_variance_one_in_every_image():
    y = 3 + 5 * images("float64")
    grouped = np.asarray(GroupNorm(4, 2, "float64")(y)).reshape(3, 4, 4, 2, 2)
    np.testing.assert_allclose(grouped.mean((1, 2, 4)), 0, atol=1e-12)
    np.testing.assert_allclose(grouped.var((1, 2, 4)), 1, atol=1e-5)


def test_channels_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        GroupNorm(6, 4)


class Linear(eqx.Module):
    rate: jax.Array

    def __call__(self, y, t):
        return self.rate * y


def test_a_neural_ode_of_a_linear_field_is_the_exponential_and_so_is_its_gradient():
    y0 = jnp.array([1.0, -2.0])
    layer = NeuralODE(Linear(jnp.asarray(0.7)), t1=2.0, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(layer(y0), y0 * np.exp(1.4), rtol=1e-8)
    bar = eqx.filter_grad(lambda layer: jnp.sum(layer(y0)))(layer)
    np.testing.assert_allclose(bar.field.rate, -2 * np.exp(1.4), rtol=1e-8)


def test_a_neural_ode_can_be_looked_at_in_between():
    layer = NeuralODE(Linear(jnp.asarray(0.7)), rtol=1e-8, atol=1e-8)
    solution = layer.solve(jnp.ones(2), jnp.linspace(0.0, 1.0, 5))
    np.testing.assert_allclose(solution.ys[:, 0], np.exp(0.7 * np.linspace(0, 1, 5)), rtol=1e-6)


def test_other_options_leave_the_field_alone():
    layer = NeuralODE(Linear(jnp.asarray(0.7)), rtol=1e-3, atol=1e-3)
    fixed = layer.with_options(method="euler", dt=0.5)
    assert fixed.field is layer.field
    np.testing.assert_allclose(fixed(jnp.ones(1)), 1.35**2, rtol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "resnet", "rk-net", "ode-net"])
def test_a_batch_of_images_becomes_a_batch_of_logits(name):
    settings = dict(channels=4, strides=(1, 2), image=(8, 8, 1), blocks=2, hidden=8, groups=1)
    net = classifier(name, dtype="float32", key=KEY, **settings)
    logits, evaluations = net(jnp.ones((3, 8, 8, 1), jnp.float32))
    assert logits.shape == (3, 10) and logits.dtype == jnp.float32
    assert (int(evaluations) > 0) == (name in ("rk-net", "ode-net"))


def test_an_ode_net_has_at_most_half_the_parameters_of_a_resnet():
    def size(name):
        net = classifier(name, channels=16, strides=(1, 2), image=(8, 8, 1), groups=1, key=KEY)
        return sum(x.size for x in jax.tree.leaves(eqx.filter(net, eqx.is_array)))

    assert 2 * size("ode-net") <= size("resnet")


def test_an_unknown_classifier_is_refused_by_name():
    with pytest.raises(ValueError, match="'perceptron'"):
        classifier("perceptron", key=KEY)
