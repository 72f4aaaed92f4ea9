"""A failed explicit solve says that it looks stiff, if it does, and which method to use."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import SolveError, odeint, solve
from jaxode.problems import problems
from jaxode.stiffness import fastest


def message_of(*args, **options) -> str:
    with pytest.raises(SolveError) as caught:
        solve(*args, **options)
    return str(caught.value)


def of(name, **options):
    p = problems[name]
    return message_of(p.f, p.y0, [0.0, p.t1 / 2, p.t1], *p.args, **options)


@pytest.mark.parametrize(
    ("problem", "method"),
    [("robertson", "tsit5"), ("van_der_pol_1e6", "dop853"), ("hires", "bosh3")],
)
def test_a_stiff_problem_is_called_stiff_and_a_method_for_it_named(problem, method):
    message = of(problem, method=method, max_steps=200, rtol=1e-4, atol=1e-8)
    assert "looks stiff" in message and "'rodas5p'" in message


@pytest.mark.parametrize("problem", ["lorenz", "kepler", "pleiades", "oscillator"])
def test_a_problem_that_is_not_stiff_is_not(problem):
    assert "looks stiff" not in of(problem, max_steps=15)


def test_a_pole_is_no_stiffness():
    message = message_of(lambda y, t: y**2, jnp.ones(2), [0.0, 2.0], max_steps=1000)
    assert "looks stiff" not in message


def test_the_rate_is_that_of_the_fastest_mode():
    f = lambda y, t, k: {"a": -k * (y["a"] - jnp.cos(t)), "b": -y["b"]}
    y0 = {"a": jnp.ones(2), "b": jnp.ones(())}
    message = message_of(f, y0, [0.0, 100.0], 1e5, max_steps=300)
    assert "rate of 1.0e+05" in message


def test_times_that_are_large_and_decreasing_are_served():
    f = lambda y, t: 1e5 * (y - 1)
    t = np.array([1e6 + 100, 1e6])
    assert "looks stiff" in message_of(f, jnp.zeros(2, jnp.float32), t, max_steps=200)


def test_an_implicit_method_or_equal_steps_are_told_nothing():
    assert "looks" not in of("robertson", method="rodas5p", max_steps=5)
    f = lambda y, t: -1e9 * y
    assert "looks" not in message_of(f, 1.0, [0.0, 1.0], method="rk4", dt=1e-5, max_steps=10)


def test_a_mode_that_turns_does_not_decay():
    matrix = jnp.array([[0.0, 5.0], [-5.0, 0.0]])
    rate, decays = fastest(lambda y: matrix @ y, jnp.ones(2))
    np.testing.assert_allclose(rate, 5.0, rtol=1e-6)
    assert not decays
    assert fastest(lambda y: -7 * y, jnp.ones(2))[1]


def test_no_failure_means_no_second_solve(monkeypatch):
    monkeypatch.setattr("jaxode.stiffness.hint", None)
    np.testing.assert_allclose(odeint(lambda y, t: -y, 1.0, [0.0, 1.0])[-1], np.exp(-1), rtol=1e-6)
