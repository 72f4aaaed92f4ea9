"""Slower questions, each with its figure: `python -m bench.studies`, or with names of some: work-precision,
stiff, adjoints, scaling.

Work against precision over the problems of `jaxode.problems`, smooth and stiff; cost against the number of
states, of lanes and of steps; memory of a gradient against steps; error, memory and time of every adjoint.
Figures and numbers go to bench/studies/.
"""

import json
import sys
from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental.ode import odeint as jax_odeint
from scipy.integrate import solve_ivp
from tqdm import tqdm

import jaxode
from bench import adjoint_study
from bench.stiff_study import draw_stiff, fastest, stiff_work_precision
from bench.timing import time_in_turn
from jaxode.problems import problems

FOLDER = Path(__file__).parent / "studies"
TOLERANCES = [10.0**-k for k in range(3, 11)]
CLASSICS = ("lotka_volterra", "brusselator", "kepler", "arenstorf", "pleiades", "van_der_pol")


def with_diffrax(f, y0, t1, method, controller, **options):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: f(y, t)), method, jnp.zeros_like(t1), t1, options.pop("dt0", None),
        y0, stepsize_controller=controller, max_steps=options.pop("max_steps", 2**16), **options,
    ).ys[-1]  # fmt: skip


def solvers(p):
    """Functions of a tolerance that give the state of a problem at its end."""
    f, y0, t1 = lambda y, t: p.f(y, t, *p.args), jnp.asarray(p.y0), jnp.asarray(p.t1)
    ours = lambda method, tol: jaxode.odeint(
        f, y0, [0.0, p.t1], rtol=tol, atol=tol, method=method, max_steps=2**16
    )[-1]
    theirs = lambda method, tol: with_diffrax(
        f, y0, t1, method, diffrax.PIDController(rtol=tol, atol=tol)
    )
    g = jax.jit(lambda t, y: f(y, t))
    compiled = g.lower(0.0, y0).compile()
    scipy = lambda tol: solve_ivp(
        lambda t, y: np.asarray(compiled(t, y)), (0.0, p.t1), p.y0, "DOP853", rtol=tol, atol=tol
    ).y[:, -1]
    return {
        "jaxode tsit5": jax.jit(partial(ours, "tsit5")),
        "jaxode dop853": jax.jit(partial(ours, "dop853")),
        "diffrax Tsit5": jax.jit(partial(theirs, diffrax.Tsit5())),
        "diffrax Dopri8": jax.jit(partial(theirs, diffrax.Dopri8())),
        "jax.experimental.ode": lambda tol: by_jax(f, y0, p.t1, tol),
        "scipy DOP853": scipy,
    }


@partial(jax.jit, static_argnums=(0, 2, 3))
def by_jax(f, y0, t1, tolerance):
    return jax_odeint(f, y0, jnp.array([0.0, t1]), rtol=tolerance, atol=tolerance)[-1]


def work_precision():
    """Seconds and errors of every solver on every problem at every tolerance."""
    found = {}
    for name in tqdm(CLASSICS, desc="work-precision"):
        p = problems[name]
        for solver, fn in solvers(p).items():
            lines = found.setdefault(name, {}).setdefault(solver, [])
            for tolerance in TOLERANCES:
                error = float(np.max(np.abs(np.asarray(fn(tolerance)) - p.answer())))
                seconds = time_in_turn({solver: fn}, tolerance, rounds=3, least=0.01)[solver]
                lines.append((error, seconds))
    return found


def at_equal_error(ours, theirs) -> float:
    """How many times longer they take, where both reach an error: the geometric mean."""
    (error, seconds), (other_error, other_seconds) = (np.log(np.array(x)).T for x in (ours, theirs))
    order = np.argsort(error)
    low = max(error.min(), other_error.min())
    inside = (other_error >= low) & (other_error <= min(error.max(), other_error.max()))
    same = np.interp(other_error[inside], error[order], seconds[order])
    return float(np.exp(np.mean(other_seconds[inside] - same)))


def draw_work_precision(found):
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    for axis, (name, lines) in zip(axes.flat, found.items()):
        for solver, points in lines.items():
            style = "o-" if solver.startswith("jaxode") else "s:"
            axis.loglog(*zip(*[(e, 1e3 * s) for e, s in points]), style, label=solver, ms=4)
        axis.invert_xaxis()
        axis.set(title=name.replace("_", " "), xlabel="error at the end", ylabel="ms")
    axes[0, 0].legend(fontsize=9)
    figure.savefig(FOLDER / "work_precision.png", dpi=120)


