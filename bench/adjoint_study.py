"""What each adjoint gets right, and what it takes, from a hundred steps to a hundred thousand."""

import json

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import jaxode
from bench.timing import time_in_turn
from jaxode.methods.reversible import Reversible
from jaxode.methods.tables import rk4

SPAN, PENDULUMS = 20.0, 10
STEPS = [100, 1000, 10_000, 100_000]
ADJOINTS = ("replay", "backsolve", "reversible", "direct")


def chain(state, t):
    """Pendulums on a line, each held by springs to its neighbours: it neither grows nor decays."""
    q, p = state[:PENDULUMS], state[PENDULUMS:]
    pull = jnp.pad(jnp.diff(q), (0, 1)) - jnp.pad(jnp.diff(q), (1, 0))
    return jnp.concatenate([p, pull - jnp.sin(q)])


def gradient(steps: int, adjoint: str, method=rk4):
    """Of the square of the state at the end, with respect to that at the start."""

    def loss(y0):
        options = dict(method=method, dt=SPAN / steps, max_steps=steps, adjoint=adjoint)
        return jnp.sum(jaxode.odeint(chain, y0, jnp.array([0.0, SPAN]), **options)[-1] ** 2)

    return jax.grad(loss)


def adjoints() -> dict:
    """For each adjoint and number of steps: the relative error of the gradient as that of the numbers that the
    solve returned, bytes of temporary memory, and seconds."""
    y0, found = jnp.cos(jnp.arange(2.0 * PENDULUMS)), {}
    for steps in tqdm(STEPS, desc="steps"):
        programs = {name: jax.jit(gradient(steps, name)).lower(y0).compile() for name in ADJOINTS}
        seconds = time_in_turn(programs, y0, rounds=3, least=0.01)
        exact = {name: programs["direct"](y0) for name in ADJOINTS}
        exact["reversible"] = jax.jit(gradient(steps, "direct", Reversible(rk4)))(y0)
        for name, program in programs.items():
            off = np.linalg.norm(program(y0) - exact[name]) / np.linalg.norm(exact[name])
            used = program.memory_analysis().temp_size_in_bytes
            found.setdefault(name, []).append((steps, float(off), used, seconds[name]))
    return found


def draw(found: dict, file) -> None:
    labels = "relative error of the gradient", "bytes of temporary memory", "seconds"
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for i, (axis, label) in enumerate(zip(axes, labels), 1):
        for name, points in found.items():
            shown = [(p[0], max(p[i], 1e-17)) for p in points]
            axis.loglog(*zip(*shown), "o-", label=name, ms=4)
        axis.set(xlabel="steps of rk4", ylabel=label)
    axes[0].set_title("beside `direct` through the same steps (itself at 1e-17)", fontsize=9)
    axes[0].legend(fontsize=9)
    figure.savefig(file, dpi=120)


def study(folder) -> None:
    """Measure, draw and print."""
    found = adjoints()
    (folder / "adjoints.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, folder / "adjoints.png")
    for name, points in found.items():
        for steps, off, used, seconds in points:
            print(f"{name:11s} {steps:7,d} steps  error {off:.1e}  {used:12,d} B  {seconds:.4f} s")
