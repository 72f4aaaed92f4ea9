"""Table 1 and figure 3 of Chen et al. (2018) on MNIST or Fashion-MNIST, 28 x 28.

By default narrow networks and few epochs; --full is the published setting: 64 channels, SGD with
momentum, 160 epochs. Data come from --data DIR, or are fetched once.
"""

import dataclasses
from pathlib import Path

import optax

from jaxode import data
from jaxode.experiments import classification, classification_figures
from jaxode.experiments.classification import ADJOINTS
from jaxode.experiments.experiment import Results, option, save

PUBLISHED = {
    "mlp": ("1.60 %", "0.24M"),
    "resnet": ("0.41 %", "0.60M"),
    "rk-net": ("0.47 %", "0.22M"),
    "ode-net": ("0.42 %", "0.22M"),
}


@dataclasses.dataclass(frozen=True)
class Settings(classification.Settings):
    """Those of both image experiments, and where the images are."""

    epochs: int = option(8, "Passes over the training data.", quick=1, full=160, low=1)
    batch: int = option(32, "Images a step.", quick=16, full=128, low=1)
    channels: int = option(16, "Of the feature maps.", quick=8, full=64, low=1)
    hidden: int = option(300, "Width of the MLP.", quick=16, low=1)
    rate: float = option(2e-2, "Learning rate of the convolutional networks.", full=0.1, low=0.0)
    mlp_rate: float = option(1e-2, "That of the MLP.", full=0.1, low=0.0)
    samples: int = option(8000, "Images to train on; 0: all.", quick=64, full=0, low=0)
    rtol: float = option(
        1e-2, "Tolerance of the solver, relative and absolute.", full=1e-3, low=1e-6, high=1.0
    )
    groups: int = option(8, "Of the group norms.", quick=2, full=32, low=1)
    adjoints: str = option(
        ",".join(ADJOINTS), "Whose memory is measured.", quick="backsolve", words=ADJOINTS
    )
    dataset: str = option("mnist", "Which images.", choices=("mnist", "fashion"))
    data: str = option("", "Folder of the four IDX files; without it they are fetched once.")
    optimiser: str = option(
        "adam", "The published one is sgd.", full="sgd", choices=("adam", "sgd")
    )


def task(settings: Settings) -> classification.Task:
    """Features of 7 x 7; images move by up to 1 pixel (published: 4) in training."""
    images, test = data.mnist(settings.data or None, settings.dataset)
    pad = 4 if settings.optimiser == "sgd" else 1
    return classification.Task(
        images, test, (1, 2, 2), pad, settings.groups, optimiser, (28, 28, 1)
    )


def optimiser(settings, rate, steps, epoch):
    """Adam with a cosine; or as published: SGD, its rate a tenth after 60, 100 and 140 of 160 epochs."""
    if settings.optimiser == "adam":
        warm = max(1, min(epoch // 4, steps // 4))
        return optax.adam(optax.warmup_cosine_decay_schedule(rate / 10, rate, warm, steps))
    falls = {int(steps * part / 160): 0.1 for part in (60, 100, 140)}
    return optax.sgd(optax.piecewise_constant_schedule(rate, falls), momentum=0.9)


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """The networks, trained and measured."""
    images = task(settings)
    nets, histories, numbers, sweep = classification.train_and_measure(
        images, settings, folder, progress, adjoints=("backsolve", "replay")
    )
    save(classification_figures.training(histories), folder / "training.png")
    rows = classification.rows_of(numbers)
    for row, name in zip(rows, numbers):
        row["paper: error"], row["parameters "] = PUBLISHED[name]
    notes = f"{classification.NOTES}\n{len(images.images.y):,} images in the training file"
    notes = f"{notes}, {settings.samples or 'all'} used."
    more = {"networks": numbers, "tolerances": sweep}
    if "ode-net" not in nets:
        return Results(rows, {}, notes, more)
    net, some = nets["ode-net"], sweep[:: max(2, len(sweep) // 2)]
    memory = classification.gradient_memory(
        net, images.images.x[: settings.batch], some, settings.listed("adjoints")
    )
    save(classification_figures.figure_3(sweep, histories["ode-net"]), folder / "figure_3.png")
    save(classification_figures.memory(memory), folder / "memory.png")
    seen = classification.prepared(images, settings).test
    save(classification_figures.between(net, seen), folder / "between.png")
    claims = classification.of_tolerances(sweep) | of_memory(memory)
    if settings.samples != 64:
        claims |= of_networks(numbers)
    return Results(rows, claims, notes, {**more, "memory": memory})


def of_memory(memory: list[dict]) -> dict[str, bool]:
    """The claims on gradients of one trained ODE-Net by several adjoints, the tightest tolerance last."""
    first, last = memory[0], memory[-1]
    growth, claims = {name: last[name] / first[name] for name in ADJOINTS if name in first}, {}
    if "backsolve" in growth:
        claims["The memory of backsolve does not grow with accuracy"] = growth["backsolve"] <= 1.05
    if {"direct", "replay"} <= growth.keys():
        claims["That of direct grows with the steps, that of replay less"] = (
            growth["direct"] > growth["replay"]
        )
    return claims


def of_networks(numbers: dict[str, dict]) -> dict[str, bool]:
    """The claims on the ODE-Net beside those others that were trained."""
    claims = classification.of_parameters(numbers)
    error = {name: row["test error"] for name, row in numbers.items()}
    if "resnet" in error:
        claims["and errs on at most 1 % more of the test images"] = (
            error["ode-net"] <= error["resnet"] + 0.01
        )
    if "mlp" in error:
        claims["ODE-Net errs less than the MLP"] = error["ode-net"] < error["mlp"]
    return claims
