"""Hypersolvers: their order, their gradients, and that the arrays of a correction reach every step."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, Signal, odeint, solve
from jaxode.methods import Hypersolver, named
from jaxode.nn import MLPCorrection, residuals

BASES = pytest.mark.parametrize("base", ["euler", "heun", "rk4"])
RATE, START = jnp.array(2.0), jnp.array([0.1, 0.6])


def logistic(y, t, rate):
    """y' = r y (1 - y)."""
    return rate * y * (1 - y)


def solution(y0, t, rate):
    """Of the logistic equation, in closed form."""
    grown = y0 * jnp.exp(rate * t)
    return grown / (1 - y0 + grown)


def true_residual(base):
    """The correction of the logistic equation that makes steps exact."""

    def correction(y, t, h, slope, rate):
        step = named(base).step(lambda y, t: logistic(y, t, rate), t, y, slope, h)
        return (solution(y, h, rate) - step.y) / h ** (named(base).order + 1)

    return correction


@BASES
def test_without_a_correction_a_step_is_that_of_the_method_bit_for_bit(base, dtype):
    y, s, h = (jnp.asarray(x, dtype) for x in ([0.3, 0.7], 0.2, 0.1))

    class Uncorrected:
        """A field whose steps get nothing."""

        def __call__(self, y, s):
            return jnp.stack([y[1], -jnp.sin(y[0])]) * (1 + s)

        def correction(self, s, y, k, h, order):
            return 0 * y

    f = Uncorrected()
    method = Hypersolver(base, f.correction)
    for found, expected in zip(
        method.step(f, s, y, f(y, s), h)[:3], named(base).step(f, s, y, f(y, s), h)[:3]
    ):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == dtype


def test_without_a_correction_outputs_are_those_of_the_method(dtype):
    y0, rate, ts = jnp.asarray(START, dtype), jnp.asarray(RATE, dtype), [0.0, 0.35, 0.8, 1.0]
    nothing = lambda y, t, h, slope, rate: 0 * y
    found, plain = (
        solve(logistic, y0, ts, rate, method=method, dt=0.1)
        for method in (Hypersolver("heun", nothing), "heun")
    )
    assert found.ys.dtype == dtype
    np.testing.assert_allclose(found.ys, plain.ys, rtol=8 * float(jnp.finfo(dtype).eps))
    assert int(found.stats.evaluations) == int(plain.stats.evaluations)


@BASES
def test_with_the_true_residual_steps_are_exact_forwards_and_backwards(base):
    end = jax.jit(
        lambda ts: odeint(
            logistic, START, ts, RATE, method=Hypersolver(base, true_residual(base)), dt=0.25
        )[-1]
    )
    for t in (1.0, -1.0):
        np.testing.assert_allclose(end(jnp.array([0.0, t])), solution(START, t, RATE), rtol=1e-12)


def leading_of_euler(y, t, h, slope, rate):
    """y'' / 2."""
    return rate * (1 - 2 * y) * logistic(y, t, rate) / 2


def leading_of_heun(y, t, h, slope, rate):
    """y''' / 6 less what Heun's method has of it: (f'' f^2 + f'^2 f) / 6 - f'' f^2 / 4."""
    f, first, second = logistic(y, t, rate), rate * (1 - 2 * y), -2 * rate
    return first**2 * f / 6 - second * f**2 / 12


@pytest.mark.parametrize(
    "base, leading, order", [("euler", leading_of_euler, 1), ("heun", leading_of_heun, 2)]
)
def test_with_the_limit_of_the_residual_the_error_of_a_step_is_one_order_higher(
    base, leading, order
):
    def error_of(method):
        one_step = jax.jit(
            lambda h: odeint(logistic, START, jnp.stack([0 * h, h]), RATE, method=method, dt=h)[-1]
        )
        return lambda h: jnp.max(jnp.abs(one_step(jnp.array(h)) - solution(START, h, RATE)))

    for method, expected in ((base, order + 1), (Hypersolver(base, leading), order + 2)):
        error = error_of(method)
        seen = np.log2(error(1 / 32) / error(1 / 64))
        assert abs(seen - expected) < 0.15


