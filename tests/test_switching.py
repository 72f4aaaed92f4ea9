"""Events that change arguments: against closed forms, and against the same number as a part of the state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, SolveError, odeint, solve

HIGH, LOW = 5.0, 3.0


def heated(y, t, power, full, loss):
    return power - loss * y


THERMOSTAT = [
    Event(lambda y, t, *_: y - HIGH, direction="up", change_args=lambda y, t, p, full, k: (0.0, full, k)),
    Event(lambda y, t, *_: y - LOW, direction="down", change_args=lambda y, t, p, full, k: (full, full, k)),
]  # fmt: skip


def switched(y0, power, full, loss, log=np.log):
    """When it is switched off, on, and off again; and the temperature one later."""
    off = log((power / loss - y0) / (power / loss - HIGH)) / loss
    on = off + log(HIGH / LOW) / loss
    return off, on, on + log((full / loss - LOW) / (full / loss - HIGH)) / loss


def heat(y0, *args, t=(0.0, 20.0), **options):
    return solve(heated, jnp.asarray(y0), jnp.array(t), *args, events=THERMOSTAT, **options)


@pytest.mark.parametrize("method", ["tsit5", "dop853", "rodas5p", "kvaerno5", "auto"])
def test_a_thermostat_switches_when_it_should(method):
    sol, (off, on, again) = heat(0.0, 1.0, 1.0, 0.1, method=method), switched(0.0, 1.0, 1.0, 0.1)
    np.testing.assert_allclose(sol.events[0].times[:2], [off, again], rtol=1e-8)
    np.testing.assert_allclose(sol.events[1].times[0], on, rtol=1e-8)
    np.testing.assert_allclose(sol.ys[-1], HIGH * np.exp(-0.1 * (20 - again)), rtol=1e-7)
    assert sol.events[0].states.shape == (16,)


@pytest.mark.parametrize("adjoint", ["replay", "direct", "backsolve", "forward"])
def test_times_and_states_have_the_derivatives_of_the_closed_form(adjoint):
    def found(*x):
        sol = heat(*x, adjoint=adjoint, rtol=1e-10, atol=1e-10)
        return jnp.stack([sol.events[0].times[1], sol.ys[-1]])

    def exact(*x):
        again = switched(*x, log=jnp.log)[2]
        return jnp.stack([again, HIGH * jnp.exp(-x[-1] * (20 - again))])

    x, every = (0.0, 1.0, 1.0, 0.1), (0, 1, 2, 3)
    jacobian = jax.jacfwd if adjoint == "forward" else jax.jacrev
    for a, b in zip(jacobian(found, every)(*x), jax.jacfwd(exact, every)(*x)):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_many_have_their_own_switches():
    powers = jnp.array([0.9, 1.0, 1.3])
    many = jax.vmap(lambda power: heat(0.0, power, power, 0.1).events[0].times[:2])(powers)
    wanted = [switched(0.0, p, p, 0.1)[::2] for p in np.asarray(powers)]
    np.testing.assert_allclose(many, wanted, rtol=1e-8)


def test_steps_are_those_without_what_goes_along():
    """Its constant numbers have no error: they do not count, neither in the first step."""
    turn = lambda y, t, a: jnp.stack([y[1], -a[0] * jnp.sin(y[0])])
    never = lambda y, t, a: y[0] - 1e3
    run = lambda event: solve(
        turn,
        jnp.array([1.0, 0.0]),
        [0.0, 20.0],
        jnp.full(7, 2.0),
        events=[event],
        rtol=1e-7,
        atol=1e-9,
    )
    plain, along = run(Event(never)), run(Event(never, change_args=lambda y, t, a: (2 * a,)))
    assert tuple(map(int, plain.stats)) == tuple(map(int, along.stats))
    np.testing.assert_allclose(along.ys, plain.ys, rtol=1e-12)


def test_state_and_arguments_change_together_by_values_and_every_output_sees_it():
    """A dose, with which the rate falls: exact from dose to dose; dense output, steps, save and folds too."""
    args = {"rate": jnp.array(0.5), "name": "drug", "n": 3}
    decay = lambda y, t, args: -args["rate"] * y
    dose = Event(
        times=[1.0, 2.0], values={"amount": jnp.array([2.0, 3.0]), "rate": jnp.array([0.4, 0.2])},
        change=lambda y, t, value, args: y + value["amount"],
        change_args=lambda y, t, value, args: ({**args, "rate": value["rate"] + 0 * y},),
    )  # fmt: skip
    y1 = np.exp(-0.5) + 2
    y2 = y1 * np.exp(-0.4) + 3
    wanted = [1, y1 - 2, y1 * np.exp(-0.2), y2 - 3, y2 * np.exp(-0.2)]
    run = partial(solve, decay, jnp.array(1.0), rtol=1e-10, atol=1e-10, events=[dose])
    t = jnp.array([0.0, 1.0, 1.5, 2.0, 3.0])
    np.testing.assert_allclose(run(t, args).ys, wanted, rtol=1e-8)
    np.testing.assert_allclose(run(t[::4], args, dense=True).dense(t), wanted, rtol=1e-8)
    rates = run(t, args, save=lambda y, t, args: args["rate"]).ys
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.4, 0.4, 0.2])
    steps = run(t[::4], args, save_steps=True)
    np.testing.assert_allclose(steps.ys[steps.mask][-1], wanted[-1], rtol=1e-8)
    least = run(t, args, fold=(jnp.inf, lambda least, y, t, args: jnp.minimum(least, args["rate"])))
    np.testing.assert_allclose(least.folded, 0.2)
    np.testing.assert_allclose(run(t, args, after_events=True).ys[1::2], [y1, y2], rtol=1e-8)


def test_what_is_given_as_two_functions_and_in_float32_switches_too():
    """y' = -k y, with k = 0 once y = 1/2, split in two halves."""
    half = lambda y, t, k: -k / 2 * y
    stop = Event(lambda y, t, k: y[0] - 0.5, change_args=lambda y, t, k: (0.0,))
    for dtype in (jnp.float32, jnp.float64):
        y = odeint(
            (half, half), jnp.ones(1, dtype), jnp.array([0.0, 2.0, 3.0], dtype), 1.0, events=[stop],
            method="kencarp4", rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        assert y.dtype == dtype
        np.testing.assert_allclose(y[1:, 0], 0.5, rtol=1e-4)


def test_a_list_of_numbers_is_a_row_for_each_time():
    rates = Event(times=[1.0, 2.0], values=[0.4, 0.2], change_args=lambda y, t, rate, k: (rate,))
    y = odeint(lambda y, t, k: -k * y, jnp.array(1.0), [0.0, 3.0], 0.5, events=rates)
    np.testing.assert_allclose(y[-1], np.exp(-1.1), rtol=1e-6)


def test_a_failure_holds_what_there_was():
    stop = Event(times=[0.5], change_args=lambda y, t, k: (2 * k,))
    with pytest.raises(SolveError, match="failed") as failure:
        solve(lambda y, t, k: k * y**2, jnp.array(1.0), [0.0, 0.4, 3.0], 1.0, events=[stop])
    np.testing.assert_allclose(failure.value.solution.ys[1], 1 / 0.6, rtol=1e-6)


WRONG = {
    "no tuple": (dict(change_args=lambda y, t, k, n: k), TypeError, "a tuple like args"),
    "an integer": (dict(change_args=lambda y, t, k, n: (k, n + 1)), TypeError, "leaf 1 of args, a int"),
    "a shape": (dict(change_args=lambda y, t, k, n: (jnp.ones(2), n)), TypeError, r"shape \(2,\) for leaf 0"),
    "the order": (dict(change_args=lambda t, y, k, n: (k, n)), TypeError, "the time before the state"),
    "a decision": (dict(change_args=lambda y, t, k, n: (k if k > 0 else -k, n)), TypeError, "jnp.where"),
    "no function": (dict(change_args=1.0), TypeError, "must be a function change_args"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_change_is_refused_in_words(name):
    given, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        event = Event(lambda y, t, k, n: y[0], **given)
        solve(lambda y, t, k, n: -k * y, jnp.ones(2), [0.0, 1.0], 1.0, 3, events=[event])


def test_other_mistakes_get_their_own_words():
    event = Event(lambda y, t, k: y[0], change_args=lambda y, t, k: (2 * k,))
    run = partial(solve, lambda y, t, k: -k * y, jnp.ones(2), events=[event])
    with pytest.raises(TypeError, match="output times `t` are missing"):
        run()
    with pytest.raises(TypeError, match="the relative tolerance is `rtol`"):
        run([0.0, 1.0], 1.0, reltol=1e-3)
    with pytest.raises(TypeError, match="`save` must be a function"):
        run([0.0, 1.0], 1.0, save=3)
    with pytest.raises(TypeError, match="`fold` must be a pair"):
        run([0.0, 1.0], 1.0, fold=3)
    with pytest.raises(TypeError, match=r"called as change_args\(y, t, \*args\)"):
        run([0.0, 1.0])


@pytest.mark.parametrize(
    "options",
    [
        dict(mass=jnp.eye(2)),
        dict(jac=lambda y, t, k: -k * jnp.eye(2)),
        dict(method="leapfrog", dt=0.1),
    ],
)
def test_what_describes_the_state_alone_is_refused(options):
    event = Event(lambda y, t, k: y[0], change_args=lambda y, t, k: (2 * k,))
    options = {"method": "rodas5p", **options}
    with pytest.raises((TypeError, ValueError), match=r"leave it out|y0 = \(q, p\)"):
        solve(lambda y, t, k: -k * y, jnp.ones(2), [0.0, 1.0], 1.0, events=[event], **options)
