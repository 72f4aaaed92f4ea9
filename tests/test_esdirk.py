"""Diagonally implicit methods: what a tolerance means, and how far Newton's method goes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Status, odeint, solve
from jaxode.methods import named
from jaxode.problems import problems

# What a tolerance of 1 is, absolutely, where numbers are small.
SCALES = {"robertson": 1e-4, "robertson_long": 1e-10, "hires": 1e-4}
STIFF = """robertson robertson_long hires oregonator van_der_pol_1e3 van_der_pol_1e6 kaps
    prothero_robinson brusselator_line""".split()  # fmt: skip
# All by one method: the others share Newton's method, its linear algebra and the choice of steps with it.
TELLING = ("robertson_long", "van_der_pol_1e6", "prothero_robinson")
PAIRS = [
    *((p, "kvaerno5") for p in STIFF),
    *((p, name) for name in ("trbdf2", "kvaerno3", "kencarp4") for p in TELLING),
]


@pytest.mark.parametrize(("problem", "name"), PAIRS)
def test_stiff_problems_are_solved_to_ten_tolerances_or_not_at_all(problem, name):
    p, scale = problems[problem], SCALES.get(problem, 1.0)
    for rtol in (1e-4, 1e-6, 1e-8):
        found = solve(
            p.f, p.y0, [p.t0, p.t1], *p.args, method=name, rtol=rtol, atol=scale * rtol, throw=False
        )
        error = np.abs(found.ys[-1] - p.answer()) / (scale + np.abs(p.answer()))
        assert int(found.status) == Status.MAX_STEPS or error.max() < 10 * rtol, rtol


def van_der_pol(y, t, mu):
    return jnp.stack([y[1], mu * ((1 - y[0] ** 2) * y[1] - y[0])])


def ends(method, rtol, **options):
    return solve(
        van_der_pol, jnp.array([2.0, 0.0]), [0.0, 0.5], 1e3, method=method, rtol=rtol, atol=rtol, **options
    )  # fmt: skip


@pytest.mark.parametrize("name", ["kvaerno3", "kvaerno5"])
def test_newtons_method_leaves_a_small_part_of_the_tolerance(name):
    exact = dataclasses.replace(named(name), kappa=1e-7, iterations=40)
    for rtol in (1e-3, 1e-6):
        ys, of_exact = ends(name, rtol).ys, ends(exact, rtol).ys
        assert np.max(np.abs(ys - of_exact)) < rtol


def test_no_more_iterations_are_made_than_the_tolerance_asks_for():
    exact = dataclasses.replace(named("kvaerno5"), kappa=1e-7, iterations=40)
    each = []
    for method in ("kvaerno5", exact):
        stats = ends(method, 1e-4).stats
        each.append(int(stats.evaluations) / int(stats.accepted + stats.rejected))
    assert each[1] > 1.5 * each[0]


def test_equal_steps_do_not_depend_on_tolerances():
    first, second = (ends("kvaerno5", rtol, dt=1e-3).ys for rtol in (1e-1, 1e-9))
    np.testing.assert_array_equal(first, second)


def test_a_state_that_is_zero_is_left_by_equal_steps():
    ys = odeint(lambda y, t: 2 * t + 0 * y, jnp.zeros(2), [0.0, 1.0], method="kvaerno3", dt=0.1)
    np.testing.assert_allclose(ys[-1], 1, rtol=1e-10)


def test_the_way_back_takes_the_steps_of_the_way_forward():
    def loss(mu, adjoint):
        ys = odeint(
            van_der_pol, jnp.array([2.0, 0.0]), [0.0, 0.5], mu, method="kvaerno5", rtol=1e-4, atol=1e-4,
            adjoint=adjoint, max_steps=400,
        )  # fmt: skip
        return ys[-1, 0]

    back = jax.jit(jax.grad(lambda mu: loss(mu, "replay")))(1e3)
    for adjoint in ("direct", "forward"):
        other = jax.jit(jax.jacfwd(lambda mu: loss(mu, adjoint)))(1e3)  # noqa: B023
        np.testing.assert_allclose(back, other, rtol=1e-9)
    small = dict(method="rodas5p", rtol=1e-10, atol=1e-10)
    at = lambda mu: odeint(van_der_pol, jnp.array([2.0, 0.0]), [0.0, 0.5], mu, **small)[-1, 0]
    np.testing.assert_allclose(back, (at(1010.0) - at(990.0)) / 20, rtol=1e-2)


@pytest.mark.parametrize("name", ["trbdf2", "kvaerno5"])
def test_every_sample_of_a_batch_is_measured_by_its_own_tolerance(name):
    def one(rtol):
        return solve(
            van_der_pol, jnp.array([2.0, 0.0]), [0.0, 0.5], 1e3, method=name, rtol=rtol, atol=rtol
        )

    rtols = 10.0 ** -jnp.linspace(3, 6, 10)
    many = jax.jit(jax.vmap(one))(rtols)
    for i in (0, 4, 9):
        alone = one(rtols[i])
        np.testing.assert_allclose(many.ys[i], alone.ys, rtol=1e-10)
        assert int(many.stats.evaluations[i]) == int(alone.stats.evaluations)


def test_float32_is_solved_as_far_as_its_roundings_allow():
    y0 = jnp.array([2.0, 0.0], jnp.float32)
    options = dict(rtol=1e-5, atol=1e-5, throw=False)
    found = solve(van_der_pol, y0, [0.0, 0.5], jnp.float32(1e3), method="kvaerno5", **options)
    assert int(found.status) == 0
    assert found.ys.dtype == jnp.float32
    exact = ends("rodas5p", 1e-9).ys[-1]
    np.testing.assert_allclose(found.ys[-1], exact, rtol=1e-4)
