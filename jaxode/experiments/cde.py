"""Neural controlled differential equations on series with missing values (arXiv 2005.08926).

A state that is driven by the path of a series, dz = f(z) dX, for three kinds of path (arXiv 2106.11028),
against a GRU with time differences and an ODE-RNN of about as many parameters, which read the same values,
when more and more of these are left out. It learns in forty steps which way spirals turn, which these two do
not; in a hundred steps on the vowels these two are better, and take a fraction of the time.
"""

import bisect
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import lax

from jaxode import data, odeint, train
from jaxode.experiments.classification import step_milliseconds
from jaxode.experiments.experiment import Options, Results, adam, option, save
from jaxode.nn import MLPField, NeuralCDE, Series, control_path
from jaxode.nn.controlled import INTERPOLATIONS
from jaxode.nn.fields import affine
from jaxode.nn.latent import GRUCell, clean, components_seen
from jaxode.nn.neural_ode import last

LABELS = {
    "backward_hermite": "CDE, Hermite cubic",
    "linear": "CDE, linear",
    "rectilinear": "CDE, rectilinear",
    "gru": "GRU, time differences",
    "ode-rnn": "ODE-RNN",
}
STEPS = dict(method="rk4", dt=1.0, max_steps=2)  # one step from knot to knot


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """Which series, how much of them is left out, and how long."""

    data: str = option(
        "JapaneseVowels", "Of the archive of UEA and UCR, or made.", quick="spirals",
        choices=("JapaneseVowels", "BasicMotions", "spirals"),
    )  # fmt: skip
    files: str = option("", "Folder of NAME_TRAIN.ts and NAME_TEST.ts; else those of sktime.")
    dropped: str = option("0,30,50,70", "Values left out, in percent.", quick="0,50", words=int)
    paths: str = option(
        ",".join(INTERPOLATIONS), "Of the CDEs.", quick="backward_hermite", words=INTERPOLATIONS
    )
    seeds: int = option(
        3, "Runs of each model, each with weights of its own.", quick=1, full=5, low=1
    )
    steps: int = option(100, "Steps of training.", quick=40, full=3000, low=1)
    batch: int = option(64, "Series a step.", quick=32, low=1)
    hidden: int = option(16, "Of the CDE's state.", quick=8, full=32, low=1)
    width: int = option(32, "Of its field.", quick=16, low=1)
    rate: float = option(1e-2, "Learning rate.", low=0.0)


class Controlled(eqx.Module):
    """A neural CDE that makes the path of a series itself."""

    model: NeuralCDE
    path: str = eqx.field(static=True)

    def __call__(self, series: Series):
        control = control_path(series, self.path, counts=1 / series.times.shape[1])
        solution = self.model.solve(control)
        return affine(self.model.head, last(solution)), solution.stats.evaluations


class Recurrent(eqx.Module):
    """A GRU that reads values, which of them there are, and the time since the last ones.

    With a field it is an ODE-RNN (arXiv 1907.03907): from point to point its state follows dh/dt = field(h),
    by a step of RK4.
    """

    cell: GRUCell
    field: Any  # an MLPField, or None
    head: eqx.nn.Linear

    def __init__(self, size: int, classes: int, hidden: int, ode: bool, key):
        keys = jax.random.split(key, 3)
        self.cell = GRUCell(2 * size + 1, hidden, key=keys[0])
        self.field = (
            MLPField(hidden, width=hidden, depth=1, time=False, key=keys[1]) if ode else None
        )
        self.head = eqx.nn.Linear(hidden, classes, key=keys[2])

    def __call__(self, series: Series):
        seen = components_seen(series)
        there = jnp.any(seen, axis=-1)
        before = lambda x: jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
        times = series.times
        since = times - before(lax.cummax(jnp.where(there, times, times[:, :1]), axis=1))
        inputs = jnp.concatenate(
            [clean(series), seen.astype(times.dtype), since[..., None]], axis=-1
        )

        def step(h, point):
            x, there, gap = point
            h = h if self.field is None else self.between(h, gap)
            return jnp.where(there[:, None], self.cell(x, h), h), None

        along = lambda x: jnp.moveaxis(x, 1, 0)
        start = jnp.zeros((len(times), self.head.in_features), times.dtype)
        h, _ = lax.scan(step, start, (along(inputs), along(there), along(times - before(times))))
        return affine(self.head, h), jnp.asarray(times.shape[1] * (1 if self.field is None else 4))

    def between(self, h, gap):
        """The state after gaps that differ from series to series."""
        field = lambda h, s, gap: gap[:, None] * self.field(h, s)
        return odeint(field, h, [0.0, 1.0], gap, method="rk4", dt=1.0, adjoint="direct")[-1]


