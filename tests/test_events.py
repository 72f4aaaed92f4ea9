"""Events: when they are found, what they change, and their derivatives; against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, Status, solve

G, BOUNCE = 9.81, 0.9


def fall(y, t, g):
    return jnp.stack([y[1], -g])


def bounce(y, t, g):
    return y * jnp.array([1.0, -BOUNCE], y.dtype)


FLOOR = Event(lambda y, t, g: y[0], direction="down", change=bounce, keep=12)


def bounces(height, g, count):
    """The times of the first bounces of a ball that is dropped."""
    first = np.sqrt(2 * height / g)
    flights = 2 * np.sqrt(2 * g * height) / g * BOUNCE ** np.arange(1, count)
    return first + np.concatenate([[0], np.cumsum(flights)])


def dropped(height, g=G, **options):
    options = {"t": [0.0, 5.0], "events": [FLOOR], **options}
    return solve(fall, jnp.stack([height, 0.0 * height]), options.pop("t"), g, **options)


METHODS = [
    *(
        ("tsit5", {}),
        ("dop853", {}),
        ("bosh3", {}),
        ("rodas5p", {}),
        ("kvaerno5", {}),
        ("auto", {}),
    ),
    *(("rk4", {"dt": 0.1}), ("dopri5", {"dt": 0.3}), ("gauss4", {"dt": 0.2})),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_bouncing_ball_bounces_when_it_should(method, options):
    sol = dropped(jnp.array(1.0), method=method, **options)
    exact = bounces(1.0, G, 10)
    found = sol.events[0]
    count = int(np.sum(exact < 5))
    assert found.count == count
    np.testing.assert_allclose(found.times[:count], exact[:count], rtol=1e-10)
    np.testing.assert_allclose(found.states[:count, 0], 0, atol=1e-10)
    speed = -np.sqrt(2 * G) * BOUNCE ** np.arange(count)
    np.testing.assert_allclose(found.states[:count, 1], speed, rtol=1e-9)
    assert np.all(np.isnan(found.times[count:]))


@pytest.mark.parametrize("method", ["tsit5", "dop853", "rodas5p", "kvaerno5"])
def test_event_times_are_as_accurate_as_the_solution(method):
    """y = sin t has its n-th root at n pi."""
    cross = Event(lambda y, t: y[0], direction="both")
    turn, roots = lambda y, t: jnp.stack([y[1], -y[0]]), np.pi * np.arange(1, 7)
    for tolerance in (1e-4, 1e-7, 1e-10):
        sol = solve(
            turn, jnp.array([0.0, 1.0]), [0.0, *roots, 20.0], events=[cross],
            method=method, rtol=tolerance, atol=tolerance,
        )  # fmt: skip
        error = np.max(np.abs(sol.ys[1:-1, 0]))
        assert sol.events[0].count == 6
        assert np.max(np.abs(sol.events[0].times[:6] - roots)) < 10 * max(error, tolerance)


def test_float32_finds_them_too():
    sol = dropped(jnp.float32(1.0), np.float32(G), t=np.array([0, 2], np.float32))
    assert sol.events[0].times.dtype == jnp.float32
    np.testing.assert_allclose(sol.events[0].times[:3], bounces(1.0, G, 3), rtol=1e-5)


def nth(height, g, n, adjoint):
    return dropped(height, g, adjoint=adjoint).events[0].times[n]


@pytest.mark.parametrize("adjoint", ["replay", "direct"])
def test_event_times_have_the_derivatives_of_the_closed_form(adjoint):
    step, slopes = 1e-5, jax.jit(jax.grad(partial(nth, adjoint=adjoint), (0, 1)))
    for n in (0, 4):
        by_height = (bounces(1 + step, G, 5)[n] - bounces(1 - step, G, 5)[n]) / (2 * step)
        by_g = (bounces(1.0, G + step, 5)[n] - bounces(1.0, G - step, 5)[n]) / (2 * step)
        np.testing.assert_allclose(slopes(1.0, G, n), (by_height, by_g), rtol=1e-8)


def test_forward_mode_and_second_derivatives_agree_with_the_closed_form():
    """The n-th time is proportional to the square root of the height."""
    time = bounces(1.0, G, 2)[1]
    of = lambda adjoint: (
        lambda height: (
            dropped(height, t=[0.0, 1.5], adjoint=adjoint, max_steps=50).events[0].times[1]
        )
    )
    value, slope = jax.jvp(jax.jacfwd(of("forward")), (1.0,), (1.0,))
    np.testing.assert_allclose((value, slope), (time / 2, -time / 4), rtol=1e-8)


@pytest.mark.parametrize("adjoint", ["replay", "direct"])
def test_what_comes_after_a_jump_has_its_derivatives(adjoint):
    """Height at t = 1, after two bounces, against finite differences of the closed form."""

    def height_at_1(height, g):
        (_, t2), v = bounces(height, g, 2), BOUNCE**2 * np.sqrt(2 * g * height)
        assert t2 < 1.3
        return v * (1.3 - t2) - g * (1.3 - t2) ** 2 / 2

    end = lambda height, g: dropped(height, g, t=[0.0, 1.3], adjoint=adjoint).ys[-1, 0]
    step = 1e-5
    value, found = jax.jit(jax.value_and_grad(end, (0, 1)))(1.0, G)
    by_height = (height_at_1(1 + step, G) - height_at_1(1 - step, G)) / (2 * step)
    by_g = (height_at_1(1.0, G + step) - height_at_1(1.0, G - step)) / (2 * step)
    np.testing.assert_allclose(value, height_at_1(1.0, G), rtol=1e-9)
    np.testing.assert_allclose(found, (by_height, by_g), rtol=1e-6)


def test_a_batch_has_events_of_its_own():
    def third(height):
        times = dropped(height).events[0].times
        return times[2], times

    heights = jnp.linspace(0.5, 2.0, 40)
    grads, times = jax.vmap(jax.grad(third, has_aux=True))(heights)
    exact = np.array([bounces(h, G, 3) for h in np.asarray(heights)])
    np.testing.assert_allclose(times[:, :3], exact, rtol=1e-9)
    np.testing.assert_allclose(grads, exact[:, 2] / (2 * np.asarray(heights)), rtol=1e-8)


def test_doses_at_known_times():
    """Elimination at a rate k: every dose decays by itself."""
    times, amounts = jnp.array([0.0, 8.0, 16.0]), jnp.array([10.0, 5.0, 2.0])

    def amount(times, amounts, k, adjoint="replay"):
        dose = Event(times=times, values=amounts, change=lambda y, t, amount, k: y + amount)
        return solve(
            lambda y, t, k: -k * y, 0.0, [0.0, 16.0, 24.0], k, events=[dose], adjoint=adjoint
        )

    def exact(times, amounts, k, t=24.0):
        return jnp.sum(amounts * jnp.exp(-k * (t - times)))

    sol = amount(times, amounts, 0.2)
    before = exact(times[:2], amounts[:2], 0.2, 16.0)
    np.testing.assert_allclose(sol.ys, [0.0, before, exact(times, amounts, 0.2)], rtol=1e-7)
    np.testing.assert_allclose(sol.events[0].times, times)
    last = lambda *args, **kw: amount(*args, **kw).ys[-1]
    wanted = jax.grad(exact, (0, 1, 2))(times, amounts, 0.2)
    for adjoint in ("replay", "direct"):
        found = jax.grad(partial(last, adjoint=adjoint), (0, 1, 2))(times, amounts, 0.2)
        for a, b in zip(found, wanted):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_times_may_be_a_list_of_traced_numbers():
    def left(s):
        dose = Event(times=[0.2, s], change=lambda y, t: y + 1)
        return solve(lambda y, t: -y, 1.0, [0.0, 1.0], events=[dose]).ys[-1]

    slope = jax.grad(left)(0.5)
    np.testing.assert_allclose(slope, np.exp(-0.5), rtol=1e-6)


def test_patients_have_doses_of_their_own_and_nan_pads():
    times = jnp.array([[0.0, 5.0, jnp.nan], [9.0, 2.0, 4.0]])
    dose = lambda times: Event(times=times, change=lambda y, t, k: y + 1.0)
    run = lambda times: solve(lambda y, t, k: -k * y, 0.0, [0.0, 10.0], 0.3, events=[dose(times)])
    sol = jax.vmap(run)(times)
    exact = [np.nansum(np.exp(-0.3 * (10 - np.asarray(row)))) for row in times]
    np.testing.assert_allclose(sol.ys[:, -1], exact, rtol=1e-7)
    np.testing.assert_array_equal(sol.events[0].count, [2, 3])


def test_a_terminal_event_ends_the_solve():
    stop = Event(lambda y, t: y - 0.5, terminal=True)
    sol = solve(lambda y, t: -y, 1.0, jnp.linspace(0.0, 2.0, 5), events=[stop])
    assert sol.status == Status.EVENT
    np.testing.assert_allclose(sol.reached, np.log(2), rtol=1e-7)
    np.testing.assert_allclose(sol.events[0].times, [np.log(2)], rtol=1e-7)
    np.testing.assert_allclose(sol.ys[:2], np.exp([0, -0.5]), rtol=1e-7)
    assert np.all(np.isnan(sol.ys[2:]))
    time = lambda k: solve(lambda y, t: -k * y, 1.0, [0.0, 9.0], events=[stop]).events[0].times[0]
    np.testing.assert_allclose(jax.grad(time)(2.0), -np.log(2) / 4, rtol=1e-6)


def test_a_terminal_event_may_have_to_happen_several_times():
    stop = Event(lambda y, t: y[0], terminal=True, count=3)
    sol = solve(
        lambda y, t: jnp.stack([y[1], -y[0]]), jnp.array([0.0, 1.0]), [0.0, 20.0], events=[stop]
    )
    np.testing.assert_allclose(sol.events[0].times, np.pi * np.arange(1, 4), rtol=1e-6)
    np.testing.assert_allclose(sol.reached, 3 * np.pi, rtol=1e-6)


def test_the_first_in_time_is_taken_first_whatever_its_place():
    late = Event(lambda y, t: y - 0.7, change=lambda y, t: y + 100.0)
    early = Event(lambda y, t: y - 0.6, change=lambda y, t: y + 0.05)
    sol = solve(lambda y, t: 1.0, 0.0, [0.0, 1.0], events=[late, early], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(sol.events[1].times[0], 0.6, rtol=1e-9)
    np.testing.assert_allclose(sol.events[0].times[0], 0.65, rtol=1e-9)
    np.testing.assert_allclose(sol.ys[-1], 101.05, rtol=1e-9)


def test_two_at_the_same_time_both_happen_in_the_order_of_the_list():
    double = Event(lambda y, t: t - 0.5, change=lambda y, t: 2 * y)
    add = Event(times=[0.5], change=lambda y, t: y + 1)
    for events, end in (([double, add], 3.0), ([add, double], 4.0)):
        sol = solve(lambda y, t: 0.0 * y, 1.0, [0.0, 1.0], events=events)
        np.testing.assert_allclose(sol.ys[-1], end)


def test_two_crossings_within_one_step_are_found():
    cross = Event(lambda y, t: (y - 0.6) * (y - 0.4))
    sol = solve(lambda y, t: 1.0, 0.0, [0.0, 1.0], events=[cross])
    assert sol.stats.accepted < 10
    np.testing.assert_allclose(sol.events[0].times[:2], [0.4, 0.6], rtol=1e-9)


@pytest.mark.parametrize(
    ("direction", "exact"), [("up", [0.5]), ("down", [1.0]), ("both", [0.5, 1.0])]
)
def test_only_the_wanted_direction_counts(direction, exact):
    wave = Event(lambda y, t: -jnp.sin(2 * jnp.pi * t), direction=direction)
    sol = solve(lambda y, t: 0 * y, jnp.zeros(1), [0.0, 1.3], events=[wave], hmax=0.1)
    assert sol.events[0].count == len(exact)
    np.testing.assert_allclose(sol.events[0].times[: len(exact)], exact, rtol=1e-9)


def test_one_that_begins_on_its_root_is_not_found_there():
    sol = dropped(jnp.array(0.0), t=[0.0, 0.5])  # it lies on the floor and falls through
    thrown = solve(fall, jnp.array([0.0, 1.0]), [0.0, 0.3], G, events=[FLOOR])
    np.testing.assert_allclose(thrown.events[0].times[0], 2 / G, rtol=1e-9)
    assert thrown.events[0].count == 1
    assert sol.events[0].count == 0


def test_bounces_that_accumulate_end_with_a_status():
    """After the sum of all flights the ball would have bounced infinitely often."""
    floor = Event(
        lambda y, t, g: y[0], direction="down", change=lambda y, t, g: y * jnp.array([1.0, -0.5])
    )
    sol = dropped(jnp.array(1.0), events=[floor], throw=False)
    first = np.sqrt(2 / G)
    assert sol.status == Status.EVENTS_ACCUMULATE
    np.testing.assert_allclose(sol.reached, 3 * first, rtol=1e-6)


def test_equal_steps_are_cut_where_a_condition_has_no_arrays():
    falls = Event(lambda y, t: y - 0.5)
    sol = solve(lambda y, t: -y, jnp.array(1.0), [0.0, 2.0], method="rk4", dt=0.1, events=[falls])
    assert sol.status == Status.SUCCESS and sol.events[0].count == 1
    np.testing.assert_allclose(sol.events[0].times[0], np.log(2), rtol=1e-5)


def test_decreasing_time():
    cross = Event(lambda y, t: y - 2.0)
    dose = Event(times=[0.5], change=lambda y, t: y * 10)
    sol = solve(lambda y, t: -y, 1.0, [1.0, 0.0], events=[cross, dose])
    np.testing.assert_allclose(sol.events[1].times, [0.5])
    np.testing.assert_allclose(sol.ys[-1], 10 * np.e, rtol=1e-7)
    np.testing.assert_allclose(sol.events[0].count, 0)  # 1.65, then 16.5


def test_a_state_of_several_arrays_and_a_boolean_condition():
    y0 = {"x": jnp.array([1.0, 2.0]), "v": jnp.array(1.0)}
    field = lambda y, t: {"x": -y["x"], "v": 0 * y["v"]}
    low = Event(
        lambda y, t: y["x"][1] < 1.0, change=lambda y, t: {"x": y["x"] * 3, "v": y["v"] + 1}
    )
    sol = solve(field, y0, [0.0, 1.0], events=[low], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sol.events[0].times[0], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(sol.ys["v"][-1], 2.0)
    np.testing.assert_allclose(sol.events[0].states["x"][0], [0.5, 1.0], rtol=1e-5)


def test_more_events_than_are_kept_are_counted():
    tick = Event(lambda y, t: jnp.sin(jnp.pi * t), keep=3)
    sol = solve(lambda y, t: 0 * y, 1.0, [0.0, 8.5], events=[tick], hmax=0.3)
    assert sol.events[0].count == 8
    np.testing.assert_allclose(sol.events[0].times, [1, 2, 3], rtol=1e-9)


def test_steps_that_are_rebuilt_bounce_again():
    """With few states stored, the backward pass rebuilds what lies between them."""
    of = lambda steps: jax.grad(
        lambda h: dropped(h, max_steps=steps, dt=5.0 / 2000, method="rk4").events[0].times[5]
    )
    np.testing.assert_allclose(of(4000)(1.0), bounces(1.0, G, 6)[5] / 2, rtol=1e-7)


def as_for_scipy(y, t):
    return y[0] - 0.5


as_for_scipy.terminal, as_for_scipy.direction = True, -1
WRONG = [
    (lambda: Event(), TypeError, "a condition"),
    (lambda: Event(lambda y, t: y, times=[1.0]), TypeError, "one of the two"),
    (lambda: Event(lambda y, t: y, direction="left"), ValueError, "'up', 'down' or 'both'"),
    (lambda: Event(lambda y, t: y, count=2), ValueError, "terminal=True"),
    (lambda: Event(lambda y, t: y, values=[1.0]), TypeError, "known `times`"),
    (lambda: run(Event(lambda y, t: y)), TypeError, "one real number"),
    (
        lambda: run(Event(lambda y, t: y[0], change=lambda y, t: y[0])),
        TypeError,
        "`change` returned",
    ),
    (lambda: run(Event(times=[3.0], terminal=True)), ValueError, "from t\\[0\\] to t\\[-1\\]"),
    (lambda: run(Event(times=[0.5, 3.0], terminal=True, count=2)), ValueError, "only 1 can"),
    (
        lambda: run(Event(times=[0.5], values=[1.0, 2.0], change=lambda y, t, value: y)),
        ValueError,
        "a row for each",
    ),
    (lambda: Event(times=[0.5], values=[1.0]), TypeError, "pass `change`"),
    (lambda: run(Event(lambda y, t: jax.lax.complex(y[0], y[1]))), TypeError, "a complex number"),
    (lambda: solve(lambda y, t: -y, 1.0, [0.0, 1.0], events="floor"), TypeError, "got str."),
    (lambda: run(lambda y, t: y[0]), TypeError, "jaxode.Event"),
    (lambda: run(Event(lambda y: y[0])), TypeError, "condition"),
    (lambda: run(Event(as_for_scipy)), TypeError, r"`terminal`.*Event\(hit, terminal=True"),
    (lambda: run(Event(as_for_scipy, terminal=True)), TypeError, "SciPy's attribute `direction`"),
]


def run(event, **options):
    return solve(lambda y, t: -y, jnp.ones(2), [0.0, 1.0], events=[event], **options)


@pytest.mark.parametrize(("wrong", "error", "says"), WRONG)
def test_what_is_wrong_is_said_at_the_door(wrong, error, says):
    with pytest.raises(error, match=says):
        wrong()


def height(t, dropped_from=1.0):
    """Of the ball at a time, by its flights."""
    begin, speed = np.sqrt(2 * dropped_from / G), np.sqrt(2 * G * dropped_from)
    if t < begin:
        return dropped_from - G * t**2 / 2
    while True:
        speed *= BOUNCE
        if t < begin + 2 * speed / G:
            return speed * (t - begin) - G * (t - begin) ** 2 / 2
        begin += 2 * speed / G


@pytest.mark.parametrize("adjoint", ["replay", "direct"])
def test_dense_output_goes_through_bounces_with_its_derivatives(adjoint):
    def seen(h):
        dense = dropped(h, t=[0.0, 4.0], dense=True, adjoint=adjoint, max_steps=100).dense
        return dense(2.3)[0], dense(ts)

    ts, step = np.linspace(0.0, 3.9, 40), 1e-6
    found, path = jax.jit(jax.grad(seen, has_aux=True))(1.0)
    np.testing.assert_allclose(path[:, 0], list(map(height, ts)), atol=1e-10)
    by_height = (height(2.3, 1 + step) - height(2.3, 1 - step)) / (2 * step)
    np.testing.assert_allclose(found, by_height, rtol=1e-6)


def test_functions_of_the_state_and_every_step_are_kept_through_bounces():
    energy = lambda y, t, g: g * y[0] + y[1] ** 2 / 2
    sol = dropped(1.0, t=[0.0, 0.2, 1.0, 1.5], save=energy)
    np.testing.assert_allclose(sol.ys, G * BOUNCE ** np.array([0, 0, 2, 4]), rtol=1e-9)
    sol = dropped(1.0, t=[0.0, 2.0], save_steps=True)
    rows = int(sol.mask.sum())
    assert rows == int(sol.stats.accepted - sol.events[0].count) + 1
    np.testing.assert_allclose(sol.ys[:rows, 0], list(map(height, sol.ts[:rows])), atol=1e-6)


def test_dense_output_at_a_dose_is_the_state_before_it():
    dose = Event(times=[0.0, 1.0], change=lambda y, t: y + 1.0)
    sol = solve(lambda y, t: -y, 0.0, [0.0, 1.0, 2.0], events=[dose], dense=True)
    wanted = [0.0, np.exp(-1), (1 + np.exp(-1)) * np.exp(-1)]
    np.testing.assert_allclose(sol.ys, wanted, rtol=1e-7)
    np.testing.assert_allclose(
        sol.dense([0.0, 1e-9, 1.0, 1 + 1e-9]), [0, 1, wanted[1], 1 + wanted[1]], rtol=1e-7
    )


def decay(doses, k, at, t, **options):
    """A state that decays, with doses at known times."""
    dose = Event(times=at, values=doses, change=lambda y, t, dose, k: y + dose)
    options = {"after_events": True, "method": "bosh3", "rtol": 1e-10, **options}
    return solve(lambda y, t, k: -k * y, 1.0, t, k, events=[dose], max_steps=4000, **options)


def remaining(doses, k, at, t, strictly=False):
    """What is there of the start and the doses at t; at the time of a dose with it, or not if `strictly`."""
    given = (at[None] < t[:, None]) if strictly else (at[None] <= t[:, None])
    left = jnp.exp(-k * (t[:, None] - at[None])) * doses[None]
    return jnp.exp(-k * t) + jnp.sum(jnp.where(given, left, 0), axis=1)


DOSES = jnp.array([2.0, 4.0, 1.0]), jnp.array(0.5), jnp.array([0.0, 1.0, 2.5])
TIMES = jnp.array([0.0, 0.5, 1.0, 2.0, 2.5, 3.0])


@pytest.mark.parametrize("adjoint", ["replay", "direct", "forward"])
def test_an_output_at_the_time_of_a_change_is_the_state_after_it_if_that_is_wanted(adjoint):
    weights, exact = jnp.arange(1.0, 7.0), lambda *given: remaining(*given, TIMES)

    def weighed(*given):
        ys = decay(*given, TIMES, adjoint=adjoint).ys
        return ys @ weights, ys

    derivative = jax.jacfwd if adjoint == "forward" else jax.grad
    got, ys = jax.jit(derivative(weighed, (0, 1, 2), has_aux=True))(*DOSES)
    wanted = jax.grad(lambda *given: exact(*given) @ weights, (0, 1, 2))(*DOSES)
    np.testing.assert_allclose(ys, exact(*DOSES), rtol=1e-8)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-8), got, wanted)


def test_outputs_after_changes_are_those_of_each_of_many_solves_and_so_are_their_gradients():
    """Ten solves in lanes, of which each has doses at times of its own; some at those of outputs."""
    ats = jnp.stack(
        [jnp.array([0.0, 1.0, 2.0]) + 0.25 * i * jnp.array([0.0, 1.0, 1.0]) for i in range(4)] * 3
    )
    weights = jnp.arange(1.0, 7.0)
    one = lambda at, f: jax.value_and_grad(lambda k: f(DOSES[0], k, at, TIMES) @ weights)(DOSES[1])
    found = jax.vmap(lambda at: one(at, lambda *x: decay(*x).ys))(ats)
    exact = jax.vmap(lambda at: one(at, remaining))(ats)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7), found, exact)


def test_states_recorded_dense_output_and_rows_of_a_function_are_those_after_changes():
    sol = decay(*DOSES, jnp.array([0.0, 3.0]), dense=True)
    at = DOSES[2]
    after, before = remaining(*DOSES, at), remaining(*DOSES, at, strictly=True)
    np.testing.assert_allclose(sol.events[0].states, after, rtol=1e-8)
    np.testing.assert_allclose(sol.dense(at), after, rtol=1e-6)
    np.testing.assert_allclose(sol.ys, remaining(*DOSES, sol.ts), rtol=1e-8)
    sol = decay(*DOSES, jnp.array([0.0, 3.0]), dense=True, after_events=False)
    np.testing.assert_allclose(sol.events[0].states, before, rtol=1e-8)
    np.testing.assert_allclose(sol.dense(at), before, rtol=1e-6)
    sol = decay(*DOSES, TIMES, save=lambda y, t, k: y**2 + t)
    np.testing.assert_allclose(sol.ys, remaining(*DOSES, TIMES) ** 2 + TIMES, rtol=1e-8)


@pytest.mark.parametrize("after", [False, True])
def test_of_a_condition_the_state_after_its_change_is_recorded_if_that_is_wanted(after):
    """A state that rises with slope 1, up to a, where it becomes t - 3 a = -2 a."""
    top = Event(lambda y, t, a: y - a, direction="up", change=lambda y, t, a: t - 3 * a, keep=1)

    def found(a):
        options = dict(events=[top], after_events=after, method="bosh3")
        sol = solve(lambda y, t, a: 1 + 0 * y, 0.0, [0.0, 2.0, 3.0], a, **options)
        return sol.events[0].states[0], sol.ys

    (state, ys), slope = jax.value_and_grad(found, has_aux=True)(jnp.array(1.5))
    np.testing.assert_allclose([state, slope], [-3.0, -2.0] if after else [1.5, 1.0], rtol=1e-10)
    np.testing.assert_allclose(ys, [0.0, -2.5, -1.5], atol=1e-10)


def test_a_solve_that_ends_at_the_time_of_an_output_has_the_state_after_the_change_there():
    last = Event(times=[1.0], change=lambda y, t: y + 5, terminal=True)
    sol = solve(
        lambda y, t: 0 * y, 1.0, [0.0, 1.0, 2.0], events=[last], after_events=True, method="bosh3"
    )
    np.testing.assert_array_equal(sol.ys, [1.0, 6.0, np.nan])
    assert sol.status == Status.EVENT


def test_states_after_events_need_events():
    with pytest.raises(ValueError, match="pass events="):
        solve(lambda y, t: -y, 1.0, [0.0, 1.0], after_events=True)
