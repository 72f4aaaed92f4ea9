"""Continuous normalizing flows against planar ones (figures 4 and 5 of Chen et al. 2018; FFJORD).

Fits densities known up to a constant by KL divergence, point clouds by maximum likelihood, and a
real table (cell nuclei, with scikit-learn) against a Gaussian mixture.
"""

import dataclasses
import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxode import data
from jaxode.experiments.experiment import Options, Results, fitted, option, parameters, save
from jaxode.nn import ConcatSquash, ContinuousFlow, Normal, PlanarField, PlanarFlow

SAMPLES = 20_000  # that a flow is measured by, and drawn with
LIMIT = 5.0  # half the width of the square on which densities are drawn and summed
TIMES = np.linspace(0, 1, 6, dtype=np.float32)  # of the film
CLOUDS = {
    "circles": data.circles,
    "moons": data.moons,
    "pinwheel": data.pinwheel,
    "checkerboard": data.checkerboard,
}


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """How long, how wide, and which."""

    kl_steps: int = option(600, "Steps of each fit by KL.", quick=30, full=10_000, low=1)
    steps: int = option(1500, "Steps of each fit by likelihood.", quick=30, full=10_000, low=1)
    table_steps: int = option(600, "Steps on the table.", quick=30, full=3000, low=1)
    batch: int = option(512, "Samples a step.", quick=256, low=2)
    sizes: str = option("2,8,32", "Widths M and depths K of the fits by KL.", quick="8", words=int)
    targets: str = option("ring,wave", "Of ring, wave.", quick="ring", words=("ring", "wave"))
    clouds: str = option(
        "circles,moons",
        "Of " + ", ".join(CLOUDS),
        quick="circles",
        full=",".join(CLOUDS),
        words=tuple(CLOUDS),
    )
    width: int = option(64, "Width M of the flows fitted by likelihood.", quick=8, low=1)
    tolerance: float = option(1e-3, "Of the solver, relative and absolute.", low=1e-7, high=1.0)


# Densities known up to a constant (Rezende and Mohamed 2015, table 1).


def ring(z):
    """Two bumps on a ring."""
    a, b = z[:, 0], z[:, 1]
    radius = jnp.sqrt(a**2 + b**2)
    bumps = jnp.logaddexp(-0.5 * ((a - 2) / 0.6) ** 2, -0.5 * ((a + 2) / 0.6) ** 2)
    return bumps - 0.5 * ((radius - 2) / 0.4) ** 2


def wave(z):
    """A sine, cut off smoothly at both ends."""
    a, b = z[:, 0], z[:, 1]
    return -0.5 * ((b - jnp.sin(jnp.pi * a / 2)) / 0.4) ** 2 - (a / 3.5) ** 8


TARGETS = {"ring": ring, "wave": wave}


def grid(n=200):
    """Points of the square, and the area of one."""
    axis = jnp.linspace(-LIMIT, LIMIT, n)
    return jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2), (2 * LIMIT / (n - 1)) ** 2


@functools.partial(jax.jit, static_argnums=0)
def log_constant(log_density):
    """The logarithm of the integral over the square."""
    points, area = grid(400)
    return jax.scipy.special.logsumexp(log_density(points)) + jnp.log(area)


def kl_loss(target, constant):
    """KL(flow || target) on samples of the flow."""

    def loss(flow, batch, key):
        x, log_prob = flow.sample_and_log_prob(key, batch)
        return jnp.mean(log_prob - target(x)) + constant, {}

    return loss


def likelihood_loss(flow, batch, key):
    """-log p, a mean over the batch."""
    return -jnp.mean(flow.log_prob(batch)), {}


def estimated_loss(flow, batch, key):
    """The same with Hutchinson's trace."""
    return -jnp.mean(flow.log_prob(batch, key=key)), {}


def common(settings, progress) -> dict:
    """How every flow is trained."""
    return dict(seed=settings.seed, progress=progress, last=0.01, clip=5.0)


def tight(flow):
    """The flow solved tightly, to be measured: training may have learnt to use a loose solver's error."""
    return flow.with_options(rtol=1e-5, atol=1e-5) if isinstance(flow, ContinuousFlow) else flow


@eqx.filter_jit
def drawn(flow, key):
    """Samples, and their log-densities."""
    return tight(flow).sample_and_log_prob(key, SAMPLES)


@eqx.filter_jit
def measured(flow, held):
    """The mean log-density of held-out samples, and the densities on the grid."""
    log_prob = tight(flow).log_prob(jnp.concatenate([held, grid()[0]]))
    return jnp.mean(log_prob[: len(held)]), jnp.exp(log_prob[len(held) :])


def continuous(width, key, settings):
    """A planar CNF."""
    field = PlanarField(2, width=width, key=key)
    tolerance = settings.tolerance
    return ContinuousFlow(field, Normal(2), rtol=tolerance, atol=tolerance, max_steps=1024)


