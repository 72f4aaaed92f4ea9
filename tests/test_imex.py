"""Additive methods: one function solved implicitly, another evaluated (IMEX), as a pair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxode import Signal, SolveError, Status, odeint, solve
from jaxode.methods import Banded, Diagonal, named
from jaxode.methods.kencarp import methods

ADDITIVE = list(methods)
method = pytest.mark.parametrize("name", ADDITIVE)


# Orders.


def trees(n: int) -> set:
    """Rooted trees of n nodes, as nested tuples of their subtrees (HNW sec. II.2)."""
    if n == 1:
        return {()}
    return {
        tuple(sorted((x, *rest))) for k in range(1, n) for x in trees(k) for rest in trees(n - k)
    }


def nodes(t) -> int:
    return 1 + sum(map(nodes, t))


def density(t) -> int:
    return nodes(t) * int(np.prod([density(x) for x in t], dtype=int))


def weights(t, tables) -> list:
    """Of every way to give the branches of a tree to the tables: the vector of its elementary weights."""
    branches = [[a @ v for a in tables for v in weights(x, tables)] for x in t]
    return [np.prod([np.ones(len(tables[0])), *of], axis=0) for of in itertools.product(*branches)]


@method
def test_both_tables_and_their_coupling_fulfil_the_conditions_of_their_order(name):
    m = named(name)
    n = len(m.c)
    tables = np.zeros((2, n, n))
    for table, rows in zip(tables, (m.a, m.explicit)):
        for i, row in enumerate(rows):
            table[i, :i] = row
    tables[0] += np.diag([0, *[m.gamma] * (n - 1)])
    np.testing.assert_allclose(tables.sum(2), [m.c, m.c], atol=1e-14)
    b = tables[0][-1]
    off = lambda k: [abs(b @ v - 1 / density(t)) for t in trees(k) for v in weights(t, tables)]
    for order in range(1, m.order + 1):
        assert max(off(order)) < 1e-14
    assert max(off(m.order + 1)) > 1e-3
    low = lambda k: [abs(np.dot(m.e, v)) for t in trees(k) for v in weights(t, tables)]
    assert max(max(low(k)) for k in range(1, m.order)) < 1e-12
    assert max(low(m.order)) > 1e-3


def decaying(y, t, k):
    return jnp.stack([-k * y[0] + y[1], -k * y[1] * jnp.cos(t) ** 2])


def turning(y, t, k):
    return jnp.stack([-y[0] * y[1] * jnp.cos(t), y[0] - y[1] * t + jnp.sin(3 * t)])


PAIR, START, TIMES = (decaying, turning), jnp.array([1.0, 0.5]), jnp.linspace(0.0, 1.0, 8)


def by_scipy(stiff, nonstiff, y0, ts, *args, **options):
    f = jax.jit(lambda t, y: stiff(y, t, *args) + nonstiff(y, t, *args))
    return solve_ivp(lambda t, y: np.asarray(f(t, y)), (ts[0], ts[-1]), y0, t_eval=np.asarray(ts),
                     rtol=1e-12, atol=1e-13, **options).y.T  # fmt: skip


@method
def test_a_pair_is_solved_with_the_order_of_the_method_and_so_is_dense_output(name):
    exact = by_scipy(*PAIR, START, TIMES, 2.0, method="DOP853")
    run = jax.jit(lambda dt: odeint(PAIR, START, TIMES, 2.0, method=name, dt=dt))
    errors = [np.abs(run(dt) - exact) for dt in (1 / 10, 1 / 20, 1 / 40)]
    ends, every = [e[-1].max() for e in errors], [e.max() for e in errors]
    assert named(name).order - 0.3 < np.log2(ends[0] / ends[2]) / 2 < named(name).order + 0.5
    assert np.log2(every[0] / every[2]) / 2 > named(name).dense_order - 0.3


# Equations in space: diffusion implicit, the rest explicit.

N = 40


def diffusion(y, t, k):
    """u_xx of u = 0 at both ends of [0, 1]."""
    padded = jnp.pad(y, 1)
    return k * (N + 1) ** 2 * (padded[2:] - 2 * y + padded[:-2])


def burgers(y, t, k):
    """-(u^2 / 2)_x."""
    padded = jnp.pad(y, 1) ** 2 / 2
    return -(N + 1) / 2 * (padded[2:] - padded[:-2])


HUMP = jnp.asarray(np.sin(np.pi * np.arange(1, N + 1) / (N + 1)))


@pytest.mark.parametrize(
    "name, dtype", [*((name, "float64") for name in ADDITIVE), ("kencarp4", "float32")]
)
def test_advection_and_diffusion_are_those_of_scipy(name, dtype):
    ts = [0.0, 0.2, 0.5]
    exact = by_scipy(diffusion, burgers, HUMP, ts, 0.1, method="LSODA")
    rtol = 1e-6 if dtype == jnp.float64 else 1e-4
    options = dict(method=name, rtol=rtol, atol=rtol, linear=Banded(1, 1))
    found = solve((diffusion, burgers), HUMP.astype(dtype), ts, jnp.asarray(0.1, dtype), **options)
    assert found.ys.dtype == dtype
    np.testing.assert_allclose(found.ys, exact, atol=3 * rtol)
    # Diffusion alone would hold explicit steps below 2.8 / (4 k (N + 1)^2), 4e-3.
    if rtol == 1e-4:
        assert int(found.stats.accepted) < 80


def test_only_the_first_function_has_the_jacobian_that_is_declared():
    """Heat on a ring in Fourier space, in which each mode decays by itself; the source mixes them."""
    n, x = 32, 2 * np.pi * np.arange(32) / 32
    k = jnp.asarray(np.fft.fftfreq(n, 1 / n))
    decay = lambda y, t: (-(k**2)).astype(y.dtype) * y
    source = lambda y, t: jnp.fft.fft(jnp.sin(jnp.fft.ifft(y).real))
    y0 = jnp.fft.fft(jnp.exp(jnp.cos(x)))
    options = dict(rtol=1e-6, atol=1e-6)
    found = odeint((decay, source), y0, [0.0, 1.0], method="kencarp5", linear=Diagonal(), **options)
    both = lambda y, t: decay(y, t) + source(y, t)
    np.testing.assert_allclose(found, odeint(both, y0, [0.0, 1.0], **options), atol=1e-4)
    with pytest.raises(ValueError, match="leaves out"):
        odeint((source, decay), y0, [0.0, 1.0], method="kencarp5", linear=Diagonal(), **options)


def test_a_jacobian_of_ones_own_is_that_of_the_first_function():
    jac = lambda y, t, k: jnp.stack([jnp.stack([-k, 1.0]), jnp.stack([0.0, -k * jnp.cos(t) ** 2])])
    options = dict(method="kencarp4", rtol=1e-7, atol=1e-7)
    derived = solve(PAIR, START, TIMES, 1e3, **options)
    found = solve(PAIR, START, TIMES, jnp.asarray(1e3), jac=jac, **options)
    np.testing.assert_allclose(found.ys, derived.ys, rtol=1e-12, atol=1e-15)
    assert int(found.stats.evaluations) == int(derived.stats.evaluations)


def test_states_of_several_parts_have_pairs_too(dtype):
    stiff = lambda y, t: {"a": -1e4 * (y["a"] - y["b"][0]), "b": 0 * y["b"]}
    rest = lambda y, t: {"a": 0 * y["a"], "b": jnp.stack([y["b"][1], -y["b"][0]])}
    y0 = {"a": jnp.ones((), dtype), "b": jnp.array([1.0, 0.0], dtype)}
    ys = odeint((stiff, rest), y0, [0.0, 2.0], method="kencarp4", rtol=1e-5, atol=1e-5)
    assert ys["a"].dtype == dtype
    np.testing.assert_allclose(ys["b"][-1], [np.cos(2), -np.sin(2)], atol=1e-4)
    np.testing.assert_allclose(ys["a"][-1], np.cos(2 - 1e-4), atol=1e-4)


# Derivatives, batches, signals.


WAYS = [("kencarp3", "direct"), ("kencarp4", "replay"), ("kencarp5", "forward")]


@pytest.mark.parametrize(("name", "adjoint"), WAYS)
def test_derivatives_of_both_functions_are_differences_whatever_the_adjoint(name, adjoint):
    def loss(y0, k, w):
        pair = decaying, lambda y, t, k: w * turning(y, t, k)
        ys = odeint(pair, y0, TIMES, k, method=name, dt=0.2, adjoint=adjoint, max_steps=8)
        value = jnp.sum(ys[3:] @ jnp.array([1.0, 2.0]))
        return value, value

    at = START, jnp.asarray(2.0), jnp.asarray(1.5)
    differentiate = jax.jacfwd if adjoint == "forward" else jax.grad
    run, e = jax.jit(differentiate(loss, (0, 1, 2), has_aux=True)), 1e-6
    exact, _ = run(*at)
    for i, x in enumerate(at):
        for unit in np.eye(x.size).reshape(-1, *x.shape):
            ends = [run(*at[:i], x + s * unit, *at[i + 1 :])[1] for s in (e, -e)]
            expected = (ends[0] - ends[1]) / (2 * e)
            np.testing.assert_allclose(np.sum(exact[i] * unit), expected, rtol=1e-6)


def test_a_batch_of_pairs_is_each_of_them_and_so_are_its_gradients():
    def end(k):
        found = solve(
            PAIR, START, [0.0, 1.0], k, method="kencarp3", rtol=1e-4, atol=1e-4, max_steps=200
        )
        return found.ys[-1, 1], found.stats.accepted

    ks, run = jnp.asarray([1.0, 10.0, 100.0]), jax.value_and_grad(end, has_aux=True)
    (many, steps), slopes = jax.jit(jax.vmap(run))(ks)
    alone = jax.jit(run)
    for i, k in enumerate(ks):
        (one, count), slope = alone(k)
        np.testing.assert_allclose([many[i], slopes[i]], [one, slope], rtol=1e-7, atol=1e-12)
        assert int(steps[i]) == int(count)
        exact = by_scipy(*PAIR, START, [0.0, 1.0], float(k), method="LSODA")[-1, 1]
        np.testing.assert_allclose(one, exact, atol=1e-4)


def test_steps_end_at_the_knots_of_signals_that_either_function_asks():
    pulse = Signal([0.0, 0.5, 0.501, 2.0], [0.0, 1.0, 0.0, 0.0], "previous")
    other = Signal([0.0, 1.2, 1.201, 2.0], [0.0, 1.0, 0.0, 0.0], "previous")
    pair = (lambda y, t: 1e3 * pulse(t) - 0 * y), (lambda y, t: 2e3 * other(t) + 0 * y)
    ys = odeint(pair, jnp.zeros(1), [0.0, 0.4, 0.6, 2.0], method="kencarp3")
    np.testing.assert_allclose(ys[:, 0], [0, 0, 1, 3], atol=1e-9)


# Failures, and wrong uses.


def test_what_is_stiff_in_the_second_function_is_said_to_belong_into_the_first():
    fast = lambda y, t: jnp.stack([-1e4 * (y[0] - jnp.cos(t)), 0.0 * t])
    slow = lambda y, t: jnp.stack([0.0 * t, -jnp.sin(y[1])])
    options = dict(method="kencarp4", rtol=1e-5, atol=1e-5, max_steps=500)
    assert int(solve((fast, slow), START, [0.0, 10.0], **options).stats.accepted) < 300
    with pytest.raises(SolveError, match=r"looks stiff.*to the first function of the pair"):
        solve((slow, fast), START, [0.0, 10.0], **options)


@pytest.mark.parametrize("first", [True, False])
def test_a_function_that_is_not_finite_fails_the_solve_and_its_gradient(first):
    bad = lambda y, t: -y / jnp.where(t < 0.5, 1.0, 0.0)
    good = lambda y, t: -y
    pair = (bad, good) if first else (good, bad)

    def end(y0):
        found = solve(pair, y0, [0.0, 1.0], method="kencarp4", throw=False, max_steps=300)
        return found.ys[-1, 0], found.status

    y0_bar, status = jax.jit(jax.grad(end, has_aux=True))(START)
    assert int(status) in (Status.NON_FINITE, Status.NOT_CONVERGED)
    assert np.all(np.isnan(y0_bar))


@pytest.mark.parametrize("name", ["tsit5", "rodas5p", "kvaerno5", "auto", "leapfrog", "gauss4"])
def test_a_method_without_an_explicit_table_names_those_that_have_one(name):
    y0 = (START, START) if name == "leapfrog" else START
    with pytest.raises(ValueError, match="'kencarp3', 'kencarp4', 'kencarp5'; '" + name):
        odeint(PAIR, y0, TIMES, 1.0, method=name, dt=None if name in ("tsit5", "auto") else 0.1)


def test_wrong_uses_of_pairs_say_what_is_wrong():
    run = lambda pair, **options: odeint(pair, START, TIMES, 1.0, method="kencarp4", **options)
    with pytest.raises(ValueError, match="`mass` is for one function"):
        run(PAIR, mass=jnp.ones(2))
    with pytest.raises(ValueError, match="backsolve"):
        run(PAIR, adjoint="backsolve")
    for wrong in ((decaying,), (*PAIR, turning), (decaying, None), "kencarp4"):
        with pytest.raises(TypeError, match="or a pair"):
            run(wrong)
    with pytest.raises(TypeError, match=r"func returned shape \(\)"):
        run((decaying, lambda y, t, k: y[0]))
