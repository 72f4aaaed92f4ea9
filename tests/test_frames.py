"""How far it is from a call to the user's function: the frames of jaxode's own files on the stack.

A reader of a traceback, or of a profile, has to get through them. func is called once for a solve, at
the door, and is a jaxpr from there on; so the way to that jaxpr is measured as well.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxode
from jaxode import odeint
from jaxode.kernels.traces import Trace

PACKAGE = str(Path(jaxode.__file__).parent)


def depth():
    """How many frames of jaxode are below this one."""
    frame, count = sys._getframe(1), 0
    while frame:
        count += frame.f_code.co_filename.startswith(PACKAGE)
        frame = frame.f_back
    return count


def solve(func, adjoint):
    return lambda y: odeint(func, y, jnp.linspace(0.0, 1.0, 4), 2.0, adjoint=adjoint)


def gradient(func, adjoint):
    return jax.grad(lambda y: solve(func, adjoint)(y).sum())


def lowered(fn, many):
    """The program, traced and lowered: as far as Python is concerned."""
    fn, y0 = (jax.vmap(fn), jnp.ones((5, 3))) if many else (fn, jnp.ones(3))
    return jax.jit(fn).lower(y0)


@pytest.mark.parametrize("adjoint", ["replay", "backsolve", "direct"])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("work", [solve, gradient])
def test_func_is_called_once_at_most_six_frames_from_the_call(work, many, adjoint):
    depths = []

    def func(y, t, a):
        depths.append(depth())
        return -a * jnp.sin(y)

    fn = work(func, adjoint)
    lowered(fn, many)
    assert len(depths) == 1 and depths[0] <= 6  # house: 10, and 14 in lanes


# As they were on 2026-11-26; the house wants 10, and 14 in lanes. A long way is mostly `problems.each`,
# the one call and the choice of a form. Lower them, and do not raise them.
FRAMES = {
    ("replay", "forward"): 16,
    ("replay", "gradient"): 21,
    ("replay", "forward in lanes"): 18,
    ("replay", "gradient in lanes"): 24,
    ("backsolve", "gradient"): 23,
    ("backsolve", "gradient in lanes"): 23,
    ("direct", "gradient"): 22,
}


@pytest.mark.parametrize("adjoint, work", FRAMES)
def test_the_way_to_the_jaxpr_of_func_does_not_grow(adjoint, work, monkeypatch):
    depths, call = [], Trace.__call__

    def counted(trace, leaves, y, t):
        depths.append(depth())
        return call(trace, leaves, y, t)

    monkeypatch.setattr(Trace, "__call__", counted)
    func = lambda y, t, a: -a * jnp.sin(y)
    fn = (gradient if "gradient" in work else solve)(func, adjoint)
    jax.clear_caches()
    lowered(fn, "lanes" in work)
    assert depths and max(depths) <= FRAMES[adjoint, work]