def fits_by_kl(settings, folder, progress):
    """KL to each target, for each size and both kinds of flow, and samples of the flows."""
    found, samples = [], {}
    for target in settings.listed("targets"):
        log_density = TARGETS[target]
        constant = log_constant(log_density)
        loss = kl_loss(log_density, constant)
        for size in map(int, settings.listed("sizes")):
            key = jax.random.key(settings.seed)
            row = {"target": target, "size": size}
            for kind, flow in {
                "CNF": continuous(size, key, settings),
                "NF": PlanarFlow(size, Normal(2), key=key),
            }.items():
                name = f"kl-{target}-{kind}-{size}".lower()
                flow, _ = fitted(
                    flow, loss, lambda step: settings.batch, settings.kl_steps, rate=5e-3,
                    folder=folder / name, label=name, **common(settings, progress),
                )  # fmt: skip
                x, log_prob = drawn(flow, jax.random.key(99))
                row[kind] = float(jnp.mean(log_prob - log_density(x)) + constant)
                samples[target, kind, size] = x
            found.append(row)
    return found, samples


def fits_by_likelihood(settings, folder, progress):
    """Held-out log-likelihood of each cloud, and what the figures show: samples, densities, paths."""
    found, shown = [], []
    for cloud in settings.listed("clouds"):
        held = CLOUDS[cloud](jax.random.key(1234), SAMPLES)
        key = jax.random.key(settings.seed)
        wide = continuous(settings.width, key, settings)
        small = wide.with_field(ConcatSquash(2, width=16, depth=2, key=key))
        depth = -(-parameters(small) // 5)  # 5 numbers a layer: as many as the small CNF has
        deep = PlanarFlow(depth, Normal(2), density=True, key=key)
        row, densities = {"cloud": cloud}, {}
        for kind, (flow, rate) in {
            "CNF": (wide, 1e-2), "small CNF": (small, 3e-2), "NF": (deep, 3e-2),
        }.items():  # fmt: skip
            name = f"{cloud}-{kind}".lower().replace(" ", "-")
            flow, _ = fitted(
                flow, likelihood_loss,
                lambda step, cloud=cloud: CLOUDS[cloud](jax.random.key(step), settings.batch),
                settings.steps, rate=rate, folder=folder / name, label=name,
                **common(settings, progress),
            )  # fmt: skip
            likelihood, densities[kind] = measured(flow, held)
            row[kind] = {"log-likelihood": float(likelihood), "parameters": parameters(flow)}
            if kind == "CNF":
                wide = flow.with_options(rtol=1e-6, atol=1e-6)
        row["total"] = float(jnp.sum(densities["CNF"]) * grid()[1])
        back = wide.transport(held, TIMES[::-1]).ys
        there = wide.transport(back[-1], TIMES).ys
        row["round trip"] = float(jnp.max(jnp.abs(there[-1] - held)))
        path = wide.transport(wide.base.sample(jax.random.key(9), SAMPLES), TIMES).ys
        found.append(row)
        shown.append((held, densities, path))
    return found, shown


def table_fit(settings, folder, progress):
    """Held-out nats of cell nuclei: FFJORD, its best step by validation, and a Gaussian mixture.

    The flow sees whitened rows; nats are of the rows as they are.
    """
    from sklearn.mixture import GaussianMixture

    parts = data.breast_cancer()
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(parts[0].T))).T.astype(np.float32)
    rows, validation, test = (part @ whiten for part in parts)
    volume = np.linalg.slogdet(whiten)[1]
    field = ConcatSquash(rows.shape[1], width=32, depth=2, key=jax.random.key(settings.seed))
    flow = ContinuousFlow(field, Normal(rows.shape[1]), rtol=1e-3, atol=1e-3, max_steps=1024)

    @eqx.filter_jit
    def scores(flow):
        nats = -tight(flow).log_prob(jnp.concatenate([validation, test])) - volume
        cut = len(validation)
        return {"validation": jnp.mean(nats[:cut]), "test": jnp.mean(nats[cut:])}

    def batches(step):
        rng = np.random.default_rng([settings.seed, step])
        noise = 0.1 * rng.normal(size=(128, rows.shape[1]))
        return (rows[rng.integers(0, len(rows), 128)] + noise).astype(np.float32)

    _, history = fitted(
        flow, estimated_loss, batches, settings.table_steps, rate=3e-3, folder=folder / "table",
        label="table", evaluate=scores, **common(settings, progress),
    )  # fmt: skip
    best = min((r for r in history if "test" in r), key=lambda record: record["validation"])
    mixtures = [
        GaussianMixture(k, covariance_type="full", reg_covar=r, random_state=0, n_init=3).fit(
            parts[0]
        )
        for k in (1, 2, 3, 4, 6)
        for r in (1e-4, 1e-3, 1e-2)
    ]
    mixture = max(mixtures, key=lambda m: m.score(parts[1]))
    return {
        "CNF": best["test"],
        "mixture": -float(mixture.score(parts[2])),
        "components": int(mixture.n_components),
        "step": best["step"],
    }


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """All fits, the table and the figures."""
    by_kl, samples = fits_by_kl(settings, folder, progress)
    by_likelihood, shown = fits_by_likelihood(settings, folder, progress)
    nuclei = table_fit(settings, folder, progress)
    save(figure_4(by_kl, samples, settings), folder / "figure_4.png")
    save(figure_5(by_likelihood, shown), folder / "figure_5.png")
    save(film(by_likelihood, shown), folder / "film.png")
    rows = [
        {"fit": f"KL, {r['target']}, M = K = {r['size']}", "CNF": f"{r['CNF']:.3f}", "NF": f"{r['NF']:.3f}"}
        for r in by_kl
    ]  # fmt: skip
    for r in by_likelihood:
        shown = {kind: f"{r[kind]['log-likelihood']:.3f}" for kind in ("CNF", "small CNF", "NF")}
        rows.append({"fit": f"log-likelihood, {r['cloud']}", **shown})
    rows.append(
        {"fit": "nats, cell nuclei", "CNF": f"{nuclei['CNF']:.3f}", "mixture": f"{nuclei['mixture']:.3f}"}
    )  # fmt: skip
    rows = [
        {name: r.get(name, "") for name in ("fit", "CNF", "small CNF", "NF", "mixture")}
        for r in rows
    ]
    first = by_likelihood[0]
    claims = {
        "Learnt densities integrate to 1 within 1 %": all(
            abs(r["total"] - 1) < 0.01 for r in by_likelihood
        ),
        "There and back again is the same point to 1e-2": all(
            r["round trip"] < 1e-2 for r in by_likelihood
        ),
    }
    if settings.steps >= 1000:
        better = first["small CNF"]["log-likelihood"] > first["NF"]["log-likelihood"]
        claims[f"On {first['cloud']} a CNF is likelier than an NF of as many parameters"] = better
    if settings.kl_steps >= 500:
        widest = [r for r in by_kl if r["size"] == max(x["size"] for x in by_kl)]
        claims["Fitted by KL, the widest CNF is nearer than the deepest NF"] = all(
            r["CNF"] < r["NF"] for r in widest
        )
    sizes = ", ".join(
        f"{kind} {first[kind]['parameters']:,}" for kind in ("CNF", "small CNF", "NF")
    )
    notes = (
        "KL in nats to the normalised target (less is better, 0 is best); log-likelihood of 20,000\n"
        "held-out samples in nats (more is better); nats of held-out rows (less is better).\n"
        f"Parameters in the fits by likelihood: {sizes}."
    )
    more = {"kl": by_kl, "likelihood": by_likelihood, "nuclei": nuclei}
    return Results(rows, claims, notes, more)


