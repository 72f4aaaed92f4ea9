"""Flow matching: fields of flows learnt without a solve, beside maximum likelihood.

The same field is trained by likelihood and along three probability paths, on point clouds and on digits
given their class; then sampled by several methods with more and more evaluations.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from jaxode import data, solve
from jaxode.experiments.experiment import Options, Results, fitted, option, parameters, save
from jaxode.experiments.flow import CLOUDS, blank, tight
from jaxode.nn import ConcatSquash, ContinuousFlow, Normal, diffusion_path, flow_matching_loss

KINDS = {  # how a field is trained: None by maximum likelihood, else options of the loss
    "likelihood": None,
    "linear": {},
    "optimal": {"optimal": True},
    "diffusion": {"path": diffusion_path()},
}
METHODS = {"euler": 1, "midpoint": 2, "rk4": 4}  # with equal steps, and the evaluations of one
BUDGETS = (4, 8, 16, 32, 64)  # evaluations of these
TIMES = np.linspace(0, 1, 11, dtype=np.float32)  # of the paths that are drawn
TOLERANCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of the method that chooses its steps
SHOWN = 8  # evaluations: a budget that the table shows
PIXELS, LEVELS = 64, 17  # of a digit, each a whole number from 0 to 16


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """How long, how wide, and on which clouds."""

    steps: int = option(4000, "Steps of matching on a cloud.", quick=120, full=50_000, low=1)
    likelihood_steps: int = option(
        600, "Steps of likelihood on a cloud.", quick=5, full=10_000, low=1
    )
    digit_steps: int = option(8000, "Steps of matching on digits.", quick=50, full=40_000, low=1)
    digit_likelihood_steps: int = option(
        150, "Steps of likelihood on digits.", quick=2, full=5000, low=1
    )
    clouds: str = option(
        "circles,checkerboard", "Of " + ", ".join(CLOUDS), quick="circles", full=",".join(CLOUDS),
        words=tuple(CLOUDS),
    )  # fmt: skip
    fits: str = option(
        ",".join(KINDS), "Of " + ", ".join(KINDS) + ", on clouds.",
        quick="likelihood,optimal,diffusion", words=tuple(KINDS),
    )  # fmt: skip
    digit_fits: str = option(
        ",".join(KINDS), "The same, on digits.", quick="optimal", words=tuple(KINDS)
    )
    methods: str = option(
        "euler,midpoint,rk4", "Of euler, midpoint, rk4, with equal steps.", quick="euler", words=tuple(METHODS),
    )  # fmt: skip
    method: str = option(
        "tsit5", "That chooses its steps.", quick="bosh3", choices=("tsit5", "dopri5", "bosh3")
    )
    width: int = option(64, "Of the field on clouds.", quick=32, low=1)
    depth: int = option(3, "Hidden layers of both fields.", quick=2, low=1)
    digit_width: int = option(128, "Of the field on digits.", quick=32, full=512, low=1)
    batch: int = option(256, "Samples a step, on clouds; half on digits.", quick=128, low=2)
    samples: int = option(2000, "Of each cloud, to measure with.", quick=500, low=2)
    digits: int = option(360, "Held-out digits to measure with.", quick=60, low=10, high=360)
    draws: int = option(4, "Samples for each of these digits.", quick=1, low=1)


def loss_by(kind):
    """The loss of one way of training, of batches (x, context); the context of clouds is None."""

    def likelihood(flow, batch, key):
        x, context = batch
        key = None if context is None else key  # an exact trace in two dimensions, else an estimate
        return -jnp.mean(flow.log_prob(x, context=context, key=key)), {}

    def matching(flow, batch, key):
        x, context = batch
        return flow_matching_loss(flow, x, key, context=context, **KINDS[kind]), {}

    return likelihood if KINDS[kind] is None else matching


def untrained(field, base, settings):
    """The flow that every way of training begins with."""
    options = dict(method=settings.method, rtol=1e-3, atol=1e-3, max_steps=1024)
    return ContinuousFlow(field, base, **options)


def trained(kind, flow, batches, steps, name, settings, folder, progress):
    """A flow after its training, and the median time of a step."""
    name = f"{name}-{kind}"
    flow, history = fitted(
        flow, loss_by(kind), batches, steps, seed=settings.seed, rate=5e-3, last=0.01, clip=5.0,
        folder=folder / name, label=name, progress=progress,
    )  # fmt: skip
    laps = np.diff([record["seconds"] for record in history])
    return flow, {"steps": steps, "ms a step": 1e3 * statistics.median(laps) if len(laps) else 0.0}


@eqx.filter_jit
def nats(flow, x, context=None, key=None):
    """-log p of each sample, solved tightly; an unbiased estimate if a key is given."""
    return -tight(flow).log_prob(x, context=context, key=key)


@eqx.filter_jit
def carried(flow, z, context, method, dt, tolerance):
    """The paths of samples z of the base, and their evaluations: in steps of dt, or to a tolerance."""
    how = dict(rtol=tolerance, atol=tolerance) if dt is None else dict(dt=dt)
    field = flow.given(context)
    solution = solve(field, z, TIMES, method=method, max_steps=1024, **how)
    return solution.ys, solution.stats.evaluations


def curves(flow, z, context, held, settings):
    """For each method evaluations, and the distance of samples from data, with more and more; and paths.

    The last method is the one that chooses its steps.
    """
    runs = {
        method: [
            carried(flow, z, context, method, jnp.asarray(METHODS[method] / n), None)
            for n in BUDGETS
        ]
        for method in settings.listed("methods")
    }
    adaptive = lambda tolerance: carried(flow, z, context, settings.method, None, tolerance)
    runs[settings.method] = [adaptive(jnp.asarray(tolerance)) for tolerance in TOLERANCES]

    def told(path, evaluations):
        distance = float(energy_distance(path[-1, : len(held)], held))
        return {"evaluations": int(evaluations), "distance": distance}

    found = {method: [told(*run) for run in several] for method, several in runs.items()}
    return found, runs[settings.method][-1][0]


@jax.jit
def energy_distance(x, y):
    """sqrt(2 E|x - y| - E|x - x'| - E|y - y'|), 0 for equal distributions (Szekely and Rizzo 2013)."""

    def apart(a, b):
        squares = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None]
        return jnp.mean(jnp.sqrt(jnp.maximum(squares - 2 * a @ b.T, 0.0)))

    return jnp.sqrt(jnp.maximum(2 * apart(x, y) - apart(x, x) - apart(y, y), 0.0))


# Point clouds.


def on_cloud(cloud, settings, folder, progress):
    """Every way of training on one cloud, and what the figures show."""
    sample = CLOUDS[cloud]
    held, other = (sample(jax.random.key(k), settings.samples) for k in (1234, 4321))
    z = jax.random.normal(jax.random.key(99), held.shape)
    key = jax.random.key(settings.seed)
    field = ConcatSquash(2, width=settings.width, depth=settings.depth, key=key)
    start = untrained(field, Normal(2), settings)
    before = float(jnp.mean(nats(start, held)))
    found, shown = {}, {"data": held[None]}
    for kind in settings.listed("fits"):
        steps = settings.likelihood_steps if kind == "likelihood" else settings.steps
        flow, cost = trained(
            kind, start, lambda step: (sample(jax.random.key(step), settings.batch), None), steps,
            cloud, settings, folder, progress,
        )  # fmt: skip
        curve, shown[kind] = curves(flow, z, None, held, settings)
        found[kind] = {**cost, "nats": float(jnp.mean(nats(flow, held))), "curves": curve}
    covariance = 2 * np.pi * np.e * np.cov(np.asarray(held).T)
    reference = {
        "normal": float(np.linalg.slogdet(covariance)[1]) / 2,
        "distance": float(energy_distance(other, held)),
    }
    return {"kinds": found, "before": before, **reference, "parameters": parameters(start)}, shown


# Digits, each given its class.


@dataclasses.dataclass(frozen=True)
class Digits:
    """Training and held-out digits as whole numbers (n, 64), their labels, and a reader of digits."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    reader: Any

    def accuracy(self, levels, labels) -> float:
        """The fraction of images that are read as their labels."""
        return float(np.mean(self.reader.predict(levels) == labels))


