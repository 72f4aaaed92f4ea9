"""Table 1 and figure 3 of Chen et al. (2018): MLP, ResNet, RK-Net and ODE-Net on images.

`train_and_measure` does the work for `digits` and `mnist`, which say what the images are.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxode import data, train
from jaxode.experiments.classification_figures import LABELS
from jaxode.experiments.experiment import Options, option, parameters
from jaxode.integrate import solve
from jaxode.nn import classifier

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}  # the memory is the same at every level
ADJOINTS = ("direct", "replay", "backsolve")
METHODS = ("bosh3", "dopri5", "tsit5", "dop853")
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """What both image experiments can be asked for."""

    epochs: int = option(24, "Passes over the training data.", quick=1, low=1)
    batch: int = option(32, "Images a step.", quick=16, low=1)
    channels: int = option(24, "Of the feature maps.", quick=8, low=1)
    hidden: int = option(128, "Width of the MLP.", quick=16, low=1)
    blocks: int = option(6, "Of the ResNet.", quick=1, low=1)
    rate: float = option(1e-2, "Learning rate of the convolutional networks.", low=0.0)
    mlp_rate: float = option(1e-2, "That of the MLP.", low=0.0)
    samples: int = option(0, "Images to train on; 0: all.", quick=64, low=0)
    tests: int = option(0, "Images to test on; 0: all.", quick=100, low=0)
    tightest: float = option(
        1e-5,
        "Of the tolerances that the trained ODE-Net is solved at.",
        quick=1e-2,
        low=1e-5,
        high=1e-2,
    )
    adjoint: str = option(
        "replay", "How the ODE-Net is differentiated.", choices=("replay", "backsolve")
    )
    method: str = option("tsit5", "Of the ODE-Net's solver.", quick="bosh3", choices=METHODS)
    rtol: float = option(
        1e-2, "Tolerance of the ODE-Net's solver, relative and absolute.", low=1e-6, high=1.0
    )
    networks: str = option(
        ",".join(LABELS), "Which of the four; to choose a rate, or for more seeds.", words=LABELS
    )
    validate: bool = option(
        False, "Keep the test images unseen: hold out a fifth of the training images instead."
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """Images, and how a network takes them in."""

    images: data.Images
    test: data.Images
    strides: tuple[int, ...]
    pad: int  # how far training images are moved at random, in pixels
    groups: int | None
    optimiser: Callable  # (settings, rate, steps, steps of an epoch) -> optax optimiser
    size: tuple[int, int, int]


def network(name: str, task: Task, settings: Settings, key):
    """One of the four, in float32."""
    net = classifier(
        name,
        channels=settings.channels,
        image=task.size,
        strides=task.strides,
        blocks=settings.blocks,
        hidden=settings.hidden,
        groups=task.groups,
        adjoint=settings.adjoint,
        rtol=settings.rtol,
        atol=settings.rtol,
        dtype=jnp.float32,
        key=key,
    )
    if name != "ode-net":
        return net
    # Replay keeps about 2 sqrt(max_steps) states, and these fields take fewer than ten steps.
    return eqx.tree_at(
        lambda net: net.body, net, net.body.with_options(method=settings.method, max_steps=256)
    )


def loss_of(pad: int):
    """The loss on images that are moved at random, each time another way."""

    def loss(net, batch, key):
        """Cross entropy."""
        x, labels = batch
        logits, evaluations = net(data.shifted(key, x, pad))
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)
        return value, {"accuracy": accuracy, "evaluations": evaluations}

    return loss


def prepared(task: Task, settings: Settings) -> Task:
    """The images that the settings ask for."""
    images, test = task.images, task.test
    if settings.validate:
        order = np.random.default_rng(0).permutation(len(images.y))
        held = order[: len(order) // 5]
        test = data.Images(images.x[held], images.y[held])
        images = data.Images(images.x[order[len(held) :]], images.y[order[len(held) :]])
    images = data.Images(*(part[: settings.samples or None] for part in images))
    test = data.Images(*(part[: settings.tests or None] for part in test))
    return dataclasses.replace(task, images=images, test=test)


def train_and_measure(task: Task, settings: Settings, folder: Path, progress: bool, adjoints=()):
    """Train those asked for and measure them: (networks, histories, rows of numbers, sweep of tolerances).

    The sweep is that of the ODE-Net, and empty without it.
    """
    task = prepared(task, settings)
    numbers, nets, histories = {}, {}, {}
    for name in [name for name in LABELS if name in settings.listed("networks")]:
        nets[name], histories[name], memory = trained(name, task, settings, folder / name, progress)
        numbers[name] = {
            "test error": histories[name][-1]["test error"],
            "parameters": parameters(nets[name]),
            "ms": step_milliseconds(histories[name]),
            "step_bytes": memory,
            **evaluations(nets[name], histories[name]),
        }
    if "ode-net" not in nets:
        return nets, histories, numbers, []
    net, x = nets["ode-net"], task.images.x[: settings.batch]
    counters = {
        adjoint: counter(net, x, adjoint)
        for adjoint in dict.fromkeys([settings.adjoint, *adjoints])
    }
    numbers["ode-net"] |= counters[settings.adjoint](settings.rtol)
    accuracies = [tolerance for tolerance in TOLERANCES if tolerance >= settings.tightest]
    sweep = tolerances(net, task.test, accuracies, {a: counters[a] for a in adjoints})
    return nets, histories, numbers, sweep


def rows_of(numbers: dict) -> list[dict]:
    """The table: a line for each network."""
    return [
        {
            "network": LABELS[name],
            "test error": f"{100 * row['test error']:.2f} %",
            "parameters": f"{row['parameters']:,}",
            "ms/step": f"{row['ms']:.1f}",
            "step memory": f"{row['step_bytes'] / 2**20:.2f} MiB",
            "forward": str(row["forward_evaluations"]),
            "backward": str(row["backward_vjps"])
            + (f" + {row['rebuilding_evaluations']}" if row["rebuilding_evaluations"] else ""),
        }
        for name, row in numbers.items()
    ]


def of_tolerances(sweep: list[dict]) -> dict[str, bool]:
    """The claim on one trained ODE-Net, solved at several tolerances, the tightest last."""
    first, last = sweep[0], sweep[-1]
    costs_more = last["evaluations"] > first["evaluations"]
    errs_less = last["feature error"] < first["feature error"]
    return {"A tighter tolerance costs more evaluations and errs less": costs_more and errs_less}


def of_parameters(numbers: dict[str, dict]) -> dict[str, bool]:
    """The claim on the sizes of the ODE-Net and the ResNet; none if either was not trained."""
    if not {"ode-net", "resnet"} <= numbers.keys():
        return {}
    ode_net, resnet = (numbers[name]["parameters"] for name in ("ode-net", "resnet"))
    return {"ODE-Net has at most half the parameters of ResNet": 2 * ode_net <= resnet}


NOTES = (
    "step memory: temporary memory of the compiled training step;\n"
    "forward: evaluations of the field (or residual blocks); backward: vjps of it, +\n"
    "evaluations that rebuild states between checkpoints."
)


def trained(name, task, settings, folder, progress):
    """The network after training, the metrics of its steps, and a step's temporary bytes."""
    net_key, order_key, shift_key = jax.random.split(jax.random.key(settings.seed), 3)
    net = network(name, task, settings, net_key)
    size = len(task.images.y)
    epoch = size // settings.batch
    steps = settings.epochs * epoch
    rate = settings.mlp_rate if name == "mlp" else settings.rate
    optimiser = optax.flatten(task.optimiser(settings, rate, steps, epoch))  # less to compile

    def batches(step):
        i = data.batch_indices(order_key, size, settings.batch, step)
        return task.images.x[i], task.images.y[i]

    wrong = eqx.filter_jit(lambda net, x, y: jnp.sum(jnp.argmax(net(x)[0], -1) != y))

    def test_error(net):
        x, y = task.test
        parts = [slice(i, i + 500) for i in range(0, len(y), 500)]
        return {"test error": sum(int(wrong(net, x[i], y[i])) for i in parts) / len(y)}

    loss, state = loss_of(task.pad), train.start(net, optimiser, shift_key)
    step = train.train_step(loss, optimiser).lower(state, batches(0)).compile()
    state, history = train.fit(
        loss, optimiser, state, batches, steps, step=step, folder=folder,
        every=max(1, min(2 * epoch, steps // 4)), evaluate=test_error, label=LABELS[name],
        progress=progress,
    )  # fmt: skip
    program: Any = step.compiled
    return state.model, history, program.memory_analysis().temp_size_in_bytes


def step_milliseconds(history) -> float:
    """The median time of a step; the first one compiles."""
    laps = [1e3 * (b["seconds"] - a["seconds"]) for a, b in itertools.pairwise(history[1:])]
    return statistics.median(laps) if laps else float("nan")


class Counted(eqx.Module):
    """A field that reports each of its evaluations, and each vjp of one, as the program runs."""

    field: eqx.Module
    report: Callable = eqx.field(static=True)

    def __call__(self, y, t):
        weights, rest = eqx.partition(self.field, eqx.is_inexact_array)
        report = self.report

        @jax.custom_vjp
        def evaluate(weights, y, t):
            jax.debug.callback(
                report, False, t
            )  # t: a call that depends on nothing leaves the loop
            return eqx.combine(weights, rest)(y, t)

        def forwards(weights, y, t):
            return evaluate(weights, y, t), (weights, y, t)

        def backwards(residuals, k_bar):
            jax.debug.callback(report, True, residuals[-1])
            plain = lambda weights, y, t: eqx.combine(weights, rest)(y, t)
            return jax.vjp(plain, *residuals)[1](k_bar)

        evaluate.defvjp(forwards, backwards)
        return evaluate(weights, y, t)


def evaluations(net, history) -> dict:
    """What a network differentiated through its steps evaluates: as many vjps as evaluations.

    A residual block counts as one evaluation. For what an adjoint evaluates see `counter`.
    """
    blocks = getattr(getattr(net, "body", None), "blocks", [])
    forward = len(blocks) or int(history[-1]["evaluations"])
    return {"forward_evaluations": forward, "backward_vjps": forward, "rebuilding_evaluations": 0}


def at_tolerance(net, x, tolerance, adjoint="replay"):
    """The features at t1, the logits, and the evaluations, at a tolerance that may be traced."""
    body = net.body
    solution = solve(
        body.field, net.features(x), [body.t0, body.t1], rtol=tolerance, atol=tolerance,
        adjoint=adjoint, max_steps=256, method=dict(body.options)["method"],
    )  # fmt: skip
    return solution.ys[-1], net.logits(solution.ys[-1]), solution.stats


def tolerances(net, test, accuracies, counters) -> list[dict]:
    """One trained ODE-Net, solved at several tolerances on test images (the paper's figure 3).

    `feature error` is the root mean square of the features at t1 minus those at tolerance 1e-6;
    `backward` is what each of the counters says, of a forward and a backward pass.
    """
    x, y = test.x[:500], test.y[:500]
    program = eqx.filter_jit(at_tolerance)
    solved = lambda tolerance: jax.block_until_ready(
        program(net, x, jnp.asarray(tolerance, jnp.float32))
    )
    exact = solved(1e-6)[0]
    rows = []
    for tolerance in accuracies:
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            features, logits, stats = solved(tolerance)
            seconds.append(time.perf_counter() - began)
        rows.append(
            {
                "tolerance": tolerance,
                "evaluations": int(stats.evaluations),
                "steps": int(stats.accepted + stats.rejected),
                "feature error": float(jnp.sqrt(jnp.mean((features - exact) ** 2))),
                "seconds": min(seconds),
                "test error": float(np.mean(np.argmax(np.asarray(logits), -1) != y)),
                "backward": {adjoint: count(tolerance) for adjoint, count in counters.items()},
            }
        )
    return rows


def counter(net, x, adjoint):
    """A function tolerance -> how often a gradient evaluates the field, counted as it runs.

    Forward, what the solve says; backward, vector-Jacobian products, and evaluations without one
    (of states that are rebuilt).
    """
    counts = [0, 0]

    def report(is_vjp, t):
        counts[int(is_vjp)] += 1

    net = eqx.tree_at(lambda net: net.body.field, net, Counted(net.body.field, report))
    weights, rest = eqx.partition(net, eqx.is_inexact_array)

    def value(weights, tolerance):
        _, logits, stats = at_tolerance(eqx.combine(weights, rest), x, tolerance, adjoint)
        return jnp.mean(jax.nn.log_softmax(logits)[:, 0]), stats.evaluations

    gradient = jax.jit(jax.grad(value, has_aux=True), compiler_options=QUICK_TO_COMPILE)

    def count(tolerance):
        counts[:] = 0, 0
        _, forward = jax.block_until_ready(gradient(weights, jnp.asarray(tolerance, jnp.float32)))
        jax.effects_barrier()
        return {
            "forward_evaluations": int(forward),
            "backward_vjps": counts[1],
            "rebuilding_evaluations": counts[0] - int(forward),
        }

    return count


def gradient_memory(net, x, sweep, adjoints=ADJOINTS) -> list[dict]:
    """Temporary bytes of the compiled gradient of the ODE block against accuracy, for each adjoint.

    `max_steps` is what each tolerance of the sweep needs, for that is what room is made for.
    """
    features = net.features(jnp.asarray(x))
    weights, rest = eqx.partition(net.body, eqx.is_inexact_array)

    def memory(tolerance, steps, adjoint):
        options = dict(rtol=tolerance, atol=tolerance, adjoint=adjoint, max_steps=steps)

        def value(weights, features):
            body = eqx.combine(weights, rest).with_options(**options)
            return jnp.sum(body(features) ** 2)

        gradient = jax.jit(jax.grad(value, (0, 1))).lower(weights, features)
        program: Any = gradient.compile(QUICK_TO_COMPILE)
        return program.memory_analysis().temp_size_in_bytes

    rows = []
    for row in sweep:
        asked = {"tolerance": row["tolerance"], "steps": row["steps"]}
        rows.append(asked | {a: memory(**asked, adjoint=a) for a in adjoints})
    return rows
