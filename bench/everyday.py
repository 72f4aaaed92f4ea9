"""The shapes of work that people have, with every output in the loss: `python -m bench everyday`.

Each is solved forward and differentiated (the sum of squares of all its outputs), with our default
method, diffrax's Tsit5 under its default controller, and JAX's odeint; float64 and tolerances of
1e-6 unless said. Tracing and compiling is timed cold: a fresh process for each work and library,
`python -m bench.everyday cold WORK LIBRARY forward`. So are the first and the hundredth call that
are not inside a program, as in a notebook: `python -m bench.everyday eager LIBRARY plain`.

From a script, every group is an iterator of rows, as is the work whose name contains a text:

    from bench.everyday import cold_rows, eager_rows, work_rows
    for row in work_rows("single", only="Kepler", quick=True): ...
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax.experimental.ode import odeint as jax_odeint

import jaxode
from bench.peers import LORENZ, installed, solver
from bench.timing import Seconds, off, row, time_in_turn

MAIN = ("jaxode", "diffrax", "jax")
PASSES = ("forward", "gradient")


def squares(ys):
    """The loss: the sum of squares of all outputs."""
    return sum(jnp.sum(y**2) for y in jax.tree.leaves(ys))


class Work(NamedTuple):
    """A piece of work, for any library."""

    outputs: Callable
    """outputs(solve) is a function of x that gives the states at all outputs; solve is like those of
    `bench.peers`, and knows its tolerance."""
    x: Any
    """Where it is computed, and what the gradient is with respect to."""
    tolerance: float = 1e-6
    loss: Callable = squares
    value: bool = False
    """The value of the loss is wanted beside its gradient."""
    lanes: bool = False
    """Each row of x is one of many, under `jax.vmap`."""
    accuracy: float = 1e-2
    """What an answer may be off by, relative to the largest number in it."""
    libraries: tuple = MAIN
    lorenz: tuple = ()
    """Those of `bench.peers.LORENZ` that do it too, from (y0, ts) as the last field says."""
    ts: Any = None
    without: tuple = ()
    """Pairs of a library and a pass that it does not come back from, or is wrong in."""


# The works, a function each.


def lorenz(y, t):
    x, y, z = y
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def lorenz_work(count):
    ts = jnp.linspace(0.0, 5.0, count)
    work = Work(lambda solve: lambda y0: solve(lorenz, y0, ts), jnp.ones(3), ts=ts)
    if count != 101:
        return work
    return work._replace(libraries=(*MAIN, "tinydiffeq"), lorenz=tuple(LORENZ))


def lorenz_batch(size, count=2):
    """From the first of two outputs to the other JAX's backward solve is lost: the problem is chaotic."""
    ts = jnp.linspace(0.0, 5.0, count)
    y0 = 1 + jnp.linspace(0, 1, size)[:, None] * jnp.array([1.0, 0.5, 0.25])
    work = Work(
        lambda solve: lambda y0: solve(lorenz, y0, ts), y0, lanes=True, ts=ts, accuracy=5e-2
    )
    if count == 2:
        work = work._replace(without=(("jax", "gradient"),))
    if size != 128:
        return work
    return work._replace(libraries=(*MAIN, "tinydiffeq"), lorenz=tuple(LORENZ))


def prey_and_predators(y, t, rates):
    birth, eaten, fed, death = rates
    prey, predators = y
    meetings = prey * predators
    return jnp.stack([birth * prey - eaten * meetings, fed * meetings - death * predators])


def fit(starts=None):
    """The value and gradient of the misfit to 20 observations, at wrong rates, or many."""
    ts = jnp.sort(jax.random.uniform(jax.random.key(0), (20,), maxval=15.0)).at[0].set(0.0)
    y0, rates = jnp.array([1.0, 1.0]), jnp.array([1.1, 0.4, 0.1, 0.4])
    seen = jax.jit(lambda p: jaxode.odeint(prey_and_predators, y0, ts, p))(rates)
    wrong = rates * jnp.array([1.05, 0.9, 1.1, 0.95])
    if starts is not None:
        wrong = rates * (1 + 0.1 * jax.random.normal(jax.random.key(1), (starts, 4)))
    outputs = lambda solve: lambda p: solve(prey_and_predators, y0, ts, (p,))
    loss = lambda ys: jnp.sum((ys - seen) ** 2)
    return Work(outputs, wrong, loss=loss, value=True, lanes=starts is not None)


def kepler_work():
    def kepler(y, t):
        cube = (y[0] ** 2 + y[1] ** 2) ** 1.5
        return jnp.stack([y[2], y[3], -y[0] / cube, -y[1] / cube])

    ts, y0 = jnp.linspace(0.0, 20.0, 201), jnp.array([0.5, 0.0, 0.0, 3**0.5])
    return Work(lambda solve: lambda y0: solve(kepler, y0, ts), y0, tolerance=1e-8)


