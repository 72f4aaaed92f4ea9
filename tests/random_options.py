"""Options of a solve at random, right ones and wrong ones, together: what may come of it, and what may not.

A solve with any options is a program, or one of the errors that are documented, raised by jaxode: never one
that comes from inside of JAX. `attempt` says what came of one; nothing is compiled.
"""

import traceback
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from random_programs import FORMS, ORDERS, Structure, vector

import jaxode
from jaxode import Event, SolveError, pid, solve
from jaxode.methods import Banded, BlockDiagonal, Diagonal

PACKAGE = str(Path(jaxode.__file__).parent)
NOTHING = object()  # an option that is left out


def last_state(value, y, t, *args):
    return vector(y, jnp.float64)[0]


def sign(y, t, *args):
    return vector(y, jnp.float64)[0] - 0.5


def same(y, t, *args):
    return y


OPTIONS = {
    "rtol": [1e-3, 1e-6, 0.0, -1.0, "a", None, [1e-3], np.nan, np.ones(2), np.float32(1e-3)],
    "atol": [1e-3, 0.0, -1.0, np.inf, {"a": 1e-3}, np.ones((2, 2)), 1],
    "mxstep": [5, 0, np.inf, 2.5, None, "many"],
    "hmax": [0.1, 0.0, -1.0, np.inf, None, "x", np.ones(2)],
    "dt": [0.1, 0.25, 0.0, -1.0, np.inf, np.nan, None, "x", 1e-30],
    "controller": [pid(integral=0.4, proportional=0.3), pid(derivative=0.1), None, 3],
    "max_steps": [1, 7, 64, 0, -1, 2.5, True, 2**31, None],
    "throw": [True, False, None],
    "heuristics": [True, False],
    "linear": [Diagonal(), Banded(1, 1), Banded(0, 0), BlockDiagonal(2), None, "dense"],
    "mass": [None, np.ones(2), np.eye(2), 1.0, "x"],
    "jac": [None, lambda y, t, *args: jnp.eye(2), 3],
    "dense": [True, False, 1, None],
    "save": [None, lambda y, t, *args: 0, lambda y, t, *args: None, same, 3],
    "save_steps": [True, False],
    "events": [
        None,
        [],
        "x",
        [Event(times=[0.1, 0.5], change=same)],
        [Event(sign, terminal=True)],
        [Event(sign, change=same), Event(times=[0.3])],
        Event(sign),
        [Event(lambda y, t, *args: y)],
    ],
    "after_events": [True, False, None],
    "fold": [None, (0.0, last_state), (0, last_state), 3, (None, last_state), (jnp.zeros(2), last_state)],
    "resumable": [True, False],
    "compensated": [True, False, 1],
    "log": [None, 5, 0, True, -1],
    "progress": [False, None],
    "max_evaluations": [None, 60, 1000, 3, 0, "x"],
    "method": [*ORDERS, *ORDERS, "nonsense", 3, "RK45"],
    "adjoint": ["replay", "backsolve", "direct", "forward", "nonsense", jaxode.adjoints.direct],
    "nonsense": [1],
}  # fmt: skip
TIMES = [
    np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0]), np.array([1.0, 0.0]), np.array([0.0]), np.zeros(0),
    np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 1.0, 0.5]), np.array([0.0, np.nan]), [0, 1],
    np.float32([0, 1]), 1.0, "x", np.array([0, 2]), np.array([[0.0, 1.0]]), np.array([0j, 1.0]),
]  # fmt: skip
WAYS = {
    "plain": lambda fn: fn,
    "vmap": lambda fn: lambda u: jax.vmap(fn)(jnp.stack([u, 2 * u, u])),
    "grad": lambda fn: jax.grad(lambda u: total(fn(u))),
    "vmap of grad": lambda fn: jax.vmap(jax.grad(lambda u: total(fn(u)))),
    "jacfwd": lambda fn: jax.jacfwd(fn),
}


def total(out):
    leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum((jnp.sum(x.real).astype(jnp.float64) for x in leaves), jnp.zeros(()))


def random_options(rng) -> dict:
    names = rng.sample([*OPTIONS], rng.choice([1, 2, 2, 3, 4]))
    return {name: rng.choice(OPTIONS[name]) for name in names}


def attempt(rng) -> tuple[str, str | None]:
    """What was tried, in words; and what is wrong with what came of it, if anything is."""
    s = Structure(form=rng.choice([*FORMS]), dtype=rng.choice(["float64", "float64", "float32"]))
    options, times, way = random_options(rng), rng.choice(TIMES[:4] + TIMES), rng.choice([*WAYS])
    if "grad" in way and options.get("adjoint") == "forward":
        way = "jacfwd"  # JAX's own error, for a loop that has no reverse mode
    width = rng.choice([2, 2, 3])
    tried = f"{way} of solve over {times!r}, {width} numbers as {s.form} in {s.dtype}, {options}"

    def ends(u):
        func = lambda y, t, rate: jax.tree.map(lambda x: (-rate.astype(x.dtype)) * x, y)
        out = solve(func, s.state(u.astype(s.wide)), times, jnp.float32(0.5), **options)
        return out.ys, out.folded

    u = jnp.ones((3, width)) if way == "vmap of grad" else jnp.ones(width)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jax.jit(WAYS[way](ends)).trace(u).lower()
    except Exception as error:
        if not is_documented(error):
            return tried, f"{type(error).__name__}: {error}"[:500]
    return tried, None


def is_documented(error: Exception) -> bool:
    """Whether an error is one of those that a solve may raise, and jaxode is who raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    kinds = ValueError, TypeError, NotImplementedError, SolveError
    return isinstance(error, kinds) and last.filename.startswith(PACKAGE)