def models(settings: Settings, train_set: data.LabelledSeries) -> dict[str, Callable]:
    """Functions from a key to a model: the CDEs, and recurrent networks of about as many parameters."""
    size, classes = train_set.series.values.shape[-1], int(train_set.y.max()) + 1

    def cde(path, key):
        net = NeuralCDE(
            1 + 2 * size, classes, hidden=settings.hidden, width=settings.width, key=key, **STEPS
        )
        return Controlled(net, path)

    makes = {path: lambda key, path=path: cde(path, key) for path in settings.listed("paths")}
    wanted = weights(makes[settings.listed("paths")[0]])
    for name, ode in (("gru", False), ("ode-rnn", True)):
        make = lambda hidden, key, ode=ode: Recurrent(size, classes, hidden, ode, key)
        sized = lambda hidden, make=make: weights(lambda key: make(hidden, key))
        hidden = 1 + bisect.bisect_left(range(1, 512), wanted, key=sized)
        hidden = min(max(1, hidden - 1), hidden, key=lambda hidden: abs(sized(hidden) - wanted))
        makes[name] = lambda key, make=make, hidden=hidden: make(hidden, key)
    return makes


def weights(make: Callable) -> int:
    """The number of weights of a model, which is not made."""
    return sum(x.size for x in jax.tree.leaves(eqx.filter_eval_shape(make, jax.random.key(0))))


def parts(settings: Settings) -> dict[int, tuple[data.LabelledSeries, data.LabelledSeries]]:
    """For each percentage the series to train and to test on; what is left out at one is at larger ones."""
    if settings.data == "spirals":
        keys = jax.random.split(jax.random.key(settings.seed))
        whole = data.turning(keys[0], 500), data.turning(keys[1], 500)
    else:
        whole = data.time_series(settings.data, settings.files or None)
    percents = list(map(int, settings.listed("dropped")))
    if max(percents) >= 100:
        raise ValueError(f"--dropped is a list of percentages below 100; got {settings.dropped}.")

    keys = jax.random.split(jax.random.key(settings.seed + 1))

    def left(i, percent):
        series = data.dropped(keys[i], whole[i].series, percent / 100)
        return data.LabelledSeries(series, whole[i].y)

    return {percent: (left(0, percent), left(1, percent)) for percent in percents}


def loss(model, batch, key):
    """Cross entropy."""
    series, labels = batch
    logits, evaluations = model(series)
    value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)
    return value, {"accuracy": accuracy, "evaluations": evaluations}


@eqx.filter_jit
def accuracy(model, test_set):
    return loss(model, test_set, None)[1]["accuracy"]


