"""Outputs: times, a function of the state, every step and a fold, each with its derivative."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint, outputs, solve
from jaxode.adjoints import direct, replay

TS = jnp.linspace(0.0, 2.0, 9)


def field(y, t, p):
    return jnp.stack([p * y[1], -y[0] + jnp.sin(t)])


def with_output(adjoint, **changes):
    """An adjoint that solves with another output."""

    def changed(integrator, f, y0, ss):
        return adjoint(dataclasses.replace(integrator, **changes), f, y0, ss)

    return changed


def kept(adjoint, y0, p, **changes):
    """The rows and the report, from inside of a solve."""
    seen = {}

    def spy(integrator, f, y0, ss):
        rows, report = with_output(adjoint, **changes)(integrator, f, y0, ss)
        seen["rows"], seen["folded"] = rows, report.folded
        blank = jax.tree.map(lambda y: jnp.zeros((len(ss), *y.shape), y.dtype), y0)
        return blank, report._replace(folded=None)

    def run(y0, p):
        solve(field, y0, TS, p, adjoint=spy, rtol=1e-8, atol=1e-8, max_steps=200)
        return seen["rows"], seen["folded"]

    with jax.disable_jit():
        return run(y0, p)


Y0 = jnp.array([1.0, 0.5])


@pytest.mark.parametrize("adjoint", [replay, direct], ids=["replay", "direct"])
def test_a_function_of_the_state_is_that_function_of_the_rows_and_differentiated(adjoint):
    save = lambda f, y, s: {"first": y[0] ** 2, "time": s * y[1]}
    energy = lambda y0, p, ad: odeint(
        field, y0, TS, p, adjoint=ad, rtol=1e-9, atol=1e-9, max_steps=200
    )
    of_rows = lambda y0, p: energy(y0, p, "replay")[:, 0] ** 2
    rows = kept(adjoint, Y0, 1.3, output=outputs.Times(save=save))[0][0]
    np.testing.assert_allclose(rows["first"], of_rows(Y0, 1.3), rtol=1e-6)
    assert rows["time"].shape == TS.shape
    total = lambda y0, p: kept(adjoint, y0, p, output=outputs.Times(save=save))[0][0]["first"].sum()
    found = jax.grad(total, (0, 1))(Y0, 1.3)
    expected = jax.grad(lambda y0, p: of_rows(y0, p).sum(), (0, 1))(Y0, 1.3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


def test_every_step_is_kept_with_its_time_and_padded_with_nan():
    times, sizes, states, _ = kept(replay, Y0, 1.3, output=outputs.EveryStep(100))[0]
    count = int(np.sum(np.isfinite(times)))
    stats = solve(field, Y0, TS, 1.3, rtol=1e-8, atol=1e-8).stats
    assert count == int(stats.accepted) + 1
    np.testing.assert_allclose(np.diff(times[:count]), sizes[: count - 1], atol=1e-15)
    assert np.all(np.diff(times[:count]) > 0) and times[0] == 0 and times[count - 1] == 1
    at = odeint(field, Y0, 2.0 * times[:count], 1.3, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(states[:count], at, rtol=1e-5, atol=1e-6)
    assert np.all(np.isnan(states[count:]))


@pytest.mark.parametrize("adjoint", [replay, direct], ids=["replay", "direct"])
def test_a_fold_is_a_sum_over_the_steps_and_differentiated(adjoint):
    fold = outputs.Sum(lambda method, s, y, memory, h, step: {"area": h * 0.5 * (y[0] + step.y[0])})
    area = lambda y0, p: kept(adjoint, y0, p, fold=fold)[1]["area"]
    fine = lambda y0, p: jnp.trapezoid(
        odeint(field, y0, jnp.linspace(0.0, 2.0, 2001), p, rtol=1e-9, atol=1e-9)[:, 0], dx=1 / 2000
    )
    np.testing.assert_allclose(area(Y0, 1.3), fine(Y0, 1.3), rtol=1e-3)
    found, expected = (jax.grad(fn, (0, 1))(Y0, 1.3) for fn in (area, fine))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-3), found, expected
    )
