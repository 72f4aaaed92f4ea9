"""`gradient_report` says in words and numbers whether a gradient can be believed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import gradient_report


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
PROBLEMS = {
    "trusted": (lorenz, ONES, [0.0, 1.0], 28.0),
    "chaotic": (lorenz, ONES, [0.0, 25.0], 28.0),
    "discontinuous": (switched, np.ones(1), [0.0, 2.0], 0.5, 0.7),
    "wrong rule": (stopped, np.ones(1), [0.0, 1.0], 0.5),
    "stability limit": (with_fast_mode, START, [0.0, 1.0]),
    "badly scaled": (scales, SCALES, [0.0, 10.0], 3.0),
    "loose tolerance": (lorenz, ONES, [0.0, 6.0], 28.0),
    "not finite": (lambda y, t, k: k * jnp.sqrt(y) + 1, np.zeros(1), [0.0, 1.0], 1.0),
}
OPTIONS = {
    "stability limit": dict(dt=0.01),
    "badly scaled": dict(loss=of_small, rtol=1e-6, atol=1e-6),
    "loose tolerance": dict(rtol=1e-3, atol=1e-3),
}
SAYS = {
    "trusted": "can be trusted",
    "chaotic": "multiple shooting",
    "discontinuous": "near t = 0.7: differences do not agree",
    "wrong rule": "stop_gradient",
    "stability limit": "pass a `dt` below 0.003",
    "badly scaled": "y['small'][1] is so small beside its atol",
    "loose tolerance": "tolerances 10",
    "not finite": "sqrt",
}


@pytest.mark.parametrize("verdict", PROBLEMS)
def test_the_verdict_is_right_and_says_what_to_do(verdict):
    options = {"loss": last, **OPTIONS.get(verdict, {})}
    report = gradient_report(*PROBLEMS[verdict], **options)
    assert report.verdict == verdict, str(report)
    assert SAYS[verdict].lower() in str(report).lower()
