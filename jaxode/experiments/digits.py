"""Table 1 of Chen et al. (2018) on scikit-learn's digits: MLP, ResNet, RK-Net and ODE-Net.

`run` trains the four, and writes into a folder: results.json, a folder for each network with its
checkpoint and metrics.jsonl, and the figures of `digits_figures`.
"""

import dataclasses
import itertools
import json
import shutil
import statistics
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxode import data, train
from jaxode.experiments import digits_figures
from jaxode.experiments.digits_figures import LABELS
from jaxode.nn import NeuralODE, classifier
from jaxode.solve import solve

NAMES = ("mlp", "resnet", "rk-net", "ode-net")
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made of; a folder holds runs of one of these."""

    epochs: int = 24
    seed: int = 0
    adjoint: str = "replay"
    rtol: float = 1e-2
    batch: int = 32
    channels: int = 24
    hidden: int = 128
    blocks: int = 6
    rate: float = 1e-2
    samples: int | None = None  # of the training set; None: all

    def quick(self) -> "Settings":
        """Seconds, to see that everything works; the errors mean nothing."""
        small = dict(epochs=1, batch=16, channels=4, hidden=16, blocks=2, samples=64)
        return dataclasses.replace(self, **small)


def network(name: str, settings: Settings, key):
    """One of the four, in float32, for 8 x 8 images: features of 4 x 4."""
    net = classifier(
        name,
        channels=settings.channels,
        image=(8, 8, 1),
        strides=(1, 2),
        blocks=settings.blocks,
        hidden=settings.hidden,
        groups=1,
        adjoint=settings.adjoint,
        rtol=settings.rtol,
        atol=settings.rtol,
        dtype=jnp.float32,
        key=key,
    )
    if name != "ode-net":
        return net
    # Replay keeps about 2 sqrt(max_steps) states, and these fields take fewer than ten steps.
    return eqx.tree_at(lambda net: net.body, net, net.body.with_options(max_steps=256))


def loss(net, batch, key):
    """Cross entropy of images that are moved by a pixel at random, each time another way."""
    x, labels = batch
    logits, evaluations = net(data.shifted(key, x))
    value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)
    return value, {"accuracy": accuracy, "evaluations": evaluations}


def run(out: str | Path, settings: Settings, *, fresh=False, progress=True) -> dict:
    """Train the four, measure, draw; returns what results.json holds.

    Networks that are trained already are not trained again, one that was interrupted goes on.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    began, out = time.perf_counter(), Path(out)
    earlier = prepare(out, settings, fresh)
    images, test = data.digits()
    images = data.Images(*(part[: settings.samples] for part in images))
    rows, nets, histories = {}, {}, {}
    for name in NAMES:
        nets[name], histories[name], milliseconds = trained(
            name, images, test, settings, out, progress
        )
        if milliseconds is None:
            milliseconds = earlier.get(name, {}).get("ms_per_step")
        batch = images.x[: settings.batch], images.y[: settings.batch]
        rows[name] = {
            "test error": histories[name][-1]["test error"],
            "parameters": parameters(nets[name]),
            "ms_per_step": milliseconds,
            **cost_of_gradient(nets[name], batch),
        }
    sweep = tolerances(nets["ode-net"], test)
    results = {
        "settings": dataclasses.asdict(settings),
        "networks": rows,
        "tolerances": sweep,
        "seconds": time.perf_counter() - began,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    digits_figures.draw(out, histories, sweep, nets["ode-net"], test)
    return results


def prepare(out: Path, settings: Settings, fresh: bool) -> dict:
    """Make the folder; the networks in its results.json, if it has any."""
    path, wanted = out / "settings.json", dataclasses.asdict(settings)
    if fresh:
        for name in NAMES:
            shutil.rmtree(out / name, ignore_errors=True)
    elif path.exists() and (found := json.loads(path.read_text())) != wanted:
        other = ", ".join(f"{k} = {found.get(k)}" for k in wanted if found.get(k) != wanted[k])
        raise ValueError(
            f"{out} holds a run with other settings ({other}): choose another --out, or start over "
            "with --fresh."
        )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=2) + "\n")
    results = out / "results.json"
    return json.loads(results.read_text())["networks"] if results.exists() and not fresh else {}


def trained(name, images, test, settings, out, progress):
    """The network after training, the metrics of its steps, the median ms of a step (or None)."""
    net_key, order_key, shift_key = jax.random.split(jax.random.key(settings.seed), 3)
    net = network(name, settings, net_key)
    size = len(images.y)
    epoch = size // settings.batch
    steps = settings.epochs * epoch
    schedule = optax.warmup_cosine_decay_schedule(
        settings.rate / 10, settings.rate, max(1, min(epoch, steps // 4)), steps
    )
    optimiser = optax.adam(schedule)
    clock = []

    def batches(step):
        clock.append(time.perf_counter())
        i = data.batch_indices(order_key, size, settings.batch, step)
        return images.x[i], images.y[i]

    error = eqx.filter_jit(lambda net: jnp.mean(jnp.argmax(net(test.x)[0], -1) != test.y))
    state, history = train.fit(
        loss,
        optimiser,
        train.start(net, optimiser, shift_key),
        batches,
        steps,
        folder=out / name,
        every=2 * epoch,
        evaluate=lambda net: {"test error": error(net)},
        label=LABELS[name],
        progress=progress,
    )
    laps = [1e3 * (b - a) for a, b in itertools.pairwise(clock[1:])]  # the first one compiles
    return state.model, history, statistics.median(laps) if laps else None


def parameters(net) -> int:
    """The number of weights."""
    return sum(x.size for x in jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array)))


