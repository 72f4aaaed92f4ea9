"""The adjoint "reversible": exact for its own steps, without stored states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import adjoints, odeint, solve
from jaxode.methods import tables
from jaxode.methods.reversible import Reversible

T = jnp.linspace(0.0, 10.0, 6)
Y0 = jnp.array([2.0, 0.3])


def lotka_volterra(y, t, a, b):
    return jnp.stack([y[0] * (a - b * y[1]), y[1] * (b * y[0] - 0.7)])


def loss(y0, t, a, **options):
    """All outputs, those inside of the steps too."""
    return jnp.sum(odeint(lotka_volterra, y0, t, a, 0.4, **options) ** 2)


gradient = jax.value_and_grad(loss, (0, 1, 2))


@pytest.mark.parametrize(
    "method, options",
    [
        ("tsit5", {"rtol": 1e-6, "atol": 1e-6}),
        ("bosh3", {"rtol": 1e-5, "atol": 1e-5}),
        ("rk4", {"dt": 0.02}),
    ],
)
def test_it_is_the_gradient_of_its_own_steps(method, options):
    table = getattr(tables, method)
    found = gradient(Y0, T, 1.1, method=method, adjoint="reversible", **options)
    same = gradient(Y0, T, 1.1, method=Reversible(table), adjoint="direct", **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), found, same)


def test_of_a_function_of_the_state_that_depends_on_what_is_differentiated():
    def total(y0, t, a, **options):
        saved = dict(save=lambda y, t, a, b: jnp.sin(a * y) + t, dt=0.2, **options)
        return jnp.sum(solve(lotka_volterra, y0, t, a, 0.4, **saved).ys ** 2)

    gradients = jax.jit(jax.grad(total, (0, 1, 2)), static_argnames=("method", "adjoint"))
    found = gradients(Y0, T[:3], 1.1, method="rk4", adjoint="reversible")
    same = gradients(Y0, T[:3], 1.1, method=Reversible(tables.rk4), adjoint="direct")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), found, same)


def test_tiny_steps_whose_errors_are_below_roundings_are_taken_back():
    """Two states that differ by roundings alone are not made one again and again."""
    options = dict(method="dop853", dt=1e-3)
    found, same = (gradient(Y0, T, 1.1, adjoint=a, **options) for a in ("reversible", "replay"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, same)


def test_it_is_as_accurate_as_the_method_itself():
    """Where prey and hunters grow and decay, a pair that is never made one comes apart."""
    exact = gradient(Y0, T, 1.1, rtol=1e-11, atol=1e-11, method="dop853")
    for method, adjoint in (("tsit5", "replay"), ("tsit5", "reversible"), ("dop853", "reversible")):
        options = dict(method=method, adjoint=adjoint, rtol=1e-7, atol=1e-7)
        found = gradient(Y0, T, 1.1, **options)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4), found, exact
        )


def test_memory_does_not_grow_with_the_steps():
    def spring(y, t):
        return jnp.concatenate([y[1:] * t, -y[:1]])

    def compiled(steps):
        def last(y):
            options = dict(method="rk4", dt=1 / steps, max_steps=steps, adjoint="reversible")
            return jnp.sum(odeint(spring, y, jnp.array([0.0, 1.0]), **options)[-1] ** 2)

        return jax.jit(jax.grad(last)).lower(jnp.ones(64)).compile().memory_analysis()

    assert compiled(10_000).temp_size_in_bytes == compiled(100).temp_size_in_bytes


def test_ten_thousand_steps():
    def spring(y, t):
        return jnp.stack([y[1], -y[0]])

    def last(y, **options):
        t = jnp.array([0.0, 100.0])
        return jnp.sum(odeint(spring, y, t, dt=0.01, max_steps=10_000, **options)[-1] ** 3)

    found = jax.grad(last)(Y0, method="dopri5", adjoint="reversible")
    same = jax.grad(last)(Y0, method=Reversible(tables.dopri5), adjoint="direct")
    np.testing.assert_allclose(found, same, rtol=1e-8)


def test_under_vmap_in_float32_and_of_a_pytree():
    starts = jnp.outer(jnp.linspace(0.5, 2.0, 5), Y0).astype(jnp.float32)
    options = dict(rtol=1e-4, atol=1e-4, adjoint="reversible")
    t = T.astype(jnp.float32)

    def of_pair(pair, a):
        func = lambda y, t: tuple(lotka_volterra(jnp.stack(y), t, a, jnp.float32(0.4)))
        return sum(jnp.sum(y**2) for y in odeint(func, tuple(pair), t, **options))

    a = jnp.float32(1.1)
    own, shared = jax.vmap(jax.grad(of_pair, (0, 1)), (0, None))(starts, a)
    total = jax.grad(lambda a: jnp.sum(jax.vmap(lambda y: of_pair(y, a))(starts)))(a)
    one = [jax.grad(of_pair, (0, 1))(y, a) for y in starts[:2]]
    assert own.dtype == jnp.float32
    for i, (y_bar, a_bar) in enumerate(one):
        np.testing.assert_allclose(own[i], y_bar, rtol=1e-3)
        np.testing.assert_allclose(shared[i], a_bar, rtol=1e-3)
    np.testing.assert_allclose(total, np.sum(shared), rtol=1e-3)


def test_decay_over_many_time_constants():
    """Forwards any number of them is right; backwards there is a gradient, or NaN if too little is kept."""

    def last(k, keep, t1=50.0):
        func = lambda y, t: k - y**3
        options = dict(rtol=1e-6, atol=1e-6, adjoint=adjoints.reversible(keep))
        return odeint(func, jnp.asarray(0.5), jnp.array([0.0, t1]), **options)[-1]

    value, found = jax.value_and_grad(last)(2.0, 100)
    np.testing.assert_allclose((value, found), (2 ** (1 / 3), 2 ** (-2 / 3) / 3), rtol=1e-3)
    value, found = jax.value_and_grad(last)(2.0, 2)
    np.testing.assert_allclose(value, 2 ** (1 / 3), rtol=1e-5)
    assert np.isnan(found)


def test_a_solve_that_fails_and_is_left_out():
    def one(y0, a):
        s = solve(lambda y, t: a * y**2, y0, jnp.array([0.0, 1.0]), adjoint="reversible")
        return jnp.where(s.status == 0, jnp.sum(s.ys[-1]), 0.0)

    starts = jnp.array([[0.5], [2.0]])  # the second has a pole at t = 0.5
    found = jax.vmap(jax.grad(one), (0, None))(starts, 1.0)
    np.testing.assert_allclose(found, [[4.0], [0.0]], rtol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "rodas4"}, "explicit Runge-Kutta"),
        ({"dense": True}, "use adjoint='replay'"),
        ({"fold": (0.0, lambda v, y, t: v)}, "without events or a fold"),
    ],
)
def test_what_it_cannot_do_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        solve(lambda y, t: -y, Y0, [0.0, 1.0], adjoint="reversible", **options)
    with pytest.raises(ValueError, match="positive integer"):
        adjoints.reversible(0)
