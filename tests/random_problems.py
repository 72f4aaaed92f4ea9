"""Problems with exact answers, of random numbers: linear systems, quadratures, rotations, orbits, stiff ones.

All are written in a unit of time and of the state of their own: with x = rate (t - start) and y = scale u,

    dy/dt = rate scale f(y / scale, x, q),

where u, x and the parameters q are about 1, whatever the span, the offset and the size of the state. Their
exact solutions are JAX functions in float64, so that they have exact derivatives too.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TIMES = 5  # of a grid


class Problem(NamedTuple):
    """An initial-value problem in its own unit, with its solution.

    `field(u, x, q)` is du/dx of a vector of `size` numbers; `exact(u0, xs, q)` are the states at xs, of which
    the first is that of u0; `draw(uniform)` gives (u0, q), `uniform(low, high, *shape)` being random numbers.
    `growth` bounds what becomes of a perturbation; `pair` says that the state is (position, momentum).
    """

    size: int
    field: Callable
    exact: Callable
    draw: Callable
    sees_time: bool = False
    growth: float = 8.0
    stiff: bool = False
    pair: bool = False


def exponential(a, x, u):
    """exp(a x) u, by its series: of |a x| up to 2, to the last digits."""

    def add(carry, k):
        total, term = carry
        term = a @ term * (x / k)
        return (total + term, term), None

    return lax.scan(add, (u, u), jnp.arange(1.0, 31.0))[0][0]


def matrix(uniform, n):
    """A random matrix with a Frobenius norm of at most 2."""
    a = np.asarray(uniform(-1, 1, n, n))
    return a * (uniform(0.1, 2) / max(np.linalg.norm(a), 1e-3))


def start_of(uniform, n):
    """A state that is not near 0, where steps may be as long as they like, and derivatives off by as much."""
    u = uniform(-1, 1, n)
    return np.where(u < 0, u - 0.3, u + 0.3)


def draw_linear(uniform):
    return start_of(uniform, 3), dict(a=matrix(uniform, 3))


def linear_exact(u0, xs, q):
    return jax.vmap(lambda x: exponential(q["a"], x - xs[0], u0))(xs)


def waves(x, q):
    return jnp.cos(q["speed"] * x + q["phase"])


def waves_slope(x, q):
    return -q["speed"] * jnp.sin(q["speed"] * x + q["phase"])


def draw_waves(uniform, n):
    return dict(speed=uniform(0.5, 4, n), phase=uniform(-3, 3, n))


def draw_manufactured(uniform):
    return start_of(uniform, 3), draw_waves(uniform, 3) | dict(a=matrix(uniform, 3))


def manufactured_exact(u0, xs, q):
    rest = u0 - waves(xs[0], q)
    return jax.vmap(lambda x: waves(x, q) + exponential(q["a"], x - xs[0], rest))(xs)


def draw_quadrature(uniform):
    return start_of(uniform, 2), draw_waves(uniform, 2) | dict(slope=uniform(-1, 1, 2))


def quadrature_exact(u0, xs, q):
    area = lambda x: jnp.sin(q["speed"] * x + q["phase"]) / q["speed"] + q["slope"] * x**3 / 3
    return jax.vmap(lambda x: u0 + area(x) - area(xs[0]))(xs)


def draw_rotation(uniform):
    return start_of(uniform, 2), dict(speed=uniform(-3, 3))


def rotation_exact(u0, xs, q):
    angle = q["speed"] * (xs - xs[0])
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([c * u0[0] - s * u0[1], s * u0[0] + c * u0[1]], 1)


def draw_logistic(uniform):
    return uniform(0.1, 0.9, 2), draw_waves(uniform, 2)


def logistic_exact(u0, xs, q):
    area = lambda x: jnp.sin(q["speed"] * x + q["phase"]) / q["speed"]
    return jax.vmap(lambda x: 1 / (1 + (1 / u0 - 1) * jnp.exp(area(xs[0]) - area(x))))(xs)


def draw_kepler(uniform):
    """At the pericentre of an ellipse of eccentricity e, turned by an angle."""
    e, angle = uniform(0, 0.5), uniform(-3, 3)
    c, s = math.cos(angle), math.sin(angle)
    r, v = 1 - e, math.sqrt((1 + e) / (1 - e))
    return np.array([c * r, s * r, -s * v, c * v]), dict(pull=uniform(0.5, 1.5))


def kepler_field(u, x, q):
    place, v = u[:2], u[2:]
    return q["pull"] * jnp.concatenate([v, -place / jnp.sum(place**2) ** 1.5])


def kepler_exact(u0, xs, q):
    """By Lagrange's f and g: the change E of the eccentric anomaly, by Newton's method."""
    place, v = u0[:2], u0[2:]
    r, turn = jnp.sqrt(jnp.sum(place**2)), jnp.sum(place * v)
    a = 1 / (2 / r - jnp.sum(v**2))
    root = jnp.sqrt(a)

    def state(x):
        x = q["pull"] * (x - xs[0])

        def newton(E, _):
            c, s = jnp.cos(E), jnp.sin(E)
            off = E - (1 - r / a) * s + turn / root * (1 - c) - x / root**3
            return E - off / (1 - (1 - r / a) * c + turn / root * s), None

        E = lax.scan(newton, x / root**3, None, length=20)[0]
        c, s = jnp.cos(E), jnp.sin(E)
        f, g = 1 - a / r * (1 - c), x - root**3 * (E - s)
        there = f * place + g * v
        away = jnp.sqrt(jnp.sum(there**2))
        return jnp.concatenate(
            [there, -root / (away * r) * s * place + (1 - a / away * (1 - c)) * v]
        )

    return jax.vmap(state)(xs)


def draw_stiff(uniform):
    return start_of(uniform, 2), draw_waves(uniform, 2) | dict(log_rate=uniform(5, 11, 2))


def stiff_field(u, x, q):
    return jnp.exp(q["log_rate"]) * (waves(x, q) - u) + waves_slope(x, q)


def stiff_exact(u0, xs, q):
    decay = lambda x: jnp.exp(-jnp.exp(q["log_rate"]) * (x - xs[0]))
    return jax.vmap(lambda x: waves(x, q) + decay(x) * (u0 - waves(xs[0], q)))(xs)


def draw_impulse(uniform):
    u0, q = draw_linear(uniform)
    return np.append(u0, 0.0), q | dict(at=uniform(0.15, 0.85), push=uniform(-1, 1, 3))


def impulse_field(u, x, q):
    """A linear system with a clock, which tells when it is pushed."""
    return jnp.concatenate([q["a"] @ u[:3], jnp.ones(1, u.dtype)])


def impulse_exact(u0, xs, q):
    pushed = xs[0] + q["at"] - u0[3]

    def state(x):
        u = exponential(q["a"], x - xs[0], u0[:3])
        later = jnp.where(x > pushed, x - pushed, 0.0)
        more = jnp.where(x > pushed, exponential(q["a"], later, q["push"]), 0.0)
        return jnp.append(u + more, u0[3] + x - xs[0])

    return jax.vmap(state)(xs)


PROBLEMS = {
    "linear": Problem(3, lambda u, x, q: q["a"] @ u, linear_exact, draw_linear),
    "manufactured": Problem(
        3,
        lambda u, x, q: waves_slope(x, q) + q["a"] @ (u - waves(x, q)),
        manufactured_exact,
        draw_manufactured,
        sees_time=True,
    ),
    "quadrature": Problem(
        2,
        lambda u, x, q: waves(x, q) + q["slope"] * x**2,
        quadrature_exact,
        draw_quadrature,
        sees_time=True,
        growth=1.0,
    ),
    "rotation": Problem(
        2,
        lambda u, x, q: q["speed"] * jnp.stack([-u[1], u[0]]),
        rotation_exact,
        draw_rotation,
        growth=1.0,
        pair=True,
    ),
    "logistic": Problem(
        2,
        lambda u, x, q: waves(x, q) * u * (1 - u),
        logistic_exact,
        draw_logistic,
        sees_time=True,
        growth=3.0,
    ),
    "kepler": Problem(4, kepler_field, kepler_exact, draw_kepler, growth=20.0),
    "stiff": Problem(2, stiff_field, stiff_exact, draw_stiff, sees_time=True, stiff=True),
    "impulse": Problem(4, impulse_field, impulse_exact, draw_impulse),
}


def uniform_of(rng):
    """Uniform random numbers from a `random.Random`: a float, or an array of a shape."""

    def uniform(low, high, *shape):
        if not shape:
            return rng.uniform(low, high)
        count = math.prod(shape)
        return np.array([rng.uniform(low, high) for _ in range(count)]).reshape(shape)

    return uniform


class Ranges(NamedTuple):
    """Powers of ten between which numbers are drawn."""

    span: tuple[float, float] = (-12.0, 6.0)
    scale: tuple[float, float] = (-3.0, 3.0)
    rtol: tuple[float, float] = (-8.0, -4.0)
    offset: float = (
        1e6  # how many spans the first time may lie away from 0, or 1e6, if that is less
    )


def draw_numbers(rng, name: str, ranges: Ranges, time_dtype=np.float64, still: bool = True) -> dict:
    """The numbers of one case of a problem: arrays that depend on nothing but the generator.

    Times increase or decrease, repeat, are all the same (if they may stand `still`), or lie near 1e6; `w` is a
    cotangent of the rows, `v` a tangent of what is differentiated (the first numbers of it).
    """
    problem, uniform = PROBLEMS[name], uniform_of(rng)
    power = lambda bounds: 10.0 ** uniform(*bounds)
    u0, q = problem.draw(uniform)
    span = power(ranges.span) * rng.choice([-1, 1])
    offset = rng.choice(["none", "near", "far"])
    farthest = min(1e6, ranges.offset * abs(span))
    start = {"none": 0.0, "near": min(1.0, ranges.offset) * span, "far": farthest}[offset]
    start = start * uniform(-1, 1)
    inner = sorted(uniform(0.01, 1, TIMES - 2))  # a solve over no time has no direction to go on in
    grid = rng.choice(["any"] * 3 + ["repeated", "at the ends"] + ["one point"] * still)
    if grid == "repeated":
        inner = [inner[0], inner[0], inner[-1]]
    if grid == "at the ends":
        inner = [0.0, inner[1], 1.0]
    parts = np.array([0.0, *inner, 1.0]) * (grid != "one point")
    start, directions = float(time_dtype(start)), np.random.default_rng(rng.getrandbits(32))
    return dict(
        u0=np.asarray(u0, float),
        q={key: np.asarray(x, float) for key, x in q.items()},
        t=np.asarray(time_dtype(start + span * parts), float),
        start=start,
        rate=1 / span,
        scale=power(ranges.scale),
        rtol=power(ranges.rtol),
        atol=power((-2, 0)),
        w=directions.uniform(-1, 1, (TIMES, problem.size)),
        v=directions.uniform(-1, 1, 40),
    )


def stack(cases: list[dict]) -> dict:
    """Cases as one tree of arrays with a leading axis."""
    return jax.tree.map(lambda *x: np.stack(x), *cases)


class Moved(NamedTuple):
    """A case after its numbers were moved by z."""

    u0: jax.Array
    q: dict
    rate: jax.Array
    t: jax.Array


MOVABLE = ("u0", "q", "rate", "t")


def moved(z, case: dict, which: tuple[str, ...]) -> Moved:
    """The numbers of a case, those that are named moved by z, each in its own unit: so all derivatives with
    respect to z are about 1."""
    parts = {name: case[name] for name in MOVABLE}
    if not which:
        return Moved(**parts)
    leaves, structure = jax.tree.flatten({name: parts[name] for name in which})
    ends = np.cumsum([0, *[np.size(x) for x in leaves]])
    pieces = [z[a:b].reshape(np.shape(x)) for x, a, b in zip(leaves, ends, ends[1:])]
    by = jax.tree.unflatten(structure, pieces)
    if "t" in by:
        by["t"] = by["t"] / case["rate"]
    if "rate" in by:
        by["rate"] = by["rate"] * case["rate"]
    add = lambda name: jax.tree.map(jnp.add, parts[name], by[name]) if name in by else parts[name]
    return Moved(*map(add, MOVABLE))


def count_moved(case: dict, which: tuple[str, ...]) -> int:
    """How many numbers z has, of one case."""
    return sum(np.size(x) for name in which for x in jax.tree.leaves(case[name]))


def exact_rows(name: str, which, z, case: dict):
    """The exact solution at the times of a case, over its scale."""
    m = moved(z, case, which)
    return PROBLEMS[name].exact(m.u0, m.rate * (m.t - case["start"]), m.q)