class Counted(eqx.Module):
    """A field that reports each of its evaluations, and each vjp of one, as the program runs."""

    field: eqx.Module
    report: object = eqx.field(static=True)

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


def cost_of_gradient(net, batch) -> dict:
    """Temporary memory (bytes) of the compiled gradient, and how often it evaluates the field.

    `forward_evaluations` is what the solve says; the backward ones are counted as the program runs:
    vector-Jacobian products of the field, and evaluations without one (states that are rebuilt).
    Residual blocks count as one evaluation each, both ways.
    """

    def compiled_gradient(net, batch, **options):
        weights, rest = eqx.partition(net, eqx.is_inexact_array)
        value = lambda weights, batch: loss(eqx.combine(weights, rest), batch, jax.random.key(0))
        gradient = jax.jit(jax.value_and_grad(value, has_aux=True))
        program = gradient.lower(weights, batch).compile(compiler_options=options)
        (_, metrics), _ = jax.block_until_ready(program(weights, batch))
        return program.memory_analysis().temp_size_in_bytes, int(metrics["evaluations"])

    solved = isinstance(getattr(net, "body", None), NeuralODE)
    memory, forward = compiled_gradient(net, batch)
    cost = {"gradient_bytes": memory}
    if not solved:
        blocks = len(net.body.blocks) if hasattr(net, "body") else 0
        return {
            **cost,
            "forward_evaluations": blocks,
            "backward_vjps": blocks,
            "rebuilding_evaluations": 0,
        }
    counts = [0, 0]

    def report(is_vjp, t):
        counts[int(is_vjp)] += 1

    one = jax.tree.map(lambda x: x[:1], batch)
    field = lambda net: net.body.field
    counted = eqx.tree_at(field, net, Counted(net.body.field, report))
    _, ran = compiled_gradient(counted, one, xla_backend_optimization_level=0)  # quick to compile
    jax.effects_barrier()
    return {
        **cost,
        "forward_evaluations": forward,
        "backward_vjps": counts[1],
        "rebuilding_evaluations": counts[0] - ran,
    }


@eqx.filter_jit
def at_tolerance(net, x, tolerance):
    """The features at t1, the logits, and the evaluations, at a tolerance that is traced."""
    body = net.body
    times = [body.t0, body.t1]
    solution = solve(body.field, net.features(x), times, rtol=tolerance, atol=tolerance)
    return solution.ys[-1], net.logits(solution.ys[-1]), solution.stats.evaluations


def tolerances(net, test) -> list[dict]:
    """One trained ODE-Net, solved at several tolerances on the test images (the paper's figure 3).

    `feature error` is the root mean square of the features at t1 minus those at tolerance 1e-6.
    """
    solved = lambda tolerance: jax.block_until_ready(
        at_tolerance(net, test.x, jnp.asarray(tolerance, jnp.float32))
    )
    exact = solved(1e-6)[0]
    rows = []
    for tolerance in TOLERANCES:
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            features, logits, evaluations = solved(tolerance)
            seconds.append(time.perf_counter() - began)
        rows.append(
            {
                "tolerance": tolerance,
                "evaluations": int(evaluations),
                "feature error": float(jnp.sqrt(jnp.mean((features - exact) ** 2))),
                "seconds": min(seconds),
                "test error": float(np.mean(np.argmax(np.asarray(logits), -1) != test.y)),
            }
        )
    return rows


def table(results: dict) -> str:
    """The results as text, one line a network."""
    head = ("", "test error", "parameters", "ms/step", "grad memory", "forward", "backward")
    lines = [head]
    for name, row in results["networks"].items():
        ms = row["ms_per_step"]
        backward, rebuilt = row["backward_vjps"], row["rebuilding_evaluations"]
        lines.append(
            (
                LABELS[name],
                f"{100 * row['test error']:.2f} %",
                f"{row['parameters']:,}",
                "-" if ms is None else f"{ms:.1f}",
                f"{row['gradient_bytes'] / 2**20:.2f} MiB",
                f"{row['forward_evaluations']}",
                f"{backward}" + (f" + {rebuilt}" if rebuilt else ""),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths)))
            for line in lines]  # fmt: skip
    note = (
        "forward: evaluations of the field (or residual blocks); backward: vjps of it, +\n"
        "evaluations that rebuild states between checkpoints."
    )
    return "\n".join([*text, note, f"{results['seconds']:.0f} s in all"])
