"""JAX's debugging switches: under each a solve finds what it finds without, and what is wrong is raised.

All tests run with `jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"` (conftest.py).
"""

import logging
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxode import Event, Signal, SolveError, consistent, explain, gradient_report, odeint, solve

TS, RATE, Y0 = np.array([0.0, 0.5, 1.0]), np.array(0.7), np.arange(1.0, 7.0)
YS = Y0 * np.exp(-RATE * TS)[:, None]
OPTIONS = dict(rtol=1e-6, atol=1e-6, max_steps=64)
NEAR = dict(rtol=1e-4, atol=1e-4)


@contextmanager
def switched(**switches):
    """JAX with these switches, and without any program in its caches."""
    before = {name: getattr(jax.config, f"jax_{name}") for name in switches}
    jax.clear_caches()
    try:
        for name, value in switches.items():
            jax.config.update(f"jax_{name}", value)
        yield
        assert all(getattr(jax.config, f"jax_{name}") == x for name, x in switches.items())
    finally:
        for name, value in before.items():
            jax.config.update(f"jax_{name}", value or ("allow" if "guard" in name else value))


def decay(y, t, rate):
    return -rate * y


def squared(y, t, rate):
    return rate * y**2


def solved(y0=Y0, rate=RATE, **options):
    return solve(decay, y0, TS, rate, **{**OPTIONS, **options})


def gradient(**options):
    """Of the sum of all that was found at the end: by y0 and by the rate."""
    return jax.grad(lambda y0, rate: jnp.sum(solved(y0, rate, **options).ys[-1]), (0, 1))


def doubled():
    """A solve whose state is doubled when its first component is 0.8; and when that is."""
    event = Event(lambda y, t, rate: y[0] - 0.8, change=lambda y, t, rate: 2 * y)
    solution = solve(decay, Y0, TS, RATE, events=[event], **OPTIONS)
    return solution.ys, solution.events[0].times


ENDS = np.full(6, np.exp(-RATE)), -21 * np.exp(-RATE)
TIMES = np.append(np.log(1 / 0.8) / RATE, np.full(15, np.nan))
MANY = jax.device_put(np.stack([Y0, -Y0]))
SIGNAL = lambda: Signal([0.0, 0.5], [1.0, 3.0], "previous")
CALLS = {
    "a solve": lambda: (solved().ys, YS),
    "a gradient": lambda: (gradient()(Y0, RATE), ENDS),
    "in a program": lambda: (jax.jit(gradient())(jax.device_put(Y0), jax.device_put(RATE)), ENDS),
    "a batch": lambda: (jax.vmap(lambda y: solved(y).ys)(MANY), np.stack([YS, -YS])),
    "an event": lambda: (doubled(), (YS * (1 + (TIMES[0] < TS))[:, None], TIMES)),
    "dense output": lambda: (solved(dense=True).dense(0.5), YS[1]),
    "every step": lambda: (jnp.nanmax(solve(decay, Y0, TS[::2], RATE, save_steps=True, **OPTIONS).ts), 1.0),
    "a fold": lambda: (solved(fold=(jnp.inf, lambda x, y, t, rate: jnp.minimum(x, y[0]))).folded, YS[2, 0]),
    "a log": lambda: (solved(log=64).log.times[:1], [0.0]),
    "a stiff gradient": lambda: (gradient(method="kvaerno3")(Y0, RATE), ENDS),
    "backsolve": lambda: (gradient(adjoint="backsolve")(Y0, RATE), ENDS),
    "a signal": lambda: (odeint(lambda y, t, u: u(t), 0.0, TS, SIGNAL()), np.array([0, 0.5, 2])),
    "a mass matrix": lambda: (solved(rate=RATE / 2, method="rodas5p", mass=np.full(6, 0.5)).ys, YS),
    "initial values": lambda: (consistent(lambda y, t: y - 2.0, Y0, 0.0, mass=np.zeros(6)), np.full(6, 2.0)),
    "later": lambda: (solved(resumable=True).resume(2.0).ys[0], Y0 * np.exp(-2 * RATE)),
}  # fmt: skip
# With "disallow" JAX takes no number of the host in `x[-1]`, in `x > 0`, and where `jax.grad` begins.
# Programs that hold neither what is infinite nor what is NaN.
NEITHER = {
    "a solve",
    "in a program",
    "a stiff gradient",
    "a mass matrix",
    "a signal",
    "initial values",
    "later",
}
OF_JAX = {"a gradient", "a stiff gradient", "backsolve", "every step", "a log", "later"}
KINDS = {
    "values that are not finite": (dict(debug_nans=True, debug_infs=True), set(CALLS) - NEITHER),
    "JAX's own checks": (dict(enable_checks=True), {"a stiff gradient"}),
    "leaks": (dict(check_tracer_leaks=True), {"a gradient", "a stiff gradient", "initial values"}),
    "transfers": (dict(transfer_guard="disallow"), set(CALLS) - OF_JAX),
    "words": (
        dict(log_compiles=True, explain_cache_misses=True, traceback_filtering="off"), {"a solve"},
    ),
}  # fmt: skip


