"""Events against diffrax's: a bouncing ball, a thousand of them, eight patients: `python -m bench events`.

diffrax ends a solve at an event; what a user of it writes is a loop over bounces, or over doses, of whole
solves. Patients have doses of their own: in diffrax, too, these are one `vmap` over rows that NaN pads,
with a scan over doses. Each is checked against a closed form before it is timed, in CPU time.
"""

import time
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix

import jaxode
from bench.timing import check, compile_in_turn, row, time_in_turn
from jaxode.nn import MLPField

G, BOUNCE, BOUNCES, TOLERANCE = 9.81, 0.9, 20, 1e-8
timed = partial(time_in_turn, clock=time.process_time)


# A ball that is dropped.


def fall(y, t, change):
    return jnp.stack([y[1], -G * change])


def rebound(y):
    return y * jnp.array([1.0, -BOUNCE])


def exact_bounces(height, count=BOUNCES):
    flights = 2 * jnp.sqrt(2 * height / G) * BOUNCE ** jnp.arange(1.0, count)
    return jnp.sqrt(2 * height / G) * 1.0 + jnp.concatenate([jnp.zeros(1), jnp.cumsum(flights)])


def ours(change, height):
    """The times of the bounces."""
    floor = jaxode.Event(
        lambda y, t, change: y[0], direction="down", change=lambda y, t, change: rebound(y),
        terminal=True, count=BOUNCES,
    )  # fmt: skip
    return jaxode.solve(
        fall, jnp.stack([height, 0 * height]), [0.0, 30.0], change, events=[floor],
        rtol=TOLERANCE, atol=TOLERANCE,
    ).events[0].times  # fmt: skip


def with_diffrax(change, height):
    """The same: a solve for each bounce."""
    term = diffrax.ODETerm(lambda t, y, args: fall(y, t, change))
    floor = diffrax.Event(
        lambda t, y, args, **kw: y[0], optimistix.Newton(TOLERANCE, TOLERANCE), direction=False
    )
    controller = diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)

    def bounce(carry, _):
        t, y = carry
        sol = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), t, 30.0, None, y, event=floor, stepsize_controller=controller,
            saveat=diffrax.SaveAt(t1=True), max_steps=4096, throw=False,
        )  # fmt: skip
        t, y = sol.ts[-1], rebound(sol.ys[-1])
        return (t, y.at[0].set(0.0)), t

    start = jnp.zeros(()), jnp.stack([height, 0 * height])
    return jax.lax.scan(bounce, start, None, length=BOUNCES)[1]


def ball_rows():
    height, heights = jnp.array(1.0), jnp.linspace(0.5, 1.5, 1000)
    sums = lambda fn: lambda height: jnp.sum(fn(height) ** 2)
    make = lambda change: {
        name: partial(fn, change) for name, fn in (("jaxode", ours), ("diffrax", with_diffrax))
    }
    gradients = lambda change: {name: jax.grad(sums(fn)) for name, fn in make(change).items()}
    many = lambda change: {name: jax.vmap(fn) for name, fn in make(change).items()}
    exact = exact_bounces(height)
    by_height = jax.grad(sums(exact_bounces))(height)
    work = "a ball, 20 bounces"
    for of, given, reference, say in (
        (make, height, exact, f"{work}, forward"),
        (gradients, height, by_height, f"{work}, gradient"),
        (many, heights, jax.vmap(exact_bounces)(heights), "1,000 balls, 20 bounces, forward"),
    ):
        compiled, seconds = compile_in_turn(of, given, rounds=1)
        check(compiled, (given,), reference, 1e-5)
        yield row(say, timed(compiled, given, rounds=7), "ms")
        yield row(f"{say}: trace + compile", seconds, "s")


# Eight patients, two compartments, doses at times of their own.

RATES = jnp.array([0.9, 0.3, 0.2, 2.0])  # absorption, out and back between compartments, volume
TIMES = np.array([
    [0, 8, 16, 24, np.nan], [0, 12, np.nan, np.nan, np.nan], [1, 5, 9, 13, 17], [2, 4, 30, np.nan, np.nan],
    [0, 24, np.nan, np.nan, np.nan], [6, 12, 18, 24, 30], [3, 27, np.nan, np.nan, np.nan], [0, 1, 2, 3, 4],
])  # fmt: skip
AMOUNTS = (
    np.where(np.isnan(TIMES), 0.0, 50 + 10 * np.arange(5.0)) * np.linspace(0.8, 1.2, 8)[:, None]
)
OBSERVED = jnp.linspace(0.0, 36.0, 13)[1:]


def compartments(y, t, rates):
    out, there, back, _ = rates
    return jnp.stack([-(out + there) * y[0] + back * y[1], there * y[0] - back * y[1]])


