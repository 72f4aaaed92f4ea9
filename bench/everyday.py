"""The shapes of work that people have: outputs inside the interval, all of them in the loss.

Every row is a problem, forward and the gradient of the sum of squares of all outputs, by each library
at the same tolerance; and trace + compile of both, each in a process of its own (`python -m
bench.everyday NAME LIBRARY KIND` prints one such time). Peers that are not installed are skipped, with
a line that says so.
"""

import functools
import importlib.util
import subprocess
import sys
import time

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint as jax_odeint

import jaxode
from bench.timing import Seconds, check, compile_in_turn, row, time_in_turn
from jaxode.nn import MLPField

LIBRARIES = ("jaxode", "diffrax", "jax")


# Solves: (f, y0, ts, args, tolerance) -> states at ts.


def with_jaxode(f, y0, ts, args=(), tolerance=1e-6):
    return jaxode.odeint(f, y0, ts, *args, rtol=tolerance, atol=tolerance)


def with_jax(f, y0, ts, args=(), tolerance=1e-6):
    return jax_odeint(f, y0, ts, *args, rtol=tolerance, atol=tolerance)


def with_diffrax(f, y0, ts, args=(), tolerance=1e-6):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: f(y, t, *args)), diffrax.Tsit5(), ts[0], ts[-1], None, y0,
        args, saveat=diffrax.SaveAt(ts=ts), max_steps=2**14,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    ).ys  # fmt: skip


SOLVES = {"jaxode": with_jaxode, "diffrax": with_diffrax, "jax": with_jax}


# Fields.


def lorenz(y, t, rho):
    a, b, c = y
    return jnp.stack([10 * (b - a), a * (rho - c) - b, a * b - 8 / 3 * c])


def lotka_volterra(y, t, p):
    prey, predators = y
    return jnp.stack([(p[0] - p[1] * predators) * prey, (p[2] * prey - p[3]) * predators])


def kepler(y, t, mass):
    cube = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return jnp.stack([y[2], y[3], -mass * y[0] / cube, -mass * y[1] / cube])


def hodgkin_huxley(y, t, current):
    v, m, h, n = y
    ramp = lambda u: jnp.where(
        jnp.abs(u) < 1e-4, 1 + u / 2, u / (1 - jnp.exp(-jnp.where(u == 0, 1, u)))
    )
    opening = ramp((v + 40) / 10), 0.07 * jnp.exp(-(v + 65) / 20), 0.1 * ramp((v + 55) / 10)
    closing = (
        4 * jnp.exp(-(v + 65) / 18),
        1 / (1 + jnp.exp(-(v + 35) / 10)),
        0.125 * jnp.exp(-(v + 65) / 80),
    )
    flow = 120 * m**3 * h * (v - 50) + 36 * n**4 * (v + 77) + 0.3 * (v + 54.387)
    gates = [a * (1 - x) - b * x for a, b, x in zip(opening, closing, (m, h, n))]
    return jnp.stack([current - flow, *gates])


CONTACTS = np.random.default_rng(1).uniform(0.05, 0.3, (12, 12))


def sir(y, t, beta):
    susceptible, infected, _ = y
    new = beta * susceptible * (jnp.asarray(CONTACTS) @ infected)
    return -new, new - 0.2 * infected, 0.2 * infected


def gray_scott(y, t, feed):
    u, v = y
    spread = lambda x: sum(jnp.roll(x, s, a) for s in (1, -1) for a in (0, 1)) - 4 * x
    reaction = u * v**2
    return jnp.stack(
        [
            0.16 * spread(u) - reaction + feed * (1 - u),
            0.08 * spread(v) + reaction - (feed + 0.06) * v,
        ]
    )


def spots():
    u, v = np.ones((64, 64)), np.zeros((64, 64))
    u[24:40, 24:40], v[24:40, 24:40] = 0.5, 0.25
    return jnp.asarray(np.stack([u, v]))


# Problems: (run(solve, x) -> outputs, x). The gradient is with respect to x.


def one(field, y0, ts, arg, tolerance=1e-6):
    return lambda solve, x: solve(field, x[0], ts, (x[1],), tolerance), (y0, arg)


