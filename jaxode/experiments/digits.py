"""Train MLP, ResNet, RK-Net and ODE-Net on 8 x 8 digits (table 1 of Chen et al. 2018).

The 1,797 digits come with scikit-learn. Prints a table and writes results.json, metrics and
figures. Ctrl-C keeps what was done; the same command goes on from there.
"""

import dataclasses
from pathlib import Path

import optax

from jaxode import data
from jaxode.experiments import classification, classification_figures
from jaxode.experiments.experiment import Results, save


@dataclasses.dataclass(frozen=True)
class Settings(classification.Settings):
    """Those of both image experiments; the defaults are for these digits."""


def task() -> classification.Task:
    """Features of 4 x 4; images move by a pixel in training."""
    images, test = data.digits()
    return classification.Task(images, test, (1, 2), 1, 1, optimiser, (8, 8, 1))


def optimiser(settings, rate, steps, epoch):
    """Adam, its rate warmed up for an epoch and then falling as a cosine."""
    rate = optax.warmup_cosine_decay_schedule(
        rate / 10, rate, max(1, min(epoch, steps // 4)), steps
    )
    return optax.adam(rate)


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """The four networks, trained and measured."""
    images = task()
    nets, histories, numbers, sweep = classification.train_and_measure(
        images, settings, folder, progress
    )
    save(classification_figures.training(histories), folder / "training.png")
    rows = classification.rows_of(numbers)
    more = {"networks": numbers, "tolerances": sweep}
    if "ode-net" not in nets:
        return Results(rows, {}, classification.NOTES, more)
    save(classification_figures.tolerance(sweep), folder / "tolerance.png")
    seen = classification.prepared(images, settings).test
    save(classification_figures.between(nets["ode-net"], seen), folder / "between.png")
    claims = classification.of_tolerances(sweep)
    if not settings.samples:
        error = numbers["ode-net"]["test error"]
        claims["ODE-Net errs on at most 2 % of the test images"] = error <= 0.02
        claims |= classification.of_parameters(numbers)
    return Results(rows, claims, classification.NOTES, more)