def scaling():
    """Seconds against states, lanes and steps; bytes of a gradient against steps."""
    tolerance = dict(rtol=1e-6, atol=1e-6)
    control = diffrax.PIDController(**tolerance)
    swing = lambda y, t: -y * jnp.sin(10 * t)

    def of_states(n):
        y0 = jnp.linspace(1.0, 2.0, n)
        return {
            "jaxode": lambda y: jaxode.odeint(swing, y, [0.0, 2.0], **tolerance)[-1],
            "diffrax": lambda y: with_diffrax(swing, y, jnp.asarray(2.0), diffrax.Tsit5(), control),
        }, y0

    def lorenz(y, t, rho=28.0):
        x, y, z = y
        return jnp.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z])

    def of_lanes(n):
        y0 = 1 + jnp.arange(3.0 * n).reshape(n, 3) / (3 * n)
        ours = lambda y: jaxode.odeint(lorenz, y, [0.0, 2.0], **tolerance)[-1]
        theirs = lambda y: with_diffrax(lorenz, y, jnp.asarray(2.0), diffrax.Tsit5(), control)
        return {"jaxode": jax.vmap(ours), "diffrax": jax.vmap(theirs)}, y0

    def of_steps(n):
        ours = lambda y: jaxode.odeint(
            lorenz, y, [0.0, 2.0], method="heun", dt=2.0 / n, max_steps=n + 1
        )[-1]
        theirs = lambda y: with_diffrax(
            lorenz, y, jnp.asarray(2.0), diffrax.Heun(), diffrax.ConstantStepSize(), dt0=2.0 / n,
            max_steps=n + 1,
        )  # fmt: skip
        return {"jaxode": ours, "diffrax": theirs}, jnp.ones(3)

    sizes = {
        "states": (of_states, [2, 10, 100, 1000, 10_000, 100_000]),
        "lanes": (of_lanes, [1, 10, 100, 1000, 10_000, 100_000]),
        "steps": (of_steps, [100, 1000, 10_000, 100_000, 1_000_000]),
    }
    found = {}
    for name, (make, counts) in sizes.items():
        for n in tqdm(counts, desc=name):
            fns, y0 = make(n)
            compiled = {k: jax.jit(fn).lower(y0).compile() for k, fn in fns.items()}
            seconds = time_in_turn(compiled, y0, rounds=3, least=0.01)
            for library, value in seconds.items():
                found.setdefault(name, {}).setdefault(library, []).append((n, value))
    found["memory"] = memory(swing)
    return found


def memory(field):
    """Bytes of temporary memory of a gradient of 2,000 states, against the bound on steps."""
    y0, found = jnp.ones(2000), {}
    for n in tqdm([64, 256, 1024, 4096, 16_384], desc="memory"):
        losses = {
            adjoint: lambda y, adjoint=adjoint, n=n: jaxode.odeint(
                field, y, [0.0, 1.0], adjoint=adjoint, max_steps=n
            )[-1].sum()
            for adjoint in ("replay", "backsolve", "direct")
        }
        losses["diffrax"] = lambda y, n=n: with_diffrax(
            field, y, jnp.asarray(1.0), diffrax.Tsit5(), diffrax.PIDController(rtol=1e-6, atol=1e-6),
            max_steps=n,
        ).sum()  # fmt: skip
        for name, loss in losses.items():
            program = jax.jit(jax.grad(loss)).lower(y0).compile()
            size = program.memory_analysis().temp_size_in_bytes
            found.setdefault(name, []).append((n, size))
    return found


def slope(points) -> float:
    """Of the last half of a line in a plot of logarithms."""
    x, y = np.log(np.array(points, float)).T
    half = len(x) // 2
    return float(np.polyfit(x[half:], y[half:], 1)[0])


def draw_scaling(found):
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.6), layout="constrained")
    labels = {"memory": ("bound on steps", "bytes of a gradient")}
    for axis, (name, lines) in zip(axes, found.items()):
        for library, points in lines.items():
            axis.loglog(*zip(*points), "o-", label=f"{library} (slope {slope(points):.2f})", ms=4)
        x, y = labels.get(name, (name, "seconds"))
        axis.set(xlabel=x, ylabel=y)
        axis.legend(fontsize=9)
    figure.savefig(FOLDER / "scaling.png", dpi=120)


def main(names):
    jax.config.update("jax_enable_x64", True)
    FOLDER.mkdir(exist_ok=True)
    if not names or "work-precision" in names:
        found = work_precision()
        draw_work_precision(found)
        (FOLDER / "work_precision.json").write_text(json.dumps(found, indent=1) + "\n")
        for solver in list(found["kepler"])[2:]:
            mine = "jaxode tsit5" if "8" not in solver else "jaxode dop853"
            ratios = [at_equal_error(lines[mine], lines[solver]) for lines in found.values()]
            print(
                f"{solver:22s} takes {np.exp(np.mean(np.log(ratios))):.1f} times as long as {mine}"
            )
    if not names or "stiff" in names:
        found = stiff_work_precision(FOLDER / "stiff.json")
        draw_stiff(found, FOLDER / "stiff.png")
        print(*fastest(found), sep="\n")
    if not names or "adjoints" in names:
        adjoint_study.study(FOLDER)
    if not names or "scaling" in names:
        found = scaling()
        draw_scaling(found)
        (FOLDER / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
        for name, lines in found.items():
            slopes = ", ".join(f"{k} {slope(v):.2f}" for k, v in lines.items())
            print(f"{name}: slopes {slopes}")


if __name__ == "__main__":
    main(sys.argv[1:])