def test_outputs_inside_of_a_step_are_on_the_cubic_through_its_corrected_end():
    method = Hypersolver("euler", true_residual("euler"))
    ys = odeint(logistic, START, np.linspace(0, 1, 5), RATE, method=method, dt=0.5)
    ends = [solution(START, t, RATE) for t in (0.0, 0.5, 1.0)]
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        k0, k1 = (0.5 * logistic(y, 0.0, RATE) for y in (a, b))
        np.testing.assert_allclose(ys[2 * i + 1], (a + b) / 2 + (k0 - k1) / 8, rtol=1e-12)
        np.testing.assert_allclose(ys[2 * i + 2], b, rtol=1e-12)


# Gradients, and batches.

TS = np.linspace(0, 1, 5)  # the ends of steps
WEIGHTS = jnp.arange(5.0)[:, None]


def swing(y, t, rate):
    """A pendulum that is pushed."""
    return jnp.stack([y[1], -rate * jnp.sin(y[0]) + 0.1 * jnp.cos(t)])


def network():
    """A correction whose last layer is not 0."""
    net = MLPCorrection(2, width=5, dtype="float64", key=jax.random.key(1))
    return eqx.tree_at(
        lambda net: net.layers[-1], net, jax.tree.map(lambda x: x + 0.3, net.layers[-1])
    )


def value(y0, rate, correction, adjoint="replay"):
    """A number that depends on the state, an argument of func, and the weights of a correction."""
    method = Hypersolver("heun", correction)
    ys = odeint(swing, y0, TS, rate, method=method, dt=0.25, adjoint=adjoint)
    return jnp.sum(ys * WEIGHTS)


def by_hand(y0, rate, correction):
    """The same, in steps that are written out."""
    ys, h = [y0], jnp.array(0.25)
    for t in map(jnp.array, TS[:-1]):
        y = ys[-1]
        k = swing(y, t, rate)
        k1 = swing(y + h * k, t + h, rate)
        ys.append(y + h * (k + k1) / 2 + h**3 * correction(y, t, h, k))
    return jnp.sum(jnp.stack(ys) * WEIGHTS)


NET = network()
ARGS = jnp.array([0.4, -0.2]), jnp.array(1.3), NET
every = lambda function: jax.jit(jax.value_and_grad(function, (0, 1, 2)))
exactly = every(by_hand)


def alike(found, expected, rtol=1e-9):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), found, expected
    )


def test_gradients_are_those_of_the_steps_in_weights_too():
    alike(every(value)(*ARGS), exactly(*ARGS))


def test_so_are_derivatives_in_forward_mode_by_direct():
    ones = jax.tree.map(jnp.ones_like, ARGS)
    found, expected = (
        jax.jit(lambda *args, of=of: jax.jvp(of, args, ones))(*ARGS)
        for of in (lambda *args: value(*args, adjoint="direct"), by_hand)
    )
    alike(found, expected)


def test_backsolve_which_would_not_see_the_weights_is_refused():
    with pytest.raises(ValueError, match=r"Hypersolver.*use adjoint='replay'"):
        value(*ARGS[:2], NET, "backsolve")


def test_many_solves_share_a_correction_and_its_gradient_is_the_sum_of_theirs():
    starts = jnp.linspace(-1, 1, 6).reshape(3, 2)
    batched = lambda starts, rate, net: jnp.sum(jax.vmap(value, (0, None, None))(starts, rate, net))
    total, (of_starts, *of_shared) = every(batched)(starts, *ARGS[1:])
    alone = [exactly(y0, *ARGS[1:]) for y0 in starts]
    add = lambda *parts: sum(parts)
    alike(total, sum(value for value, _ in alone))
    alike(of_starts, jnp.stack([gradients[0] for _, gradients in alone]))
    alike(of_shared, jax.tree.map(add, *(list(gradients[1:]) for _, gradients in alone)))