def real_digits(count: int) -> Digits:
    """Those of scikit-learn, so many of the held-out ones, and a support vector classifier of digits."""
    from sklearn.svm import SVC

    rows = [(np.round((LEVELS - 1) * part.x.reshape(-1, PIXELS)), part.y) for part in data.digits()]
    train, test = rows
    return Digits(train, (test[0][:count], test[1][:count]), SVC(gamma=0.001).fit(*train))


def dequantised(levels, rng):
    """Pixels in [-1, 1]: the levels with uniform noise of one level (Theis et al. 2016, section 3.1)."""
    noisy = levels + rng.uniform(size=levels.shape)
    return (2 * noisy / LEVELS - 1).astype(np.float32)


def quantised(x):
    """The levels of pixels."""
    return np.clip(np.floor((np.asarray(x) + 1) * LEVELS / 2), 0, LEVELS - 1)


def one_hot(labels):
    """What a field is told of the class."""
    return np.eye(10, dtype=np.float32)[labels]


def two_sample(real, others) -> float:
    """How often the nearest other image is of the same set, 1/2 if both have one distribution.

    The leave-one-out accuracy of one nearest neighbour (Lopez-Paz and Oquab 2017, arXiv 1610.06545).
    """
    both = np.concatenate([real, others])
    squares = np.sum(both**2, axis=1)
    apart = squares[:, None] + squares - 2 * both @ both.T
    np.fill_diagonal(apart, np.inf)
    is_real = np.arange(len(both)) < len(real)
    return float(np.mean(is_real[np.argmin(apart, axis=1)] == is_real))