def many(field, y0, ts, args, tolerance=1e-6):
    each = lambda solve, y0: lambda arg: solve(field, y0, ts, (arg,), tolerance)
    return lambda solve, x: jax.vmap(each(solve, x[0]))(x[1]), (y0, args)


def lotka_volterra_fit(size=None):
    """The misfit of 20 observations, in the rates; from one start, or from many at once."""
    ts = np.sort(np.random.default_rng(0).uniform(0, 15, 20))
    ts[0] = 0
    ts, true = jnp.asarray(ts), jnp.array([1.1, 0.4, 0.1, 0.4])
    y0 = jnp.array([10.0, 5.0])
    seen = jaxode.odeint(lotka_volterra, y0, ts, true, rtol=1e-10, atol=1e-10)
    misfit = lambda solve: lambda p: solve(lotka_volterra, y0, ts, (p,), 1e-6) - seen
    if size is None:
        return lambda solve, p: misfit(solve)(p), 1.05 * true
    starts = true * jnp.linspace(0.9, 1.1, size)[:, None]
    return lambda solve, p: jax.vmap(misfit(solve))(p), starts


def neural(batched):
    """A network 2-64-64-2: 128 samples with a solve each, or as one state."""
    field = MLPField(2, width=64, depth=2, time=False, dtype=jnp.float32, key=jax.random.key(0))
    weights, structure = jax.tree.flatten(field)
    y0 = jax.random.normal(jax.random.key(1), (128, 2), jnp.float32)
    ts = jnp.linspace(0.0, 1.0, 20, dtype=jnp.float32)
    func = lambda y, t, weights: jax.tree.unflatten(structure, weights)(y, t)
    each = lambda solve, weights, y0: solve(func, y0, ts, (weights,), 1e-5)
    if batched:
        return lambda solve, weights: jax.vmap(lambda y: each(solve, weights, y))(y0), weights
    return lambda solve, weights: each(solve, weights, y0), weights


ONES, RHO = np.ones(3), 28.0
PROBLEMS = {
    **{
        f"Lorenz, {n:,} outputs": lambda n=n: one(
            lorenz, jnp.asarray(ONES), jnp.linspace(0.0, 5.0, n), jnp.asarray(RHO)
        )
        for n in (11, 101, 1001)
    },
    "Lotka-Volterra fit, 20 observations": lotka_volterra_fit,
    "the same from 64 starts": lambda: lotka_volterra_fit(64),
    "Kepler, 201 outputs, 1e-8": lambda: one(
        kepler, jnp.array([0.5, 0.0, 0.0, 3**0.5]), jnp.linspace(0.0, 20.0, 201), jnp.asarray(1.0), 1e-8
    ),
    "Hodgkin-Huxley, 501 outputs": lambda: one(
        hodgkin_huxley, jnp.array([-65.0, 0.05, 0.6, 0.32]), jnp.linspace(0.0, 50.0, 501), jnp.asarray(10.0)
    ),
    "SIR in 12 groups, 61 days": lambda: one(
        sir, (jnp.full(12, 0.99), jnp.full(12, 0.01), jnp.zeros(12)), jnp.arange(0.0, 61.0), jnp.asarray(0.3)
    ),
    "256 of them": lambda: many(
        sir, (jnp.full(12, 0.99), jnp.full(12, 0.01), jnp.zeros(12)), jnp.arange(0.0, 61.0),
        jnp.linspace(0.2, 0.4, 256),
    ),
    **{
        f"batch of {n} Lorenz, 2 outputs": lambda n=n: many(
            lorenz, jnp.asarray(ONES), jnp.array([0.0, 5.0]), jnp.linspace(5.0, 28.0, n)
        )
        for n in (2, 8, 32, 128)
    },
    "batch of 1,024 Lorenz, 101 outputs": lambda: many(
        lorenz, jnp.asarray(ONES), jnp.linspace(0.0, 5.0, 101), jnp.linspace(5.0, 28.0, 1024)
    ),
    "Gray-Scott on 64 x 64, 11 outputs": lambda: one(
        gray_scott, spots(), jnp.linspace(0.0, 200.0, 11), jnp.asarray(0.035)
    ),
    "neural ODE, 128 samples by vmap, 20 outputs": lambda: neural(True),
    "the same as one state": lambda: neural(False),
}  # fmt: skip
# The backward solve of jax.experimental.ode takes minutes, or does not come back.
NO_GRADIENT = {("Gray-Scott on 64 x 64, 11 outputs", "jax")}


