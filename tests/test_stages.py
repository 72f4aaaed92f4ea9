"""Stages written out or as a loop: the same numbers, and each field gets the form that suits it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint
from jaxode.kernels import forms
from jaxode.kernels.forms import Loops, which

laplace = lambda u: jnp.roll(u, 1) - 2 * u + jnp.roll(u, -1)


def heat(y, t, k):
    return k * laplace(y) + jnp.sin(y + t)


def layers(y, t, k):
    """Ten of them, of ten numbers each."""
    x = y.reshape(-1, 10)
    for i in range(10):
        weights = jnp.sin(jnp.arange(100, dtype=y.dtype) * (i + 1)).reshape(10, 10)
        x = x + jnp.tanh(x @ weights) * k / 50
    return t - x.reshape(y.shape)


FIELDS = {
    "differences of neighbours": (lambda y, t: laplace(y[0]), Loops(True, True)),
    "differences of padded arrays": (
        lambda y, t: jnp.diff(jnp.pad(y[0], 1), n=2),
        Loops(True, True),
    ),
    "a mirror image": (lambda y, t: y[0] - y[0][::-1], Loops(True, True)),
    "two of them, stacked": (
        lambda y, t: jnp.stack([laplace(y[0]) - y[1], laplace(y[1]) + y[0]]),
        Loops(True, True),
    ),
    "rows of a state": (lambda y, t: jnp.stack([y[1] * y[0], y[0] - y[1]]), Loops(False, True)),
    "each entry by itself": (lambda y, t: -y * jnp.sin(y + t), Loops(False, True)),
    "sums over pairs": (lambda y, t: jnp.sum(y[:1] - y[0][:, None], 1), Loops(False, True)),
    "a network": (lambda y, t: jnp.tanh(y @ jnp.ones((99, 99))), Loops(False, False)),
}


@pytest.mark.parametrize("name", FIELDS)
def test_neighbours_make_a_loop_and_a_network_is_written_out(name):
    field, expected = FIELDS[name]
    field = jax.tree_util.Partial(field)
    assert which(field, jnp.ones((2, 99)), jnp.zeros(())) == expected


def test_a_deep_network_makes_a_loop_unless_its_state_is_large():
    field = jax.tree_util.Partial(lambda y, t: layers(y, t, 1.0))
    for size, expected in ((100, True), (101, False)):
        y = jax.ShapeDtypeStruct((size, 100), jnp.float32)
        loops = which(field, y, jnp.zeros((), jnp.float32))
        assert loops == Loops(expected, expected)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    ("method", "field"), [("tsit5", heat), ("dop853", heat), ("rk4", heat), ("bosh3", layers)]
)
def test_both_forms_give_the_same_solution_and_gradient(monkeypatch, field, method, count, dtype):
    y0 = jnp.sin(jnp.arange(100, dtype=dtype))
    t = jnp.linspace(0.0, 0.3, count, dtype=dtype)
    tolerance = 1e-6 if dtype == "float64" else 1e-4
    options = {"dt": 0.01} if method == "rk4" else {"rtol": tolerance, "atol": tolerance}

    def loss(y0, k, t):
        ys = odeint(field, y0, t, k, method=method, **options)
        return jnp.sum(jnp.cos(ys) * jnp.arange(1, count + 1, dtype=dtype)[:, None])

    def run(loops):
        monkeypatch.setattr(forms, "which", lambda *_: loops)
        jax.clear_caches()
        return jax.value_and_grad(loss, (0, 1, 2))(y0, jnp.asarray(5.0, dtype), t)

    rounding = 1e-9 if dtype == "float64" else 2e-3
    for a, b in zip(*(jax.tree.leaves(run(Loops(x, x))) for x in (True, False))):
        np.testing.assert_allclose(a, b, rtol=rounding, atol=rounding * np.abs(b).max())
        assert a.dtype == dtype


def test_a_pytree_of_neighbours_is_solved_as_by_an_exact_series():
    x = 2 * np.pi * np.arange(64) / 64
    rate = 4 * np.sin(np.pi / 64) ** 2  # of exp(ix) under second differences
    field = lambda y, t: {"u": laplace(y["u"]), "v": laplace(y["v"])}
    y0 = {"u": jnp.sin(x), "v": jnp.cos(x)}
    ys = odeint(field, y0, [0.0, 10.0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ys["u"][-1], np.exp(-10 * rate) * np.sin(x), atol=1e-7)
    np.testing.assert_allclose(ys["v"][-1], np.exp(-10 * rate) * np.cos(x), atol=1e-7)
