"""Lanes: a batch of solves agrees with its solves one by one, whatever they are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint, solve
from jaxode.adjoints import replay_in_lanes
from jaxode.batch import plans
from jaxode.nn import MLPField
from jaxode.solution import Status

LANES = 5
T = np.linspace(0.0, 1.0, 4)


def lorenz(y, t, rho, beta):
    x, y_, z = y
    return jnp.stack([10 * (y_ - x) + jnp.sin(t), x * (rho - z) - y_, x * y_ - beta * z])


def problem(dtype="float64", size=LANES):
    rhos = jnp.linspace(5.0, 30.0, size, dtype=dtype)
    y0s = 1 + jnp.arange(3 * size, dtype=dtype).reshape(size, 3) / 50
    return y0s, rhos


def loss(y0, rho, t, beta, **options):
    ys = odeint(lorenz, y0, t, rho, beta, **{"rtol": 1e-7, "atol": 1e-7, **options})
    return jnp.sum(jnp.sin(ys) * jnp.arange(1.0, len(t) + 1, dtype=ys.dtype)[:, None])


def one_by_one(fn, *batches):
    return jax.tree.map(lambda *x: jnp.stack(x), *(fn(*xs) for xs in zip(*batches)))


def close(a, b, tolerance=1e-9):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * (np.abs(y).max() + 1e-3))


@pytest.mark.parametrize(
    "times, options",
    [
        (T[[0, -1]], {"max_steps": 300, "mxstep": 200.0}),
        (T, {"method": "dop853"}),
        (T, {"method": "rk4", "dt": 0.01}),
        (T[::-1], {"method": "bosh3"}),
        (T, {"adjoint": "backsolve"}),
        (T[[0, -1]], {"adjoint": "backsolve", "method": "rk4", "dt": 0.01}),
    ],
    ids=str,
)
def test_values_and_all_gradients_agree_with_single_solves(times, options):
    y0s, rhos = problem()
    fn = lambda y0, rho: jax.value_and_grad(loss, (0, 1, 2, 3))(
        y0, rho, jnp.asarray(times), 8 / 3, **options
    )
    # Backwards in time Lorenz's system grows 10^6-fold, and so do roundings.
    tolerance = 1e-9 if times[0] == 0 and "adjoint" not in options else 1e-6
    close(jax.jit(jax.vmap(fn))(y0s, rhos), one_by_one(fn, y0s, rhos), tolerance)


def test_a_derivative_that_is_infinite_leaves_the_solution_alone():
    fn = lambda p: odeint(lambda y, t, p: -jnp.sqrt(p) * y, jnp.array(1.0), [0.0, 1.0], p)[-1]
    values, slopes = jax.vmap(jax.value_and_grad(fn))(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(values, [1.0, np.exp(-1)], rtol=1e-6)
    assert not np.isfinite(slopes[0]) and np.isclose(slopes[1], -np.exp(-1) / 2)


def test_statistics_are_those_of_single_solves(dtype):
    y0s, rhos = problem(dtype)
    fn = lambda y0, rho: solve(
        lorenz, y0, T.astype(dtype), rho, 8 / 3, rtol=1e-4, atol=1e-4, throw=False
    )
    many, single = jax.vmap(fn)(y0s, rhos), one_by_one(fn, y0s, rhos)
    for a, b in zip(many.stats, single.stats):
        np.testing.assert_allclose(a, b, atol=0 if dtype == "float64" else 20)
    np.testing.assert_array_equal(many.status, 0)
    np.testing.assert_allclose(many.ys, single.ys, rtol=2e-2, atol=2e-2)
    assert many.ys.dtype == dtype


@pytest.mark.parametrize("adjoint", ["replay", "backsolve"])
def test_more_problems_than_lanes_are_all_solved_and_uneven_ones_too(monkeypatch, adjoint):
    monkeypatch.setattr(plans, "lanes_at_once", lambda *_: 16)
    size = 75
    rates = jnp.where(jnp.arange(size) % 10 == 3, 60.0, 1.0) * jnp.linspace(0.5, 2.0, size)

    def fn(rate):
        field = lambda y, t, r: -r * jnp.sin(r * t) * y
        ys = odeint(field, jnp.ones(2), T, rate, rtol=1e-9, atol=1e-9, adjoint=adjoint)
        return jnp.sum(ys**2)

    exact = lambda rate: 2 * jnp.sum(jnp.exp(2 * (jnp.cos(rate * T) - 1)))
    close(jax.vmap(fn)(rates), jax.vmap(exact)(rates), 1e-6)
    close(jax.vmap(jax.grad(fn))(rates), jax.vmap(jax.grad(exact))(rates), 1e-5)


def test_a_tape_that_is_full_is_thinned_and_gradients_stay(monkeypatch):
    y0s, rhos = problem()
    total = lambda y0, rho: loss(y0, rho, jnp.asarray(T), 8 / 3, max_steps=4096, rtol=1e-10)
    fn = jax.grad(total, (0, 1))
    expected = one_by_one(fn, y0s, rhos)
    monkeypatch.setattr(replay_in_lanes, "TAPE", 2**18)
    close(jax.vmap(fn)(y0s, rhos), expected)


class Network(eqx.Module):
    field: MLPField
    scale: jax.Array

    def __call__(self, y, t, rate):
        return {"a": self.scale * self.field(y["a"], t), "b": -rate * y["b"]}


@pytest.mark.parametrize("order", ["vmap(grad)", "grad(vmap)"])
@pytest.mark.parametrize("adjoint, tolerance", [("replay", 1e-9), ("backsolve", 1e-6)])
def test_networks_pytrees_and_ragged_times_work_and_shared_weights_are_summed(
    monkeypatch, order, adjoint, tolerance
):
    monkeypatch.setattr(plans, "lanes_at_once", lambda *_: 3)
    field = Network(MLPField(5, width=8, dtype="float64", key=jax.random.key(0)), jnp.array(1.5))
    keys = jax.random.split(jax.random.key(1))
    y0s = {"a": jax.random.normal(keys[0], (LANES, 5)), "b": jnp.ones((LANES, 2, 3))}
    ts = jnp.outer(jnp.linspace(1.0, 1.4, LANES), T)
    rates = jnp.linspace(0.5, 1.5, LANES)

    def fn(field, y0, t, rate):
        ys = odeint(field, y0, t, rate, rtol=1e-8, atol=1e-8, adjoint=adjoint)
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(ys))

    grad = eqx.filter_grad(lambda x: fn(*x))
    arrays = lambda x: eqx.filter(grad(x), eqx.is_array)
    lane = lambda i: jax.tree.map(lambda x: x[i], (y0s, ts, rates))
    each = jax.tree.map(lambda *x: jnp.stack(x), *(arrays((field, *lane(i))) for i in range(LANES)))
    if order == "vmap(grad)":
        found = jax.vmap(lambda *x: arrays((field, *x)))(y0s, ts, rates)
        return close(found, each, tolerance)
    batched = lambda x: jnp.sum(jax.vmap(fn, (None, 0, 0, 0))(*x))
    found = eqx.filter_jit(eqx.filter_grad(batched))((field, y0s, ts, rates))
    summed = (jax.tree.map(lambda x: x.sum(0), each[0]), *each[1:])
    close(eqx.filter(found, eqx.is_array), summed, tolerance)


@pytest.mark.parametrize("adjoint", ["replay", "backsolve"])
def test_shared_weights_have_no_gradient_if_a_solve_failed_unless_it_is_left_out(adjoint):
    mlp = MLPField(3, width=16, time=False, dtype="float64", key=jax.random.key(0))
    rates = jnp.array([0.0, 40.0, 0.5])  # the second one grows beyond all numbers

    def field(y, t, mlp, rate):
        return mlp(y, t) + rate * y**3

    def loss(mlp, kept):
        one = lambda rate: solve(
            field, jnp.ones(3), T, mlp, rate, adjoint=adjoint, max_steps=200, throw=False
        )
        solutions = jax.vmap(one)(rates)
        assert solutions.ys.shape == (3, len(T), 3)
        return jnp.sum(jnp.where(kept[:, None, None], solutions.ys, 0.0) ** 2)

    arrays = lambda kept: jax.tree.leaves(eqx.filter_grad(loss)(mlp, jnp.array(kept)))
    assert all(np.all(np.isnan(x)) for x in arrays([True, True, True]))
    single = [arrays([i == k for i in range(3)]) for k in (0, 2)]
    close(arrays([True, False, True]), [a + b for a, b in zip(*single)], 1e-6)


def test_nested_vmap_partial_vmap_scan_and_map_agree():
    y0s, rhos = problem()
    fn = lambda y0, rho: loss(y0, rho, jnp.asarray(T), 8 / 3)
    grid = jnp.stack([jnp.stack([fn(y, r) for r in rhos[:2]]) for y in y0s[:3]])
    nested = jax.vmap(jax.vmap(fn, (None, 0)), (0, None))
    close(nested(y0s[:3], rhos[:2]), grid)
    close(jax.jit(nested)(y0s[:3], rhos[:2]), grid)
    slope = jax.grad(lambda y, r: jnp.sum(nested(y, r)))(y0s[:3], rhos[:2])
    single = jax.grad(lambda y, r: sum(fn(y, x) for x in r))
    close(slope, jnp.stack([single(y, rhos[:2]) for y in y0s[:3]]))
    both = lambda rho: jax.vmap(fn, (0, None))(y0s, rho)
    close(jax.lax.map(both, rhos[:2]), jnp.stack([both(r) for r in rhos[:2]]))
    _, scanned = jax.lax.scan(lambda carry, r: (carry, both(r)), 0.0, rhos[:2])
    close(scanned, jnp.stack([both(r) for r in rhos[:2]]))


def test_second_derivatives_and_cotangents_alone_can_be_batched():
    y0s, rhos = problem()
    # Equal steps: a difference does not see another choice of them.
    fn = lambda rho: loss(y0s[0], rho, jnp.asarray(T[[0, -1]]), 8 / 3, method="rk4", dt=0.05)
    slope, h = jax.jit(jax.grad(fn)), 1e-4
    expected = jnp.stack([(slope(r + h) - slope(r - h)) / (2 * h) for r in rhos[:2]])
    close(jax.jit(jax.vmap(jax.hessian(fn)))(rhos[:2]), expected, 1e-6)
    options = dict(method="bosh3", rtol=1e-6, atol=1e-6)
    path = lambda y0, adjoint: odeint(lorenz, y0, T, 10.0, 2.0, adjoint=adjoint, **options)
    back = jax.jit(jax.jacrev(lambda y0: path(y0, "replay")))
    forward = jax.jit(jax.jacfwd(lambda y0: path(y0, "forward")))
    close(back(y0s[0]), forward(y0s[0]), 1e-6)


@pytest.mark.parametrize("adjoint", ["replay", "backsolve"])
def test_one_failed_lane_is_nan_for_itself_alone(adjoint):
    def blow_up(y, t, p):
        return jnp.where(p > 1, y**2 * p, -y)

    p = jnp.array([0.5, 3.0, 0.7])
    fn = lambda p: solve(
        blow_up, jnp.array(1.0), [0.0, 0.5, 1.0], p, max_steps=500, adjoint=adjoint
    )
    sols = jax.vmap(fn)(p)
    assert sols.status[0] == sols.status[2] == 0
    assert sols.status[1] in (Status.DT_TOO_SMALL, Status.NON_FINITE, Status.MAX_STEPS)
    assert np.all(np.isfinite(sols.ys[::2])) and np.isnan(sols.ys[1, -1])
    grads = jax.vmap(jax.grad(lambda p: fn(p).ys[-1]))(p)
    assert np.all(np.isfinite(grads[::2])) and np.isnan(grads[1])


def test_a_derivative_that_is_nan_for_a_while_does_not_spoil_the_lanes_next_problem(monkeypatch):
    monkeypatch.setattr(plans, "lanes_at_once", lambda *_: 2)
    field = lambda y, t, p: jnp.where(p > 0, jnp.nan, -1.0) * y
    ys = jax.vmap(lambda p: odeint(field, jnp.ones(2), [0.0, 1.0], p, rtol=1e-8, atol=1e-8)[-1])(
        jnp.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    )
    np.testing.assert_allclose(ys[jnp.array([1, 2, 4, 5])], np.exp(-1), rtol=1e-6)
    assert np.all(np.isnan(ys[jnp.array([0, 3])]))


def test_complex_states_tolerances_of_each_lane_and_one_lane_alone():
    y0 = jnp.array([1.0 + 1.0j, 2.0 + 0.0j])
    fn = lambda w, rtol: odeint(
        lambda y, t, w: jax.lax.complex(0 * w, w) * y, y0, [0.0, 1.0], w, rtol=rtol, atol=1e-10
    )
    w, rtol = jnp.array([1.0, 2.0, 3.0]), jnp.array([1e-3, 1e-6, 1e-9])
    exact = jnp.outer(jnp.exp(jax.lax.complex(0 * w, w)), y0)
    errors = jnp.abs(jax.vmap(fn)(w, rtol)[:, -1] - exact).max(axis=1)
    assert errors[0] > 100 * errors[1] > 1e4 * errors[2]
    close(jax.vmap(fn)(w[:1], rtol[:1]), fn(w[0], rtol[0])[None])


def test_jacobians_of_many_solves_are_those_of_single_ones():
    y0s, rhos = problem()
    path = lambda y0, rho: odeint(lorenz, y0, T, rho, 8 / 3, rtol=1e-7, atol=1e-7, method="bosh3")[
        -1
    ]
    jacobian = jax.jacrev(path, (0, 1))
    expected = one_by_one(jacobian, y0s, rhos)
    close(jax.vmap(jacobian)(y0s, rhos), expected)
    nested = jax.vmap(jax.vmap(jacobian, (0, None)), (None, 0))(y0s[:2], rhos[:1])
    close(nested[0][0, 0], expected[0][0])
