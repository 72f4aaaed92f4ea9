"""A fold over the accepted steps: against the steps themselves, closed forms, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, Signal, Status, odeint, solve

Y0 = jnp.array([1.0, 2.0, 3.0])


def lorenz(y, t, sigma):
    x, y, z = y
    return jnp.stack([sigma * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def seen(value, y, t, *args):
    """The least state, the integral by the trapezoidal rule, how many steps, whether x was below -10."""
    least, total, (before, last), count, below = value
    total = total + (t - last) * (y + before) / 2
    return jnp.minimum(least, y), total, (y, t), count + 1, below | (y[0] < -10)


START = jnp.full(3, jnp.inf), jnp.zeros(3), (Y0, 0.0), 0, False


@pytest.mark.parametrize(
    ("method", "t1", "options"),
    [
        ("tsit5", 2.0, {}),
        ("tsit5", -0.1, {"adjoint": "direct"}),
        ("rk4", 2.0, {"dt": 0.02}),
        ("rodas5p", 1.0, {"rtol": 1e-5}),
    ],
)
def test_a_minimum_an_integral_and_a_count_are_those_of_the_steps(method, t1, options):
    given = dict(method=method, fold=(START, seen), save_steps=True, max_steps=400, **options)
    sol = solve(lorenz, Y0, [0.0, t1], 10.0, **given)
    ts, ys = (np.asarray(x)[np.asarray(sol.mask)] for x in (sol.ts, sol.ys))
    least, total, (y, t), count, below = sol.folded
    np.testing.assert_array_equal(least, ys[1:].min(axis=0))
    np.testing.assert_allclose(total, np.trapezoid(ys, ts, axis=0), rtol=1e-12)
    np.testing.assert_array_equal(y, ys[-1])
    assert t == t1 and int(count) == int(sol.stats.accepted) == len(ts) - 1
    assert below == np.any(ys[1:, 0] < -10)


# A fold that is not a sum: what a step adds depends on the value.
SCALE = jnp.array([1.5])


def loss(y0, k, start, scale, adjoint="replay"):
    def swing(y, t, k):
        return jnp.stack([y[1], -k * y[0]]) * jnp.cos(t)

    def mixed(value, y, t, k):
        number, count = value
        return number + 0.1 * scale[0] * y[0] ** 2 * t + 0.01 * k * jnp.sin(number), count + 1

    options = dict(method="rk4", dt=0.2, adjoint=adjoint)
    sol = solve(swing, y0, [0.5, 1.0, 2.0], k, fold=((start, 0), mixed), **options)
    return 2 * sol.folded[0] + sol.ys[1, 0]


GIVEN = jnp.array([1.0, 0.3]), jnp.array(2.0), jnp.array(0.7), SCALE


def test_the_gradient_of_a_fold_is_that_of_finite_differences_by_every_adjoint():
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    _, gradient = run(*GIVEN)
    others = [
        jax.jit(jax.grad(lambda *xs: loss(*xs, "direct"), (0, 1, 2, 3)))(*GIVEN),
        jax.jit(jax.jacfwd(lambda *xs: loss(*xs, "forward"), (0, 1, 2, 3)))(*GIVEN),
    ]
    for found in others:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), found, gradient)
    h = 1e-5
    for i, x in enumerate(GIVEN):
        for j in range(x.size):
            move = jnp.zeros(x.size).at[j].set(h).reshape(x.shape)
            ends = [run(*GIVEN[:i], x + step, *GIVEN[i + 1 :])[0] for step in (move, -move)]
            slope = (ends[0] - ends[1]) / (2 * h)
            np.testing.assert_allclose(gradient[i].reshape(-1)[j], slope, rtol=1e-7)


def test_folds_of_many_solves_are_those_of_each():
    y0s = jnp.stack([GIVEN[0] * (1 + 0.1 * i) for i in range(12)])
    both = jax.value_and_grad(lambda y0, k: loss(y0, k, *GIVEN[2:]), (0, 1))
    many = jax.jit(jax.vmap(both, (0, None)))(y0s, GIVEN[1])
    one = jax.jit(both)
    each = jax.tree.map(lambda *x: jnp.stack(x), *(one(y0, GIVEN[1]) for y0 in y0s))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), many, each)


def test_integers_keep_all_their_bits():
    values = [np.int8(-3), np.uint32(2**31), np.int64(-(2**40)), np.int32(7)]
    mixed = lambda values: [x * x.dtype.type(5) - x.dtype.type(5) for x in values]
    fold = values, lambda values, y, t: mixed(values)
    sol = solve(lambda y, t: -y, 1.0, [0.0, 1.0], method="rk4", dt=0.05, fold=fold)
    with np.errstate(over="ignore"):
        for _ in range(20):
            values = mixed(values)
    for found, value in zip(sol.folded, values, strict=True):
        assert found.dtype == value.dtype and found == value


@pytest.mark.parametrize("adjoint", ["replay", "direct"])
def test_an_integral_across_changes_of_the_state_has_the_derivative_of_their_times(adjoint):
    """A state that rises with slope 1, and falls to 0 wherever it is at a: a saw."""

    def area(a):
        at_top = Event(lambda y, t, a: y - a, direction="up", change=lambda y, t, a: 0 * y)
        add = lambda v, y, t, a: (v[0] + (t - v[2]) * (y + v[1]) / 2, y, t, v[3] + 1)
        fold = (jnp.array(0.0), jnp.array(0.0), jnp.array(0.0), 0), add
        options = dict(method="bosh3", adjoint=adjoint, max_steps=200, hmax=0.4)
        sol = solve(
            lambda y, t, a: 1 + 0 * y, 0.0, [0.0, 4.0], a, events=[at_top], fold=fold, **options
        )
        return sol.folded[0], (sol.folded[3], sol.stats.accepted)

    a, n = jnp.array(1.5), 2
    (found, (calls, steps)), slope = jax.value_and_grad(area, has_aux=True)(a)
    rest = 4 - n * a
    np.testing.assert_allclose(found, n * a**2 / 2 + rest**2 / 2, rtol=1e-9)
    np.testing.assert_allclose(slope, n * a - n * rest, rtol=1e-9)
    assert int(calls) == int(steps)  # an event is a step: seen are its state before, and after


@pytest.mark.parametrize("adjoint", ["replay", "direct"])
def test_an_extremum_at_an_event_is_that_of_the_event_and_moves_with_it(adjoint):
    """The largest speed of a ball is that with which it first meets the floor."""
    fall = lambda y, t: jnp.stack([y[1], -9.81])
    floor = Event(
        lambda y, t: y[0], direction="down", change=lambda y, t: y * jnp.array([1.0, -0.9])
    )
    faster = lambda value, y, t: (jnp.maximum(value[0], jnp.abs(y[1])), jnp.minimum(value[1], y[0]))

    def fastest(height):
        start, fold = jnp.stack([height, 0 * height]), ((jnp.zeros(()), height), faster)
        options = dict(events=[floor], fold=fold, adjoint=adjoint, max_steps=200)
        speed, lowest = solve(fall, start, [0.0, 1.0], **options).folded
        return speed, lowest

    (speed, lowest), slope = fastest(jnp.array(2.0)), jax.grad(lambda h: fastest(h)[0])(2.0)
    np.testing.assert_allclose(speed, np.sqrt(2 * 9.81 * 2), rtol=1e-9)
    np.testing.assert_allclose(slope, np.sqrt(9.81 / (2 * 2)), rtol=1e-9)
    np.testing.assert_allclose(lowest, 0, atol=1e-12)


def test_a_fold_goes_on_from_knot_to_knot_of_a_signal():
    def final(us):
        force = Signal([0.0, 1.0, 2.5, 3.0], us, "previous")
        add = lambda v, y, t, u: (v[0] + (t - v[2]) * (y + v[1]) / 2, y, t, v[3] + 1)
        fold = (jnp.array(0.0), jnp.array(0.0), jnp.array(0.0), 0), add
        sol = solve(lambda y, t, u: u(t) + 0 * y, 0.0, [0.0, 3.0], force, method="bosh3", fold=fold)
        return sol.folded[0], (sol.folded[3], sol.stats.accepted)

    us = jnp.array([1.0, -2.0, 3.0, 0.0])
    (area, (count, accepted)), slope = jax.value_and_grad(final, has_aux=True)(us)
    weights = [0.5 + 2.0, 1.125 + 0.75, 0.125, 0.0]  # of each height in the integral of the state
    np.testing.assert_allclose(area, np.dot(weights, us), rtol=1e-12)
    np.testing.assert_allclose(slope, weights, rtol=1e-12)
    assert int(count) == int(accepted)


def test_a_fold_sees_states_as_the_user_knows_them_and_changes_nothing_else():
    func = lambda y, t: {"x": y["v"], "v": -y["x"]}
    y0, t = {"x": jnp.array(1.0), "v": jnp.array(0.0)}, [0.0, 1.0, 3.0]
    most = lambda value, y, t: jnp.maximum(value, y["x"] ** 2 + y["v"] ** 2)
    for options in ({}, {"save": lambda y, t: y["x"]}, {"dense": True, "max_steps": 100}):
        options = {"method": "bosh3", "rtol": 1e-4, **options}
        plain = solve(func, y0, t, **options)
        folded = solve(func, y0, t, fold=(0.0, most), **options)
        assert 0.9 < folded.folded < 1.1
        jax.tree.map(np.testing.assert_array_equal, folded._replace(folded=None), plain)


def test_the_fold_of_no_steps_is_its_start_and_that_of_a_failed_solve_is_nan():
    count = lambda value, y, t: value + 1
    assert solve(lambda y, t: y, 1.0, [], fold=(3, count)).folded == 3
    assert solve(lambda y, t: y, 1.0, [0.0], fold=(3, count)).folded == 3
    options = dict(method="bosh3", max_steps=20, throw=False)
    sol = solve(lambda y, t: y**2, 1.0, [0.0, 2.0], fold=(3.0, count), **options)
    assert sol.status != Status.SUCCESS and jnp.isnan(sol.folded)


def test_nothing_goes_back_through_a_step_that_was_none():
    """A distance has an infinite derivative at 0, where all of these start; the first one ends there."""

    def far(t1, rate):
        longest = lambda value, y, t, rate: jnp.maximum(value, jnp.sqrt(y**2))
        options = dict(method="bosh3", rtol=1e-3, fold=(0.0, longest))
        return solve(
            lambda y, t, rate: rate + 0 * y, 0.0, jnp.stack([0 * t1, t1]), rate, **options
        ).folded

    t1s = jnp.linspace(0.0, 1.0, 12)
    slopes = jax.vmap(jax.grad(far, 1), (0, None))(t1s, jnp.array(2.0))
    np.testing.assert_allclose(slopes, t1s, rtol=1e-12)


@pytest.mark.parametrize(
    ("fold", "error", "message"),
    [
        (lambda v, y, t: v, TypeError, "must be a pair"),
        ((0.0, 1.0), TypeError, "must be a pair"),
        (((), lambda v, y, t: v), TypeError, "holds none"),
        (("text", lambda v, y, t: v), TypeError, "must be an array"),
        ((0.0, lambda v, y: v), TypeError, r"function\(value, y, t, \*args\)"),
        ((0.0, lambda v, y, t: (v, v)), TypeError, "a value like its start"),
        ((0.0, lambda v, y, t: jnp.stack([v, v])), TypeError, "pass a start like"),
        ((0, lambda v, y, t: y), TypeError, "pass a start like"),
    ],
)
def test_what_is_no_fold_is_refused_with_what_to_do(fold, error, message):
    with pytest.raises(error, match=message):
        solve(lambda y, t: -y, 1.0, [0.0, 1.0], fold=fold)


def test_folds_are_refused_where_there_are_none():
    fold = 0, lambda value, y, t: value + 1
    with pytest.raises(TypeError, match="call `solve`"):
        odeint(lambda y, t: -y, 1.0, [0.0, 1.0], fold=fold)
    with pytest.raises(ValueError, match="with `fold` use adjoint='replay'"):
        solve(lambda y, t: -y, 1.0, [0.0, 1.0], fold=fold, adjoint="backsolve")
