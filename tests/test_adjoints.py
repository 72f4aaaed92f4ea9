"""Four ways to differentiate a solve, against differences, closed forms and each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from jaxode import odeint, solve
from jaxode.adjoints import backsolve

REVERSE = ["replay", "backsolve", "direct"]
tight = dict(rtol=1e-10, atol=1e-10)


def spring(y, t, p):
    """Nonlinear, non-autonomous, on a pytree."""
    x, v = y["x"], y["v"]
    return {"x": v * jnp.cos(t), "v": -p["k"] * jnp.sin(x) - p["c"] * v + p["bias"].sum() * t}


y0 = {"x": jnp.array([0.4, -0.3]), "v": jnp.array([0.1, 0.8])}
p = {"k": jnp.array(2.0), "c": jnp.array([0.1, 0.3]), "bias": jnp.array([[0.2], [0.1]])}
ts = jnp.array([0.2, 0.7, 1.1, 1.15, 2.0])


def loss_of(adjoint, **options):
    def loss(y0, ts, p):
        ys = odeint(spring, y0, ts, p, adjoint=adjoint, **{**tight, **options})
        weights = jnp.arange(1.0, len(ts) + 1)[:, None]
        return jnp.sum(weights * ys["x"] ** 2) + jnp.sum(jnp.sin(ys["v"]) * weights)

    return loss


def close(a, b, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), a, b)


@pytest.mark.parametrize("adjoint", REVERSE)
def test_gradients_agree_with_differences(adjoint):
    check_grads(loss_of(adjoint), (y0, ts, p), order=1, modes=["rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adjoint", ["direct", "forward"])
def test_tangents_agree_with_differences(adjoint):
    check_grads(loss_of(adjoint), (y0, ts, p), order=1, modes=["fwd"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, dict(dt=0.1, method="rk4"), dict(method="dop853")], ids=str
)
def test_replay_and_direct_agree_to_rounding(options):
    replay, direct = (
        jax.grad(loss_of(a, **options), (0, 1, 2))(y0, ts, p) for a in ("replay", "direct")
    )
    close(replay, direct, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method, dt", [("euler", 0.3), ("heun", 0.2), ("rk4", 0.25)])
def test_gradients_of_fixed_steps_are_exact_for_the_numbers_returned(method, dt):
    """Crude steps: the derivative of the numbers is far from that of the solution. The number of steps
    must not jump under a difference, hence times a little below a multiple of dt."""
    times = jnp.array([0.0, 0.31, 1.17])
    loss = loss_of("replay", method=method, dt=dt)
    check_grads(loss, (y0, times, p), order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


def test_backsolve_agrees_to_its_tolerance():
    exact = jax.grad(loss_of("replay"), (0, 2))(y0, ts, p)
    for tolerance in (1e-5, 1e-8):
        adjoint = backsolve(rtol=tolerance, atol=tolerance)
        close(
            jax.grad(loss_of(adjoint), (0, 2))(y0, ts, p),
            exact,
            rtol=50 * tolerance,
            atol=50 * tolerance,
        )


def test_a_closed_form_linear_system():
    """y = exp(A t) y0: dL/dy0 = exp(A' t) w."""
    a = jnp.array([[0.1, 1.0], [-2.0, -0.3]])
    w = jnp.array([1.0, -2.0])
    loss = lambda y0, adjoint: (
        odeint(lambda y, t: a @ y, y0, [0.0, 1.5], adjoint=adjoint, **tight)[-1] @ w
    )
    for adjoint in REVERSE:
        got = jax.grad(loss)(jnp.ones(2), adjoint)
        np.testing.assert_allclose(got, jax.scipy.linalg.expm(1.5 * a).T @ w, rtol=1e-7)


@pytest.mark.parametrize("adjoint", ["replay", "backsolve"])
def test_evaluations_of_a_gradient_do_not_grow_with_the_outputs(adjoint):
    def count(n):
        calls = []
        f = lambda y, t: (
            jax.debug.callback(lambda _: calls.append(1), t),
            jnp.sin(y) * jnp.cos(t),
        )[1]
        times = np.linspace(0, 2, n)
        loss = lambda y0: odeint(f, y0, times, rtol=1e-6, atol=1e-6, adjoint=adjoint)[-1].sum()
        jax.block_until_ready(jax.jit(jax.grad(loss))(jnp.ones(40)))
        jax.effects_barrier()
        return len(calls)

    limit = 1.05 if adjoint == "replay" else 2.5
    assert count(101) <= limit * count(2)


def test_gradients_of_direct_work_under_jit_and_vmap_either_way_around():
    """Those of replay and backsolve, which have lanes, are in test_lanes."""
    loss = loss_of("direct", method="bosh3", rtol=1e-6, atol=1e-6)
    several = jax.tree.map(lambda x: jnp.stack([x, 1.3 * x, -x]), y0)
    one = jax.jit(jax.grad(loss))
    single = [one(jax.tree.map(lambda x, i=i: x[i], several), ts, p) for i in range(3)]
    single = jax.tree.map(lambda *x: jnp.stack(x), *single)
    vmap_of_grad = jax.jit(jax.vmap(jax.grad(loss), (0, None, None)))(several, ts, p)
    grad_of_vmap = jax.grad(lambda y: jax.vmap(loss, (0, None, None))(y, ts, p).sum())(several)
    close(vmap_of_grad, single, rtol=1e-9, atol=1e-9)
    close(grad_of_vmap, single, rtol=1e-9, atol=1e-9)


def test_second_derivatives_by_forward_and_by_reverse_over_reverse_agree():
    options = dict(method="bosh3", rtol=1e-6, atol=1e-6, max_steps=400)
    vector = lambda f: lambda y: f({"x": y[:2], "v": y[2:]}, ts, p)
    y = jnp.array([0.4, -0.3, 0.1, 0.8])
    direct = jax.jit(jax.hessian(vector(loss_of("direct", **options))))(y)
    replay = vector(loss_of("replay", **options))
    for second in (jax.hessian(replay), jax.jacrev(jax.grad(replay))):
        np.testing.assert_allclose(jax.jit(second)(y), direct, rtol=1e-8, atol=1e-8)


def test_third_derivatives_of_replay_are_refused_not_wrong():
    f = lambda y0: odeint(lambda y, t: y**2, y0, [0.0, 0.2])[-1]
    with pytest.raises(NotImplementedError, match="direct"):
        jax.grad(jax.grad(jax.grad(f)))(1.0)


def test_a_tape_that_was_thinned_gives_the_same_gradient():
    """40,000 numbers a state leave room for few rows: states in between have to be rebuilt."""
    y0 = jnp.linspace(0.5, 1.5, 5000)
    loss = lambda y0, adjoint, **o: odeint(
        lambda y, t: jnp.sin(3 * t) * y * (2 - y), y0, [0.0, 0.4, 3.0, 8.0], rtol=1e-9, atol=1e-9,
        adjoint=adjoint, max_steps=o.get("max_steps", 900),
    )[1:].sum()  # fmt: skip
    steps = solve(
        lambda y, t: jnp.sin(3 * t) * y * (2 - y), y0, [0.0, 8.0], rtol=1e-9, atol=1e-9
    ).stats
    assert steps.accepted > 60  # the tape of 900 steps has 30 rows
    replay, direct = jax.grad(loss)(y0, "replay"), jax.grad(loss)(y0, "direct")
    np.testing.assert_allclose(replay, direct, rtol=1e-9, atol=1e-12)


def test_memory_of_backsolve_is_flat_and_of_replay_grows_as_a_square_root():
    def temporary(adjoint, steps):
        f = lambda y, t: jnp.tanh(y)
        loss = lambda y0: odeint(f, y0, [0.0, 1.0], method="rk4", dt=1 / steps, adjoint=adjoint)[
            -1
        ].sum()
        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones(2000)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary("backsolve", 10_000) <= 1.1 * temporary("backsolve", 100)
    assert temporary("replay", 10_000) <= 12 * temporary("replay", 100)
    assert temporary("direct", 10_000) > 50 * temporary("direct", 100)


def test_an_adjoint_may_live_outside_the_library():
    seen = []

    def spying(solve, f, y0, ss):
        seen.append(ss.shape)
        return solve(f, y0, ss)

    ys = odeint(lambda y, t: -y, 1.0, [0.0, 1.0, 2.0], adjoint=spying)
    np.testing.assert_allclose(ys, np.exp([0, -1, -2]), rtol=1e-6)
    assert seen == [(3,)]


def test_what_is_not_differentiated_costs_nothing_and_unused_parameters_get_zeros():
    f = lambda y, t, used, unused: -used * y
    g = jax.grad(lambda u, v: odeint(f, 1.0, [0.0, 1.0], u, v)[-1], (0, 1))(0.5, jnp.ones(3))
    np.testing.assert_allclose(g[0], -np.exp(-0.5), rtol=1e-6)
    np.testing.assert_array_equal(g[1], np.zeros(3))

    def temporary(*of):
        f = lambda y, t, rate, table: -rate * jnp.max(jnp.sin(table)) * y
        end = lambda rate, table: odeint(f, 1.0, [0.0, 1.0], rate, table, method="bosh3")[-1]
        program = jax.jit(jax.grad(end, of)).lower(0.5, jnp.ones(10**6)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(0) < temporary(0, 1) - 8e6  # no cotangent of the table


def cubic(y, t):
    return jnp.roll(y, 1) * jnp.cos(t) - 0.3 * y**3


def squares(z, **options):
    """With few numbers in z it is differentiated by sensitivities, with more by going back."""
    chosen: Any = dict(method="heun", dt=0.25) | options
    return (odeint(cubic, z, [0.0, 0.3, 1.0], **chosen) ** 2).sum()


def of_both(y):
    return jnp.stack([y, 2 * y])


AROUND = {
    "map": lambda one: lambda y: lax.map(one, of_both(y)).sum(),
    "cond": lambda one: (
        lambda y: lax.map(
            lambda z: lax.cond(z[0] > 0, one, lambda z: 0 * z.sum(), z), of_both(y)
        ).sum()
    ),
    "checkpoint": lambda one: (
        lambda y: lax.fori_loop(
            0, 2, lambda i, total: total + jax.checkpoint(one)(of_both(y)[i]), 0.0
        )
    ),
}
TWICE = {"forward over reverse": jax.hessian, "reverse twice": lambda f: jax.jacrev(jax.jacrev(f))}


@pytest.mark.parametrize(
    "around, size, second",
    [
        ("map", 2, "forward over reverse"),
        ("map", 2, "reverse twice"),
        ("map", 6, "forward over reverse"),
        ("cond", 2, "forward over reverse"),
        ("checkpoint", 2, "forward over reverse"),
    ],
)
def test_second_derivatives_inside_of_loops_and_branches_are_those_of_one_solve_after_another(
    around, size, second
):
    y = jnp.linspace(0.3, 1.0, size)
    one = jax.jit(jax.hessian(squares))
    found = jax.jit(TWICE[second](AROUND[around](squares)))(y)
    np.testing.assert_allclose(found, one(y) + 4 * one(2 * y), rtol=1e-10, atol=1e-12)


def test_second_derivatives_by_direct_through_implicit_steps_are_those_of_replay():
    """A scan of steps, each of which has the rule of the implicit function."""
    y, hessians = jnp.array([0.6]), {}
    for adjoint in ("direct", "replay"):
        one = lambda z, adjoint=adjoint: squares(z, method="kvaerno3", dt=0.5, adjoint=adjoint)
        hessians[adjoint] = jax.jit(jax.hessian(one))(y)
    np.testing.assert_allclose(hessians["direct"], hessians["replay"], rtol=1e-10)


@pytest.mark.parametrize("adjoint", ["backsolve", "reversible"])
@pytest.mark.parametrize("around", [lambda one: one, AROUND["map"]], ids=["alone", "map"])
def test_second_derivatives_that_there_are_not_are_refused(around, adjoint):
    y = jnp.array([0.3, 1.0])
    for second in TWICE.values():
        with pytest.raises(NotImplementedError, match="has first derivatives alone"):
            second(around(lambda z: squares(z, adjoint=adjoint)))(y)


def test_third_derivatives_of_replay_are_refused_inside_of_a_loop_too():
    total = lambda a: lax.map(lambda c: squares(c * a * jnp.ones(2)), jnp.array([1.0, 2.0])).sum()
    with pytest.raises(NotImplementedError, match="direct"):
        jax.grad(jax.grad(jax.grad(total)))(0.5)


def test_a_failed_solve_in_a_loop_that_another_input_has_differentiated_has_no_derivative():
    """By w the loop is differentiated first, and its solves are left as they are."""

    def total(y, w):
        explode = lambda c: odeint(lambda y, t: y**2, c * y, [0.0, 0.3, 2.0], max_steps=100)[1]
        return lax.map(lambda c: w * explode(c), jnp.array([0.1, 2.0])).sum()

    by_w = jax.grad(total, 1)
    assert np.isfinite(by_w(1.0, 1.0))
    assert np.isnan(jax.grad(by_w)(1.0, 1.0))


@pytest.mark.parametrize(
    "times, adjoint, many",
    [
        ([0, 0, 1, 1], "replay", lambda fn: lambda z: jax.vmap(fn)(jnp.stack([z, z]))[1]),
        ([1, 1, 0.2, 0.2], "replay", lambda fn: fn),
        ([0, 0, 1, 1], "direct", lambda fn: fn),
        ([0, 0, 0], "replay", lambda fn: fn),
    ],
    ids=["replay of many", "replay backwards", "direct", "replay over no time"],
)
def test_second_derivatives_in_times_that_are_the_start_or_the_end(times, adjoint, many):
    """1/y = 1/y0 - (A(t) - A(t0)) for dy/dt = A'(t) y^2: a row at the start bends as the others do."""
    times = jnp.array(times, jnp.float64)
    area = lambda t, p: jnp.sin(p * t + 0.4) / p
    weights = jnp.arange(1.0, len(times) + 1)

    def found(z):
        func = lambda y, t, p: jnp.cos(p * t + 0.4) * y**2
        ys = odeint(func, z[0], times + z[2:], z[1], method="rk4", dt=0.01, adjoint=adjoint)
        return weights @ ys

    def exact(z):
        y0, p, t = z[0], z[1], times + z[2:]
        return weights @ (1 / (1 / y0 - (area(t, p) - area(t[0], p))))

    z = jnp.concatenate([jnp.array([0.5, 1.3]), jnp.zeros(len(times))])
    hessian = jax.jit(many(jax.jacrev(jax.grad(found))))(z)
    np.testing.assert_allclose(hessian, jax.hessian(exact)(z), rtol=1e-7, atol=1e-7)
