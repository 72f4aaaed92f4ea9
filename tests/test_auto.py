"""The method "auto": explicit where a problem is not stiff, implicit where it is, each solve by itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Status, odeint, solve
from jaxode.methods import Banded, named
from jaxode.methods.auto import CALM, LARGE
from jaxode.problems import problems

# What a tolerance of 1 is, absolutely, where numbers are small.
SCALES = {"robertson": 1e-4, "hires": 1e-4}


@pytest.mark.parametrize("problem", ["lorenz", "lotka_volterra", "kepler"])
def test_a_problem_that_is_not_stiff_is_solved_by_the_steps_of_tsit5(problem):
    p = problems[problem]
    for rtol in (1e-4, 1e-8):
        found, expected = (
            solve(p.f, p.y0, [0.0, p.t1 / 3, p.t1], *p.args, method=m, rtol=rtol, atol=rtol)
            for m in ("auto", "tsit5")
        )
        np.testing.assert_allclose(found.ys, expected.ys, rtol=1e-9, atol=1e-12)
        assert found.stats.accepted == expected.stats.accepted
        assert found.stats.evaluations == expected.stats.evaluations


@pytest.mark.parametrize("problem", ["robertson", "hires", "oregonator", "van_der_pol_1e6"])
def test_a_stiff_problem_is_solved_to_ten_tolerances_in_the_steps_of_an_implicit_method(problem):
    p, scale = problems[problem], SCALES.get(problem, 1.0)
    for rtol in (1e-4, 1e-6, 1e-8):
        found, implicit = (
            solve(p.f, p.y0, [0.0, p.t1], *p.args, method=m, rtol=rtol, atol=scale * rtol)
            for m in ("auto", "rodas5p")
        )
        error = np.abs(found.ys[-1] - p.answer()) / (scale + np.abs(p.answer()))
        assert error.max() < 10 * rtol
        assert int(found.stats.accepted) < 1.5 * int(implicit.stats.accepted) + 30


def van_der_pol(y, t, mu):
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def ends(mu, t=(0.0, 2.0), **options):
    options = dict(method="auto", rtol=1e-6, atol=1e-6, max_steps=1000) | options
    return solve(van_der_pol, jnp.array([2.0, 0.0]), jnp.array(t), mu, **options)


def test_every_sample_of_a_batch_chooses_for_itself():
    mus = jnp.geomspace(1.0, 1e6, 12)
    many = jax.jit(jax.vmap(ends))(mus)
    for i in (0, 5, 11):
        alone = ends(mus[i])
        np.testing.assert_allclose(many.ys[i], alone.ys, rtol=1e-9)
        assert int(many.stats.evaluations[i]) == int(alone.stats.evaluations)
    explicit = ends(mus[0], method="tsit5")
    assert int(many.stats.evaluations[0]) == int(explicit.stats.evaluations)
    assert int(ends(1e6, method="tsit5", throw=False).status) == Status.MAX_STEPS


@pytest.mark.parametrize("problem", ["robertson", "hires", "pollution", "kaps"])
def test_gradients_are_those_of_an_implicit_method(problem):
    p, scale = problems[problem], SCALES.get(problem, 1.0)
    weights = jnp.cos(jnp.arange(len(p.y0)))

    @partial(jax.jit, static_argnames="method")
    def slope(pace, rtol, method):
        options = dict(method=method, rtol=rtol, atol=scale * rtol)
        end = lambda pace: odeint(
            lambda y, t: pace * p.f(y, t, *p.args), p.y0, [0.0, p.t1], **options
        )[-1]
        return jax.value_and_grad(lambda pace: weights @ end(pace))(pace)

    exact = slope(1.0, 1e-9, "rodas5p")
    for rtol in (1e-3, 1e-5, 1e-7):
        np.testing.assert_allclose(
            slope(1.0, rtol, "auto"), exact, rtol=20 * rtol, atol=20 * rtol * scale
        )


@pytest.mark.parametrize("mu", [1e4])  # 8 explicit steps, then implicit ones
def test_every_adjoint_gives_the_same_derivative(mu):
    def value(mu, adjoint):
        return ends(mu, (0.0, 0.7, 2.0), adjoint=adjoint, max_steps=200).ys[1:, 0].sum()

    back = jax.jit(jax.grad(lambda mu: value(mu, "replay")))(mu)
    for other in (
        jax.grad(lambda mu: value(mu, "direct")),
        jax.jacfwd(lambda mu: value(mu, "forward")),
    ):
        np.testing.assert_allclose(back, jax.jit(other)(mu), rtol=1e-8)
    at = lambda mu: (
        ends(mu, (0.0, 0.7, 2.0), method="rodas5p", rtol=1e-11, atol=1e-13).ys[1:, 0].sum()
    )
    difference = (at(1.001 * mu) - at(0.999 * mu)) / (0.002 * mu)
    np.testing.assert_allclose(back, difference, rtol=1e-3)


def test_the_gradients_of_a_batch_are_those_of_its_samples():
    mus = jnp.geomspace(1.0, 1e5, 10)
    slope = jax.grad(lambda mu: ends(mu, max_steps=300).ys[-1, 0])
    many = jax.jit(jax.vmap(slope))(mus)
    assert np.all(np.isfinite(many))
    alone = jax.jit(slope)
    np.testing.assert_allclose(many, [alone(mu) for mu in mus], rtol=1e-7)


def test_dense_output_is_as_good_in_both_kinds_of_steps():
    t = jnp.linspace(0.0, 10.0, 60)  # explicit at first, then implicit
    found = ends(1e3, t).ys
    exact = ends(1e3, t, method="rodas5p", rtol=1e-11, atol=1e-13, max_steps=10_000).ys
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


def test_steps_become_implicit_when_they_look_stiff_and_explicit_again_when_not():
    method, s = named("auto"), jnp.zeros(())
    rate = lambda speed: lambda y, s: -speed * y

    @jax.jit
    def step(y, memory, speed, h):
        return method.step(rate(speed), s, y, memory, h)[:2]

    y = jnp.array([1.0, 2.0])
    memory = method.start(rate(280.0), s, y)
    for _ in range(5):  # inside the stability region of tsit5
        y, memory = step(y, memory, 280.0, 0.01)
        assert memory.left == 0
    y, memory = step(y, memory, 280.0, 100.0)
    assert memory.left == CALM
    assert np.max(np.abs(y)) < 1e-3  # an explicit step would multiply it by 1e19
    for _ in range(CALM):
        assert memory.left > 0
        y, memory = step(y, memory, 1.0, 0.01)
    assert memory.left == 0


def test_states_of_any_form_are_served(dtype):
    def f(y, t):
        return {"a": -1e4 * (y["a"] - jnp.cos(t).astype(dtype)), "b": [1j * y["b"][0]]}

    complex_ = jnp.complex64 if dtype == "float32" else jnp.complex128
    y0 = {"a": jnp.ones((2, 1), dtype), "b": [jnp.ones((), complex_)]}
    ys = odeint(f, y0, jnp.array([0.0, 1.0], dtype), method="auto", rtol=1e-5, atol=1e-5)
    assert ys["a"].dtype == dtype and ys["b"][0].dtype == complex_
    np.testing.assert_allclose(ys["a"][-1], np.cos(1.0), atol=2e-4)
    np.testing.assert_allclose(ys["b"][0][-1], np.exp(1j), atol=2e-4)


def test_a_large_state_takes_explicit_steps_alone():
    f = lambda y, t: -y
    y0, t = jnp.ones(LARGE + 1), [0.0, 1.0]
    found, expected = (odeint(f, y0, t, method=m) for m in ("auto", "tsit5"))
    np.testing.assert_array_equal(found, expected)
    slope = jax.grad(lambda y0: odeint(f, y0, t, method="auto", adjoint="backsolve")[-1].sum())
    np.testing.assert_allclose(slope(y0), np.exp(-1.0), rtol=1e-5)


def test_the_structure_of_its_jacobian_is_declared_and_looked_at():
    rates = jnp.array([1.0, 1e2, 1e4, 1e5])
    f = lambda y, t: -rates * y + jnp.pad(y[1:], (0, 1))  # an upper diagonal
    options = dict(method="auto", rtol=1e-6, atol=1e-9)
    dense, banded = (
        odeint(f, jnp.ones(4), [0.0, 1.0], linear=linear, **options)
        for linear in (None, Banded(0, 1))
    )
    np.testing.assert_allclose(banded, dense, rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match="df/dy has entries"):
        odeint(f, jnp.ones(4), [0.0, 1.0], linear=Banded(1, 0), **options)


def test_what_it_does_not_serve_is_refused_with_the_remedy():
    f, t = lambda y, t: -y, [0.0, 1.0]
    with pytest.raises(ValueError, match="replay"):
        odeint(f, 1.0, t, method="auto", adjoint="backsolve")
    with pytest.raises(ValueError, match="rodas5p"):
        odeint(f, 1.0, t, method="auto", dt=0.1)
    with pytest.raises(ValueError, match="'auto'"):
        odeint(f, 1.0, t, method="LSODA")


def test_a_state_of_several_dtypes_is_one_of_auto():
    with jax.numpy_dtype_promotion("strict"):
        y0 = jnp.ones((), jnp.float32), jnp.ones(2, jnp.float64)
        func = lambda y, t: (-y[0], -2 * y[1])
        single, double = solve(func, y0, [0.0, 1.0], method="auto", rtol=1e-6, atol=1e-6).ys
    np.testing.assert_allclose(single[-1], np.exp(-1), rtol=1e-4)
    np.testing.assert_allclose(double[-1], np.exp(-2), rtol=1e-4)
