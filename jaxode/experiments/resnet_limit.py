"""A ResNet is Euler's method: the same weights at more and more steps, and by adaptive solvers.

Trains a residual network with shared weights (Euler at a few steps) on a spiral classification, and
runs it as an ODE: error against steps with the order of each method, and the paths between.
"""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxode import solve
from jaxode.experiments.experiment import Options, Results, fitted, option, save
from jaxode.nn import MLPField
from jaxode.nn.fields import affine

METHODS = ("euler", "heun", "rk4")


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """How long, and how many layers."""

    steps: int = option(1500, "Steps of training.", quick=300, full=10_000, low=1)
    layers: int = option(
        8, "Residual layers, which are steps of Euler's method, in training.", low=1
    )
    width: int = option(32, "Of the field.", low=1)


def two_spirals(key, n):
    """Two interleaved spirals: points (n, 2), and which one (0 or 1)."""
    keys = jax.random.split(key)
    label = jnp.arange(n) % 2
    radius = jnp.sqrt(jax.random.uniform(keys[0], (n,), minval=0.02))
    angle = 2.5 * jnp.pi * radius + jnp.pi * label
    x = 2 * radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    return x + 0.05 * jax.random.normal(keys[1], (n, 2)), label


class Residual(eqx.Module):
    """h <- h + f(h, t) / L, L times, with one f for all layers; then a linear read-out."""

    field: MLPField
    head: eqx.nn.Linear

    def __init__(self, width, key):
        keys = jax.random.split(key)
        self.field = MLPField(2, width=width, depth=2, key=keys[0])
        self.head = eqx.nn.Linear(2, 2, key=keys[1])

    def __call__(self, x, layers: int):
        """The logits of a residual network, written as one."""
        for i in range(layers):
            x = x + self.field(x, i / layers) / layers
        return affine(self.head, x)


@jax.enable_x64(True)
def errors(model, x, labels, counts):
    """Distance of the features at t = 1 from the exact flow, and the test error, at each count.

    In float64: in float32 rounding shows before the fourth order does.
    """
    wide = lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x
    model, x = jax.tree.map(wide, (model, x))
    exact = solve(model.field, x, [0.0, 1.0], method="dop853", rtol=1e-12, atol=1e-12).ys[-1]

    def end(**how):
        solution = solve(model.field, x, [0.0, 1.0], **how)
        end = solution.ys[-1]
        wrong = jnp.mean(jnp.argmax(affine(model.head, end), -1) != labels)
        distance = jnp.sqrt(jnp.mean((end - exact) ** 2))
        return solution.stats, {"error": distance, "test error": wrong}

    # One program for each method: a step that is known would make one for each count.
    in_steps = jax.jit(
        lambda method, dt: end(method=method, dt=dt, max_steps=1024)[1], static_argnums=0
    )
    numbers = lambda found: {name: float(x) for name, x in found.items()}
    found = {
        method: [{"steps": n, **numbers(in_steps(method, 1 / n))} for n in counts]
        for method in METHODS
    }
    stats, adaptive = end(rtol=1e-3, atol=1e-3)
    return {**found, "tsit5": {"evaluations": int(stats.evaluations), **numbers(adaptive)}}


