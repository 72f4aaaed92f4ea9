"""Cheaper dynamics: penalties that make a neural ODE take fewer evaluations.

Kinetic energy and Jacobian norm (RNODE), a random end time (STEER), and the solver's own estimates of
error and stiffness, against none: on digits and on a flow.
"""

import dataclasses
import statistics
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxode import data, solve, train
from jaxode.experiments import classification, digits
from jaxode.experiments.experiment import Options, Results, fitted, option, running_mean, save
from jaxode.nn import (
    ConcatSquash,
    ContinuousFlow,
    JacobianNorm,
    Normal,
    WithIntegrals,
    kinetic_energy,
)

PENALTIES = ("none", "RNODE", "STEER", "error", "stiffness")


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """How long, and how strong."""

    epochs: int = option(20, "Passes over the digits.", quick=1, full=60, low=1)
    channels: int = option(16, "Of the ODE-Net.", quick=8, full=64, low=1)
    samples: int = option(0, "Digits to train on; 0: all.", quick=64, low=0)
    steps: int = option(1200, "Steps of each flow.", quick=100, full=10_000, low=1)
    kinetic: float = option(0.2, "Weight of the kinetic energy (RNODE); half on digits.", low=0.0)
    jacobian: float = option(0.2, "Weight of the Jacobian norm (RNODE); half on digits.", low=0.0)
    method: str = option(
        "tsit5", "Of the solver in training.", quick="bosh3", choices=classification.METHODS
    )
    steer: float = option(
        0.5, "The end time is uniform in 1 plus or minus this.", low=0.0, high=0.99
    )
    error: float = option(10.0, "Weight of the error estimates.", low=0.0)
    stiffness: float = option(0.001, "Weight of the stiffness estimates.", low=0.0)
    penalties: str = option(
        "none,RNODE,STEER,error", "Which, of none, " + ", ".join(PENALTIES[1:]) + "; none is always run.",
        quick="none,RNODE", full=",".join(PENALTIES), words=PENALTIES,
    )  # fmt: skip

    def listed(self, name):
        words = super().listed(name)
        return ["none", *(w for w in words if w != "none")] if name == "penalties" else words


def random_end(settings, penalty, key):
    """1, or for STEER a random number around it."""
    moved = jax.random.uniform(key, minval=-settings.steer, maxval=settings.steer)
    return 1.0 + (moved if penalty == "STEER" else 0.0)


def estimates(settings, penalty, solution):
    """The solver's own penalty."""
    if solution.heuristics is None:
        return 0.0
    weight = settings.error if penalty == "error" else settings.stiffness
    return weight * getattr(solution.heuristics, penalty)


def solver_options(penalty):
    """How a penalty wants its solve."""
    own = penalty in ("error", "stiffness")
    return dict(adjoint="direct", heuristics=True, max_steps=32) if own else dict(max_steps=512)


def digits_loss(settings, penalty):
    """Cross entropy and a penalty, of an ODE-Net."""

    def loss(net, batch, key):
        x, labels = batch
        shift_key, end_key, noise_key = jax.random.split(key, 3)
        h = net.features(data.shifted(shift_key, x))
        ts = jnp.stack([jnp.zeros(()), random_end(settings, penalty, end_key)])
        options = dict(method=settings.method, rtol=1e-3, atol=1e-3, **solver_options(penalty))
        extra = 0.0
        if penalty == "RNODE":
            noise = jax.random.rademacher(noise_key, h.shape, h.dtype)
            field = WithIntegrals(net.body.field, [kinetic_energy, JacobianNorm(noise)])
            solution = solve(field, (h, field.zeros(h)), ts, **options)
            h1, (kinetic, jacobian) = jax.tree.map(lambda y: y[-1], solution.ys)
            extra = jnp.mean(settings.kinetic * kinetic + settings.jacobian * jacobian) / 2
        else:
            solution = solve(net.body.field, h, ts, **options)
            h1 = solution.ys[-1]
        logits = net.logits(h1)
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)
        extra = extra + estimates(settings, penalty, solution)
        return value + extra, {"accuracy": accuracy, "evaluations": solution.stats.evaluations}

    return loss


