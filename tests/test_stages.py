"""Stages written out or as a loop: the same numbers, and each field gets the form that suits it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint
from jaxode.kernels import forms
from jaxode.kernels.forms import CALLS, ONE_CALL, PLAIN, Loops, which

laplace = lambda u: jnp.roll(u, 1) - 2 * u + jnp.roll(u, -1)


def heat(y, t, k):
    return k * laplace(y) + jnp.sin(y + t)


def decay(y, t, k):
    return -k * y


def layers(y, t, k):
    """Ten of them, of ten numbers each."""
    x = y.reshape(-1, 10)
    for i in range(10):
        weights = jnp.sin(jnp.arange(100, dtype=y.dtype) * (i + 1)).reshape(10, 10)
        x = x + jnp.tanh(x @ weights) * k / 50
    return t - x.reshape(y.shape)


FORMS = {
    "each entry by itself": (lambda y, t: -y * jnp.sin(y + t), (99,)),
    "many operations": (lambda y, t: layers(y, t, 1.0), (100,)),
    "a network": (lambda y, t: jnp.tanh(y @ jnp.ones((99, 99))), (2, 99)),
    "a large state": (lambda y, t: -y * jnp.sin(y + t), (60, 2)),
}
EXPECTED = {
    "each entry by itself": [Loops(True, True), Loops(False, False), Loops(True, True)],
    "many operations": [Loops(True, True), Loops(True, True), Loops(False, False)],
    "a network": [Loops(True, True), Loops(True, False), Loops(False, False)],
    "a large state": [Loops(True, True), Loops(False, False), Loops(True, True)],
}


@pytest.mark.parametrize("name", FORMS)
def test_each_field_gets_the_form_that_suits_it(name):
    field, shape = FORMS[name]
    given = jax.tree_util.Partial(field), jnp.ones(shape), jnp.zeros(())
    assert [which(*given, kernel) for kernel in (ONE_CALL, CALLS, PLAIN)] == EXPECTED[name]
    if name == "each entry by itself":
        assert which(given[0], jnp.ones(3), given[2], ONE_CALL) == Loops(False, True)


def printing(y, t, k):
    jax.debug.callback(lambda t: None, t)
    return -k * y


ODD = {
    "sorts": lambda y, t, k: -k * jnp.sort(y),
    "scatters": lambda y, t, k: -k * y.at[jnp.array([0, 2])].add(y[1]),
    "transforms": lambda y, t, k: -k * jnp.fft.irfft(jnp.fft.rfft(y) ** 2, 100) / 100,
    "solves": lambda y, t, k: -jnp.linalg.solve(jnp.eye(100, dtype=y.dtype) * (1 + k) + 0.1, y),
    "loops": lambda y, t, k: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) - k * y, y),
    "has a rule of its own": lambda y, t, k: -k * jax.nn.relu(y) + jax.nn.softplus(-y),
    "calls back": printing,
    "has numbers that are whole": lambda y, t, k: -k * y[jnp.arange(100)[::-1]],
}
HALVES = list(ODD)[::2], list(ODD)[1::2]  # a program has the solve once, whatever the field does


@pytest.mark.parametrize("names", HALVES, ids=" and ".join)
def test_a_field_in_calls_has_the_derivatives_that_jax_finds(names):
    of_all = lambda y, t, k: sum(ODD[name](y, t, k) for name in names)
    field = lambda y, t, k: of_all(y, t, k) + 0 * jnp.sort(y)  # never one call

    def loss(y0, k, t, adjoint):
        times = jnp.stack([jnp.zeros_like(t), t / 3, t])
        options = dict(method="bosh3", dt=0.1, max_steps=10, adjoint=adjoint)
        ys = odeint(field, y0, times, k, **options)
        return jnp.sum(ys**2 * jnp.arange(1.0, 4.0)[:, None])

    of, given = jax.grad(loss, (0, 1, 2)), (jnp.sin(jnp.arange(100.0)), 0.5, 0.6)
    for a, b in zip(of(*given, "replay"), of(*given, "direct")):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "field", "count", "dtype"),
    [
        ("tsit5", heat, 4, "float32"),
        ("dop853", decay, 4, "float64"),
        ("rk4", heat, 2, "float64"),
        ("bosh3", layers, 4, "float32"),
    ],
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
