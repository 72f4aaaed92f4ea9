"""Gradients in few numbers are carried along; they are those of going back, and of closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint, solve
from jaxode.adjoints import sensitivities
from jaxode.kernels.forms import derivatives_are_finite

TS = jnp.array([0.0, 0.4, 0.7, 1.5])


def lotka(y, t, p):
    prey, predators = y
    return jnp.stack([p[0] * prey - prey * predators, prey * predators - p[1] * predators])


def pair(y, t, p):
    """A state of two arrays, of a separable system; time occurs."""
    q, v = y
    return v, -p[0] * q + p[1] * jnp.cos(t) * q**2


def linear(y, t, p):
    return p[0] * jnp.tanh(jnp.array([[0.1, 0.7], [-0.4, 0.2]]) @ y) - p[1] * y


FIELDS = {
    "Lotka-Volterra": (lotka, jnp.array([1.0, 0.5])),
    "two arrays": (pair, (jnp.array([1.0]), jnp.array([0.2]))),
    "with a matrix": (linear, jnp.array([1.0, -0.6])),
}


@pytest.fixture
def back(monkeypatch):
    """back(): from now on no gradient is carried along."""

    def set_():
        for name in ("FEW", "FEW_OF_MANY"):
            monkeypatch.setattr(sensitivities, name, 0)
        jax.clear_caches()

    yield set_
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize(
    "name, options",
    [
        ("Lotka-Volterra", dict()),
        ("with a matrix", dict(method="dopri5", dt=0.1)),
        ("two arrays", dict(method="leapfrog", dt=0.05)),
    ],
)
def test_they_are_what_going_back_finds_alone_and_in_batches(name, options, back):
    f, y0 = FIELDS[name]
    p = jnp.array([1.1, 0.7])

    def loss(p, y0):
        ys = odeint(f, y0, TS, p, **options)
        return sum(jnp.sum(jnp.sin(y) * jnp.expand_dims(TS, 1)) for y in jax.tree.leaves(ys))

    many = jax.tree.map(lambda y: jnp.linspace(0.8, 1.1, 70)[:, None] * y[None], y0)
    shared = lambda p: jnp.sum(jax.vmap(loss, (None, 0))(p, many))
    grads = lambda: [
        jax.jit(jax.grad(loss, (0, 1)))(p, y0),
        jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(p, many),
        jax.jit(jax.grad(shared))(p),
        jax.jit(jax.vmap(jax.grad(loss, 1), (None, 0)))(p, many) if not options else (),
    ]
    carried = grads()
    back()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), carried, grads()
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_they_are_those_of_the_closed_form(dtype):
    # y' = -k y: y = y0 exp(-k t), dy/dk = -t y, dy/dy0 = exp(-k t).
    y0, k, ts = (jnp.asarray(x, dtype) for x in (2.0, 0.7, TS))
    ys, (of_y0, of_k) = (
        odeint(lambda y, t, k: -k * y, y0, ts, k),
        jax.jacrev(lambda y0, k: odeint(lambda y, t, k: -k * y, y0, ts, k), (0, 1))(y0, k),
    )
    assert of_k.dtype == dtype
    error = dict(rtol=20 * float(jnp.finfo(dtype).eps) ** 0.5, atol=1e-6)
    np.testing.assert_allclose(of_y0, jnp.exp(-k * ts), **error)
    np.testing.assert_allclose(of_k, -ts * ys, **error)


def test_a_state_of_two_precisions_has_the_derivatives_of_both():
    def total(k):
        y0 = jnp.asarray(2.0, jnp.float32), jnp.asarray(3.0, jnp.float64)
        func = lambda y, t, k: jax.tree.map(lambda y: -k.astype(y.dtype) * y, y)
        ys = odeint(func, y0, jnp.array([0.0, 1.0]), k)
        return sum(y[-1].astype(jnp.float64) for y in ys)

    np.testing.assert_allclose(jax.grad(total)(0.7), -5 * np.exp(-0.7), rtol=1e-5)


def test_a_field_whose_derivative_may_be_infinite_goes_back():
    drag = lambda y, t, p: p[0] - p[1] * jnp.sqrt(y)
    one = lambda p: odeint(drag, jnp.array(0.0), jnp.array([0.0, 2.0]), p)[-1]
    p = jnp.array([1.0, 0.5])
    alone = jax.grad(one)(p)
    np.testing.assert_allclose(alone, [1.53317, -1.27120], rtol=1e-4)
    np.testing.assert_allclose(jax.vmap(jax.grad(one))(jnp.stack([p, p]))[1], alone, rtol=1e-10)
    finite = lambda f: derivatives_are_finite(jax.make_jaxpr(f)(jnp.ones(2)).jaxpr)
    assert finite(lambda y: jnp.exp(-(y**2)) / (1 + y) @ y)
    for f in (jnp.sqrt, jnp.arcsin, lambda y: y**0.5, jnp.linalg.norm, jax.nn.relu, jnp.cbrt):
        assert not finite(f), f


def test_a_failed_solve_has_no_gradient_unless_it_is_left_out():
    explode = lambda y, t, p: p * y**2

    def loss(p, weight):
        ys = odeint(explode, jnp.array(1.0), jnp.array([0.0, 0.5, 2.0]), p, max_steps=300)
        return jnp.sum(jnp.where(weight == 0, 0, ys * weight))

    grad = jax.jit(jax.grad(loss))
    assert grad(1.0, jnp.zeros(3)) == 0
    assert np.isnan(grad(1.0, jnp.ones(3)))
    both = jax.vmap(jax.grad(loss), (0, None))(jnp.array([0.2, 1.0]), jnp.ones(3))
    assert np.isfinite(both[0]) and np.isnan(both[1])


def test_second_derivatives_and_complex_states():
    y0, ts = jnp.array(2.0), jnp.array([0.0, 1.0])
    end = lambda k: odeint(lambda y, t, k: -k * y, y0, ts, k, rtol=1e-10, atol=1e-10)[-1]
    for second in (jax.hessian(end), jax.grad(jax.grad(end)), jax.jacfwd(jax.grad(end))):
        np.testing.assert_allclose(second(0.7), 2 * np.exp(-0.7), rtol=1e-6)
    turn = lambda k: odeint(lambda y, t, k: 1j * k * y, 1.0 + 0j, ts, k, rtol=1e-10, atol=1e-10)
    of_real = jax.grad(lambda k: jnp.real(turn(k)[-1]))(0.7)
    np.testing.assert_allclose(of_real, -np.sin(0.7), rtol=1e-7)


def test_a_tolerance_may_be_of_each_component_and_statistics_are_those_of_the_plain_solve():
    rtol = jnp.array([1e-4, 1e-8])
    run = lambda p: solve(lotka, jnp.array([1.0, 0.5]), TS, p, rtol=rtol, atol=1e-8)
    p = jnp.array([1.1, 0.7])
    plain = run(p).stats
    _, carried = jax.value_and_grad(lambda p: (jnp.sum(run(p).ys), run(p).stats)[0])(p)
    assert np.all(np.isfinite(carried))
    sol, _ = jax.vjp(lambda p: run(p).ys, p)
    np.testing.assert_allclose(sol, run(p).ys, rtol=1e-12)
    stats = jax.grad(lambda p: (jnp.sum(run(p).ys), run(p).stats), has_aux=True)(p)[1]
    assert int(stats.accepted) == int(plain.accepted)
    assert int(stats.evaluations) == int(plain.evaluations)
