"""What a plain neural ODE cannot represent, and an augmented one does (arXiv 1904.01681).

The map x to -x on the line, and a disc inside a ring in the plane; with the number of evaluations
over training.
"""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxode.experiments.experiment import Options, Results, fitted, option, running_mean, save
from jaxode.nn import Augmented, MLPField, NeuralODE
from jaxode.nn.fields import affine


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """How long, and how many extra dimensions."""

    steps: int = option(1000, "Steps of training.", quick=200, full=5000, low=1)
    batch: int = option(128, "Points a step.", low=1)
    width: int = option(32, "Of the field.", low=1)
    extra: int = option(2, "Extra dimensions of the augmented one.", low=1)
    tolerance: float = option(1e-3, "Of the solver.", low=1e-7, high=1.0)


def reflection(key, n):
    """x in [-1, 1], and -x."""
    x = jax.random.uniform(key, (n, 1), minval=-1, maxval=1)
    return x, -x


def annuli(key, n):
    """Points of a disc of radius 1 (target -1) and of a ring from 2 to 3 (target 1)."""
    radius_key, angle_key = jax.random.split(key)
    ring = jnp.arange(n) % 2 == 0
    uniform = jax.random.uniform(radius_key, (n,))
    radius = jnp.where(ring, jnp.sqrt(4 + 5 * uniform), jnp.sqrt(uniform))
    angle = jax.random.uniform(angle_key, (n,), maxval=2 * jnp.pi)
    x = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    return x, jnp.where(ring, 1.0, -1.0)[:, None]


TASKS = {"x to -x": (reflection, 1), "disc in a ring": (annuli, 2)}


class Model(eqx.Module):
    """A (possibly augmented) neural ODE and a linear read-out."""

    layer: Augmented
    head: eqx.nn.Linear

    def __init__(self, size, extra, settings, key):
        keys = jax.random.split(key)
        field = MLPField(size + extra, width=settings.width, depth=2, time=False, key=keys[0])
        tolerance = settings.tolerance
        ode = NeuralODE(field, rtol=tolerance, atol=tolerance, max_steps=1024)
        self.layer = Augmented(ode, extra)
        self.head = eqx.nn.Linear(size + extra, 1, key=keys[1])

    def __call__(self, x):
        solution = self.layer.solve(x)
        return affine(self.head, solution.ys[-1]), solution.stats.evaluations


class Identity(Model):
    """The same without a read-out: the first component is the answer."""

    def __call__(self, x):
        solution = self.layer.solve(x)
        return solution.ys[-1][:, :1], solution.stats.evaluations


def loss(model, batch, key):
    """Mean squared error."""
    x, y = batch
    found, evaluations = model(x)
    return jnp.mean((found - y) ** 2), {"evaluations": evaluations}


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """Both tasks, both networks."""
    rows, found, models = [], {}, {}
    for task, (sample, size) in TASKS.items():
        for name, extra in (("plain", 0), ("augmented", settings.extra)):
            make = Identity if size == 1 else Model
            model = make(size, extra, settings, jax.random.key(settings.seed))
            label = f"{task}, {name}"
            model, history = fitted(
                model, loss, lambda step, sample=sample: sample(jax.random.key(step), settings.batch),
                settings.steps, seed=settings.seed, rate=5e-3, last=0.05, parts=5, label=label,
                folder=folder / label.replace(" ", "-").replace(",", ""), progress=progress,
            )  # fmt: skip
            test, metrics = loss(model, sample(jax.random.key(10**6), 1000), None)
            evaluations = [r["evaluations"] for r in history]
            models[task, name], found[label] = model, {
                "error": float(test), "evaluations": evaluations, "loss": [r["loss"] for r in history],
            }  # fmt: skip
            rows.append({
                "task": label, "test error (MSE)": f"{float(test):.2g}",
                "evaluations, first": f"{evaluations[0]:.0f}", "last": f"{evaluations[-1]:.0f}",
                "at the end of training": f"{float(metrics['evaluations']):.0f}",
            })  # fmt: skip
    error = lambda task, name: found[f"{task}, {name}"]["error"]
    claims = {
        "A plain ODE cannot turn x into -x (error at least that of 0, 1/3)": error(
            "x to -x", "plain"
        )
        > 0.3,
        "An augmented one can": error("x to -x", "augmented") < 0.03,
        "On disc in a ring, the augmented one errs less": error("disc in a ring", "augmented")
        < error("disc in a ring", "plain"),
    }
    cost = lambda name: np.mean(found[f"disc in a ring, {name}"]["evaluations"][-50:])
    claims["and takes fewer evaluations at the end"] = cost("augmented") <= cost("plain")
    save(figure(found, models), folder / "augment.png")
    notes = "Error of always answering 0: 1/3 for x to -x, 1 for disc in a ring."
    return Results(rows, claims, notes, {"runs": found})