def neuron_work():
    """Hodgkin and Huxley's axon, under a current that makes it fire."""

    def trap(x):
        """x / (1 - exp(-x)), which is smooth at 0."""
        small = jnp.abs(x) < 1e-4
        safe = jnp.where(small, 1.0, x)
        return jnp.where(small, 1 + x / 2, safe / (1 - jnp.exp(-safe)))

    def axon(y, t):
        v, m, h, n = y
        current = 10 - 120 * m**3 * h * (v - 50) - 36 * n**4 * (v + 77) - 0.3 * (v + 54.387)
        opens = trap((v + 40) / 10) * (1 - m) - 4 * jnp.exp(-(v + 65) / 18) * m
        closes = 0.07 * jnp.exp(-(v + 65) / 20) * (1 - h) - h / (1 + jnp.exp(-(v + 35) / 10))
        slow = 0.1 * trap((v + 55) / 10) * (1 - n) - 0.125 * jnp.exp(-(v + 65) / 80) * n
        return jnp.stack([current, opens, closes, slow])

    ts, y0 = jnp.linspace(0.0, 50.0, 501), jnp.array([-65.0, 0.05, 0.6, 0.32])
    return Work(lambda solve: lambda y0: solve(axon, y0, ts), y0)


def cascade_work():
    """What is given passes through a chain of 6 compartments, of which each is written by itself."""

    def cascade(y, t, rates):
        flows = rates * y / (1 + 0.1 * y)
        dy = jnp.zeros(6).at[0].set(2 * jnp.exp(-0.1 * t) - flows[0])
        for i in range(1, 6):
            dy = dy.at[i].set(flows[i - 1] - flows[i])
        return dy

    ts, rates = jnp.linspace(0.0, 40.0, 81), jnp.array([0.9, 0.7, 0.5, 0.6, 0.4, 0.3])
    return Work(lambda solve: lambda rates: solve(cascade, jnp.zeros(6), ts, (rates,)), rates)


def quake_work():
    """An oscillator that is shaken by a record, which is interpolated."""
    times = jnp.linspace(0.0, 20.0, 101)
    record = jnp.sin(2 * times) * jnp.exp(-0.1 * times) + 0.3 * jnp.sin(7 * times)

    def shaken(y, t, p):
        stiffness, damping = p
        force = jnp.interp(t, times, record)
        return jnp.stack([y[1], -stiffness * y[0] - damping * y[1] - force])

    ts, p = jnp.linspace(0.0, 20.0, 201), jnp.array([9.0, 0.4])
    return Work(lambda solve: lambda p: solve(shaken, jnp.zeros(2), ts, (p,)), p)


def epidemic(many=None):
    """Susceptible, infected and recovered in 12 groups that meet: a tuple of three arrays."""
    contacts = jax.random.uniform(jax.random.key(1), (12, 12), minval=0.05, maxval=0.3)
    y0, days = (jnp.full(12, 0.99), jnp.full(12, 0.01), jnp.zeros(12)), jnp.arange(61.0)

    def sir(y, t, beta):
        susceptible, infected, _ = y
        new, healed = beta * susceptible * (contacts @ infected), 0.2 * infected
        return -new, new - healed, healed

    beta = jnp.asarray(0.5) if many is None else jnp.linspace(0.1, 1.0, many)
    outputs = lambda solve: lambda beta: solve(sir, y0, days, (beta,))
    return Work(outputs, beta, lanes=many is not None)


def gray_scott_work():
    """Reaction and diffusion on a torus of 64 x 64. Backwards, as JAX's gradient needs it, it explodes."""
    y0 = jnp.stack([jnp.ones((64, 64)), jnp.zeros((64, 64))])
    y0 = y0.at[:, 26:38, 26:38].set(jnp.array([0.5, 0.25])[:, None, None])
    y0 += 0.01 * jax.random.uniform(jax.random.key(0), y0.shape)

    def gray_scott(y, t, p):
        feed, kill, *spread = p
        neighbours = sum(jnp.roll(y, by, axis) for by in (1, -1) for axis in (1, 2))
        spreads = jnp.stack(spread)[:, None, None] * (neighbours - 4 * y)
        u, v = y
        uptake = u * v * v
        return spreads + jnp.stack([feed * (1 - u) - uptake, uptake - (feed + kill) * v])

    outputs = lambda solve: lambda p: solve(gray_scott, y0, jnp.linspace(0.0, 200.0, 11), (p,))
    p = jnp.array([0.04, 0.06, 0.16, 0.08])
    return Work(outputs, p, without=(("jax", "gradient"),))