def slope(runs):
    """The order seen: the slope of log error against log step between the last two."""
    (n, error), (more, less) = ((r["steps"], r["error"]) for r in runs[-2:])
    return np.log(error / less) / np.log(more / n)


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """Train once, run many ways."""
    model = Residual(settings.width, jax.random.key(settings.seed))

    def loss(model, batch, key):
        x, labels = batch
        logits = model(x, settings.layers)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(value), {"accuracy": jnp.mean(jnp.argmax(logits, -1) == labels)}

    model, history = fitted(
        model, loss, lambda step: two_spirals(jax.random.key(step), 256), settings.steps,
        seed=settings.seed, rate=1e-2, last=0.02, parts=5, folder=folder / "resnet", label="ResNet",
        progress=progress,
    )  # fmt: skip
    x, labels = two_spirals(jax.random.key(10**6), 1000)
    counts = [1, 2, 4, 8, 16, 32, 64, 128]
    found = errors(model, x, labels, counts)
    euler = solve(
        model.field, x, [0.0, 1.0], method="euler", dt=1 / settings.layers, max_steps=1024
    ).ys[-1]
    same = jnp.max(jnp.abs(affine(model.head, euler) - model(x, settings.layers)))
    orders = {method: slope(found[method]) for method in METHODS}
    rows = [
        {"solver": method, "order seen": f"{orders[method]:.2f}",
         **{f"{r['steps']}": f"{r['error']:.1g}" for r in found[method][:6]}}
        for method in METHODS
    ]  # fmt: skip
    claims = {
        "The ResNet's logits are those of Euler's method, to rounding": float(same) < 1e-3,
        "Euler, Heun and RK4 converge with order 1, 2 and 4": all(
            abs(orders[m] - p) < 0.35 for m, p in zip(METHODS, (1, 2, 4))
        ),
        "The network classifies better than 95 %": history[-1]["accuracy"] > 0.95,
    }
    if settings.steps < 1000:
        del claims["The network classifies better than 95 %"]
    notes = (
        "Distance of the features from the exact flow, at 1 to 32 steps, for weights trained as a ResNet\n"
        f"of {settings.layers} layers. Test error: as trained {100 * at(found, settings.layers):.1f} %, tsit5 "
        f"{100 * found['tsit5']['test error']:.1f} % with {found['tsit5']['evaluations']} evaluations."
    )
    save(figure(model, found, settings), folder / "resnet_limit.png")
    return Results(rows, claims, notes, {"runs": found, "orders": orders})


def at(found, layers):
    """The test error of Euler's method nearest to the number of layers."""
    return min(found["euler"], key=lambda r: abs(r["steps"] - layers))["test error"]


def paths(axis, model, layers, every=1):
    """Lines: the paths of the ODE; dots: the layers of the network, run with so many of them."""
    x, labels = two_spirals(jax.random.key(3), 16)
    smooth = np.asarray(solve(model.field, x, np.linspace(0, 1, 200, dtype=np.float32)).ys)
    grid = np.linspace(0, 1, layers + 1, dtype=np.float32)
    euler = dict(method="euler", dt=1 / layers, max_steps=1024)
    steps = np.asarray(solve(model.field, x, grid, **euler).ys)[::every]
    for label, colour in ((0, "#0072B2"), (1, "#D55E00")):
        chosen = np.asarray(labels) == label
        lines = axis.plot(*np.moveaxis(smooth[:, chosen], -1, 0), color=colour, lw=1)
        dots = axis.plot(*np.moveaxis(steps[:, chosen], -1, 0), ".", color=colour, ms=5)
        lines[0].set_label(f"ODE, spiral {label + 1}")
        dots[0].set_label("layers")
    axis.set(xlabel="first component", ylabel="second component")


def figure(model, found, settings):
    """Paths of a ResNet and of the ODE; error against steps; test error against steps."""
    plt_figure, axes = plt.subplots(1, 4, figsize=(19, 4.8))
    paths(axes[0], model, settings.layers)
    paths(axes[1], model, 8 * settings.layers, every=8)
    axes[0].set_title(f"{settings.layers} residual layers, as trained")
    axes[1].set_title(f"{8 * settings.layers} layers, every eighth drawn")
    axes[0].legend(fontsize=10)
    for method, order in zip(METHODS, (1, 2, 4)):
        counts = np.array([r["steps"] for r in found[method]])
        error = np.array([r["error"] for r in found[method]])
        (line,) = axes[2].loglog(counts, error, "o-", label=method)
        guide = error[-1] * (counts[-1] / counts) ** order
        axes[2].loglog(counts, guide, ":", lw=1, color=line.get_color(), label=f"order {order}")
        axes[3].plot(counts, [100 * r["test error"] for r in found[method]], "o-", label=method)
    axes[2].set(xlabel="steps", ylabel="distance from the exact flow", title="Error against steps")
    axes[2].set_ylim(top=10 * max(r["error"] for r in found["euler"]))
    axes[3].set(
        xlabel="steps", ylabel="test error (%)", xscale="log", title="The same weights, other steps"
    )
    axes[2].legend(fontsize=10, ncols=2)
    axes[3].axvline(settings.layers, ls=":", color="#999999", label="as trained")
    axes[3].legend(fontsize=10)
    return plt_figure