def trained(name, make, sets, settings, folder, progress) -> dict[str, Any]:
    """Accuracies (percent) for each percentage and seed, and what a step takes: one program for all."""
    optimiser = adam(settings.steps, settings.rate, last=0.05, clip=1.0)
    step, accuracies, laps, history = None, {}, [], []
    for percent, (train_set, test_set) in sets.items():
        accuracies[percent] = []
        for seed in range(settings.seed, settings.seed + settings.seeds):
            keys = jax.random.split(jax.random.key(seed), 3)
            size = len(train_set.y)

            def batches(n, key=keys[0], train_set=train_set, size=size):
                i = data.batch_indices(key, size, min(settings.batch, size), n)
                return jax.tree.map(lambda x: x[i], train_set)

            state = train.start(make(keys[1]), optimiser, keys[2])
            if step is None:
                step = train.train_step(loss, optimiser).lower(state, batches(0)).compile()
            state, history = train.fit(
                loss, optimiser, state, batches, settings.steps, step=step, progress=progress,
                folder=folder / f"{name}-{percent}-{seed}", every=max(1, settings.steps // 4),
                label=f"{LABELS[name]}, {percent} % left out, seed {seed}",
            )  # fmt: skip
            accuracies[percent].append(100 * float(accuracy(state.model, test_set)))
            laps.append(step_milliseconds(history))
    program: Any = step.compiled if step else None
    return {
        "accuracy": accuracies,
        "parameters": weights(make),
        "ms": statistics.median(laps),
        "evaluations": int(history[-1]["evaluations"]),
        "bytes": program.memory_analysis().temp_size_in_bytes,
    }


def against(found, gru) -> str:
    """At which percentages all runs are better than all of the GRU, or worse."""
    better = [str(p) for p, runs in found.items() if min(runs) > max(gru[p])]
    worse = [str(p) for p, runs in found.items() if max(runs) < min(gru[p])]
    words = {"better": better, "worse": worse}
    said = [f"{word} at {', '.join(where)} %" for word, where in words.items() if where]
    return "; ".join(said) or "level"


def rows_of(found: dict) -> list[dict]:
    """The table: a line for each model."""
    spread = lambda runs: f" ({min(runs):.1f} to {max(runs):.1f})" if len(runs) > 1 else ""
    cell = lambda runs: f"{statistics.mean(runs):.1f}{spread(runs)}"
    return [
        {
            "accuracy (%), left out:": LABELS[name],
            **{f"{percent} %": cell(runs) for percent, runs in row["accuracy"].items()},
            "against the GRU": ""
            if name == "gru"
            else against(row["accuracy"], found["gru"]["accuracy"]),
            "parameters": f"{row['parameters']:,}",
            "ms/step": f"{row['ms']:.1f}",
            "evaluations": str(row["evaluations"]),
            "step memory": f"{row['bytes'] / 2**20:.2f} MiB",
        }
        for name, row in found.items()
    ]


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """All fits, the table and the figure."""
    sets = parts(settings)
    train_set, test_set = next(iter(sets.values()))
    makes = models(settings, train_set)
    found = {
        name: trained(name, make, sets, settings, folder, progress) for name, make in makes.items()
    }
    counts = np.bincount(test_set.y)
    most = 100 * counts.max() / counts.sum()
    sizes = [row["parameters"] for row in found.values()]
    lowest = min(
        min(runs) for path in settings.listed("paths") for runs in found[path]["accuracy"].values()
    )
    claims = {
        f"Every CDE, whatever is left out, beats the most frequent class ({most:.1f} %)": lowest
        > most,
        "The models have as many parameters, within 10 %": max(sizes) < 1.1 * min(sizes),
    }
    notes = (
        f"{settings.data}, {len(test_set.y)} test series, mean of {settings.seeds} seeds (least to most). "
        "Better and worse: all\nruns than all of the GRU. Evaluations: of the field, or of the GRU's cell, to "
        "read a series.\nStep memory: temporary memory of the compiled training step."
    )
    save(figure(found, sets, settings), folder / "cde.png")
    return Results(rows_of(found), claims, notes, {"models": found})


def figure(found, sets, settings):
    """Accuracy against what is left out; and the paths of one component of a series."""
    plt_figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=(2, 3))
    for i, (name, row) in enumerate(found.items()):
        percents = np.array(list(row["accuracy"])) + 0.6 * (i - len(found) / 2)  # side by side
        runs = np.array(list(row["accuracy"].values()))
        middle = runs.mean(axis=1)
        spread = np.abs([runs.min(axis=1) - middle, runs.max(axis=1) - middle])
        style = "--" if name in ("gru", "ode-rnn") else "-"
        left.errorbar(
            percents, middle, spread, fmt=f"o{style}", ms=5, capsize=3, label=LABELS[name]
        )
    left.set(xlabel="values left out (%)", ylabel="test accuracy (%)", title=settings.data)
    left.legend(fontsize=10)
    series = jax.tree.map(lambda x: x[:1], list(sets.values())[-1][1].series)
    there = components_seen(series)[0, :, 0]
    for path in settings.listed("paths"):
        control = control_path(series, path)
        points = np.asarray(control(np.linspace(0, control.ts[-1], 2000, dtype=np.float32)))[:, 0]
        right.plot(points[:, 0], points[:, 1], lw=1.6, label=path.replace("_", " "))
    right.plot(series.times[0][there], series.values[0, there, 0], "o", color="black", label="seen")
    percent = list(sets)[-1]
    right.set(xlabel="time (of the longest series)", ylabel="first component (standardised)")
    right.set_title(f"Paths of one series, {percent} % left out")
    right.legend(fontsize=10)
    return plt_figure
