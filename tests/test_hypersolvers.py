"""Hypersolvers: their order, their gradients, and that the arrays of a correction reach every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import odeint, solve
from jaxode.methods import Hypersolver, named
from jaxode.nn import MLPCorrection, residuals

BASES = pytest.mark.parametrize("base", ["euler", "heun", "rk4"])
TS = np.array([0.0, 0.35, 0.8, 1.0])


def logistic(y, t, rate):
    """y' = r y (1 - y)."""
    return rate * y * (1 - y)


def solution(y0, t, rate):
    """Of the logistic equation, in closed form."""
    grown = y0 * jnp.exp(rate * t).astype(y0.dtype)
    return grown / (1 - y0 + grown)


def true_residual(base):
    """The correction of the logistic equation that makes steps exact."""

    def correction(y, t, h, slope, rate):
        f = lambda y, t: logistic(y, t, rate)
        h = h.astype(y.dtype)
        psi = named(base).step(f, 0 * h, y, slope, h).y
        return (solution(y, h, rate) - psi) / h ** (named(base).order + 1)

    return correction


def network(dtype="float64"):
    """A network whose last layer is not 0."""
    correction = MLPCorrection(2, width=5, dtype=dtype, key=jax.random.key(1))
    last = jax.tree.map(lambda x: x + jnp.asarray(0.3, dtype), correction.layers[-1])
    return jax.tree.map(lambda x: x, correction), last


def trained_like(dtype="float64"):
    import equinox as eqx

    correction, last = network(dtype)
    return eqx.tree_at(lambda c: c.layers[-1], correction, last)


@BASES
def test_without_a_correction_a_step_is_that_of_the_method_bit_for_bit(base, dtype):
    y, s, h = (jnp.asarray(x, dtype) for x in ([0.3, 0.7], 0.2, 0.1))
    f = lambda y, s: jnp.stack([y[1], -jnp.sin(y[0])]) * (1 + s)

    class Plain:
        """A field whose steps get nothing."""

        __call__ = staticmethod(f)
        correction = staticmethod(lambda s, y, k, h, order: 0 * y)

    plain = named(base).step(f, s, y, f(y, s), h)
    step = Hypersolver(base, lambda *args: None).step(Plain(), s, y, f(y, s), h)
    for found, expected in ((step.y, plain.y), (step.slope, plain.slope)):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == dtype


@BASES
def test_without_a_correction_outputs_are_those_of_the_method(base, dtype):
    y0, zero = jnp.asarray([0.1, 0.6], dtype), lambda y, t, h, slope, rate: 0 * y
    options = dict(dt=0.1)
    rate = jnp.asarray(2.0, dtype)
    found, plain = (
        odeint(logistic, y0, TS, rate, method=method, **options)
        for method in (Hypersolver(base, zero), base)
    )
    assert found.dtype == dtype
    np.testing.assert_allclose(found, plain, rtol=8 * float(jnp.finfo(dtype).eps))


@BASES
def test_with_the_true_residual_steps_are_exact(base):
    y0, rate = jnp.array([0.1, 0.6]), jnp.array(2.0)
    for ts in (TS, TS[::-1]):
        method = Hypersolver(base, true_residual(base))
        ys = odeint(logistic, y0, [ts[0], ts[-1]], rate, method=method, dt=0.25)
        exact = solution(y0, jnp.asarray(ts[-1] - ts[0]), rate)
        np.testing.assert_allclose(ys[-1], exact, rtol=1e-12)


@pytest.mark.parametrize("base, limit", [("euler", 2), ("heun", 3)])
def test_with_the_limit_of_the_residual_the_order_is_one_higher(base, limit):
    rate = jnp.array(2.0)

    def leading(y, t, h, slope, rate):
        # y'' / 2 for Euler; y''' / 6 - psi's own third derivative in h for Heun, by Taylor series.
        f = lambda y: logistic(y, t, rate)
        first = jnp.vectorize(jax.grad(f))(y)
        second = jnp.vectorize(jax.grad(jax.grad(f)))(y)
        if limit == 2:
            return first * f(y) / 2
        return (second * f(y) ** 2 + first**2 * f(y)) / 6 - second * f(y) ** 2 / 4

    def error(method, dt):
        end = odeint(logistic, jnp.array([0.1, 0.6]), [0.0, 1.0], rate, method=method, dt=dt)[-1]
        return float(jnp.max(jnp.abs(end - solution(jnp.array([0.1, 0.6]), jnp.array(1.0), rate))))

    for method, order in ((base, limit - 1), (Hypersolver(base, leading), limit)):
        seen = np.log2(error(method, 1 / 32) / error(method, 1 / 64))
        assert abs(seen - order) < 0.15


