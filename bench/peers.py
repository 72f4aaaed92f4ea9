"""The libraries that a user may have instead, each called in one way. Those not installed are left out.

`SOLVERS` are those that solve inside a JAX program: functions of (field, y0, ts, args, tolerance)
that give the states at ts, with the same pair of order 5(4) where there is a choice. `LORENZ` are
those that are not: they are given whole Lorenz systems.
"""

import functools
from importlib.util import find_spec
from types import SimpleNamespace

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint as jax_odeint

import jaxode


def with_jaxode(field, y0, ts, args=(), tolerance=1e-6):
    return jaxode.odeint(field, y0, ts, *args, rtol=tolerance, atol=tolerance)


def with_diffrax(field, y0, ts, args=(), tolerance=1e-6):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(y, t, *args)), diffrax.Tsit5(), ts[0], ts[-1], None, y0,
        args, saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    ).ys  # fmt: skip


def with_jax(field, y0, ts, args=(), tolerance=1e-6):
    return jax_odeint(field, y0, ts, *args, rtol=tolerance, atol=tolerance)


def with_tinydiffeq(field, y0, ts, args=(), tolerance=1e-6, loop="bounded"):
    """Its differentiable loop has 4,096 slots for steps unless told, used or not; "forward" has none."""
    import tinydiffeq

    return tinydiffeq.solve_ode(
        lambda y, t, _, args: field(y, t, *args), tinydiffeq.Tsit5(), ts[0], ts[-1], y0, p=args,
        dt_0=1e-3, save_at=tinydiffeq.SaveAt(ts=ts), adaptive_loop=loop,
        controller=tinydiffeq.IController(rtol=tolerance, atol=tolerance),
    ).xs  # fmt: skip


SOLVERS = {
    "jaxode": with_jaxode,
    "diffrax": with_diffrax,
    "jax": with_jax,
    "tinydiffeq": with_tinydiffeq,
}


def solver(name, gradient, lanes):
    """The function of SOLVERS, in the form that is fastest for what it is asked."""
    if name == "tinydiffeq" and not gradient and not lanes:  # under vmap it takes 26 times as long
        return functools.partial(with_tinydiffeq, loop="forward")
    return SOLVERS[name]


def gradsolve_lorenz(y0, ts, tolerance):
    """Its programs replay steps that were recorded before, and are timed without the recording.

    That flatters it: it chooses steps outside of any program, in Python, at a point at a time.
    "whole" are its own calls, which choose the steps too, and trace anew in each call.
    """
    import gradsolve
    from gradsolve.api import grad_closure

    def field(t, y, _):
        x, y, z = y[0], y[1], y[2]
        return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    first, last = float(ts[0]), float(ts[-1])
    problem = SimpleNamespace(
        name="bench_lorenz", dim=3, t0=first, t1=last, is_stiff=False, f_jax=field
    )
    y0, no_parameters = np.asarray(y0), np.zeros((len(y0), 1))
    options = dict(saveat=np.asarray(ts), rtol=tolerance, atol=tolerance)
    record = lambda: grad_closure(problem, y0, no_parameters, wrt="y0", **options)
    gradient_of = lambda ends: jax.grad(lambda y0: (ends(y0) ** 2).sum())
    ends = record()
    compiled = lambda f: jax.jit(f).lower(jnp.asarray(y0)).compile()
    return {
        "forward": compiled(ends),
        "gradient": compiled(gradient_of(ends)),
        "whole forward": lambda y0: gradsolve.solve(problem, y0, no_parameters, **options).y_saved,
        "whole gradient": lambda y0: gradient_of(record())(y0),
    }


def torch_lorenz(t, y):
    import torch

    x, y, z = y.unbind(-1)
    return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], -1)


def torch_passes(solve):
    """Forward and gradient of the sum of squares, from arrays to arrays."""
    import torch

    def forward(y0):
        with torch.no_grad():
            return solve(torch.tensor(np.asarray(y0))).numpy()

    def gradient(y0):
        y0 = torch.tensor(np.asarray(y0), requires_grad=True)
        (solve(y0) ** 2).sum().backward()
        return y0.grad.numpy()

    return {"forward": forward, "gradient": gradient}


def torchdiffeq_lorenz(y0, ts, tolerance):
    """Dormand and Prince's pair, its default; a batch has one step for all."""
    import torch
    import torchdiffeq

    ts = torch.tensor(np.asarray(ts))
    options = dict(rtol=tolerance, atol=tolerance, method="dopri5")
    return torch_passes(
        lambda y0: torchdiffeq.odeint(torch_lorenz, y0, ts, **options).transpose(0, 1)
    )


def torchode_lorenz(y0, ts, tolerance):
    """Its loop as it is, not compiled: torch.compile wants a C++ compiler, and minutes."""
    import torch
    import torchode

    ts = torch.tensor(np.asarray(ts)).repeat(len(y0), 1)
    term = torchode.ODETerm(torch_lorenz)
    control = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
    loop = torchode.AutoDiffAdjoint(
        torchode.Tsit5(term=term), control, backprop_through_step_size_control=False
    )
    return torch_passes(
        lambda y0: loop.solve(torchode.InitialValueProblem(y0=y0, t_eval=ts), term).ys
    )


LORENZ = {
    "gradsolve": gradsolve_lorenz,
    "torchdiffeq": torchdiffeq_lorenz,
    "torchode": torchode_lorenz,
}
OPTIONAL = ("tinydiffeq", "sksundae", *LORENZ)


@functools.cache
def installed(name) -> bool:
    """Whether an optional peer can be imported; says so, once, where it is not."""
    found = name not in OPTIONAL or find_spec(name) is not None
    if not found:
        print(f"{name} is not installed: its columns stay empty", flush=True)
    return found