def told_apart(digits, levels) -> float:
    """The same for several sets of samples, each as large as the held-out set: a mean."""
    sets = np.split(levels, len(levels) // len(digits.test[0]))
    return float(np.mean([two_sample(digits.test[0], part) for part in sets]))


def on_digits(settings, folder, progress):
    """Every way of training on digits, beside a normal distribution of each class."""
    digits = real_digits(settings.digits)
    held, labels = (np.concatenate([part] * settings.draws) for part in digits.test)
    context, x = one_hot(labels), dequantised(held, np.random.default_rng(1234))
    order, noise_key, base_key = jax.random.split(jax.random.key(settings.seed), 3)
    z = jax.random.normal(base_key, x.shape)
    size = dict(width=settings.digit_width, depth=settings.depth, context=10)
    field = ConcatSquash(PIXELS, **size, key=order)
    start = untrained(field, Normal(PIXELS), settings)
    each = lambda flow: np.asarray(nats(flow, x, context, noise_key)) + PIXELS * np.log(LEVELS / 2)

    def batches(step):
        size = min(settings.batch // 2, len(digits.train[0]))
        i = data.batch_indices(order, len(digits.train[0]), size, step)
        rng = np.random.default_rng([settings.seed, step])
        return dequantised(digits.train[0][i], rng), one_hot(digits.train[1][i])

    found, shown = {}, {"held out": digits.test[0]}
    for kind in settings.listed("digit_fits"):
        likelihood = kind == "likelihood"
        steps = settings.digit_likelihood_steps if likelihood else settings.digit_steps
        flow, cost = trained(kind, start, batches, steps, "digits", settings, folder, progress)
        curve, paths = curves(flow, z, context, x[: settings.digits], settings)
        shown[kind] = quantised(paths[-1])
        found[kind] = {**cost, **measured(digits, each(flow), shown[kind], labels), "curves": curve}
    simple, shown["normal"] = normal_of_each_class(digits, held, labels, settings)
    found["normal"] = measured(digits, simple, shown["normal"], labels)
    others = same_classes(*digits.train, digits.test[1])
    real = {"accuracy": digits.accuracy(*digits.test), "told apart": told_apart(digits, others)}
    near = dequantised(others, np.random.default_rng(4321))
    reference = {
        "before": float(each(start).mean()), "real": real, "parameters": parameters(start),
        "distance": float(energy_distance(near, x[: settings.digits])),
    }  # fmt: skip
    return {"kinds": found, **reference}, (shown, labels)


def measured(digits, nats, levels, labels) -> dict[str, float]:
    """What is told of a model: nats of held-out digits, and what samples of the same classes are worth."""
    return {
        "nats": float(nats.mean()), "error": float(nats.std() / len(nats) ** 0.5),
        "accuracy": digits.accuracy(levels, labels), "told apart": told_apart(digits, levels),
    }  # fmt: skip


def same_classes(levels, labels, wanted):
    """Images of the wanted classes, no image twice."""
    left = {label: iter(levels[labels == label]) for label in np.unique(labels)}
    return np.stack([next(left[label]) for label in wanted])


def normal_of_each_class(digits, held, labels, settings):
    """Nats and samples of a normal distribution of the noisy levels of each class (Ledoit and Wolf 2004)."""
    from sklearn.covariance import LedoitWolf

    rng = np.random.default_rng(settings.seed)
    samples, each = np.empty(held.shape), np.empty(len(held))
    for label in range(10):
        train = digits.train[0][digits.train[1] == label]
        model = LedoitWolf().fit(train + rng.uniform(size=train.shape))
        here = labels == label
        off = held[here] + rng.uniform(size=held[here].shape) - model.location_
        volume = np.linalg.slogdet(2 * np.pi * model.covariance_)[1]
        each[here] = (np.sum(off @ model.precision_ * off, axis=1) + volume) / 2
        samples[here] = rng.multivariate_normal(model.location_, model.covariance_, here.sum())
    return each, np.clip(np.floor(samples), 0, LEVELS - 1)


# The table, and what it claims.


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """All clouds, the digits, and the figures."""
    clouds, shown = {}, {}
    for cloud in settings.listed("clouds"):
        clouds[cloud], shown[cloud] = on_cloud(cloud, settings, folder, progress)
    digits, images = on_digits(settings, folder, progress)
    save(cloud_figure(clouds, shown), folder / "clouds.png")
    save(digit_figure(digits, *images), folder / "digits.png")
    save(evaluation_figure({**clouds, "digits": digits}), folder / "evaluations.png")
    everything = {**clouds, "digits": digits}
    rows = [
        row(f"{name}, {kind}", result)
        for name, found in everything.items()
        for kind, result in found["kinds"].items()
    ]
    rows.append(row("digits, real", digits["real"]))
    each = lambda key, form: ", ".join(f"{r[key]:{form}} ({k})" for k, r in everything.items())
    notes = (
        "Nats of held-out data: less is better. Of the normal distribution of a cloud's covariance "
        + ", ".join(f"{found['normal']:.2f} ({cloud})" for cloud, found in clouds.items())
        + f".\nThose of digits: of 64 pixels, whole numbers with uniform noise of 1, given the class;\n"
        f"{PIXELS * np.log(LEVELS):.1f} for equal probabilities. Evaluations: by {settings.method} to 1e-4.\n"
        f"A method, {SHOWN}: energy distance from held-out data of samples by steps of {SHOWN} evaluations in\n"
        f"all (a solve makes one more, at its end); less is better, of other real data\n"
        f"{each('distance', '.3f')}.\n"
        "Read: the part that a classifier reads as its class. Told apart: by the nearest neighbour, from\n"
        "held-out digits; 0.5 is best, but noise is near to digits, too: look at both.\n"
        f"Parameters: {each('parameters', ',')}."
    )
    return Results(rows, claimed(settings, clouds, digits), notes, everything)


def distance(result, method, budget=SHOWN):
    """Of samples by a method with a budget."""
    return result["curves"][method][BUDGETS.index(budget)]["distance"]


def evaluations(result):
    """Of samples to the least tolerance."""
    *_, adaptive = result["curves"].values()
    return adaptive[-1]["evaluations"]


def row(name, result):
    """A line of the table; "" for what there is not."""
    shown = lambda key, form: form.format(result[key]) if key in result else ""
    line = {"fit": name, "steps": shown("steps", "{}"), "ms a step": shown("ms a step", "{:.1f}")}
    line |= {"nats": shown("nats", "{:.2f}"), "evaluations": ""}
    if "curves" in result:
        line["evaluations"] = str(evaluations(result))
        *equal, _ = result["curves"]
        line |= {f"{method}, {SHOWN}": f"{distance(result, method):.3f}" for method in equal}
    return line | {"read": shown("accuracy", "{:.3f}"), "told apart": shown("told apart", "{:.3f}")}


def claimed(settings, clouds, digits) -> dict[str, bool]:
    """What holds at every size, and what needs training."""
    of_clouds = [found["kinds"] for found in clouds.values()]
    claims = {
        "Matching makes held-out data likelier, on clouds and digits": all(
            worst(found) < found["before"] for found in (*clouds.values(), digits)
        )
    }
    trained = settings.steps >= 2000
    if trained:
        claims["Every matched cloud is likelier than a normal distribution"] = all(
            worst(found) < found["normal"] for found in clouds.values()
        )
    straight = {"linear", "optimal"} & set(settings.listed("digit_fits"))
    if settings.digit_steps >= 5000 and straight:
        claims["Along straight lines digits are likelier than by a normal distribution a class"] = (
            all(
                digits["kinds"][kind]["nats"] < digits["kinds"]["normal"]["nats"]
                for kind in straight
            )
        )
    if not {"optimal", "diffusion"} <= set(settings.listed("fits")):
        return claims
    if "euler" in settings.listed("methods"):
        claims[
            "By 4 steps of Euler's method optimal pairs are nearer to a cloud than diffusion"
        ] = all(
            distance(found["optimal"], "euler", 4) < distance(found["diffusion"], "euler", 4)
            for found in of_clouds
        )
    if trained:
        claims["They take no more evaluations by a method that chooses its steps"] = all(
            evaluations(found["optimal"]) <= evaluations(found["diffusion"]) for found in of_clouds
        )
    return claims


def worst(found):
    """The nats of the matched field to which held-out data are least likely."""
    kinds = found["kinds"].items()
    matched = (r["nats"] for kind, r in kinds if kind not in ("likelihood", "normal"))
    return max(matched, default=-np.inf)


# Figures.


def cloud_figure(clouds, shown):
    """Each cloud, and samples of each field with the paths of some of them."""
    columns = max(map(len, shown.values()))
    figure, axes = plt.subplots(
        len(clouds), columns, figsize=(3 * columns, 3.2 * len(clouds)), squeeze=False
    )
    for axes_row, (cloud, found) in zip(axes, clouds.items()):
        for axis, kind in zip(axes_row, shown[cloud]):
            path = np.asarray(shown[cloud][kind])
            axis.plot(*path[-1].T, ".", ms=2)
            axis.plot(path[:, :60, 0], path[:, :60, 1], color="#D55E00", lw=0.7)
            nats = f": {found['kinds'][kind]['nats']:.2f} nats" if kind in KINDS else ""
            axis.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
            axis.set_title(f"{cloud}, {kind}{nats}", fontsize=11)
            blank(axis)
    return figure


def digit_figure(digits, shown, labels):
    """Three digits of each class: real ones, and samples."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 4.4))
    for axis in axes.flat:
        blank(axis)
    for axis, (name, levels) in zip(axes.flat, shown.items()):
        of_class = [levels[labels[: len(levels)] == label] for label in range(10)]
        images = np.stack([np.resize(some, (3, 8, 8)) for some in of_class], axis=1)
        images = np.pad(images, [(0, 0), (0, 0), (1, 1), (1, 1)])
        axis.imshow(images.transpose(0, 2, 1, 3).reshape(30, 100), cmap="gray_r")
        apart = digits["kinds"].get(name, digits["real"])["told apart"]
        axis.set_title(f"{name}: told apart {apart:.2f}")
    return figure


def evaluation_figure(everything):
    """The distance of samples from held-out data against their evaluations, by each method."""
    curves = {
        name: {kind: r["curves"] for kind, r in found["kinds"].items() if "curves" in r}
        for name, found in everything.items()
    }
    rows, columns = len(curves), max(map(len, curves.values()))
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.8 * columns, 3.4 * rows), sharey="row", sharex=True, squeeze=False
    )
    for axes_row, (name, found) in zip(axes, everything.items()):
        for axis, (kind, by_method) in zip(axes_row, curves[name].items()):
            for method, runs in by_method.items():
                points = [(run["evaluations"], run["distance"]) for run in runs]
                axis.loglog(*zip(*points), "o-", ms=5, label=method)
            axis.axhline(found["distance"], ls=":", color="#999999", label="real data")
            axis.xaxis.set_major_locator(ticker.FixedLocator(BUDGETS))
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            for one in (axis.xaxis, axis.yaxis):
                one.set_minor_locator(ticker.NullLocator())
                one.set_major_formatter("{x:g}")
            axis.set(title=f"{name}, {kind}", xlabel="evaluations")
        axes_row[0].set_ylabel("energy distance")
    axes[0, 0].legend(fontsize=10)
    return figure