def test_outputs_inside_of_a_step_are_on_the_cubic_through_its_corrected_end():
    y0, rate = jnp.array([0.1, 0.6]), jnp.array(2.0)
    ts = np.linspace(0, 1, 9)
    method = Hypersolver("euler", true_residual("euler"))
    ys = odeint(logistic, y0, ts, rate, method=method, dt=0.5)
    a, b = (solution(y0, jnp.asarray(t), rate) for t in (0.0, 0.5))
    k0, k1 = 0.5 * logistic(a, 0, rate), 0.5 * logistic(b, 0, rate)
    middle = (a + b) / 2 + (k0 - k1) / 8
    np.testing.assert_allclose(ys[2], middle, rtol=1e-12)
    np.testing.assert_allclose(ys[4], b, rtol=1e-12)


def swing(y, t, rate):
    return jnp.stack([y[1], -rate * jnp.sin(y[0]) + 0.1 * jnp.cos(t).astype(y.dtype)])


def loss(adjoint, dt=0.1):
    """A number that depends on the state, an argument of func, and the weights of the correction."""

    def value(y0, rate, correction):
        method = Hypersolver("heun", correction)
        ys = odeint(swing, y0, TS, rate, method=method, dt=dt, adjoint=adjoint)
        return jnp.sum(ys * jnp.arange(1.0, 5.0)[:, None])

    return value


ARGS = jnp.array([0.4, -0.2]), jnp.array(1.3), trained_like()


@pytest.mark.parametrize("adjoint", ["replay", "direct", "forward"])
def test_gradients_are_those_of_differences_in_weights_too(adjoint):
    value = loss(adjoint)
    derivative = jax.jacfwd if adjoint == "forward" else jax.grad
    if adjoint == "forward":  # in a direction: there are many weights
        push = jax.jit(lambda dx: jax.jvp(value, ARGS, dx)[1])
    else:
        found = jax.jit(derivative(value, (0, 1, 2)))(*ARGS)
        push = lambda dx: sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (found, dx))))
    run = jax.jit(value)
    for i in range(3):
        direction = [jax.tree.map(jnp.zeros_like, x) for x in ARGS]
        direction[i] = jax.tree.map(
            lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), ARGS[i]
        )
        direction = tuple(direction)
        moved = [
            run(*jax.tree.map(lambda x, d, e=e: x + e * d, ARGS, direction)) for e in (1e-6, -1e-6)
        ]
        np.testing.assert_allclose(push(direction), (moved[0] - moved[1]) / 2e-6, rtol=1e-7)


def test_by_backsolve_the_equation_is_differentiated_and_not_the_correction():
    small = jax.tree.map(lambda x: 1e-3 * x, ARGS[2])
    exact, found = (
        jax.jit(jax.grad(loss(adjoint, 0.01), (0, 1)))(*ARGS[:2], small)
        for adjoint in ("replay", "backsolve")
    )
    for a, b in zip(exact, found):
        np.testing.assert_allclose(a, b, rtol=1e-3)


def test_many_solves_have_each_their_own_correction_and_a_shared_one():
    starts = jnp.linspace(-1, 1, 6).reshape(3, 2)
    many = jax.vmap(lambda k: jax.tree.map(lambda x: k * x, ARGS[2]))(jnp.array([0.5, 1.0, 2.0]))
    gradient = jax.grad(loss("replay"), (0, 2))
    shared = jax.vmap(gradient, (0, None, None))(starts, *ARGS[1:])
    own = jax.vmap(gradient, (0, None, 0))(starts, ARGS[1], many)
    pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    alone = jax.jit(gradient)
    for i in range(3):
        for found, correction in ((shared, ARGS[2]), (own, pick(many, i))):
            expected = alone(starts[i], ARGS[1], correction)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
                pick(found, i), expected,
            )  # fmt: skip


