"""Signals: the same function as other libraries', steps that end at knots, gradients to all of it."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicHermiteSpline, interp1d

from jaxode import Signal, SolveError, Status, odeint, solve
from jaxode.nn import NeuralODE

KNOTS = np.array([0.0, 0.7, 1.0, 2.5, 3.0])
VALUES = np.array([0.0, 2.0, -1.0, 3.0, 1.0])
TS = np.array([0.0, 0.7, 0.9, 2.7, 4.0])
BACKWARD = (np.diff(VALUES) / np.diff(KNOTS))[[0, 0, 1, 2, 3]]  # to the knot before
KINDS = pytest.mark.parametrize("kind", ["linear", "previous", "cubic"])


def driven(y, t, u):
    return -y + u(t) * jnp.cos(t).astype(y.dtype)


def exact(kind):
    """By another solver, from knot to knot."""
    signal, rows = Signal(KNOTS, VALUES, kind), [1.0]
    for a, b in itertools.pairwise(TS):
        y, edges = rows[-1], [a, *[k for k in KNOTS if a < k < b], b]
        for p, q in itertools.pairwise(edges):
            piece = signal.piece((p + q) / 2)
            f = lambda t, y, piece=piece: -y + float(piece(t)) * np.cos(t)
            y = solve_ivp(f, (p, q), [y], rtol=1e-11, atol=1e-12).y[0, -1]
        rows.append(y)
    return np.array(rows)


@pytest.mark.parametrize("kind", ["linear", "previous", "cubic", "backward_hermite"])
def test_a_signal_is_the_interpolant_of_that_name(kind):
    signal = Signal(KNOTS, VALUES, kind)
    others = {
        "linear": interp1d(KNOTS, VALUES),
        "previous": interp1d(KNOTS, VALUES, "previous"),
        "cubic": CubicHermiteSpline(KNOTS, VALUES, np.asarray(signal.slopes())),
        "backward_hermite": CubicHermiteSpline(KNOTS, VALUES, BACKWARD),
    }
    t = np.linspace(0, 2.99, 50)
    np.testing.assert_allclose(jax.vmap(signal)(t), others[kind](t), atol=1e-12)
    assert float(signal(-1.0)) == VALUES[0] and float(signal(9.0)) == VALUES[-1]


@KINDS
def test_a_solve_with_a_signal_is_right_in_both_directions_of_time(kind):
    signal, options = Signal(KNOTS, VALUES, kind), dict(rtol=1e-9, atol=1e-9)
    ys = odeint(driven, jnp.array(1.0), TS, signal, **options)
    np.testing.assert_allclose(ys, exact(kind), rtol=1e-6, atol=1e-7)
    back = odeint(driven, ys[-1], TS[::-1], signal, **options)
    np.testing.assert_allclose(back[::-1], ys, rtol=1e-5, atol=1e-6)


def test_aligned_steps_are_fewer():
    aligned = solve(driven, jnp.array(1.0), TS, Signal(KNOTS, VALUES, "previous")).stats
    held = lambda t: jnp.asarray(VALUES)[jnp.searchsorted(jnp.asarray(KNOTS), t, side="right") - 1]
    across = solve(lambda y, t: driven(y, t, held), jnp.array(1.0), TS).stats
    assert 2 * int(aligned.evaluations) < int(across.evaluations)
    assert int(aligned.rejected) <= 2 < int(across.rejected)


@pytest.mark.parametrize(
    "adjoint, kind",
    [
        *(("replay", kind) for kind in ("linear", "previous", "cubic")),
        *(("backsolve", kind) for kind in ("linear", "previous")),
    ],
)
def test_gradients_reach_values_knots_state_and_times(adjoint, kind):
    def loss(values, knots, y0, ts):
        signal = Signal(knots, values, kind)
        ys = odeint(driven, y0, ts, signal, rtol=1e-10, atol=1e-10, adjoint=adjoint)
        return jnp.sum(ys * jnp.arange(1.0, 6.0))

    inputs = (
        jnp.array(VALUES), jnp.array(KNOTS) + 0.05, jnp.array(1.0), jnp.array(TS) + 0.01,
    )  # fmt: skip
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    _, grads = run(*inputs)
    for i, grad in enumerate(grads):
        direction = jax.random.normal(jax.random.key(i), inputs[i].shape, inputs[i].dtype)
        moved = [
            run(*inputs[:i], inputs[i] + s * 1e-6 * direction, *inputs[i + 1 :])[0] for s in (1, -1)
        ]
        np.testing.assert_allclose(
            jnp.vdot(grad, direction), (moved[0] - moved[1]) / 2e-6, rtol=1e-4, atol=1e-5
        )


def test_several_signals_and_vector_values_work_together(dtype):
    one = Signal(KNOTS.astype(dtype), VALUES.astype(dtype), "previous")
    two = Signal(np.array([0.5, 1.5], dtype), np.eye(2, dtype=dtype)[[0, 1]], "linear")
    field = lambda y, t, signals: signals["b"](t) - signals["a"](t) * y
    ys = odeint(field, jnp.ones(2, dtype), [0.0, 2.0], {"a": one, "b": two})
    assert ys.dtype == dtype and np.all(np.isfinite(ys))
    np.testing.assert_allclose(one(jnp.asarray(0.7, dtype)), 2.0)


def test_a_failed_solve_with_a_signal_says_so():
    signal = Signal(KNOTS, VALUES)
    with pytest.raises(SolveError, match="max_steps"):
        solve(driven, jnp.array(1.0), TS, signal, max_steps=2)
    quiet = solve(driven, jnp.array(1.0), TS, signal, max_steps=2, throw=False)
    assert int(quiet.status) != 0 and np.all(np.isnan(quiet.ys[2:]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((KNOTS, VALUES, "quintic"), "kind"),
        ((KNOTS[::-1], VALUES), "increase"),
        ((KNOTS, VALUES[:3]), "shape"),
        ((KNOTS[:1], VALUES[:1]), "n >= 2"),
    ],
)
def test_a_wrong_signal_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Signal(*arguments)


def test_the_estimates_of_all_stretches_are_summed_and_no_times_give_no_outputs():
    signal = Signal(KNOTS, VALUES, "linear")
    options = dict(adjoint="direct", max_steps=64, heuristics=True)
    whole = solve(driven, jnp.array(1.0), TS, signal, **options).heuristics
    assert float(whole.error) > 0 and float(whole.stiffness) > 0
    assert odeint(driven, jnp.array(1.0), jnp.zeros(0), signal).shape == (0,)


# Derivatives, and paths to drive by.


def test_a_derivative_is_that_of_the_interpolant(dtype):
    between = np.array(
        [0.0, 0.1, 0.6, 0.7, 0.8, 1.2, 2.4, 2.5, 2.9]
    )  # a knot belongs to what follows
    central = np.asarray(Signal(KNOTS, VALUES, "cubic").slopes())
    expected = {
        "linear": (np.diff(VALUES) / np.diff(KNOTS))[[0, 0, 0, 1, 1, 2, 2, 3, 3]],
        "previous": np.zeros(9),
        "cubic": CubicHermiteSpline(KNOTS, VALUES, central)(between, 1),
        "backward_hermite": CubicHermiteSpline(KNOTS, VALUES, BACKWARD)(between, 1),
    }
    for kind, slopes in expected.items():
        signal = Signal(KNOTS.astype(dtype), np.stack([VALUES, 2 * VALUES], 1).astype(dtype), kind)
        found = signal.derivative(between.astype(dtype))
        assert found.dtype == dtype
        precision = 1e-4 if dtype == "float32" else 1e-11
        np.testing.assert_allclose(found, np.stack([slopes, 2 * slopes], 1), atol=precision)
        np.testing.assert_array_equal(signal.derivative(np.array([-1, 3, 5], dtype)), 0)


@pytest.mark.parametrize("kind, ahead", [("linear", 1), ("backward_hermite", 1), ("cubic", 2)])
def test_how_many_knots_ahead_a_signal_looks(kind, ahead):
    by_us = jax.jacfwd(lambda us, t: Signal(KNOTS, us, kind)(t))
    each = jax.jit(jax.vmap(by_us, (None, 0)))
    slopes = each(jnp.array(VALUES), jnp.array([0.3, 0.8, 1.7]))  # in each piece but the last
    last = [np.flatnonzero(slope).max() for slope in slopes]
    assert last == [0 + ahead, 1 + ahead, 2 + ahead]


@pytest.mark.parametrize("kind, dtype", [("backward_hermite", "float64"), ("linear", "float32")])
def test_what_follows_the_derivative_of_a_signal_follows_the_signal(kind, dtype):
    # dy/dt = y du/dt has the solution y0 exp(u(t) - u(0)), and steps that end at knots see no corner.
    knots, ts = KNOTS.astype(dtype), TS[:-1].astype(dtype)

    def solved(us):
        signal = Signal(knots, us, kind)
        return odeint(lambda y, t, u: y * u.derivative(t), jnp.ones((), dtype), ts, signal)

    us, weights = jnp.array(VALUES / 4, dtype), jnp.arange(1, 5, dtype=dtype)
    exact = lambda us: jnp.exp(Signal(knots, us, kind)(ts) - us[0])

    def with_slopes(f):
        values, pull = jax.vjp(f, us)
        return values, *pull(weights)

    (found, by_us), (right, expected) = (
        jax.jit(with_slopes, static_argnums=0)(f) for f in (solved, exact)
    )
    precision = dict(rtol=1e-4, atol=1e-4) if dtype == "float32" else dict(rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found, right, **precision)
    np.testing.assert_allclose(by_us, expected, **precision)


def test_a_backward_hermite_cubic_begins_anew_after_a_jump_or_a_missing_value():
    x = jnp.array([0.25, 0.5, 0.75])
    for ts, us in (([0, 1, 1, 2, 3], [0, 7, 0, 1, 1]), ([0, 0.5, 1, 2, 3], [0, np.nan, 0, 1, 1])):
        signal = Signal(ts, us, "backward_hermite")
        np.testing.assert_allclose(signal(1 + x), x)
        np.testing.assert_allclose(signal(2 + x), 1 + x * (1 - x) ** 2)
        at = lambda us, ts=ts: Signal(ts, us, "backward_hermite")(2.5)
        by_us = jax.grad(at)(jnp.array(us, float))
        np.testing.assert_allclose(by_us, [0, 0, -1 / 8, 3 / 4, 3 / 8], atol=1e-12)


def test_a_rectilinear_path_moves_along_time_and_then_along_values(dtype):
    ts = np.array([[0.0, 1.0], [0.5, 3.0], [2.0, 4.0]], dtype)  # of two series
    us = np.arange(12, dtype=dtype).reshape(3, 2, 2)
    path = Signal.rectilinear(ts, us)
    assert path.us.dtype == dtype and path.us.shape == (5, 2, 3) and path.kind == "linear"
    point = lambda i, j: np.concatenate([ts[i][:, None], us[j]], axis=1)
    for i in range(3):
        np.testing.assert_array_equal(path(2.0 * i), point(i, i))
    for i in range(2):
        np.testing.assert_array_equal(path(2.0 * i + 1), point(i + 1, i))
    with pytest.raises(ValueError, match=r"got \(3,\) and \(3, 2, 2\)"):
        Signal.rectilinear(ts[:, 0], us)


# What a signal is made of.


@pytest.mark.parametrize(
    "kind, at_5, area", [("linear", 5, 50), ("previous", 0, 0), ("cubic", 5, 50)]
)
def test_integers_become_floats(kind, at_5, area):
    times = [0, 10], np.array([0, 10], np.int16), [0.0, 10.0]
    values = [0, 10], np.array([0, 10]), np.array([0, 10], np.int8), [np.int64(0), np.int64(10)]
    for ts, us, lift in itertools.product(times, values, (lambda x: x, jnp.asarray)):
        signal = Signal(lift(ts), lift(us), kind)
        assert signal.ts.dtype == signal.us.dtype == jnp.float64
        assert float(signal(5.0)) == at_5 == float(signal(5))
    signal = Signal([0, 10], [0, 10], kind)
    ys = odeint(lambda y, t, u: u(t), jnp.array(0.0), [0, 10], signal)
    np.testing.assert_allclose(ys, [0, area], atol=1e-9)


def test_booleans_and_traced_integers_become_floats():
    assert float(Signal([False, True], [True, False])(0.25)) == 0.75
    traced = jax.jit(lambda ts, us, t: Signal(ts, us)(t))
    assert float(traced(jnp.array([0, 10]), jnp.array([0, 10]), jnp.array(5))) == 5
    batch = jax.vmap(traced, (None, 0, None))
    us = jnp.array([[0, 10], [10, 0], [1, 2]])
    np.testing.assert_array_equal(batch(jnp.array([0, 10]), us, jnp.array(5.0)), [5, 5, 1.5])
    slope = jax.grad(lambda a: Signal([0, a], [0, 10])(1.0))(4.0)  # 10 / a
    np.testing.assert_allclose(slope, -10 / 16)


def test_a_signal_can_be_asked_at_many_times_at_once():
    signal = Signal(KNOTS, np.stack([VALUES, -VALUES], 1))
    ts = np.array([[0.1, 0.7], [2.0, 9.0]])
    expected = np.stack([np.interp(ts, KNOTS, VALUES), -np.interp(ts, KNOTS, VALUES)], -1)
    np.testing.assert_allclose(signal(ts), expected, atol=1e-12)


@pytest.mark.parametrize("ts", [["a", "b"], [None, 1.0], [[1, 2], [3]], [0.0, 1j]])
def test_what_are_no_numbers_is_refused(ts):
    with pytest.raises(TypeError, match="`ts` of a signal"):
        Signal(ts, [0.0, 1.0])
    with pytest.raises(TypeError, match="`us` of a signal"):
        Signal([0.0, 1.0], ["a", "b"])


def test_knots_that_a_dtype_cannot_tell_apart_are_refused_with_the_remedy():
    ts = np.array([1.7e9, 1.7e9 + 10, 1.7e9 + 20])
    assert float(Signal(ts, [0, 1, 2])(ts[0] + 5)) == 0.5
    with jax.enable_x64(False), pytest.raises(ValueError, match="subtract the same number"):
        Signal(ts, [0, 1, 2])
    with jax.enable_x64(False):
        assert float(Signal(ts - ts[0], [0, 1, 2])(5.0)) == 0.5
        Signal(np.linspace(0, 1, 1_000_001), np.zeros(1_000_001))  # as good as float32 can be


# Wherever it lives.


class Driven(eqx.Module):
    drive: Signal

    def __call__(self, y, t):
        return self.drive(t) - 0 * y


@eqx.filter_jit
def compiled_before(y, t, u):
    return u(t) - 0 * y


def choosing(signal):
    return lambda y, t: jax.lax.cond(t < 4, lambda: signal(t), lambda: 0 * y)


def rebuilt(signal):
    return lambda y, t: Signal(signal.ts, jnp.abs(signal.us), "previous")(t) - 0 * y


HOMES = {
    "args": lambda u: (lambda y, t, u: u(t) - 0 * y, u),
    "a module in args": lambda u: (lambda y, t, m: m(y, t), Driven(u)),
    "a module": lambda u: (Driven(u),),
    "a closure": lambda u: (lambda y, t: u(t) - 0 * y,),
    "a partial": lambda u: (functools.partial(lambda y, t, u: u(t) - 0 * y, u=u),),
    "a compiled function": lambda u: (compiled_before, u),
    "a checkpoint": lambda u: (jax.checkpoint(lambda y, t: u(t) - 0 * y),),
    "a branch": lambda u: (choosing(u),),
    "made by func": lambda u: (rebuilt(u),),
    "a vmap": lambda u: (lambda y, t: jax.vmap(lambda s: s * u(t))(jnp.ones(1, y.dtype))[0],),
    "a derivative": lambda u: (lambda y, t: jax.grad(lambda y: u(t) * y)(y),),
}
PULSE = np.array([0.0, 1.0, 1.1, 5.0])  # of height 10 and width 0.1: a solve steps over it


@pytest.mark.parametrize(
    "home, dtype", [*((h, "float64") for h in HOMES), ("a closure", "float32")]
)
def test_a_pulse_is_not_missed_wherever_the_signal_lives(home, dtype):
    def end(ts, us):
        func, *args = HOMES[home](Signal(ts, us, "previous"))
        return odeint(func, jnp.zeros((), dtype), [0.0, 3.0], *args, method="bosh3")[-1]

    ts, us = jnp.asarray(PULSE, dtype), jnp.array([0, 10, 0, 0], dtype)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-5)
    batch = jnp.stack([ts, ts + 0.5]), jnp.stack([us, 2 * us])
    ends, (by_ts, by_us) = jax.jit(jax.vmap(jax.value_and_grad(end, (0, 1))))(*batch)
    close(ends, [1, 2])
    close(by_ts, [[0, -10, 10, 0], [0, -20, 20, 0]])
    close(by_us, [[1, 0.1, 1.9, 0], [1.5, 0.1, 1.4, 0]])


def test_a_neural_ode_has_a_signal_in_its_field():
    layer = NeuralODE(Driven(Signal(PULSE, [0, 10, 0, 0], "previous")))
    ys = layer.solve(jnp.arange(3.0), [0.0, 1.05, 3.0]).ys
    np.testing.assert_allclose(ys, np.arange(3.0) + np.array([[0], [0.5], [1]]), atol=1e-7)
    grads = eqx.filter_grad(lambda layer: layer.solve(jnp.array(0.0), [0.0, 3.0]).ys[-1])(layer)
    np.testing.assert_allclose(grads.field.drive.ts, [0, -10, 10, 0], atol=1e-6)
    np.testing.assert_allclose(grads.field.drive.us, [1, 0.1, 1.9, 0], atol=1e-6)


@pytest.mark.parametrize("adjoint", ["replay", "backsolve", "direct", "forward"])
def test_every_adjoint_reaches_a_signal_that_is_closed_over(adjoint):
    def end(us):
        u = Signal(KNOTS, us, "previous")
        options = dict(adjoint=adjoint, max_steps=500, rtol=1e-9, atol=1e-9)
        return odeint(lambda y, t: u(t) - y, jnp.array(0.0), [0.0, 3.0], **options)[-1]

    derivative = jax.jacfwd if adjoint == "forward" else jax.jacrev
    expected = [*np.diff(np.exp(KNOTS - 3)), 0]
    np.testing.assert_allclose(derivative(end)(jnp.array(VALUES)), expected, rtol=1e-4)


def test_func_is_traced_once_with_a_signal_and_without():
    signal, traces = Signal(KNOTS, VALUES), []

    def func(y, t, u):
        traces.append(1)
        return u(t) - y

    for u in (signal, jnp.cos):
        traces.clear()
        odeint(func, jnp.array(1.0), TS, u)
        assert len(traces) == 1


def test_a_second_call_compiles_nothing():
    compiled = []
    seen = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(seen)
    for scale in (1.0, 2.0):
        compiled.clear()
        odeint(
            lambda y, t, u: u(t) - jnp.tanh(y), jnp.array(scale), TS, Signal(KNOTS, scale * VALUES)
        )
        Signal(KNOTS, scale * VALUES)(scale)
    assert not compiled


def test_effects_of_func_stay_in_the_solve():
    seen, signal = [], Signal([0, 1, 2], [0, 1, 0])

    def func(y, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return signal(t) - y

    jax.block_until_ready(odeint(func, jnp.array(0.0), [0.0, 2.0]))
    jax.effects_barrier()
    assert min(seen) == 0 and max(seen) == 2 and len(seen) > 10


# Asked at another time than t.

SHIFTED = {
    "a delay": (lambda u, t: u(t - 1.0), [0, 0, 0.5, 1]),
    "a lead": (lambda u, t: u(t + 0.5), [0, 1, 1, 1]),
    "another unit": (lambda u, t: u(t / 2), [0, 0, 0.5, 2]),
    "backwards": (lambda u, t: u(2.1 - t), [0, 0.5, 1, 1]),
    "a delay cut off": (lambda u, t: u(jnp.maximum(t - 1, 0.0)), [0, 0, 0.5, 1]),
    "a time cut off": (lambda u, t: u(jnp.clip(t, 0.0, 1.05)), [0, 0.5, 10.5, 15]),
    "two delays": (lambda u, t: u(t) * u(t - 0.05), [0, 0, 5, 5]),
    "a window": (lambda u, t: u(t - jnp.arange(2.0)).sum(), [0, 0.5, 1.5, 2]),
    "compiled": (lambda u, t: jax.jit(lambda t: u(t - 1.0))(t), [0, 0, 0.5, 1]),
}


@pytest.mark.parametrize("case", SHIFTED)
def test_a_signal_of_an_affine_time_is_aligned_too(case):
    asked, expected = SHIFTED[case]
    signal, y0 = Signal(PULSE, [0, 10, 0, 0], "previous"), jnp.array(0.0)
    for end in (False, True):
        ts = np.array([0.0, 1.05, 2.05, 2.5])
        ts = ts[::-1] if end else ts
        ys = odeint(lambda y, t: asked(signal, t), y0, ts, method="bosh3")
        exact = np.array(expected, float)
        exact = (exact - exact[-1])[::-1] if end else exact
        np.testing.assert_allclose(ys, exact, atol=1e-6)


def test_the_derivative_of_a_delay_is_right():
    signal = Signal(PULSE, [0, 10, 0, 0], "previous")
    end = lambda d: odeint(lambda y, t: signal(t - d), jnp.array(0.0), [0.0, 1.05])[-1]
    np.testing.assert_allclose(jax.grad(end)(0.02), -10, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(end))(jnp.array([0.02, 0.04])), -10, rtol=1e-6)


def test_a_signal_of_the_state_or_of_a_periodic_time_has_its_right_value():
    table = Signal([0, 1, 2], [1.0, 2.0, 0.0])  # dy/dt = 1 + y up to 1, then 4 - 2 y
    ys = odeint(lambda y, t: table(y), jnp.array(0.0), [0.0, 0.5, np.log(2), 1.5])
    later = 2 - np.exp(-2 * (1.5 - np.log(2)))
    np.testing.assert_allclose(ys, [0, np.exp(0.5) - 1, 1, later], rtol=1e-5)
    wave = Signal([0, 1, 2], [0.0, 1.0, 0.0])
    ys = odeint(lambda y, t: wave(t % 2.0), jnp.array(0.0), [0.0, 2.0, 5.0], hmax=0.1)
    np.testing.assert_allclose(ys, [0, 1, 2.5], rtol=1e-5)


def test_a_signal_in_a_scan_or_a_custom_rule_has_its_right_value():
    signal = Signal(PULSE, [0, 10, 0, 0], "previous")

    @jax.custom_jvp
    def custom(t):
        return signal(t)

    custom.defjvp(lambda t, dt: (custom(*t), 0 * dt[0]))
    scan = lambda t: jax.lax.scan(lambda c, x: (c + x * signal(t), None), 0.0, jnp.ones(2) / 2)[0]
    for inside in (custom, scan):
        field = lambda y, t, inside=inside: inside(t) + 0 * y
        ys = odeint(field, jnp.array(0.0), [0.0, 3.0], hmax=0.05)
        np.testing.assert_allclose(ys[-1], 1, rtol=1e-5)


# Knots and values of all sorts.


@KINDS
def test_a_knot_at_an_end_of_the_solve_has_its_derivative(kind):
    # The value is the integral of a signal that is 1: no knot matters, whatever it coincides with.
    def end(ts, us, t):
        return odeint(lambda y, t: Signal(ts, us, kind)(t), jnp.array(0.0), t, method="bosh3")[-1]

    ts, us, slopes = jnp.array([0.0, 1.0, 3.0]), jnp.ones(3), jax.jit(jax.grad(end, (0, 1, 2)))
    for ends in ((0.0, 3.0), (3.0, 0.0), (-1.0, 4.0), (0.5, 0.5)):
        by_ts, by_us, by_t = slopes(ts, us, jnp.array(ends))
        np.testing.assert_allclose(by_ts, 0, atol=1e-12)
        np.testing.assert_allclose(by_us.sum(), ends[1] - ends[0], atol=1e-9)
        np.testing.assert_allclose(by_t, [-1, 1], atol=1e-9)


def relaxed(ts, us, t, kind="linear"):
    return solve(lambda y, t, u: u(t) - y, jnp.zeros((), us.dtype), t, Signal(ts, us, kind))


def weighed(ts, us, t, weights):
    """A number made of the rows, and the solution."""
    solution = relaxed(ts, us, t)
    return jnp.vdot(weights, solution.ys), solution


# Programs that the tests below share: knots, values and times are their arguments.
with_slopes = jax.jit(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True))
many_with_slopes = jax.jit(jax.vmap(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True)))


RAGGED = {
    "repeated knots": ([0, 2, 2, 2], [0, 4, 4, 4], [0, 2, 4]),
    "infinite knots": ([0, 2, np.inf, np.inf], [0, 4, 4, 4], [0, 2, 4]),
    "NaN after": ([0, 2, 3, 4], [0, 4, np.nan, np.nan], [0, 1, 2]),
    "NaN before": ([-2, -1, 0, 2], [np.nan, np.nan, 0, 4], [0, 1, 2]),
    "NaN on both sides": ([-2, -1, 0, 2, 3], [np.nan, np.nan, 0, 4, np.nan], [0, 1, 2]),
    "knots before": ([-3, -2, 0, 2], [5, 0, 0, 4], [0, 2, 4]),
    "knots after": ([0, 2, 6, 7], [0, 4, 4, 9], [0, 2, 4]),
    "one knot within": ([0, 2, 2], [0, 4, 4], [1, 3]),
}


@pytest.mark.parametrize(
    "case, backwards, dtype",
    [
        *((case, False, "float64") for case in RAGGED),
        *((case, True, "float64") for case in ("repeated knots", "NaN on both sides")),
        ("repeated knots", False, "float32"),
    ],
)
def test_ragged_signals_are_right_and_have_finite_gradients(case, backwards, dtype):
    knots, values, t = RAGGED[case]
    t = np.array(t[::-1] if backwards else t, dtype)
    ts, us = jnp.array(knots, dtype), jnp.array(values, dtype)

    def exact(t, y, s):  # y' = min(2 t, 4) - y from y at time s
        if s > t:
            return float(
                solve_ivp(
                    lambda t, y: min(2 * t, 4) - y,
                    (s, t),
                    [y],
                    rtol=1e-10,
                    atol=1e-10,
                    max_step=0.1,
                ).y[0, -1]
            )
        ramp = lambda t, y, s: 2 * (t - 1) + (y - 2 * (s - 1)) * np.exp(s - t)
        if t <= 2:
            return ramp(t, y, s)
        y, s = (ramp(2, y, s), 2) if s < 2 else (y, s)
        return 4 + (y - 4) * np.exp(s - t)

    expected = [exact(x, 0.0, t[0]) for x in t]
    tolerance = dict(rtol=2e-5, atol=2e-5) if dtype == "float32" else dict(rtol=1e-6, atol=1e-7)
    Signal(ts, us)  # not refused where knots and values are known
    given = ts, us, jnp.asarray(t), jnp.ones(len(t), dtype)
    (_, solution), grads = with_slopes(*given)
    assert int(solution.status) == Status.SUCCESS
    np.testing.assert_allclose(solution.ys, expected, **tolerance)
    assert all(np.all(np.isfinite(grad)) for grad in grads)
    if case == "repeated knots" and dtype == "float64":
        _, many = many_with_slopes(*(jnp.stack([x, x]) for x in given))
        for grad, of_many in zip(grads, many):
            np.testing.assert_allclose(of_many[1], grad, rtol=1e-4, atol=1e-4)


@KINDS
def test_a_padded_signal_has_the_gradient_of_the_one_that_is_not(kind):
    total = lambda ts, us: relaxed(ts, us, jnp.array([0.0, 2.0, 4.0]), kind).ys.sum()
    ts, us = jnp.array([0.0, 0.5, 2.0]), jnp.array([0.0, 3.0, 4.0])
    pad = lambda x: jnp.concatenate([x, x[-1:], x[-1:]])
    padded = lambda ts, us: total(pad(ts), pad(us))
    (found, slopes), (right, expected) = (
        jax.jit(jax.value_and_grad(fn, (0, 1)))(ts, us) for fn in (padded, total)
    )
    np.testing.assert_allclose(found, right, rtol=1e-7)
    for slope, exact in zip(slopes, expected):
        np.testing.assert_allclose(slope, exact, atol=1e-6)


def test_equal_knots_make_a_jump():
    for kind in ("linear", "cubic"):
        signal = Signal([0, 1, 1, 2], [0.0, 2.0, 5.0, 5.0], kind)
        np.testing.assert_allclose(signal(jnp.array([0.5, 1.0, 1.5])), [1, 5, 5])
        ys = odeint(lambda y, t, u: u(t), jnp.array(0.0), [0.0, 1.0, 2.0], signal)
        np.testing.assert_allclose(ys, [0, 1, 6], atol=1e-8)


def test_knots_of_two_signals_may_be_a_rounding_apart(dtype):
    step = np.array([0, 0.3, 1], dtype)
    apart = step.copy()
    apart[1] = np.nextafter(apart[1], step[2])
    one, two = (Signal(ts, np.array([1, 2, 3], dtype), "previous") for ts in (step, apart))
    ys = odeint(lambda y, t: one(t) + two(t), jnp.zeros((), dtype), [0.0, 1.0])
    np.testing.assert_allclose(ys[-1], 3.4, rtol=1e-6)


@pytest.mark.parametrize(
    "knots, t",
    [
        ([0.0, 2.0, 3.0, 4.0], [0.0, 2.0, 1.0]),
        ([0.0, 2.0, 3.0, 4.0], [0.0, 2.0, 0.0]),
        ([0.0, 2.0, 3.0, 4.0], [0.0, np.nan, 2.0]),
        ([0.0, 2.0, 3.0, 4.0], [0.0, 1.0, np.inf]),
        ([0.0, 3.0, 2.0, 4.0], [0.0, 1.0, 2.0]),
        ([0.0, np.nan, 3.0, 4.0], [0.0, 1.0, 2.0]),
    ],
)
def test_traced_times_or_knots_out_of_order_are_bad_input(knots, t):
    us, first = jnp.array([0.0, 1.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 0.0])
    (_, solution), grads = with_slopes(jnp.array(knots), us, jnp.array(t), first)
    assert Status(int(solution.status)) == Status.BAD_INPUT and np.all(np.isnan(solution.ys))
    assert all(np.all(np.isnan(grad)) for grad in grads)
    ts, times = jnp.array([knots, [0.0, 1.0, 2.0, 3.0]]), jnp.array([t, [0.0, 1.0, 2.0]])
    (_, batch), _ = many_with_slopes(ts, jnp.stack([us, us]), times, jnp.stack([first, first]))
    assert list(batch.status) == [Status.BAD_INPUT, Status.SUCCESS]


def test_rows_before_a_failure_have_no_gradient_either():
    pole = lambda y, t, u: u(t) * y**2
    loss = lambda us: odeint(pole, jnp.array(1.0), [0.0, 0.5, 2.0], Signal([0, 0.7, 3], us))[1]
    assert np.all(np.isnan(jax.jit(jax.grad(loss))(jnp.ones(3))))


@pytest.mark.parametrize("backwards", [False, True])
def test_outputs_may_crowd_in_a_stretch_or_at_one_time(backwards):
    """Forty knots, and sixty outputs: some at every knot, most in one stretch, and many equal ones."""
    knots = np.linspace(0.0, 4.0, 41)
    values = np.cos(np.arange(41.0))
    crowd, equal = np.linspace(1.51, 1.59, 25), np.full(30, 2.3)
    ts = np.sort(np.concatenate([[0.0, 0.1, 0.2, 0.25, 4.0], crowd, equal]))
    ts = ts[::-1].copy() if backwards else ts
    whole = np.concatenate([[0.0], np.cumsum(0.05 * (values[1:] + values[:-1]))])

    def area(t):
        i = np.clip((t * 10 + 1e-9).astype(int), 0, 39)
        part = t - knots[i]
        return whole[i] + part * values[i] + part**2 * 5 * (values[i + 1] - values[i])

    weights = np.sin(np.arange(60.0))
    of = lambda y, t, u: odeint(lambda y, t, u: u(t) + 0 * y, y, t, Signal(knots, u))
    found = of(jnp.array(1.0), ts, values)
    np.testing.assert_allclose(found, 1 + area(ts) - area(ts[:1]), atol=1e-9)
    by_y, by_t, by_u = jax.grad(lambda *given: weights @ of(*given), (0, 1, 2))(1.0, ts, values)
    slopes = np.interp(ts, knots, values)
    exact = weights * slopes
    exact[0] -= np.sum(weights) * slopes[0]
    np.testing.assert_allclose(by_t, exact, atol=1e-9)
    np.testing.assert_allclose(by_y, np.sum(weights), rtol=1e-9)
    np.testing.assert_allclose(values @ by_u, weights @ (area(ts) - area(ts[:1])), rtol=1e-9)


def test_memory_grows_as_knots_and_outputs_do_and_not_as_their_product():
    def of(count):
        ts = np.arange(float(count))
        fn = lambda us: jnp.sum(
            odeint(lambda y, t, u: u(t) - y, jnp.array(0.0), ts, Signal(ts, us), method="bosh3")
        )
        program = jax.jit(jax.grad(fn)).lower(np.zeros(count)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert of(800) < 2.5 * of(400)
