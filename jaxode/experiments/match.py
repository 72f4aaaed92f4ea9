"""Flow matching: fields of flows learnt without a solve, beside maximum likelihood.

The same field is trained by likelihood and along three probability paths, on point clouds and on digits
given their class; then sampled by several methods with more and more evaluations.
"""

import dataclasses
import statistics
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

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
TOLERANCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of tsit5, which chooses its steps
SHOWN = 8  # evaluations: a budget that the table shows
PIXELS, LEVELS = 64, 17  # of a digit, each a whole number from 0 to 16


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """How long, how wide, and on which clouds."""

    steps: int = option(6000, "Steps of matching on a cloud.", quick=150, full=50_000, low=1)
    likelihood_steps: int = option(
        800, "Steps of likelihood on a cloud.", quick=10, full=10_000, low=1
    )
    digit_steps: int = option(4000, "Steps of matching on digits.", quick=60, full=40_000, low=1)
    digit_likelihood_steps: int = option(
        150, "Steps of likelihood on digits.", quick=2, full=5000, low=1
    )
    clouds: str = option(
        "circles,checkerboard", "Of " + ", ".join(CLOUDS), quick="circles", full=",".join(CLOUDS),
        words=tuple(CLOUDS),
    )  # fmt: skip
    width: int = option(64, "Of the field on clouds.", quick=32, low=1)
    digit_width: int = option(128, "Of the field on digits.", quick=32, full=512, low=1)
    batch: int = option(256, "Samples a step, on clouds; half on digits.", quick=128, low=2)
    samples: int = option(2000, "Of each cloud, to measure with.", quick=500, low=2)
    draws: int = option(4, "Samples for each held-out digit.", quick=1, low=1)


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
    """Where samples z of the base end, and the evaluations that took: in steps of dt, or to a tolerance."""
    how = dict(rtol=tolerance, atol=tolerance) if dt is None else dict(dt=dt)
    field = flow.given(context)
    solution = solve(field, z, [0.0, 1.0], method=method, max_steps=1024, **how)
    return solution.ys[-1], solution.stats.evaluations


def curves(flow, z, context, score):
    """For each method the evaluations and the score of samples, with more and more evaluations."""
    runs = {
        method: [carried(flow, z, context, method, jnp.asarray(cost / n), None) for n in BUDGETS]
        for method, cost in METHODS.items()
    }
    adaptive = lambda tolerance: carried(flow, z, context, "tsit5", None, jnp.asarray(tolerance))
    runs["tsit5"] = [adaptive(tolerance) for tolerance in TOLERANCES]
    told = lambda x, evaluations: {"evaluations": int(evaluations), "score": float(score(x))}
    found = {method: [told(*run) for run in several] for method, several in runs.items()}
    return found, runs["tsit5"][-1][0]


@jax.jit
def energy_distance(x, y):
    """sqrt(2 E|x - y| - E|x - x'| - E|y - y'|), 0 for equal distributions (Szekely and Rizzo 2013)."""
    apart = lambda a, b: jnp.mean(jnp.linalg.norm(a[:, None] - b[None], axis=-1))
    return jnp.sqrt(jnp.maximum(2 * apart(x, y) - apart(x, x) - apart(y, y), 0.0))


# Point clouds.


def on_cloud(cloud, settings, folder, progress):
    """Every way of training on one cloud, and what the figures show."""
    sample = CLOUDS[cloud]
    held, other = (sample(jax.random.key(k), settings.samples) for k in (1234, 4321))
    z = jax.random.normal(jax.random.key(99), held.shape)
    field = ConcatSquash(2, width=settings.width, key=jax.random.key(settings.seed))
    start = ContinuousFlow(field, Normal(2), rtol=1e-3, atol=1e-3, max_steps=1024)
    found, shown = {}, {"data": held}
    for kind, how in KINDS.items():
        steps = settings.likelihood_steps if how is None else settings.steps
        flow, cost = trained(
            kind, start, lambda step: (sample(jax.random.key(step), settings.batch), None), steps,
            cloud, settings, folder, progress,
        )  # fmt: skip
        curve, shown[kind] = curves(flow, z, None, lambda x: energy_distance(x, held))
        found[kind] = {**cost, "nats": float(jnp.mean(nats(flow, held))), "curves": curve}
    covariance = 2 * np.pi * np.e * np.cov(np.asarray(held).T)
    reference = {
        "normal": float(np.linalg.slogdet(covariance)[1]) / 2,
        "distance": float(energy_distance(other, held)),
    }
    return {"kinds": found, **reference, "parameters": parameters(start)}, {"z": z, **shown}


# Digits, each given its class.