def test_it_is_a_model_and_new_weights_do_not_compile_again():
    traced = []

    def field(y, t, rate):
        traced.append(t)
        return swing(y, t, rate)

    @jax.jit
    def end(method, y0):
        return odeint(field, y0, [0.0, 1.0], 1.0, method=method, dt=0.25)[-1]

    method = Hypersolver("heun", ARGS[2])
    ends = [end(m, ARGS[0]) for m in (method, jax.tree.map(lambda x: 2 * x, method))]
    assert len(traced) == 1 and float(jnp.max(jnp.abs(ends[0] - ends[1]))) > 1e-3
    outside = odeint(swing, ARGS[0], [0.0, 1.0], 1.0, method=method, dt=0.25)[-1]
    np.testing.assert_allclose(outside, ends[0], rtol=1e-12)


def test_states_of_several_arrays_events_folds_and_signals_are_as_of_any_method():
    from jaxode import Event, Signal

    swing = lambda y, t: {"q": y["p"], "p": -y["q"]}
    third = lambda y, t, h, slope: jax.tree.map(lambda k: -k / 6, slope)  # of q'' = -q
    method = Hypersolver("heun", third)
    y0 = {"q": jnp.array(1.0), "p": jnp.array(0.0)}
    found = solve(
        swing, y0, [0.0, 2.0], method=method, dt=0.02, events=[Event(lambda y, t: y["q"], terminal=True)],
        fold=(0.0, lambda value, y, t: jnp.maximum(value, jnp.abs(y["p"]))),
    )  # fmt: skip
    np.testing.assert_allclose(found.events[0].t[0], np.pi / 2, atol=1e-6)
    np.testing.assert_allclose(found.folded, 1.0, atol=1e-6)
    drive = Signal(np.array([0.0, 0.5, 1.0]), np.array([1.0, 2.0, 2.0]), "previous")
    ys = odeint(
        lambda y, t, drive: drive(t) - y, jnp.array(0.0), [0.0, 1.0], drive,
        method=Hypersolver("euler", lambda y, t, h, slope, drive: -slope / 2), dt=0.01,
    )  # fmt: skip
    np.testing.assert_allclose(ys[-1], 2 - np.exp(-0.5) * (1 + np.exp(-0.5)), atol=1e-4)


def test_a_correction_costs_no_evaluation():
    counts = [
        int(solve(swing, ARGS[0], [0.0, 1.0], 1.0, method=method, dt=0.25).stats.evaluations)
        for method in ("heun", Hypersolver("heun", ARGS[2]))
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "of, message",
    [
        (lambda: Hypersolver("rodas5p", ARGS[2]), "explicit Runge-Kutta method.*rodas5p"),
        (lambda: Hypersolver("heun", None), "must be a function correction"),
        (lambda: Hypersolver("hein", ARGS[2]), "Did you mean 'heun'"),
        (lambda: run(lambda y, t, h, slope: y, dt=None), "step size `dt=`"),
        (lambda: run(lambda y, t, h, slope: y[:1]), "correction of a Hypersolver returned shape"),
        (lambda: run(lambda y, t, h: y), "called as correction"),
        (lambda: run(lambda t, y, h, slope: y), "time before the state"),
        (lambda: residuals(swing, jnp.ones((2, 2)), TS[:2], method="rodas4"), "explicit"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_what_to_do(of, message):
    with pytest.raises((TypeError, ValueError), match=message):
        of()


def run(correction, dt=0.1):
    return odeint(
        lambda y, t: -y, jnp.ones(2), [0.0, 1.0], method=Hypersolver("heun", correction), dt=dt
    )


@BASES
def test_residuals_of_exact_solutions_are_the_corrections_that_make_steps_exact(base):
    rate, ts = jnp.array(2.0), jnp.asarray(TS)
    ys = jax.vmap(lambda t: solution(jnp.array([0.1, 0.6]), t, rate))(ts)
    found = residuals(logistic, ys, ts, rate, method=base)
    expected = jax.vmap(lambda *x: true_residual(base)(*x, rate))(*found[:4])
    np.testing.assert_allclose(found.residual, expected, rtol=1e-8)
    np.testing.assert_allclose(found.h, np.diff(TS), rtol=1e-14)