def in_plane(model, *clouds):
    """Where points are at t = 1: across, and the answer of the read-out; a pair of arrays a cloud.

    `across` is the widest direction of all features in which the answer does not change.
    """
    end = np.asarray(model.layer.solve(jnp.concatenate(clouds)).ys[-1])
    answer = np.asarray(affine(model.head, end))[:, 0]
    weights = np.asarray(model.head.weight)
    rest = end - end @ weights.T @ weights / np.sum(weights**2)
    rest -= rest.mean(0)
    across = rest @ np.linalg.svd(rest, full_matrices=False)[2][0]
    cuts = np.cumsum([len(cloud) for cloud in clouds])[:-1]
    return list(zip(np.split(across, cuts), np.split(answer, cuts)))


def features(axis, model):
    """Where a flow takes a disc, a ring, and the circles that bound them."""
    x, y = annuli(jax.random.key(0), 600)
    angle = jnp.linspace(0, 2 * jnp.pi, 2000)
    circle = jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    disc, ring = x[y[:, 0] < 0], x[y[:, 0] > 0]
    disc, ring, inner, outer = in_plane(model, disc, ring, circle, 2 * circle)
    for cloud, bound, colour, label in (
        (disc, inner, "#0072B2", "disc"),
        (ring, outer, "#D55E00", "ring"),
    ):
        axis.plot(*cloud, ".", color=colour, ms=5, alpha=0.7, label=label)
        axis.plot(*bound, color=colour, lw=1.2, label=f"edge of the {label}")
    for target in (-1, 1):
        axis.axhline(target, color="black", ls=":", lw=1)
    axis.set(xlabel="across", ylabel="answer (targets dotted)")


def figure(found, models):
    """Paths on the line, features of the plane, and evaluations over training."""
    plt_figure, axes = plt.subplots(2, 3, figsize=(14, 8))
    ts = np.linspace(0, 1, 50, dtype=np.float32)
    for i, name in enumerate(("plain", "augmented")):
        x = jnp.linspace(-1, 1, 11)[:, None]
        paths = np.asarray(models["x to -x", name].layer.solve(x, ts).ys)[..., 0]
        axes[0, i].plot(ts, paths, color="#0072B2", lw=1.3)
        axes[0, i].plot(np.ones(11), -x, "o", color="black", mfc="none", clip_on=False, label="-x")
        axes[0, i].set(xlabel="t", ylabel="first component", title=f"x to -x, {name}")
        axes[0, i].legend(loc="upper center")
        features(axes[1, i], models["disc in a ring", name])
        axes[1, i].set(title=f"disc in a ring at t = 1, {name}")
    axes[1, 0].legend(fontsize=10)
    for axis, task in zip(axes[:, 2], TASKS):
        for name in ("plain", "augmented"):
            axis.plot(running_mean(found[f"{task}, {name}"]["evaluations"]), label=name)
        axis.set(xlabel="training step", ylabel="evaluations", title=task, ylim=(0, None))
        axis.legend()
    return plt_figure
