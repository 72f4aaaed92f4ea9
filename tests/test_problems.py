"""The problems have the answers that they state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from scipy.integrate import solve_ivp

from jaxode import odeint, solve
from jaxode.problems import problems

exact = pytest.mark.parametrize("name", [n for n, p in problems.items() if p.exact])
# Of the ring modulator SciPy takes minutes: see bench/references.py.
ordinary = pytest.mark.parametrize(
    "name", [n for n, p in problems.items() if p.mass is None and n != "ring_modulator"]
)
smooth = pytest.mark.parametrize("name", [n for n, p in problems.items() if not p.stiff])


@ordinary
def test_another_library_finds_the_stated_answer(name):
    p, rtol = problems[name], 1e-7 if problems[name].stiff else 1e-10
    f = jax.jit(lambda t, y: p.f(y, t, *p.args))
    options = dict(method="DOP853")
    if p.stiff:
        jac = jax.jit(lambda t, y: jax.jacfwd(lambda y: p.f(y, t, *p.args))(y))
        options = dict(method="Radau", jac=lambda t, y: np.asarray(jac(t, y)))
    found = solve_ivp(f, (p.t0, p.t1), p.y0, rtol=rtol, atol=1e-2 * rtol * p.scale, **options)
    error = np.abs(found.y[:, -1] - p.answer()) / (p.scale + np.abs(p.answer()))
    assert error.max() < (1e-4 if p.stiff else 1e-5)


@exact
def test_a_stated_solution_starts_where_the_problem_does_and_obeys_its_equation(name):
    p = problems[name]
    np.testing.assert_allclose(p.exact(p.t0), p.y0, rtol=1e-12, atol=1e-12)
    # The slope of a stiff one is a difference of large numbers.
    error = dict(rtol=1e-4, atol=1e-6) if not p.stiff else dict(rtol=1e-4, atol=1e-4)
    for t in np.linspace(p.t0 + 0.1, p.t1 - 0.1, 7):
        slope = (p.exact(t + 1e-5) - p.exact(t - 1e-5)) / 2e-5
        np.testing.assert_allclose(p.f(p.exact(t), t, *p.args), slope, **error)


@smooth
def test_a_solve_finds_the_answer_and_a_tighter_tolerance_gives_a_smaller_error(name):
    p = problems[name]
    errors = []
    for tolerance in (1e-5, 1e-10):
        ys = odeint(p.f, p.y0, (p.t0, p.t1), *p.args, rtol=tolerance, atol=tolerance)
        errors.append(np.abs(ys[-1] - p.answer()).max())
    np.testing.assert_allclose(ys[-1], p.answer(), rtol=1e-4, atol=1e-5)
    assert errors[1] < 1e-2 * errors[0]


@pytest.mark.parametrize("name", ["lorenz", "arenstorf", "pleiades"])
def test_a_method_of_high_order_finds_the_answer(name):
    p = problems[name]
    ys = odeint(p.f, p.y0, (p.t0, p.t1), *p.args, method="dop853", rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ys[-1], p.answer(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, p in problems.items() if p.invariants])
def test_invariants_are_kept_to_tolerance(name):
    p = problems[name]
    ys = odeint(p.f, p.y0, np.linspace(p.t0, p.t1, 20), *p.args, rtol=1e-9, atol=1e-9)
    kept = np.array([p.invariants(np.asarray(y)) for y in ys])
    np.testing.assert_allclose(kept, np.broadcast_to(kept[0], kept.shape), rtol=1e-5, atol=1e-5)


@smooth
def test_problems_keep_the_precision_of_their_state(name):
    p = problems[name]
    solution = solve(
        p.f, jnp.array(p.y0, jnp.float32), (p.t0, (p.t0 + p.t1) / 50), *p.args, throw=False
    )
    assert solution.ys.dtype == jnp.float32 and np.all(np.isfinite(solution.ys))


@pytest.mark.parametrize("name", [n for n, p in problems.items() if p.mass is not None])
def test_algebraic_equations_hold_at_the_start_and_at_the_stated_end(name):
    p = problems[name]
    free_of_slopes = scipy.linalg.null_space(p.mass.T)
    assert free_of_slopes.shape[1] >= 1
    for y, t in ((p.y0, p.t0), (p.answer(), p.t1)):
        f = np.asarray(p.f(jnp.asarray(y), t, *p.args))
        np.testing.assert_allclose(free_of_slopes.T @ f, 0, atol=1e-14)


def test_robertsons_problem_ends_the_same_with_a_conservation_law():
    ends = [problems[name].answer() for name in ("robertson", "robertson_dae")]
    np.testing.assert_allclose(*ends, rtol=1e-14)
