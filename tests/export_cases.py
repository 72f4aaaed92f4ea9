"""Solves to be exported for a platform that need not be there, and what must not be in their programs.

`jax.export` lowers a program for any platform, here StableHLO text. A case is a method with an adjoint, one
solve or a batch, in float32 or float64; or one of `EXTRAS`, once each.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxode import Event, Signal, odeint, solve
from jaxode.adjoints import adjoints
from jaxode.methods import Banded, BlockDiagonal, Sparse, methods

PLATFORMS = "cpu", "cuda", "tpu"
BATCH = 12  # more than are solved one after another on a CPU
# What XLA on a CPU alone knows: a whole solve as one function, and calls that stay calls.
CPU_ALONE = "xla_cpu", "inlineable"
# The custom calls of a platform; every other one would not be found there.
CALLS = {
    "cpu": r"lapack_\w+",
    "cuda": r"(cusolver|cublas|cu)_\w+",
    "tpu": r"(LuDecomposition|Qr|Eigh)",
}
OWN_STEPS = dict(rtol=1e-3, atol=1e-3, max_steps=64)


class Case(NamedTuple):
    """A solve; without an adjoint there is no gradient of it."""

    method: str
    adjoint: str = "none"
    batched: bool = False
    dtype: str = "float32"
    extra: str = ""

    def __str__(self) -> str:
        form = "batch" if self.batched else "single"
        return " ".join(part for part in (*self[:2], form, self.dtype, self.extra) if part)


# Problems: a state of three species, or (q, p) of an oscillator for symplectic methods. Six numbers are
# differentiated, so that "replay" goes back; of at most four it carries the derivatives along.


def species(y, t, rates):
    a, b, c = y
    turned = rates[0] * jnp.cos(t).astype(y.dtype) * b
    return jnp.stack([turned - rates[1] * a, rates[1] * a - b * c, b * c - rates[2] * c])


def oscillator(state, t, rates):
    q, p = state
    return rates[0] * p, -rates[1] * jnp.sin(q)


def problem(case: Case):
    """A function of the state and the rates, its output a few rows; and where both begin."""
    symplectic = case.method in ("leapfrog", "yoshida4")
    options = dict(OWN_STEPS, method=case.method)
    if case.adjoint != "none":
        options |= dict(adjoint=case.adjoint)
    if methods[case.method].error_order is None:
        options |= dict(dt=0.1)
    func = oscillator if symplectic else species
    start = jnp.array([1.0, 0.5] if symplectic else [1.0, 0.5, 0.2], case.dtype)
    times = jnp.array([0.0, 0.3, 0.7, 1.0], case.dtype)

    def rows(y0, rates):
        y0 = tuple(y0) if symplectic else y0
        return odeint(func, y0, times, rates, **options)

    return rows, start, jnp.array([0.7, 0.4, 0.3], case.dtype)


# What else a solve can be asked for, once each, with a gradient by "replay".


def oscillating(y, t, rates):
    return jnp.stack([rates[0] * y[1], -rates[1] * y[0]])


def with_events(y0, rates, **options):
    change = lambda y, t, rates: y * jnp.array([1.0, -0.9], y.dtype)
    crossing = Event(lambda y, t, rates: y[0], direction="down", change=change)
    dose = Event(times=[0.4], change=lambda y, t, rates: y + rates[2])
    sol = solve(oscillating, y0[:2], [0.0, 3.0, 6.0], rates, events=[crossing, dose], **options)
    return sol.ys, sol.events[0].times[:1]


def with_dense(y0, rates, **options):
    return solve(species, y0, [0.0, 1.0], rates, dense=True, **options).dense(0.5)


def with_save_steps(y0, rates, **options):
    sol = solve(species, y0, [0.0, 1.0], rates, save_steps=True, **options)
    return jnp.where(sol.mask[:, None], sol.ys, 0)


def with_save(y0, rates, **options):
    return solve(species, y0, [0.0, 0.5, 1.0], rates, save=lambda y, t, _: y[0] ** 2, **options).ys


def with_fold(y0, rates, **options):
    highest = lambda most, y, t, rates: jnp.maximum(most, y[1])
    return solve(species, y0, [0.0, 1.0], rates, fold=(0.0, highest), **options).folded


def with_log(y0, rates, **options):
    return solve(species, y0, [0.0, 1.0], rates, log=5, **options).ys


def with_budget(y0, rates, **options):
    return solve(species, y0, [0.0, 1.0], rates, max_evaluations=40, **options).ys


def with_signal(y0, rates, **options):
    drive = Signal(ts=[0.0, 0.4, 1.0], us=[0.0, 1.0, 0.5], kind="previous")
    func = lambda y, t, rates, u: species(y, t, rates) + u(t).astype(y.dtype)
    return odeint(func, y0, [0.0, 0.5, 1.0], rates, drive, **options)


def with_mass(y0, rates, **options):
    def conserving(y, t, rates):
        return species(y, t, rates).at[2].set(jnp.sum(y) - 1.0)

    y0 = y0 / jnp.sum(y0)
    mass = jnp.array([1.0, 1.0, 0.0], y0.dtype)
    return odeint(conserving, y0, [0.0, 0.5, 1.0], rates, mass=mass, **options)


def in_parts(y0, rates, **options):
    pair = (lambda y, t, rates: -20 * y, lambda y, t, rates: 20 * y + species(y, t, rates))
    return odeint(pair, y0, [0.0, 0.5, 1.0], rates, **options)


def of_few_numbers(y0, rates, **options):
    return odeint(species, y0, [0.0, 0.5, 1.0], jax.lax.stop_gradient(rates), **options)


def diffusion(y, t, rates):
    return rates[0] * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1)) - rates[1] * y * jnp.abs(y)


def wide(count: int, **more) -> Callable:
    """A solve of so many numbers: of a matrix of that size, or by the form of a step for large states."""

    def rows(y0, rates, **options):
        y0 = jnp.tile(y0, count // 3)
        return odeint(diffusion, y0, [0.0, 0.5, 1.0], rates, **options, **more)

    return rows


def network(y0, rates, **options):
    weights = jnp.outer(rates, jnp.linspace(-1.0, 1.0, 16, dtype=rates.dtype))
    func = lambda y, t, w: jnp.tanh(y @ w) @ w.T
    return odeint(func, jnp.tile(y0, (64, 1)), [0.0, 0.5, 1.0], weights, **options)


def neighbours(count: int) -> np.ndarray:
    one = np.eye(count, dtype=bool)
    return one | np.roll(one, 1, 1) | np.roll(one, -1, 1)


EXTRAS: dict[str, tuple[str, Callable]] = {
    "events": ("tsit5", with_events),
    "events, stiff": ("rodas5p", with_events),
    "dense": ("tsit5", with_dense),
    "save_steps": ("tsit5", with_save_steps),
    "save": ("tsit5", with_save),
    "fold": ("tsit5", with_fold),
    "log": ("tsit5", with_log),
    "max_evaluations": ("tsit5", with_budget),
    "signal": ("tsit5", with_signal),
    "mass": ("rodas5p", with_mass),
    "mass, diagonally implicit": ("kvaerno5", with_mass),
    "two parts": ("kencarp4", in_parts),
    "few numbers": ("tsit5", of_few_numbers),
    "few numbers, stiff": ("rodas5p", of_few_numbers),
    "a network": ("tsit5", network),
    "6,000 numbers": ("tsit5", wide(6000)),
    "a matrix in a loop": ("rodas5p", wide(12)),
    "a matrix of 300": ("rodas5p", wide(300)),
    "a band": ("rodas5p", wide(60, linear=Banded(1, 1))),
    "a pattern": ("rodas5p", wide(60, linear=Sparse(neighbours(60)))),
    "blocks": ("kvaerno3", wide(60, linear=BlockDiagonal(3))),
}


def program(case: Case):
    """What is exported: the value, or the value with its gradient in the state and the rates."""
    if case.extra:
        _, of_extra = EXTRAS[case.extra]
        options = dict(OWN_STEPS, method=case.method)
        options |= {} if case.adjoint == "none" else dict(adjoint=case.adjoint)
        _, y0, rates = problem(case._replace(extra="", method="tsit5"))
        rows = lambda y0, rates: of_extra(y0, rates, **options)
    else:
        rows, y0, rates = problem(case)

    def loss(y0, rates):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(rows(y0, rates)))

    def pushed(y0, rates):
        moved = jnp.ones_like(y0), jnp.ones_like(rates)
        return jax.jvp(rows, (y0, rates), moved)

    one = rows if case.adjoint == "none" else jax.value_and_grad(loss, (0, 1))
    if case.adjoint == "forward":
        one = pushed
    if not case.batched:
        return jax.jit(one), (y0, rates)
    scales = jnp.linspace(0.5, 1.5, BATCH, dtype=case.dtype)
    return jax.jit(jax.vmap(one, (0, None))), (scales[:, None] * y0[None], rates)


def cases() -> list[Case]:
    """All of them. What an adjoint does not do, it refuses."""
    both = [False, True]
    ways = ["none", *adjoints]
    found = [Case(m, a, b, "float32") for m in methods for a in ways for b in both]
    chosen = "tsit5", "dop853", "leapfrog", "rodas5p", "kvaerno5", "auto", "gauss4"
    found += [Case(m, a, b, "float64") for m in chosen for a in ways for b in both]
    extras = [(extra, m) for extra, (m, _) in EXTRAS.items()]
    return found + [Case(m, "replay", b, "float32", e) for e, m in extras for b in both]


def foreign(text: str, platform: str) -> list[str]:
    """What is in a program for this platform, and is not known there."""
    marks = [] if platform == "cpu" else [mark for mark in CPU_ALONE if mark in text]
    targets = re.findall(r'custom_call @(?:"([^"]+)"|([\w.]+))', text)
    names = {a or b for a, b in targets}
    return marks + sorted(name for name in names if not re.fullmatch(CALLS[platform], name))


def wrong(case: Case, run: bool = True) -> list[str]:
    """What is wrong with the exports of a case, one for each platform; that for a CPU is called."""
    fn, args = program(case)
    found = []
    for platform in PLATFORMS:
        exported = export.export(fn, platforms=[platform])(*args)
        bytes_ = exported.serialize()
        text = exported.mlir_module()
        found += [f"{platform}: {name} is in the program" for name in foreign(text, platform)]
        if platform == "cpu" and run:
            found += differences(export.deserialize(bytes_).call(*args), fn(*args))
    return found


def differences(found, wanted) -> list[str]:
    """How an exported program differs from the plain one; and whether both are no numbers."""
    leaves = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    out = [f"{x} where the plain call has {y}" for x, y in leaves if not np.array_equal(x, y)]
    return out + [f"{y} is not finite" for _, y in leaves if not np.all(np.isfinite(y))]