def on_digits(penalty, settings, folder, progress):
    """Error, evaluations at a tolerance of 1e-5 on test images, and seconds of training."""
    size = classification.Settings(channels=settings.channels, samples=settings.samples)
    task = classification.prepared(digits.task(), size)
    net_key, order_key, key = jax.random.split(jax.random.key(settings.seed), 3)
    net = classification.network("ode-net", task, size, net_key)
    epoch = len(task.images.y) // 32
    steps = settings.epochs * epoch
    rate = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, max(1, min(epoch, steps // 4)), steps)
    optimiser = optax.adam(rate)

    def batches(step):
        i = data.batch_indices(order_key, len(task.images.y), 32, step)
        return task.images.x[i], task.images.y[i]

    _, history = train.fit(
        digits_loss(settings, penalty), optimiser, train.start(net, optimiser, key), batches, steps,
        folder=folder / f"digits-{penalty.lower()}", every=max(1, steps // 4),
        evaluate=lambda net: quality_on_digits(net, *task.test),
        label=f"digits, {penalty}", progress=progress,
    )  # fmt: skip
    return summary(history, "test error")


@eqx.filter_jit
def quality_on_digits(net, x, labels):
    """On test images, at a tolerance of 1e-5."""
    _, logits, stats = classification.at_tolerance(net, x, 1e-5)
    wrong = jnp.mean(jnp.argmax(logits, -1) != labels)
    return {"test error": wrong, "test evaluations": stats.evaluations}


def summary(history, quality: str) -> dict:
    """What is told of a run."""
    return {
        "quality": history[-1][quality],
        "evaluations": history[-1]["test evaluations"],
        "seconds": training_seconds(history),
        "curve": [r["evaluations"] for r in history],
    }


def training_seconds(history) -> float:
    """All steps at their median time: without compilation."""
    laps = np.diff([r["seconds"] for r in history])
    return len(history) * statistics.median(laps) if len(laps) else float("nan")


def flow_loss(settings, penalty):
    """-log p and a penalty, of a flow."""

    def loss(flow, batch, key):
        end_key, noise_key = jax.random.split(key)
        rates = []
        if penalty == "RNODE":
            noise = jax.random.rademacher(noise_key, batch.shape, batch.dtype)
            rates = [kinetic_energy, JacobianNorm(noise)]
        log_prob, integrals, solution = flow.with_options(
            method=settings.method, **solver_options(penalty)
        ).log_prob_and_integrals(batch, rates, end=random_end(settings, penalty, end_key))
        weights = (settings.kinetic, settings.jacobian)
        extra = sum(w * jnp.mean(i) for w, i in zip(weights, integrals))
        extra = extra + estimates(settings, penalty, solution)
        return extra - jnp.mean(log_prob), {"evaluations": solution.stats.evaluations}

    return loss


def on_flow(penalty, settings, folder, progress):
    """Held-out nats, evaluations at a tolerance of 1e-5, and seconds of training."""
    key = jax.random.key(settings.seed)
    field = ConcatSquash(2, width=32, depth=2, key=key)
    flow = ContinuousFlow(field, Normal(2), rtol=1e-4, atol=1e-4)
    held = data.pinwheel(jax.random.key(1234), 2000)

    _, history = fitted(
        flow, flow_loss(settings, penalty), lambda step: data.pinwheel(jax.random.key(step), 256),
        settings.steps, seed=settings.seed, rate=5e-3, last=0.05, parts=5,
        evaluate=lambda flow: quality_of_flow(flow, held),
        folder=folder / f"flow-{penalty.lower()}", label=f"flow, {penalty}", progress=progress,
    )  # fmt: skip
    return summary(history, "nats")


@eqx.filter_jit
def quality_of_flow(flow, held):
    """On held-out points, at a tolerance of 1e-5."""
    tight = flow.with_options(rtol=1e-5, atol=1e-5)
    log_prob, _, solution = tight.log_prob_and_integrals(held)
    return {"nats": -jnp.mean(log_prob), "test evaluations": solution.stats.evaluations}


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """Each penalty, on both."""
    found, rows = {}, []
    for kind, experiment in (("digits", on_digits), ("flow", on_flow)):
        for penalty in settings.listed("penalties"):
            result = found[f"{kind}, {penalty}"] = experiment(penalty, settings, folder, progress)
            shown = "test error" if kind == "digits" else "nats"
            quality = (
                f"{100 * result['quality']:.2f} %"
                if kind == "digits"
                else f"{result['quality']:.3f}"
            )
            none = found[f"{kind}, none"]
            rows.append({
                "run": f"{kind}, {penalty}", "quality": f"{quality} {shown}",
                "evaluations": f"{result['evaluations']:.0f}",
                "fewer": f"{none['evaluations'] / result['evaluations']:.1f}x",
                "training (s)": f"{result['seconds']:.0f}",
            })  # fmt: skip
    save(figure(found, settings), folder / "regularize.png")
    claims = claimed(settings, found) if "RNODE" in settings.listed("penalties") else {}
    notes = (
        "Evaluations of a forward solve on test data, tolerance 1e-5; of the flow (a pinwheel) less\n"
        "nats are better; training without compilation."
    )
    return Results(rows, claims, notes, {"runs": found})


def claimed(settings, found) -> dict[str, bool]:
    """What RNODE is to do to the flow."""
    none, rnode = found["flow, none"], found["flow, RNODE"]
    claims = {
        "RNODE needs no more evaluations than none, on the flow": rnode["evaluations"]
        <= none["evaluations"]
    }
    if settings.steps >= 1000:
        claims |= {
            "at most half of them": 2 * rnode["evaluations"] <= none["evaluations"],
            "at a cost of at most 0.1 nats": rnode["quality"] <= none["quality"] + 0.1,
        }
    return claims


def figure(found, settings):
    """Evaluations over training, and quality against evaluations at the end."""
    plt_figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    for row, (kind, label) in zip(axes, (("digits", "test error (%)"), ("flow", "nats"))):
        for penalty in settings.listed("penalties"):
            result = found[f"{kind}, {penalty}"]
            (line,) = row[0].plot(running_mean(result["curve"]), label=penalty)
            scale = 100 if kind == "digits" else 1
            row[1].plot(
                result["evaluations"], scale * result["quality"], "o", ms=10, color=line.get_color()
            )
            row[1].annotate(f"  {penalty}", (result["evaluations"], scale * result["quality"]))
        row[0].set(xlabel="training step", ylabel="evaluations", title=kind, ylim=(0, None))
        row[1].set(xlabel="evaluations after training", ylabel=label)
        row[1].margins(0.2)
    axes[0, 0].legend()
    return plt_figure
