"""Structure: Hamiltonian and divergence-free fields, symplectic methods, forcing, real dynamics.

A pendulum learnt from noisy paths and run for long; energy drift of methods; volume kept by a field;
a driven oscillator whose drive is found from its response; lynx and hares, 1900 to 1920.
"""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxode import Signal, odeint, solve
from jaxode.experiments.experiment import Options, Results, fitted, option, save
from jaxode.nn import DivergenceFreeField, MLPField, SeparableHamiltonian


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """How long, and how noisy."""

    steps: int = option(1500, "Steps of each field that is learnt.", quick=50, full=10_000, low=1)
    paths: int = option(50, "Pendulum paths to learn from.", low=2)
    noise: float = option(0.05, "Standard deviation of their noise.", low=0.0)
    horizon: float = option(
        100.0, "Seconds for which the learnt pendulums are run.", quick=10.0, low=1.0
    )
    width: int = option(32, "Of the fields.", low=1)


def pendulum(state, t):
    """q'' = -sin q, as a pair."""
    q, p = state
    return p, -jnp.sin(q)


def energy(q, p):
    return 0.5 * p**2 - jnp.cos(q)


def common(settings, progress) -> dict:
    """How every model is trained."""
    return dict(seed=settings.seed, progress=progress, last=0.02, parts=5)


# A pendulum, learnt.


class Unstructured(eqx.Module):
    """An MLP for the pair (q, p): what the Hamiltonian network is compared with."""

    field: MLPField

    def __call__(self, state, t):
        out = self.field(jnp.concatenate(state, axis=-1), t)
        return out[..., :1], out[..., 1:]


