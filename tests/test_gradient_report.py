"""`gradient_report` says in words and numbers whether a gradient can be believed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Signal, gradient_report


def last(solution):
    return solution.ys[-1].sum()


def lorenz(y, t, r):
    return jnp.stack([10 * (y[1] - y[0]), y[0] * (r - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


def switched(y, t, k, at):
    return jnp.where(t < at, -k * y, 5.0)


def scales(y, t, w):
    small = w * jnp.stack([y["small"][1], -y["small"][0]])
    return {"big": -0.1 * y["big"], "small": small}


def of_small(solution):
    return 1e6 * solution.ys["small"][-1, 0]


def with_fast_mode(y, t):  # that nothing excites: the values of unstable steps are right
    return jnp.stack([y[1], -y[0], -1000 * y[2]])


def stopped(y, t, k):
    return -jax.lax.stop_gradient(k * y)


ONES, SCALES = np.ones(3), {"big": 1e6, "small": np.array([1e-6, 0.0])}
START = np.array([1.0, 0.0, 0.0])


def positive(solution):
    return jnp.sum(solution.ys > 0).astype(float)


PROBLEMS = {
    "trusted": (lorenz, ONES, [0.0, 1.0], 28.0),
    "chaotic": (lorenz, ONES, [0.0, 30.0], 28.0),
    "zero": (lorenz, ONES, [0.0, 1.0], 28.0),
    "discontinuous": (switched, np.ones(1), [0.0, 2.0], 0.5, 0.7),
    "wrong rule": (stopped, np.ones(1), [0.0, 1.0], 0.5),
    "stability limit": (with_fast_mode, START, [0.0, 1.0]),
    "badly scaled": (scales, SCALES, [0.0, 10.0], 3.0),
    "loose tolerance": (lorenz, ONES, [0.0, 6.0], 28.0),
    "not finite": (lambda y, t, k: k * jnp.sqrt(y) + 1, np.zeros(1), [0.0, 1.0], 1.0),
}
OPTIONS = {
    "zero": dict(loss=positive),
    "stability limit": dict(dt=0.01),
    "badly scaled": dict(loss=of_small, rtol=1e-6, atol=1e-6),
    "loose tolerance": dict(rtol=1e-3, atol=1e-3),
}
SAYS = {
    "trusted": "can be trusted",
    "chaotic": "multiple shooting",
    "zero": "the loss does not depend on y0 or args",
    "discontinuous": "near t = 0.7: differences do not agree",
    "wrong rule": "stop_gradient",
    "stability limit": "pass a `dt` below 0.003",
    "badly scaled": "y['small'][0] is so small beside its atol",
    "loose tolerance": "tolerances 10",
    "not finite": "sqrt",
}


@pytest.mark.parametrize("verdict", PROBLEMS)
def test_the_verdict_is_right_and_says_what_to_do(verdict):
    options = {"loss": last, **OPTIONS.get(verdict, {})}
    report = gradient_report(*PROBLEMS[verdict], **options)
    assert report.verdict == verdict, str(report)
    assert SAYS[verdict].lower() in str(report).lower()


def test_the_numbers_are_those_of_the_gradient():
    decay = lambda y, t, p: {"a": -p["rate"] * y["a"], "n": 0 * y["n"]}
    y0, t, p = {"a": np.array([1.0, 2.0]), "n": 3}, [0.0, 2.0], {"rate": 0.5, "count": 2}
    report = gradient_report(decay, y0, t, p, loss=lambda s: s.ys["a"][-1].sum())
    exact = np.array([0.0, *(np.exp(-1.0) * np.array([1.0, 2.0])), 0.0, -6 * np.exp(-1.0)])
    _, y0_bar, (p_bar,) = report.gradient
    np.testing.assert_allclose(y0_bar["a"], np.exp(-1.0), rtol=1e-6)
    np.testing.assert_allclose(p_bar["rate"], exact[-1], rtol=1e-6)
    assert p_bar["count"] is None and report.verdict == "trusted" and report.where is None
    length = np.sqrt(np.exp(-2.0) * (1 + 4 + 9))  # of x dL/dx
    np.testing.assert_allclose([*report.lengths.values()], length, rtol=1e-5)
    np.testing.assert_allclose([*report.slopes.values()], report.slopes["tight"], rtol=1e-5)
    np.testing.assert_allclose([*report.angles.values()], 0.0, atol=1e-3)
    assert report.error < 1e-6 and report.recovered < 1e-6 and 0.5 < report.condition < 3


def test_backsolve_drifts_where_replay_is_right_and_the_time_is_told():
    fast = lambda y, t, k: k * (jnp.cos(t) - y**3)
    asked = fast, np.ones(1), [0.0, 2.0], 10.0
    beside = gradient_report(*asked, loss=last)
    assert beside.verdict == "trusted" and beside.findings[0].kind == "backsolve drifts"
    assert beside.recovered > 0.03 and 0 < beside.findings[0].time < 2
    report = gradient_report(*asked, loss=last, adjoint="backsolve")
    assert report.verdict == "backsolve drifts" and "adjoint='replay'" in str(report)


def test_a_float32_solve_is_compared_with_one_in_float64():
    turns = lambda y, t, p: p["w"] * jnp.stack([y[1], -y[0]])
    y0, p = np.array([1.0, 0.0], np.float32), {"w": np.float32(2.0)}
    report = gradient_report(turns, y0, [0.0, 3.0], p, loss=lambda solution: solution.ys[-1, 0])
    assert report.verdict == "trusted" and report.tight_tolerance < 1e-9
    np.testing.assert_allclose(report.tight_loss, np.cos(6.0), rtol=1e-9)
    assert report.gradient[2][0]["w"].dtype == np.float32


def test_a_solve_that_fails_has_no_gradient():
    report = gradient_report(lambda y, t: y**2, 1.0, [0.0, 2.0])
    assert report.verdict == "failed" and np.isnan(report.condition)
    assert "The solve failed" in str(report) and "explain" in str(report)
    np.testing.assert_allclose(report.where, 1.0, atol=1e-4)


def test_what_cannot_be_reported_is_refused():
    decay, t = lambda y, t, k: -k * y, [0.0, 1.0]
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda y: gradient_report(decay, y, t, 1.0).loss)(1.0)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.vmap(lambda k: gradient_report(lambda y, t: -k * y, 1.0, t).loss)(np.ones(2))
    with pytest.raises(TypeError, match="one real number"):
        gradient_report(decay, 1.0, t, 1.0, loss=lambda solution: solution.ys)
    with pytest.raises(TypeError) as error:
        gradient_report(decay, 1.0, t, 1.0, loss=lambda ys: jnp.sum(ys**2))
    assert "given the Solution" in error.value.__notes__[0]
    with pytest.raises(TypeError, match="no `save_steps`"):
        gradient_report(decay, 1.0, t, 1.0, save_steps=True)
    with pytest.raises(ValueError, match="forward mode"):
        gradient_report(decay, 1.0, t, 1.0, adjoint="forward")
    with pytest.raises(ValueError, match="nothing to differentiate"):
        gradient_report(decay, np.zeros(0), t, 1.0)
    with pytest.raises(ValueError, match="from a first to a later one"):
        gradient_report(decay, 1.0, [0.0], 1.0)


def test_a_padded_signal_keeps_its_equal_knots():
    signal = Signal(np.array([0.0, 1.0, 2.0, 2.0]), np.array([0.0, 4.0, 2.0, 2.0]))
    report = gradient_report(lambda y, t, u: u(t) - y, 0.0, [0.0, 2.0], signal, loss=last)
    assert report.verdict == "trusted", str(report)
