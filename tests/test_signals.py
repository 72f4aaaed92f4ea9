"""Signals: the same function as other libraries', steps that end at knots, gradients to all of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicHermiteSpline, interp1d

from jaxode import Signal, SolveError, odeint, solve

KNOTS = np.array([0.0, 0.7, 1.0, 2.5, 3.0])
VALUES = np.array([0.0, 2.0, -1.0, 3.0, 1.0])
TS = np.array([0.0, 0.7, 0.9, 2.7, 4.0])
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


@KINDS
def test_a_signal_is_the_interpolant_of_that_name(kind):
    signal = Signal(KNOTS, VALUES, kind)
    others = {
        "linear": interp1d(KNOTS, VALUES),
        "previous": interp1d(KNOTS, VALUES, "previous"),
        "cubic": CubicHermiteSpline(KNOTS, VALUES, np.asarray(signal.slopes())),
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


@KINDS
@pytest.mark.parametrize("adjoint", ["replay", "backsolve"])
def test_gradients_reach_values_knots_state_and_times(kind, adjoint):
    def loss(values, knots, y0, ts):
        signal = Signal(knots, values, kind)
        ys = odeint(driven, y0, ts, signal, rtol=1e-10, atol=1e-10, adjoint=adjoint)
        return jnp.sum(ys * jnp.arange(1.0, 6.0))

    inputs = (
        jnp.array(VALUES), jnp.array(KNOTS) + 0.05, jnp.array(1.0), jnp.array(TS) + 0.01,
    )  # fmt: skip
    grads = jax.grad(loss, (0, 1, 2, 3))(*inputs)
    compiled = jax.jit(loss)
    for i, grad in enumerate(grads):
        direction = jax.random.normal(jax.random.key(i), inputs[i].shape, inputs[i].dtype)
        moved = [
            compiled(*inputs[:i], inputs[i] + s * 1e-6 * direction, *inputs[i + 1 :])
            for s in (1, -1)
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