def on_pendulum(settings, folder, progress):
    """Energy drift, and distance from the truth, of learnt pendulums over a long time."""
    keys = jax.random.split(jax.random.key(settings.seed), 4)
    start = jax.random.uniform(keys[0], (settings.paths, 2), minval=-1.5, maxval=1.5)
    ts = np.linspace(0, 3, 16, dtype=np.float32)
    q, p = odeint(pendulum, (start[:, :1], start[:, 1:]), ts, rtol=1e-6, atol=1e-6)
    noise = settings.noise * jax.random.normal(keys[1], (2, *q.shape))
    seen = q + noise[0], p + noise[1]

    def loss(field, batch, key):
        first = jax.tree.map(lambda x: x[0], batch)  # noisy, too
        found = odeint(field, first, ts, method="rk4", dt=0.2, max_steps=16)
        return sum(jnp.mean((a - b) ** 2) for a, b in zip(found, batch)), {}

    models = {
        "Hamiltonian": SeparableHamiltonian(1, width=settings.width, key=keys[2]),
        "unstructured": Unstructured(MLPField(2, width=settings.width, time=False, key=keys[3])),
    }
    results, paths = {}, {}
    long = np.linspace(0, settings.horizon, 400, dtype=np.float32)
    begin = jnp.array([1.2]), jnp.array([0.0])
    steps = dict(dt=0.05, max_steps=2**14)
    paths["truth"] = odeint(pendulum, begin, long, method="yoshida4", **steps)
    for name, model in models.items():
        model, _ = fitted(
            model, loss, lambda step: seen, settings.steps, rate=5e-3, label=f"pendulum, {name}",
            folder=folder / f"pendulum-{name.lower()}", **common(settings, progress),
        )  # fmt: skip
        method = "leapfrog" if name == "Hamiltonian" else "rk4"
        paths[name] = odeint(model, begin, long, method=method, throw=False, **steps)
        h = np.asarray(energy(*paths[name]))[:, 0]
        drift = np.abs(h - h[0])
        late = drift[-len(drift) // 4 :]
        results[name] = {
            "energy drift": float(np.mean(late)) if np.all(np.isfinite(late)) else 99.0
        }
    return results, (long, paths)


# Methods, over a long time.


def on_methods(settings):
    """The error of the pendulum's energy for methods at the same number of evaluations."""
    found = {}
    ts = np.linspace(0, 20 * settings.horizon, 300, dtype=np.float32)
    for method, cost in (("leapfrog", 2), ("yoshida4", 4), ("heun", 2), ("rk4", 4)):
        path = solve(
            pendulum, (jnp.array([1.2]), jnp.array([0.0])), ts, method=method, dt=0.1 * cost / 2,
            max_steps=2**16,
        ).ys  # fmt: skip
        found[method] = np.abs(np.asarray(energy(*path))[:, 0] - float(energy(1.2, 0.0)))
    return ts, found


# Volume.


def volumes(settings, folder, progress):
    """How much the area of a disc changes under a learnt rotation with shear, with and without structure."""
    key = jax.random.key(settings.seed)

    def swirl(y):
        r = jnp.sum(y**2, axis=-1, keepdims=True)
        return jnp.exp(-r / 4) * jnp.stack([-y[..., 1], y[..., 0]], -1) * 2

    def loss(field, batch, key):
        return jnp.mean((field(batch, 0.0) - swirl(batch)) ** 2), {}

    models = {
        "divergence-free": DivergenceFreeField(2, width=settings.width, key=key),
        "unstructured": MLPField(2, width=settings.width, time=False, key=key),
    }
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    disc = np.stack([1 + 0.5 * np.cos(angle), 0.5 * np.sin(angle)], -1).astype(np.float32)
    results, shapes = {}, {}
    for name, model in models.items():
        model, _ = fitted(
            model, loss, lambda step: jax.random.normal(jax.random.key(step), (256, 2)) * 1.5,
            settings.steps, rate=5e-3, folder=folder / f"volume-{name}", label=f"volume, {name}",
            **common(settings, progress),
        )  # fmt: skip
        ys = np.asarray(odeint(model, disc, [0.0, 10.0], rtol=1e-5, atol=1e-5))
        shapes[name] = ys[-1]
        results[name] = {"change of area": abs(area(ys[-1]) / area(ys[0]) - 1)}
    return results, (disc, shapes)


def area(polygon) -> float:
    """By the shoelace formula."""
    x, y = polygon.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


# Forcing.


def forced(y, t, drive):
    """A damped oscillator and its drive."""
    x, v = y
    return jnp.stack([v, drive(t) - x - 0.3 * v])


def on_forcing(settings):
    """The drive of an oscillator, found from its noisy response by gradients to the signal's values."""
    knots = np.linspace(0, 10, 11, dtype=np.float32)
    rng = np.random.default_rng(settings.seed)
    truth = rng.normal(size=len(knots)).astype(np.float32)
    truth[-1] = truth[-2]  # a hold never shows its last value
    ts = np.linspace(0, 10, 101, dtype=np.float32)
    response = lambda us: odeint(
        forced, jnp.zeros(2), ts, Signal(knots, us, "previous"), rtol=1e-4, atol=1e-4, max_steps=256
    )
    seen = response(truth) + 0.01 * rng.normal(size=(len(ts), 2)).astype(np.float32)
    optimiser = optax.adam(0.1)

    @jax.jit
    def step(us, slots):
        gradient = jax.grad(lambda us: jnp.mean((response(us) - seen) ** 2))(us)
        updates, slots = optimiser.update(gradient, slots)
        return optax.apply_updates(us, updates), slots

    us = jnp.zeros(len(knots))
    slots = optimiser.init(us)
    for _ in range(200):
        us, slots = step(us, slots)
    aligned = solve(forced, jnp.zeros(2), ts, Signal(knots, truth, "previous")).stats
    held = lambda t: jnp.asarray(truth)[jnp.searchsorted(knots, t, side="right") - 1]
    crossing = solve(lambda y, t: forced(y, t, held), jnp.zeros(2), ts).stats
    error = float(jnp.sqrt(jnp.mean((us[:-1] - truth[:-1]) ** 2)))
    return {
        "error of the drive": error,
        "evaluations, aligned": int(aligned.evaluations),
        "evaluations, across jumps": int(crossing.evaluations),
    }, (knots, truth, np.asarray(us), ts, np.asarray(seen))


# Lynx and hares.

# Pelts of the Hudson's Bay Company in thousands, 1900 to 1920 (Odum 1953; Howard 2009).
HARE = "30 47.2 70.2 77.4 36.3 20.6 18.1 21.4 22 25.4 27.1 40.3 57 76.6 52.3 19.5 11.2 7.6 14.6 16.2 24.7"
LYNX = "4 6.1 9.8 35.2 59.4 41.7 19 13 8.3 9.1 7.4 8 12.3 19.5 45.7 51.1 29.7 15.8 9.7 10.1 8.6"


def lotka_volterra(y, t, rates):
    """In logarithms: no population is ever negative."""
    a, b, c, d = jnp.exp(rates)
    prey, predators = jnp.exp(y)
    return jnp.stack([a - b * predators, d * prey - c])


def on_pelts(settings, folder, progress):
    """Predator-prey rates and initial numbers from the pelts; error of the logarithms."""
    pelts = np.log(np.stack([np.array(text.split(), np.float32) for text in (HARE, LYNX)], -1))
    ts = np.arange(21, dtype=np.float32)
    model = {"rates": jnp.log(jnp.array([0.5, 0.025, 0.8, 0.025])), "y0": jnp.asarray(pelts[0])}

    def loss(model, batch, key):
        ys = odeint(
            lotka_volterra, model["y0"], ts, model["rates"], rtol=1e-4, atol=1e-4, max_steps=512
        )
        return jnp.mean((ys - pelts) ** 2), {}

    model, _ = fitted(
        model, loss, lambda step: None, min(settings.steps, 800), rate=1e-2, label="lynx and hares",
        folder=folder / "pelts", **common(settings, progress),
    )  # fmt: skip
    fine = np.linspace(0, 20, 300, dtype=np.float32)
    path = np.exp(odeint(lotka_volterra, model["y0"], fine, model["rates"], rtol=1e-6, atol=1e-6))
    error = float(loss(model, None, None)[0]) ** 0.5
    constant = float(np.sqrt(np.mean((pelts - pelts.mean(0)) ** 2)))
    rates = [float(x) for x in np.exp(model["rates"])]
    results = {"error": error, "constant": constant, "rates": rates}
    return results, (ts, np.exp(pelts), fine, path)


def run(settings: Settings, folder: Path, progress: bool) -> Results:
    """Everything, the table and the figures."""
    learnt, pendulums = on_pendulum(settings, folder, progress)
    times, drifts = on_methods(settings)
    volume, shapes = volumes(settings, folder, progress)
    drive, driven = on_forcing(settings)
    pelts, animals = on_pelts(settings, folder, progress)
    save(figure(pendulums, (times, drifts), shapes, driven, animals), folder / "physics.png")
    late = {m: float(np.mean(d[-75:])) for m, d in drifts.items()}
    free, plain = (volume[k]["change of area"] for k in ("divergence-free", "unstructured"))
    own, other = (learnt[k]["energy drift"] for k in ("Hamiltonian", "unstructured"))
    rows = [
        {"what": f"learnt pendulum, energy drift after {settings.horizon:.0f} s",
         "with structure": f"{own:.3f}", "without": f"{other:.3f}"},
        {"what": "change of area in 10 s", "with structure": f"{free:.1e}", "without": f"{plain:.1e}"},
        {"what": f"energy error after {20 * settings.horizon:.0f} s: leapfrog, Heun",
         "with structure": f"{late['leapfrog']:.1e}", "without": f"{late['heun']:.1e}"},
        {"what": "the same: Yoshida, RK4", "with structure": f"{late['yoshida4']:.1e}",
         "without": f"{late['rk4']:.1e}"},
        {"what": "evaluations for a drive with 9 jumps, aligned or not",
         "with structure": str(drive["evaluations, aligned"]),
         "without": str(drive["evaluations, across jumps"])},
    ]  # fmt: skip
    claims = {
        "A symplectic method keeps the energy better than an unstructured one of its cost": late[
            "leapfrog"
        ]
        < late["heun"],
        "A divergence-free field keeps area to 1e-3": free < 1e-3,
        "and better than an unstructured one": free < plain,
        "Aligned steps cost fewer evaluations": drive["evaluations, aligned"]
        < drive["evaluations, across jumps"],
        "The drive is found from the response within 0.1": drive["error of the drive"] < 0.1,
        "Lynx and hares: a better fit than constants": pelts["error"] < pelts["constant"],
    }
    if settings.steps >= 1000:
        claims["The learnt Hamiltonian pendulum drifts less than the unstructured one"] = (
            own < other
        )
    notes = (
        f"Drive found from a noisy response: error {drive['error of the drive']:.3f} (RMS).\n"
        f"Lynx and hares: error of the logarithms {pelts['error']:.2f} (constants "
        f"{pelts['constant']:.2f}), rates " + ", ".join(f"{x:.3f}" for x in pelts["rates"]) + "."
    )
    more = {"pendulum": learnt, "methods": late, "volume": volume, "drive": drive, "pelts": pelts}
    return Results(rows, claims, notes, more)


def figure(pendulums, methods, shapes, driven, animals):
    """Five panels."""
    plt_figure, axes = plt.subplots(2, 3, figsize=(15, 8.5))
    ts, paths = pendulums
    for name, (q, p) in paths.items():
        style: dict = dict(color="black", lw=4, alpha=0.25) if name == "truth" else dict(lw=1.2)
        axes[0, 0].plot(np.asarray(q)[:, 0], np.asarray(p)[:, 0], label=name, **style)
        axes[0, 1].plot(ts, energy(np.asarray(q)[:, 0], np.asarray(p)[:, 0]), label=name, **style)
    axes[0, 0].set(xlabel="q", ylabel="p", title="A pendulum, learnt")
    axes[0, 1].set(xlabel="time", ylabel="energy", title="Its energy")
    axes[0, 1].legend()
    times, drifts = methods
    for method, drift in drifts.items():
        axes[0, 2].semilogy(times, np.maximum(drift, 1e-8), label=method)
    axes[0, 2].set(xlabel="time", ylabel="error of the energy", title="Methods at equal cost")
    axes[0, 2].legend()
    disc, ends = shapes
    axes[1, 0].fill(*disc.T, color="#999999", alpha=0.5, label="start")
    for name, shape in ends.items():
        axes[1, 0].plot(*shape.T, label=name, lw=1.5)
    axes[1, 0].set(title="A disc after 10 s of a learnt swirl", aspect="equal")
    axes[1, 0].legend(fontsize=11)
    knots, truth, found, ts, seen = driven
    found = np.append(found[:-1], found[-2])
    axes[1, 1].step(knots, truth, where="post", color="black", lw=4, alpha=0.25, label="drive")
    axes[1, 1].step(knots, found, where="post", label="found")
    axes[1, 1].plot(ts, seen[:, 0], ".", ms=4, label="response")
    axes[1, 1].set(xlabel="time", title="A drive found from the response")
    axes[1, 1].legend(fontsize=11)
    ts, pelts, fine, path = animals
    for i, name in enumerate(("hares", "lynx")):
        (line,) = axes[1, 2].plot(1900 + fine, path[:, i], label=name)
        axes[1, 2].plot(1900 + ts, pelts[:, i], "o", color=line.get_color())
    axes[1, 2].set(ylabel="pelts (thousands)", title="Lynx and hares")
    axes[1, 2].legend()
    return plt_figure