def functions(name):
    """Of each library: the outputs and the gradient, as functions of x; and x."""
    run, x = PROBLEMS[name]()

    def loss(solve, x):
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(run(solve, x)))

    forward = {lib: functools.partial(run, solve) for lib, solve in SOLVES.items()}
    gradient = {
        lib: jax.grad(functools.partial(loss, solve))
        for lib, solve in SOLVES.items()
        if (name, lib) not in NO_GRADIENT
    }
    return {"forward": forward, "gradient": gradient}, x


def cold(name, library, kind) -> float:
    """Seconds to trace and compile, in this process, which has done nothing like it before."""
    fns, x = functions(name)
    warm = lambda y0: SOLVES[library](
        lambda y, t, a: -a * y, y0, jnp.array([0.0, 0.5, 1.0]), (1.0,)
    )
    jax.jit(jax.grad(lambda y0: jnp.sum(warm(y0)))).lower(jnp.ones(2)).compile()
    began = time.perf_counter()
    jax.jit(fns[kind][library]).lower(x).compile()
    return time.perf_counter() - began


def cold_seconds(name, kind, libraries, rounds=2):
    """The least of some such times, each of a process of its own."""
    found = {}
    for library in libraries:
        command = [sys.executable, "-m", "bench.everyday", name, library, kind]
        runs = [subprocess.run(command, capture_output=True, text=True) for _ in range(rounds)]
        times = [float(run.stdout) for run in runs if run.returncode == 0]
        if times:
            found[library] = Seconds(min(times))
            found[library].spread = (max(times) - min(times)) / 2 / min(times)
    return found


def everyday_rows(chosen=None, compiles=True):
    """Every problem, or those whose name has one of the chosen words in it."""
    for name in PROBLEMS:
        if chosen and not any(word.lower() in name.lower() for word in chosen):
            continue
        fns, x = functions(name)
        for kind in ("forward", "gradient"):
            compiled, _ = compile_in_turn(lambda _, chosen=fns[kind]: chosen, x, rounds=1)
            check(compiled, (x,), compiled["diffrax"](x), 5e-2)
            yield row(f"{name}, {kind}", time_in_turn(compiled, x, rounds=11), "ms")
            if compiles:
                seconds = cold_seconds(name, kind, compiled)
                yield row(f"{name}, {kind}: trace + compile", seconds, "s")


def eager_rows():
    """Calls without `jit`, as in a notebook: the first, and the hundredth."""
    y0, ts = jnp.ones(2), jnp.linspace(0.0, 1.0, 5)
    plain = lambda y, t, a: -a * y
    functions = {
        "a plain function": lambda: plain,
        "one with jax.nn.relu, made anew in each call": lambda: lambda y, t, a: -jax.nn.relu(a * y),
    }
    for kind, made in functions.items():
        first, hundredth = {}, {}
        for library, solve in SOLVES.items():
            took = []
            for _ in range(25 if library == "diffrax" else 100):
                began = time.perf_counter()
                jax.block_until_ready(solve(made(), y0, ts, (1.0,)))
                took.append(time.perf_counter() - began)
            first[library], hundredth[library] = Seconds.of(took[:1] * 2), Seconds.of(took[-20:])
        yield row(f"eager call, {kind}: first", first, "ms")
        yield row(f"eager call, {kind}: hundredth", hundredth, "ms")


# Peers that not everyone has.


def other_rows():
    """Lorenz with 101 outputs, and a batch of 128, by what else is installed."""
    rows = {"tinydiffeq": tinydiffeq_rows, "gradsolve": gradsolve_rows, "torchdiffeq": torch_rows}
    for name, of in rows.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: no rows for it (pip install {name})")
        else:
            yield from of()


