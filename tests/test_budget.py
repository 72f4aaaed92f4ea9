"""A budget of evaluations of func: never exceeded, spent on what error there has to be, and no failure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, Signal, Status, solve
from jaxode.solution import succeeded

TOLERANCES = dict(rtol=1e-9, atol=1e-9)
Y0 = jnp.array([2.0, 0.0])


def pendulum(y, t):
    return jnp.stack([y[1], -jnp.sin(y[0])])


def counted(method, budget, t):
    """A solve with a budget, and how often func was called."""
    calls = []

    def func(y, t):
        jax.debug.callback(lambda _: calls.append(1), t)
        return pendulum(y, t)

    solution = solve(func, Y0, t, method=method, max_evaluations=budget, **TOLERANCES)
    jax.effects_barrier()
    return solution, len(calls)


@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])  # "dop853" below
def test_the_error_grows_as_the_budget_shrinks_and_the_end_is_reached(method):
    t = [0.0, 8.0]
    exact = solve(pendulum, Y0, t, method="dop853", rtol=1e-12, atol=1e-12).ys[-1]
    plain = solve(pendulum, Y0, t, method=method, **TOLERANCES)
    errors, estimates, total = [], [], int(plain.stats.evaluations)
    for budget in (total // 8, total // 3, int(0.8 * total)):
        found = solve(pendulum, Y0, t, method=method, max_evaluations=budget, **TOLERANCES)
        assert Status(int(found.status)) == Status.BUDGET and found.reached == 8.0
        assert 0.6 * budget < int(found.stats.evaluations) <= budget
        errors.append(float(jnp.max(jnp.abs(found.ys[-1] - exact))))
        estimates.append(float(found.error))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert estimates[0] > estimates[1] > estimates[2] > 1
    enough = solve(pendulum, Y0, t, method=method, max_evaluations=9000, **TOLERANCES)
    assert enough.status == 0 and float(enough.error) <= 1
    assert jax.tree.map(int, enough.stats) == jax.tree.map(int, plain.stats)
    np.testing.assert_allclose(enough.ys, plain.ys, rtol=1e-12)


def test_what_is_counted_is_what_is_called_with_outputs_too():
    for t in (np.linspace(0.0, 8.0, 40),):
        solution, calls = counted("dop853", 150, t)
        # One call more is for the slope of the state at the end, which is only differentiated.
        assert calls <= 150 and abs(int(solution.stats.evaluations) - calls) <= 1
        assert np.all(np.isfinite(solution.ys))


def test_derivatives_are_those_of_the_steps_that_were_taken():
    def end(y0, adjoint):
        t = jnp.array([0.0, 4.0])
        found = solve(pendulum, y0, t, adjoint=adjoint, max_evaluations=80, **TOLERANCES)
        return found.ys[-1, 0]

    replay = jax.jit(jax.grad(lambda y0: end(y0, "replay")))(Y0)
    np.testing.assert_allclose(replay, jax.grad(lambda y0: end(y0, "direct"))(Y0), rtol=1e-9)
    starts = jnp.stack([Y0 + 0.05 * i for i in range(10)])
    many = jax.vmap(jax.grad(lambda y0: end(y0, "replay")))(starts)
    np.testing.assert_allclose(many[0], replay, rtol=1e-6)
    assert np.all(np.isfinite(many)) and succeeded(int(Status.BUDGET))


def test_steps_that_can_be_taken_back_are_paid_for_as_what_they_cost():
    of = lambda budget: solve(
        pendulum, Y0, [0.0, 4.0], adjoint="reversible", max_evaluations=budget, **TOLERANCES
    )
    found = of(100)
    assert Status(int(found.status)) == Status.BUDGET and found.reached == 4.0
    assert 80 < int(found.stats.evaluations) <= 100 and np.all(np.isfinite(found.ys))
    with pytest.raises(ValueError, match="'reversible', which takes 14"):
        of(15)


def test_a_solution_that_is_not_finite_is_a_failure():
    pole = lambda y, t: jnp.where(y > 1e6, jnp.nan, y**2)
    found = solve(pole, 1.0, [0.0, 5.0], max_evaluations=100, throw=False)
    assert Status(int(found.status)) == Status.NON_FINITE and int(found.stats.evaluations) <= 100
    assert np.isnan(found.ys[-1])


def test_a_budget_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="pass at least 8"):
        solve(pendulum, Y0, [0.0, 1.0], max_evaluations=7)
    with pytest.raises(ValueError, match="'rodas5p'"):
        solve(pendulum, Y0, [0.0, 1.0], method="kvaerno5", max_evaluations=100)
    u = Signal([0.0, 1.0], [0.0, 1.0])
    event = [Event(lambda y, t: y[0])]
    for func, options in (
        (pendulum, dict(events=event)),
        (pendulum, dict(dt=0.1)),
        (lambda y, t: u(t) * y, {}),
    ):
        with pytest.raises(ValueError, match="not with events, signals"):
            solve(func, Y0, [0.0, 1.0], max_evaluations=100, **options)