@dataclasses.dataclass(frozen=True)
class Digits:
    """Training and held-out digits as whole numbers (n, 64), their labels, and a reader of digits."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    reader: object

    def accuracy(self, levels, labels) -> float:
        """The fraction of images that are read as their labels."""
        return float(np.mean(self.reader.predict(levels) == labels))


def real_digits() -> Digits:
    """Those of scikit-learn, and a support vector classifier trained on the training part."""
    from sklearn.svm import SVC

    rows = [
        (np.round((LEVELS - 1) * part.x.reshape(-1, PIXELS)), part.y) for part in data.digits()
    ]
    return Digits(*rows, SVC(gamma=0.001).fit(*rows[0]))


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
    digits = real_digits()
    held, labels = (np.concatenate([part] * settings.draws) for part in digits.test)
    context, x = one_hot(labels), dequantised(held, np.random.default_rng(1234))
    order, noise_key, base_key = jax.random.split(jax.random.key(settings.seed), 3)
    z = jax.random.normal(base_key, x.shape)
    field = ConcatSquash(PIXELS, width=settings.digit_width, context=10, key=order)
    start = ContinuousFlow(field, Normal(PIXELS), rtol=1e-3, atol=1e-3, max_steps=1024)

    def batches(step):
        size = min(settings.batch // 2, len(digits.train[0]))
        i = data.batch_indices(order, len(digits.train[0]), size, step)
        levels, labels = (part[i] for part in digits.train)
        rng = np.random.default_rng([settings.seed, step])
        return dequantised(levels, rng), one_hot(labels)

    read = lambda x: digits.accuracy(quantised(x), labels)
    found, shown = {}, {}
    for kind, how in KINDS.items():
        steps = settings.digit_likelihood_steps if how is None else settings.digit_steps
        flow, cost = trained(kind, start, batches, steps, "digits", settings, folder, progress)
        curve, samples = curves(flow, z, context, read)
        levels = shown[kind] = quantised(samples)
        each = np.asarray(nats(flow, x, context, noise_key)) + PIXELS * np.log(LEVELS / 2)
        found[kind] = {
            **cost, "nats": float(each.mean()), "error": float(each.std() / len(each) ** 0.5),
            "curves": curve, "accuracy": digits.accuracy(levels, labels),
            "told apart": told_apart(digits, levels),
        }  # fmt: skip
    found["normal"], shown["normal"] = normal_of_each_class(digits, labels, held, settings)
    reference = {
        "accuracy": digits.accuracy(*digits.test),
        "told apart": two_sample(digits.test[0], same_classes(*digits.train, digits.test[1])),
    }
    shown = {"held out": digits.test[0], **shown}
    return {"kinds": found, "real": reference, "parameters": parameters(start)}, (shown, labels)


def same_classes(levels, labels, wanted):
    """Images of the wanted classes, no image twice."""
    left = {label: iter(levels[labels == label]) for label in np.unique(labels)}
    return np.stack([next(left[label]) for label in wanted])


def normal_of_each_class(digits, labels, held, settings):
    """The simplest model: a normal distribution of the noisy levels of each class (Ledoit and Wolf 2004)."""
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
    levels = np.clip(np.floor(samples), 0, LEVELS - 1)
    return {
        "nats": float(each.mean()), "error": float(each.std() / len(each) ** 0.5),
        "accuracy": digits.accuracy(levels, labels), "told apart": told_apart(digits, levels),
    }, levels  # fmt: skip


# The table, and what it claims.


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """All clouds, the digits, and the figures."""
    clouds, shown = {}, {}
    for cloud in settings.listed("clouds"):
        clouds[cloud], shown[cloud] = on_cloud(cloud, settings, folder, progress)
    digits, images = on_digits(settings, folder, progress)
    save(cloud_figure(clouds, shown), folder / "clouds.png")
    save(digit_figure(digits, *images), folder / "digits.png")
    save(evaluation_figure(clouds, digits), folder / "evaluations.png")
    rows = [
        row(f"{cloud}, {kind}", result, "{:.3f}")
        for cloud, found in clouds.items()
        for kind, result in found["kinds"].items()
    ]
    rows += [row(f"digits, {kind}", r, "{:.3f}") for kind, r in digits["kinds"].items()]
    rows.append(row("digits, real", digits["real"], "{:.3f}"))
    first = next(iter(clouds.values()))
    notes = (
        f"Nats of held-out data (less is better); of the normal distribution of a cloud's covariance: "
        + ", ".join(f"{found['normal']:.2f} ({cloud})" for cloud, found in clouds.items())
        + f".\nDigits: 64 pixels in whole numbers with uniform noise of 1; equal for all values: "
        f"{PIXELS * np.log(LEVELS):.1f}.\n"
        f"Evaluations: of a sample by tsit5 to 1e-4. {SHOWN} evaluations by a method: on clouds the energy\n"
        "distance to held-out points (less is better; that of other points of the cloud: "
        + ", ".join(f"{found['distance']:.3f}" for found in clouds.values())
        + "),\non digits how many samples a classifier reads as their class. Told apart: by the nearest\n"
        f"neighbour, from held-out digits (0.5 is best). Parameters: {first['parameters']:,} on clouds, "
        f"{digits['parameters']:,} on digits."
    )
    more = {"clouds": clouds, "digits": digits}
    return Results(rows, claimed(settings, clouds, digits), notes, more)


def score_at(result, method, budget=SHOWN):
    """The score of a method with a budget."""
    runs = result["curves"][method]
    return next(run["score"] for run in runs if run["evaluations"] == budget)


def row(name, result, form):
    """A line of the table; "" for what there is not."""
    shown = lambda key, form: form.format(result[key]) if key in result else ""
    line = {"fit": name, "steps": shown("steps", "{}"), "ms a step": shown("ms a step", "{:.1f}")}
    line["nats"] = shown("nats", "{:.2f}")
    line["evaluations"] = ""
    if "curves" in result:
        line["evaluations"] = f"{result['curves']['tsit5'][-1]['evaluations']}"
        line |= {f"{m}, {SHOWN}": form.format(score_at(result, m)) for m in METHODS}
    return line | {key: shown(key, "{:.3f}") for key in ("accuracy", "told apart")}


def claimed(settings, clouds, digits) -> dict[str, bool]:
    """What holds at every size, and what needs training."""
    matched = [kind for kind, how in KINDS.items() if how is not None]
    of_clouds = [found["kinds"] for found in clouds.values()]
    steps = lambda found, kind: found[kind]["curves"]["tsit5"][-1]["evaluations"]
    claims = {
        "On clouds every matched field is likelier than a normal distribution": all(
            found["kinds"][kind]["nats"] < found["normal"]
            for found in clouds.values()
            for kind in matched
        ),
        "Samples along optimal pairs take no more evaluations than along diffusion": all(
            steps(found, "optimal") <= steps(found, "diffusion") for found in of_clouds
        ),
        "By Euler's method with 4 evaluations they are nearer to the cloud": all(
            score_at(found["optimal"], "euler", 4) < score_at(found["diffusion"], "euler", 4)
            for found in of_clouds
        ),
        "On digits every matched field is likelier than equal pixels": all(
            digits["kinds"][kind]["nats"] < PIXELS * np.log(LEVELS) for kind in matched
        ),
    }
    if settings.digit_steps >= 2000:
        claims["At least 90 % of matched digits are read as their class"] = all(
            digits["kinds"][kind]["accuracy"] >= 0.9 for kind in matched
        )
    return claims


# Figures.


def cloud_figure(clouds, shown):
    """Each cloud, and samples of each field with the lines from where some of them begin."""
    columns = ["data", *KINDS]
    figure, axes = plt.subplots(
        len(clouds), len(columns), figsize=(3 * len(columns), 3.2 * len(clouds)), squeeze=False
    )
    for axes_row, (cloud, found) in zip(axes, clouds.items()):
        z = np.asarray(shown[cloud]["z"])
        for axis, kind in zip(axes_row, columns):
            x = np.asarray(shown[cloud][kind])
            axis.plot(*x.T, ".", ms=2)
            title = cloud
            if kind in KINDS:
                ends = np.stack([z[:40], x[:40]], axis=1)
                axis.plot(*ends.T, color="#999999", lw=0.7)
                title = f"{kind}: {found['kinds'][kind]['nats']:.2f} nats"
            axis.set(title=title, xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
            blank(axis)
    return figure


def digit_figure(digits, shown, labels):
    """Three digits of each class: real ones, and samples."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6))
    for axis, (name, levels) in zip(axes.flat, shown.items()):
        of_class = [levels[labels[: len(levels)] == label][:3] for label in range(10)]
        images = np.stack(of_class, axis=1).reshape(3, 10, 8, 8)
        axis.imshow(images.transpose(0, 2, 1, 3).reshape(24, 80), cmap="gray_r")
        read = digits["kinds"].get(name, digits["real"])["accuracy"]
        axis.set_title(f"{name}: {100 * read:.0f} % are read as their class")
        blank(axis)
    return figure


def evaluation_figure(clouds, digits):
    """What samples are worth against the evaluations that they took, by each method."""
    figure, axes = plt.subplots(
        len(clouds) + 1, len(KINDS), figsize=(15, 3.6 * (len(clouds) + 1)), sharey="row", sharex=True
    )
    for axes_row, (name, found) in zip(axes, [*clouds.items(), ("digits", digits)]):
        for axis, kind in zip(axes_row, KINDS):
            for method, runs in found["kinds"][kind]["curves"].items():
                points = [(run["evaluations"], run["score"]) for run in runs]
                axis.plot(*zip(*points), "o-", ms=5, label=method)
            level = found["distance"] if name != "digits" else found["real"]["accuracy"]
            axis.axhline(level, ls=":", color="#999999", label="real data")
            axis.set(title=f"{name}, {kind}", xscale="log", xlabel="evaluations")
            axis.set_yscale("log" if name != "digits" else "linear")
        axes_row[0].set_ylabel("energy distance" if name != "digits" else "read as their class")
    axes[0, 0].legend(fontsize=10)
    return figure