def check(name):
    found, right = CALLS[name]()
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(x, y, **NEAR, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_under_a_switch_a_solve_finds_what_it_finds_without(kind, caplog):
    switches, names = KINDS[kind]
    with caplog.at_level(logging.CRITICAL), switched(**switches):
        for name in CALLS:
            if name in names:
                check(name)


def test_without_jit_it_does_too():
    rough = dict(rtol=1e-2, atol=1e-2, max_steps=16)
    with switched(disable_jit=True):
        np.testing.assert_allclose(solved(**rough).ys, YS, rtol=0.05)
        for x, y in zip(gradient(**rough)(Y0[:1], RATE), (ENDS[0][:1], -ENDS[0][0])):
            np.testing.assert_allclose(x, y, rtol=0.05)


def test_a_second_call_traces_nothing_but_func():
    names = "a solve", "a fold"
    for name in names:
        check(name)
    with jax.no_tracing():
        for name in names:
            check(name)
        with pytest.raises(RuntimeError, match="no_tracing"):
            odeint(decay, Y0[:3], TS, RATE)  # another program


def test_transfers_of_a_solve_are_mentioned_only_where_explicit_ones_are():
    with switched(transfer_guard="log"):
        check("a solve")
    with switched(transfer_guard="disallow_explicit"), pytest.raises(Exception, match="Disallowed"):
        check("a solve")


# What is wrong.


def fails(y0, rate=1.0, **options):
    """A solve that comes to a pole."""
    return solve(squared, y0, [0.0, 3.0], rate, **{**OPTIONS, "max_steps": 30, **options}).ys


def back_from_far(y0):
    """A state that has decayed so far that the solve backwards does not come back to y0."""
    return jnp.sum(
        odeint(lambda y, t: -60.0 * y, y0, [0.0, 3.0], adjoint="backsolve", max_steps=2000)
    )


WRONG = {
    "a solve": (lambda: fails(Y0), SolveError, "step limit"),
    "in a program": (lambda: jax.jit(fails)(Y0), SolveError, "step limit"),
    "without an error": (lambda: fails(Y0, throw=False), FloatingPointError, "nan.*a solve. The step limit"),
    "a batch": (lambda: jax.vmap(fails)(np.stack([Y0, Y0])), FloatingPointError, "nan.*the solution"),
    "a gradient": (lambda: jax.grad(lambda y: fails(y).sum())(Y0), FloatingPointError, "nan.*the solution"),
    "a backward pass": (lambda: jax.grad(back_from_far)(Y0), FloatingPointError, "nan.*the backward pass"),
    "what is saved": (lambda: solved(save=lambda y, t, rate: jnp.log(-y)), FloatingPointError, "nan.*`save`"),
    "an infinity": (lambda: solved(save=lambda y, t, rate: 1 / (0 * y)), FloatingPointError, "inf.*`save`"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_finite_and_no_padding_is_raised(name):
    call, error, words = WRONG[name]
    with switched(debug_nans=True, debug_infs=True), pytest.raises(error, match=words):
        call()


def test_failures_are_explained_under_the_switches_too():
    given = squared, Y0, [0.0, 3.0], 1.0
    with switched(debug_nans=True, debug_infs=True, transfer_guard="disallow"):
        assert "came to" in str(explain(*given, max_steps=30))
        assert gradient_report(*given, max_steps=30).verdict == "failed"
        with pytest.raises(SolveError, match="step limit"):
            solve(*given, max_steps=30)