def network_work(one_state):
    """The weights of a network's field, in float32: 128 samples under `jax.vmap`, or one state."""
    sizes, single = (2, 64, 64, 2), jnp.float32
    keys = jax.random.split(jax.random.key(0), len(sizes))
    weights = [
        (jax.random.normal(k, (n, m), single) / n**0.5, jnp.zeros(m, single))
        for k, n, m in zip(keys, sizes, sizes[1:])
    ]
    starts, ts = jax.random.normal(keys[-1], (128, 2), single), jnp.linspace(0, 1, 20, dtype=single)

    def network(y, t, weights):
        *hidden, (matrix, shift) = weights
        for w, b in hidden:
            y = jnp.tanh(y @ w + b)
        return y @ matrix + shift

    def outputs(solve):
        one = lambda y0, weights: solve(network, y0, ts, (weights,))
        if one_state:
            return partial(one, starts)
        return lambda weights: jax.vmap(one, (0, None))(starts, weights)

    return Work(outputs, weights, tolerance=1e-3)


WORKS = {
    "single": {
        **{f"Lorenz, {n:,} outputs": partial(lorenz_work, n) for n in (11, 101, 1001)},
        "Lotka-Volterra fit, 20 observations": fit,
        "Kepler, 201 outputs, 1e-8": kepler_work,
        "Hodgkin-Huxley, 501 outputs": neuron_work,
        "SIR in 12 groups, 61 days": epidemic,
        "6 compartments by `.at[i].set`": cascade_work,
        "an oscillator shaken by `jnp.interp`": quake_work,
    },
    "lanes": {
        "Lotka-Volterra fit, 64 starts": partial(fit, 64),
        "SIR in 12 groups, 256 of them": partial(epidemic, 256),
        **{f"batch of {n} Lorenz": partial(lorenz_batch, n) for n in (2, 8, 32, 128)},
        "batch of 1,024 Lorenz, 101 outputs": partial(lorenz_batch, 1024, 101),
    },
    "grid": {"Gray-Scott on 64 x 64, 11 outputs": gray_scott_work},
    "networks": {
        "neural ODE, 128 samples by vmap": partial(network_work, False),
        "neural ODE, 128 samples as one state": partial(network_work, True),
    },
}


# How they are run.


def program(work, solve, gradient):
    """The work by a solve, or by that of a library of this name, as a function of x."""
    if isinstance(solve, str):
        solve = solver(solve, gradient, work.lanes)
    one = forward = work.outputs(partial(solve, tolerance=work.tolerance))
    if gradient:
        derive = jax.value_and_grad if work.value else jax.grad
        one = derive(lambda x: work.loss(forward(x)))
    return jax.vmap(one) if work.lanes else one


def in_programs(work):
    """The libraries that solve inside of a program, for each of the two passes."""
    for way in PASSES:
        names = [n for n in work.libraries if installed(n) and (n, way) not in work.without]
        yield way, names


def exactly(field, y0, ts, args=(), tolerance=1e-6):
    """What answers are checked against."""
    single = jnp.result_type(*jax.tree.leaves(y0)) == jnp.float32
    fine = 1e-6 if single else 1e-11
    options = dict(rtol=fine, atol=fine, method="dop853", max_steps=2**15)
    return jaxode.odeint(field, y0, ts, *args, **options)


def others(work):
    """Both passes of the libraries that are given whole Lorenz systems."""
    for name in filter(installed, work.lorenz):
        if work.lanes:
            yield name, LORENZ[name](work.x, work.ts, work.tolerance)
        else:
            ways = LORENZ[name](work.x[None], work.ts, work.tolerance)
            yield name, {way: of_one(f) for way, f in ways.items()}


def of_one(function):
    """A function of many systems, of one."""
    return lambda x: function(x[None])[0]


def right(programs, work, exact):
    """The programs whose answers are right. Ours has to be."""
    kept = {}
    for name, function in programs.items():
        error = off(function(work.x), exact)
        if error < work.accuracy:
            kept[name] = function
            continue
        assert name != "jaxode", f"jaxode is off by {error:.1e}"
        print(f"{name} is off by {error:.1e}, and is left out of the next row", flush=True)
    return kept


def timed(programs, x, quick, budget=20.0):
    """As many rounds as fit into a number of seconds, 3 to 15; one, if it is to be quick."""
    began = time.perf_counter()
    for function in programs.values():
        jax.block_until_ready(function(x))
    rounds = int(budget / (time.perf_counter() - began + 0.02 * len(programs)))
    return time_in_turn(programs, x, rounds=1 if quick else min(max(rounds, 3), 15))