def tinydiffeq_rows():
    """Its adaptive Tsit5, one solve and a batch, forward and gradient."""
    import tinydiffeq

    def solve(f, y0, ts, args=(), tolerance=1e-6):
        return tinydiffeq.solve_ode(
            lambda y, t, args, p: f(y, t, *args), tinydiffeq.Tsit5(), ts[0], ts[-1], y0, args=args,
            dt_0=1e-2, save_at=tinydiffeq.SaveAt(ts=ts), max_steps=2048,
            controller=tinydiffeq.IController(rtol=tolerance, atol=tolerance),
        ).xs  # fmt: skip

    for name in ("Lorenz, 101 outputs", "batch of 128 Lorenz, 2 outputs"):
        run, x = PROBLEMS[name]()
        loss = lambda solve, x, run=run: jnp.sum(run(solve, x) ** 2)
        for kind, of in (("forward", run), ("gradient", loss)):
            fns = {
                lib: functools.partial(of, s)
                for lib, s in (("jaxode", with_jaxode), ("tinydiffeq", solve))
            }
            if kind == "gradient":
                fns = {lib: jax.grad(fn) for lib, fn in fns.items()}
            compiled, _ = compile_in_turn(lambda _, fns=fns: fns, x, rounds=1)
            check(compiled, (x,), compiled["jaxode"](x), 5e-2)
            yield row(
                f"{name}, {kind}, beside tinydiffeq", time_in_turn(compiled, x, rounds=5), "ms"
            )


def gradsolve_rows():
    """Its engine for a CPU; called from outside of `jit`, as it has to be."""
    import gradsolve

    class Lorenz:
        name, dim, t0, t1, is_stiff = "lorenz of the bench", 3, 0.0, 5.0, False

        @staticmethod
        def f_jax(t, y, p):
            return lorenz(y, t, p[0])

    run, x = PROBLEMS["batch of 128 Lorenz, 2 outputs"]()
    rho = np.asarray(x[1])[:, None]
    y0, tolerance = np.tile(ONES, (len(rho), 1)), dict(rtol=1e-6, atol=1e-6)
    call = lambda _: np.asarray(
        gradsolve.solve(Lorenz, y0, rho, engine="tsit5_replay", **tolerance).y_final
    )
    ours = jax.jit(functools.partial(run, with_jaxode)).lower(x).compile()
    assert np.max(np.abs(call(x) - ours(x)[:, -1])) < 1e-2
    yield row(
        "batch of 128 Lorenz, 2 outputs, forward, beside gradsolve",
        time_in_turn({"jaxode": ours, "gradsolve": call}, x, rounds=5), "ms",
    )  # fmt: skip


def torch_rows():
    """torchdiffeq, eager, on one thread as it comes: Lorenz with 101 outputs."""
    import torch
    from torchdiffeq import odeint as torch_odeint

    ts, tolerance = torch.linspace(0.0, 5.0, 101, dtype=torch.float64), dict(rtol=1e-6, atol=1e-6)

    def field(t, y):
        a, b, c = y
        return torch.stack([10 * (b - a), a * (RHO - c) - b, a * b - 8 / 3 * c])

    def gradient(y0):
        y0 = y0.detach().requires_grad_()
        (torch_odeint(field, y0, ts, **tolerance) ** 2).sum().backward()
        return y0.grad

    fns, x = functions("Lorenz, 101 outputs")
    start = torch.ones(3, dtype=torch.float64)
    runs = {"forward": lambda y0: torch_odeint(field, y0, ts, **tolerance), "gradient": gradient}
    for kind, run in runs.items():
        ours = jax.jit(fns[kind]["jaxode"]).lower(x).compile()
        seconds = time_in_turn({"jaxode": ours}, x)
        took = []
        for _ in range(3):
            began = time.perf_counter()
            run(start)
            took.append(time.perf_counter() - began)
        seconds["torchdiffeq"] = Seconds.of(took)
        yield row(f"Lorenz, 101 outputs, {kind}, beside torch", seconds, "ms")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(cold(*sys.argv[1:]))