def test_or_each_has_one_of_its_own():
    nets = jax.vmap(lambda k: jax.tree.map(lambda x: k * x, NET))(jnp.array([0.5, 2.0]))
    found = jax.vmap(value, (None, None, 0))(*ARGS[:2], nets)
    for i in range(2):
        net = jax.tree.map(lambda x, i=i: x[i], nets)
        np.testing.assert_allclose(found[i], by_hand(*ARGS[:2], net), rtol=1e-12)


def test_it_is_a_model_and_new_weights_do_not_compile_again():
    traced = []

    def field(y, t, rate):
        traced.append(t)
        return swing(y, t, rate)

    @jax.jit
    def end(method, y0):
        return odeint(field, y0, TS, 1.3, method=method, dt=0.25)

    method = Hypersolver("heun", NET)
    for model in (method, jax.tree.map(lambda x: 2 * x, method)):
        ys = end(model, ARGS[0])
        np.testing.assert_allclose(
            jnp.sum(ys * WEIGHTS), by_hand(*ARGS[:2], model.correction), rtol=1e-12
        )
    assert len(traced) == 1


# Beside what else there is to a solve.


def test_states_of_several_arrays_and_events_are_as_of_any_method():
    turn = lambda y, t: {"q": y["p"], "p": -y["q"]}
    third = lambda y, t, h, slope: jax.tree.map(lambda k: -k / 6, slope)  # y''' / 6
    start = {"q": jnp.array(1.0), "p": jnp.array(0.0)}
    method, through = Hypersolver("heun", third), Event(lambda y, t: y["q"], terminal=True)
    found = solve(turn, start, [0.0, 2.0], method=method, dt=0.02, events=[through])
    # Without the correction it is off by 1e-4.
    np.testing.assert_allclose(found.events[0].times[0], np.pi / 2, atol=1e-6)


def test_steps_end_at_the_knots_of_signals():
    drive = Signal(np.array([0.0, 0.5, 1.0]), np.array([1.0, 2.0, 2.0]), "previous")
    second = lambda y, t, h, slope, drive: -slope / 2
    method = Hypersolver("euler", second)
    ys = odeint(
        lambda y, t, drive: drive(t) - y, jnp.array(0.0), [0.0, 1.0], drive, method=method, dt=0.005
    )
    np.testing.assert_allclose(ys[-1], 2 - np.exp(-0.5) * (1 + np.exp(-0.5)), atol=1e-5)


def run(correction, dt=0.1):
    method = Hypersolver("heun", correction)
    return odeint(lambda y, t: -y, jnp.ones(2), [0.0, 1.0], method=method, dt=dt)


@pytest.mark.parametrize(
    "of, message",
    [
        (lambda: Hypersolver("rodas5p", NET), "explicit Runge-Kutta method.*rodas5p"),
        (lambda: Hypersolver("heun", None), "must be a function correction"),
        (lambda: Hypersolver("hein", NET), "Did you mean 'heun'"),
        (lambda: run(NET, dt=None), "Hypersolver has no error estimate: pass a step size `dt=`"),
        (lambda: run(lambda y, t, h, slope: y[:1]), "correction of a Hypersolver returned shape"),
        (lambda: run(lambda y, t, h: y), "called as correction"),
        (lambda: run(lambda t, y, h, slope: y), "time before the state"),
        (lambda: residuals(swing, jnp.ones((2, 2)), TS[:2], method="rodas4"), "explicit"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_what_to_do(of, message):
    with pytest.raises((TypeError, ValueError), match=message):
        of()


@BASES
def test_residuals_of_exact_solutions_are_the_corrections_that_make_steps_exact(base):
    ts = jnp.array([0.0, 0.35, 0.8, 1.0])
    ys = jax.vmap(lambda t: solution(START, t, RATE))(ts)
    found = jax.jit(lambda ys: residuals(logistic, ys, ts, RATE, method=base))(ys)
    expected = jax.jit(jax.vmap(lambda *x: true_residual(base)(*x, RATE)))(*found[:4])
    np.testing.assert_allclose(found.residual, expected, rtol=1e-8)
    np.testing.assert_allclose(found.h, np.diff(ts), rtol=1e-14)