def works(group=None, only=""):
    """Names and makers of the works of a group, or of all, whose names contain a text."""
    groups = [group] if group else WORKS
    return {n: make for g in groups for n, make in WORKS[g].items() if only in n}


def work_rows(group=None, only="", quick=False):
    """Forward and gradient of each work, by every library that does it."""
    for name, make in works(group, only).items():
        work = make()
        more = dict(others(work))
        for way, names in in_programs(work):
            gradient = way == "gradient"
            compiled = {
                n: jax.jit(program(work, n, gradient)).lower(work.x).compile() for n in names
            }
            for peer, ways in more.items():
                compiled[peer] = ways[way]
                if f"whole {way}" in ways:
                    compiled[f"{peer}, whole"] = ways[f"whole {way}"]
            exact = jax.jit(program(work, exactly, gradient))(work.x)
            yield row(f"{name}, {way}", timed(right(compiled, work, exact), work.x, quick), "ms")


def cold_rows(group=None, only="", quick=False, runs=1):
    """Trace and compile each work in processes of their own; the libraries take turns."""
    for name, make in works(group, only).items():
        for way, libraries in in_programs(make()):
            samples = {library: [] for library in libraries}
            for _ in range(1 if quick else runs):
                for library, seconds in samples.items():
                    seconds += alone("cold", name, library, way)
            seconds = {library: Seconds.of(times) for library, times in samples.items()}
            yield row(f"{name}, {way}: trace + compile", seconds, "s")


def eager_rows(group=None, only="", quick=False):
    """The first call of a process and the hundredth, outside of any program."""
    for kind, shown in (("plain", "a function"), ("relu", "a new lambda with relu")):
        if only in f"eager odeint of {shown}":
            found = {library: alone("eager", library, kind) for library in MAIN}
            for i, which in enumerate(("first", "hundredth")):
                times = {library: calls[i] for library, calls in found.items()}
                yield row(f"eager odeint of {shown}, {which} call", times, "ms")


def alone(*arguments) -> list[float]:
    """Numbers that a fresh process prints, with no compiled programs kept from before."""
    command = [sys.executable, "-m", "bench.everyday", *arguments]
    settings = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    out = subprocess.run(command, env=settings, stdout=subprocess.PIPE, check=True).stdout
    return [float(word) for word in out.split()]


# What the fresh processes do.


def cold(name, library, way):
    """Seconds to trace and compile, once the library has compiled something tiny."""
    tiny = Work(
        lambda solve: lambda y0: solve(lambda y, t: -y, y0, jnp.linspace(0, 1, 3)), jnp.ones(2)
    )
    for gradient in (False, True):
        jax.jit(program(tiny, library, gradient)).lower(tiny.x).compile()
    work, gradient = works()[name](), way == "gradient"
    function = program(work, library, gradient)
    began = time.perf_counter()
    jax.jit(function).lower(work.x).compile()
    yield time.perf_counter() - began


def eager(library, kind, calls=100, limit=30.0):
    """Seconds of the first call, and about the hundredth, or the last within a number of seconds."""
    y0, ts = jnp.ones(3), jnp.linspace(0.0, 5.0, 11)
    matrix = jnp.eye(3) / 2
    jax.block_until_ready(matrix @ y0)
    options = dict(rtol=1e-6, atol=1e-6)

    def by_diffrax(field):
        control = diffrax.PIDController(**options)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Tsit5(), ts[0], ts[-1], None, y0,
            saveat=diffrax.SaveAt(ts=ts), stepsize_controller=control,
        ).ys  # fmt: skip

    def plain(y, t):
        return lorenz(y, t)

    def plain_of_diffrax(t, y, args):
        return lorenz(y, t)

    def call():
        if library == "diffrax":
            new = lambda t, y, args: jax.nn.relu(matrix @ y) - y
            return by_diffrax(plain_of_diffrax if kind == "plain" else new)
        odeint = jaxode.odeint if library == "jaxode" else jax_odeint
        new = lambda y, t: jax.nn.relu(matrix @ y) - y
        return odeint(plain if kind == "plain" else new, y0, ts, **options)

    began, samples = time.perf_counter(), []
    while len(samples) < calls + 10 and time.perf_counter() - began < limit:
        start = time.perf_counter()
        jax.block_until_ready(call())
        samples.append(time.perf_counter() - start)
    yield samples[0]
    yield statistics.median(samples[-20:] if len(samples) == calls + 10 else samples[-3:])


def main(what, *arguments):
    jax.config.update("jax_enable_x64", True)
    assert not jax.config.jax_enable_compilation_cache, (
        "compiled programs from before would be used"
    )
    print(*{"cold": cold, "eager": eager}[what](*arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