# Figures.


def show(axis, values):
    axis.imshow(
        np.asarray(values).reshape(200, 200),
        origin="lower",
        extent=(-LIMIT, LIMIT) * 2,
        cmap="viridis",
    )
    blank(axis)


def blank(axis):
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def histogram(axis, x):
    image, *_ = np.histogram2d(x[:, 1], x[:, 0], 100, [(-LIMIT, LIMIT)] * 2)
    axis.imshow(image, origin="lower", extent=(-LIMIT, LIMIT) * 2, cmap="viridis")
    blank(axis)


def figure_4(found, samples, settings):
    """Targets, and samples of each fit."""
    targets, sizes = settings.listed("targets"), list(map(int, settings.listed("sizes")))
    count = 1 + 2 * len(sizes)
    figure, axes = plt.subplots(
        len(targets), count, figsize=(2.2 * count, 2.5 * len(targets)), squeeze=False
    )
    for row, target in zip(axes, targets):
        show(row[0], jnp.exp(TARGETS[target](grid()[0])))
        row[0].set_title("target")
        for axis, (kind, size) in zip(row[1:], [(k, s) for k in ("NF", "CNF") for s in sizes]):
            histogram(axis, np.asarray(samples[target, kind, size]))
            value = next(r[kind] for r in found if (r["target"], r["size"]) == (target, size))
            letter = "K" if kind == "NF" else "M"
            axis.set_title(f"{kind} {letter} = {size}\nKL {value:.2f}", fontsize=11)
    return figure


def figure_5(found, shown):
    """Data, and the densities learnt by likelihood."""
    figure, axes = plt.subplots(len(found), 4, figsize=(10, 2.7 * len(found)), squeeze=False)
    for row, result, (held, densities, _) in zip(axes, found, shown):
        histogram(row[0], np.asarray(held))
        row[0].set_title(result["cloud"])
        for axis, kind in zip(row[1:], ("NF", "small CNF", "CNF")):
            show(axis, densities[kind])
            axis.set_title(f"{kind}: {result[kind]['log-likelihood']:.2f}", fontsize=12)
    return figure


def film(found, shown):
    """Samples on their way from the base to the data."""
    frames = len(TIMES)
    figure, axes = plt.subplots(
        len(found), frames, figsize=(2.1 * frames, 2.4 * len(found)), squeeze=False
    )
    for row, (_, _, path) in zip(axes, shown):
        for axis, t, x in zip(row, TIMES, np.asarray(path)):
            histogram(axis, x)
            axis.set_title(f"t = {t:.1f}")
    return figure
