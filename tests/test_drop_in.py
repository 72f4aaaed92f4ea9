"""What `jax.experimental.ode.odeint` promises, `jaxode.odeint` keeps: its own test suite, retold.

The cases are those of JAX's tests/ode_test.py (the issue that each guards against is named).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from jax.experimental.ode import odeint as jax_odeint
from jax.test_util import check_grads

from jaxode import odeint

TOLERANCE = dict(atol=1e-3, rtol=1e-3)
check_twice = partial(check_grads, modes=["rev"], order=2, **TOLERANCE)


def pendulum(np, y, _, damping, gravity):
    theta, omega = y
    return [omega, -damping * omega - gravity * np.sin(theta)]


def weird_pendulum(np, y, t):
    return np.array([y[1] * -t, -1 * y[1] - 9.8 * np.sin(y[0])])


def decay(np, y, t, a, b):
    return -np.sqrt(t) - y + a - np.mean((y + b) ** 2)


def swoop(np, y, t, a, b):
    return np.array(y - np.sin(t) - np.cos(t) * a + b)


def random(n):
    return np.random.RandomState(n).randn(3)


CASES = {
    "pendulum": (pendulum, [np.pi - 0.1, 0.0], np.linspace(0, 1, 11), (0.25, 9.8)),
    "weird pendulum": (weird_pendulum, [np.pi - 0.1, 0.0], np.linspace(0, 1, 11), ()),
    "decay": (decay, random(0), np.linspace(0.1, 0.2, 4), (random(1), random(2))),
    "swoop": (swoop, np.linspace(0.1, 0.9, 10), np.array([0.1, 0.2]), (0.1, 0.2)),
    "bigger swoop": (swoop, np.linspace(1.1, 10.9, 10), np.array([0.1, 0.2]), (0.1, 0.3)),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_float32_is_as_accurate_as_with_jax(case):
    f, y0, t, args = case
    args = [jnp.asarray(a, jnp.float32) for a in (y0, t, *args)]
    values = odeint(partial(f, jnp), *args)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, jax_odeint(partial(f, jnp), *args), rtol=1e-5, atol=1e-5)


def test_values_agree_with_scipy(case):
    f, y0, t, args = case
    expected = scipy.integrate.odeint(partial(f, np), np.array(y0), t, args, rtol=1e-9, atol=1e-9)
    values = odeint(partial(f, jnp), jnp.array(y0), jnp.array(t), *args)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)


def test_values_agree_with_jax(case):
    f, y0, t, args = case
    expected = jax_odeint(partial(f, jnp), jnp.array(y0), jnp.array(t), *args)
    values = odeint(partial(f, jnp), jnp.array(y0), jnp.array(t), *args)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)


def test_first_and_second_derivatives_agree_with_differences(case):
    f, y0, t, args = case
    check_twice(partial(odeint, partial(f, jnp)), (y0, jnp.array(t), *args))


def test_a_state_may_be_a_pytree_of_mixed_shapes():
    y0 = (np.array(-0.1), np.array([[[0.1]]]))
    f = lambda y, t: jax.tree.map(jnp.negative, y)
    check_twice(partial(odeint, f), (y0, np.linspace(0.0, 1.0, 11)))


def test_a_complex_state_and_complex_arguments_have_derivatives():  # jax issues 3986, 8757
    def f(y0, t, alpha):
        return odeint(lambda y, t, alpha: alpha * y, y0, t, alpha).real

    with jax.numpy_dtype_promotion("standard"):
        check_twice(f, (1 + 2j, jnp.linspace(0.0, 1.0, 11), 3 + 4j))


def test_a_vmapped_gradient_is_the_sum_of_single_ones_to_the_last_digits():  # jax issue 2531
    def last(y0):
        return odeint(lambda y, *_: 0.1 * y, y0, jnp.array([0.0, 5.0]))[-1].sum()

    def one(x, z):
        return last(jnp.array([x, z]))

    def both(x):
        return jax.vmap(last)(jnp.array([[x, 0.1], [x, 0.2]])).sum()

    expected = jax.grad(one)(2.0, 0.1) + jax.grad(one)(2.0, 0.2)
    np.testing.assert_allclose(jax.grad(both)(2.0), expected, rtol=2e-15, atol=5e-15)


def test_vmap_works_without_jit():  # jax issue 2598
    with jax.disable_jit():
        t = jnp.array([0.0, 1.0])
        ys = jax.vmap(lambda y0: odeint(lambda y, _t: y, y0, t))(jnp.ones((5, 2)))
    np.testing.assert_allclose(ys[:, 1], np.full((5, 2), np.e), rtol=1e-6)


def closed_over(rate):
    return odeint(lambda y, t: -rate * y, 1.0, jnp.arange(0, 10, 0.1))[-1]


def test_a_gradient_reaches_what_func_closes_over():  # jax issue 2718
    check_grads(closed_over, (0.01,), modes=["rev"], order=1)


def test_a_gradient_reaches_what_func_closes_over_under_jit_and_vmap():  # jax issue 2718
    rates = jnp.arange(0.0, 1.0, 0.1)
    values, slopes = jax.vmap(jax.value_and_grad(jax.jit(closed_over)))(rates)
    np.testing.assert_allclose(values, np.exp(-9.9 * rates), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(slopes, -9.9 * np.exp(-9.9 * rates), rtol=1e-5, atol=1e-7)


def test_a_closure_need_not_be_differentiable():  # jax issue 3584
    def f(y0):
        return odeint(lambda y, t: jnp.stack([y[0], y[1]]), y0, jnp.arange(10.0)).sum()

    expected = np.full(2, np.exp(np.arange(10.0)).sum())
    np.testing.assert_allclose(jax.grad(f)(jnp.ones(2)), expected, rtol=1e-6)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_forward_mode_is_refused_with_the_way_out(transform):  # jax issue 3558
    f = transform(lambda k: odeint(lambda y, t: k * y, 1.0, jnp.linspace(0, 1.0, 50)).sum())
    with pytest.raises(TypeError, match="can't apply forward-mode"):
        jax.jacfwd(f)(3.0)
    with pytest.raises(TypeError, match="adjoint='forward'"):
        jax.jacfwd(lambda k: odeint(lambda y, t: k * y, 1.0, [0.0, 1.0]))(3.0)


def test_hmax_keeps_a_pulse_from_being_stepped_over():  # jax issue 10922
    def pulse(y, t):
        return jnp.where((t >= 5) & (t <= 6), 1.0, 0.0) * jnp.ones_like(y)

    ys = odeint(func=pulse, y0=0.0, t=jnp.array([0.0, 10.0]), hmax=0.5)
    np.testing.assert_allclose(ys[-1], 1.0, rtol=1e-5)
    assert odeint(pulse, 0.0, jnp.array([0.0, 10.0]))[-1] == 0.0