def patient(rates, times, amounts):
    """Concentrations at the observed times."""
    dose = jaxode.Event(
        times=times, values=amounts, change=lambda y, t, amount, rates: y.at[0].add(amount)
    )
    t = jnp.concatenate([jnp.zeros(1), OBSERVED])
    ys = jaxode.odeint(
        compartments, jnp.zeros(2), t, rates, events=[dose], rtol=TOLERANCE, atol=TOLERANCE
    )
    return ys[1:, 0] / rates[3]


def patient_with_diffrax(rates, times, amounts):
    """The same, segment by segment: each writes the outputs that lie in it."""
    term = diffrax.ODETerm(lambda t, y, args: compartments(y, t, rates))
    controller = diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)
    end = OBSERVED[-1]
    begins = jnp.concatenate([jnp.zeros(1), jnp.nan_to_num(times, nan=end)])
    ends = jnp.concatenate([begins[1:], end[None]])
    doses = jnp.concatenate([jnp.zeros(1), amounts])

    def segment(y, given):
        begin, stop, dose = given
        y = y.at[0].add(dose)
        inside = (begin < OBSERVED) & (stop >= OBSERVED)
        ts = jnp.concatenate([jnp.clip(OBSERVED, begin, stop), stop[None]])
        sol = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), begin, stop, None, y, stepsize_controller=controller,
            saveat=diffrax.SaveAt(ts=ts), max_steps=4096,
        )  # fmt: skip
        return sol.ys[-1], jnp.where(inside, sol.ys[:-1, 0], 0)

    rows = jax.lax.scan(segment, jnp.zeros(2), (begins, ends, doses))[1]
    return jnp.sum(rows, 0) / rates[3]


def exact_patient(rates, times, amounts):
    """Superposed responses to every dose, by the matrix exponential."""
    out, there, back, volume = rates
    matrix = jnp.array([[-(out + there), back], [there, -back]])
    since = OBSERVED[:, None] - times
    after = since > 0
    response = lambda t: jax.scipy.linalg.expm(matrix * t)[0, 0]
    found = jax.vmap(jax.vmap(response))(jnp.where(after, since, 0))
    return jnp.sum(jnp.where(after, found * amounts, 0), 1) / volume


def patient_rows():
    times, amounts = jnp.asarray(TIMES), jnp.asarray(AMOUNTS)
    seen = jax.vmap(exact_patient, (None, 0, 0))(1.1 * RATES, times, amounts)

    def fit(one):
        fits = lambda rates: jnp.mean(
            (jax.vmap(one, (None, 0, 0))(rates, times, amounts) - seen) ** 2
        )
        return jax.value_and_grad(fits)

    make = lambda change: {
        name: lambda rates, one=one: fit(one)(change * rates)
        for name, one in (("jaxode", patient), ("diffrax", patient_with_diffrax))
    }
    compiled, seconds = compile_in_turn(make, RATES, rounds=1)
    check(compiled, (RATES,), fit(exact_patient)(RATES), 1e-4)
    work = "8 patients with doses of their own, value and gradient"
    yield row(work, timed(compiled, RATES, rounds=7), "ms")
    yield row(f"{work}: trace + compile", seconds, "s")


# What an event costs that never happens.


def lorenz(y, t, change):
    x, y, z = y
    return jnp.stack([10 * (y - x), x * (change * 28 - z) - y, x * y - 8 / 3 * z])


def idle_rows():
    net = MLPField(64, width=128, key=jax.random.key(0), dtype=jnp.float32)
    works = {
        "Lorenz": (lorenz, jnp.ones(3), 20.0, lambda y, t, change: y[2] - 100.0),
        "MLP 64-128-128-64, batch 256": (
            lambda y, t, change: net(y, t) * change.astype(y.dtype),
            jax.random.normal(jax.random.key(1), (256, 64), jnp.float32), 1.0,
            lambda y, t, change: y[0, 0] - 100.0,
        ),
    }  # fmt: skip
    for work, (field, y0, end, condition) in works.items():

        def run(change, events, y0, field=field, end=end):
            options = dict(events=events, rtol=1e-6, atol=1e-6)
            return jaxode.odeint(field, y0, [0.0, end], jnp.asarray(change), **options)

        def make(change, run=run, condition=condition):
            with_one = [jaxode.Event(condition)]
            return {"jaxode": partial(run, change, None), "with": partial(run, change, with_one)}

        seconds = timed(compile_in_turn(make, y0, rounds=1)[0], y0)
        yield row(
            f"{work}, an event that never happens over none",
            {"jaxode": seconds["with"] / seconds["jaxode"]}, "times",
        )  # fmt: skip


def event_rows():
    yield from ball_rows()
    yield from patient_rows()
    yield from idle_rows()
