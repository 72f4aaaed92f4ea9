"""Many solves at once: `jax.vmap` of a solve, even and uneven, its gradient, and a network's.

Beside diffrax: our own loop under a plain `vmap` (adjoint "forward", which lanes leave alone), and a C
program compiled for this machine, one problem after another: what a core can do.
"""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from bench.timing import check, compile_in_turn, row, time_in_turn
from jaxode.nn import MLPField

HERE = Path(__file__).parent


def lorenz(y, t, args):
    """Its time runs `speed` times as fast."""
    rho, speed = args
    x, y, z = y
    return speed * jnp.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z])


def with_diffrax(field, y0, ts, args, tolerance, outputs=False, adjoint=None):
    """The last state, or those at ts."""
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(y, t, args)), diffrax.Tsit5(), ts[0], ts[-1], None, y0,
        args, saveat=diffrax.SaveAt(ts=ts) if outputs else diffrax.SaveAt(t1=True),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance), max_steps=2**14,
        adjoint=adjoint or diffrax.RecursiveCheckpointAdjoint(),
    ).ys  # fmt: skip


def solvers(dtype, end, tolerance):
    """The last state of one system, by each library, as functions of (rho, speed)."""
    y0, ts = jnp.ones(3, dtype), jnp.array([0.0, end], dtype)
    options = dict(rtol=tolerance, atol=tolerance)
    return {
        "jaxode": lambda *args: jaxode.odeint(lorenz, y0, ts, args, **options)[-1],
        "diffrax": lambda *args: with_diffrax(lorenz, y0, ts, args, tolerance)[-1],
        "plain vmap": lambda *args: jaxode.odeint(
            lorenz, y0, ts, args, adjoint="forward", **options
        )[-1],
    }


def forward_rows():
    size, tolerance = 8192, 1e-5
    rho = jnp.linspace(0, 100, size, dtype=jnp.float32)
    even, uneven = jnp.ones(size, jnp.float32), np.ones(size, np.float32)
    uneven[::100] = 20
    fns = {name: jax.vmap(fn) for name, fn in solvers(jnp.float32, 10.0, tolerance).items()}
    compiled, compile_seconds = compile_in_turn(lambda _: fns, rho, even, rounds=1)
    # Chaos: only the tame ones can be compared.
    tame = lambda fn: lambda rho, speed: fn(rho, speed)[: size // 8]
    check(
        {n: tame(fn) for n, fn in compiled.items()},
        (rho, even),
        tame(compiled["diffrax"])(rho, even),
        1e-2,
    )
    seconds = time_in_turn(compiled, rho, even, rounds=5)
    limit = by_c(np.asarray(rho), tolerance, 10.0)
    yield row("8,192 Lorenz systems, float32", seconds | ({"C": limit} if limit else {}), "ms")
    yield row("8,192 Lorenz systems: trace + compile", compile_seconds, "s")
    seconds = time_in_turn(compiled, rho, jnp.asarray(uneven), rounds=1)
    yield row("the same, one in a hundred with 20 times the steps", seconds, "ms")


def gradient_rows():
    rho = jnp.linspace(0.0, 100.0, 2048)
    fns = {
        name: jax.vmap(jax.grad(lambda rho, fn=fn: fn(rho, jnp.ones(()))[0]))
        for name, fn in solvers(jnp.float64, 5.0, 1e-6).items()
        if name != "plain vmap"
    }
    compiled, compile_seconds = compile_in_turn(lambda _: fns, rho, rounds=1)
    tame = lambda fn: lambda rho: fn(rho)[:256]
    check({n: tame(fn) for n, fn in compiled.items()}, (rho,), tame(compiled["diffrax"])(rho), 1e-2)
    yield row(
        "2,048 Lorenz systems, float64, gradient", time_in_turn(compiled, rho, rounds=5), "ms"
    )
    yield row("2,048 Lorenz systems, gradient: trace + compile", compile_seconds, "s")


def network_rows():
    """The gradient of a latent ODE's weights: 256 paths, each with 30 times of its own."""
    field = MLPField(4, width=20, time=False, dtype=jnp.float32, key=jax.random.key(0))
    times = jnp.sort(jax.random.uniform(jax.random.key(1), (256, 30), jnp.float32), axis=1)
    z0 = jax.random.normal(jax.random.key(2), (256, 4), jnp.float32)

    def solvers(adjoint, its_adjoint):
        options = dict(rtol=1e-3, atol=1e-3, adjoint=adjoint)
        return {
            "jaxode": lambda field, z, t: jaxode.odeint(field, z, t, **options),
            "diffrax": lambda field, z, t: with_diffrax(
                lambda y, t, field: field(y, t), z, t, field, 1e-3, True, its_adjoint
            ),
        }

    def gradient(fn):
        total = lambda field: jnp.mean(jax.vmap(fn, (None, 0, 0))(field, z0, times) ** 2)
        return lambda weights: jax.grad(lambda w: total(jax.tree.unflatten(structure, w)))(weights)

    weights, structure = jax.tree.flatten(field)
    fns = {name: gradient(fn) for name, fn in solvers("replay", None).items()}
    compiled, compile_seconds = compile_in_turn(lambda _: fns, weights, rounds=1)
    exact = compiled["diffrax"](weights)
    check(compiled, (weights,), exact, 1e-2)
    seconds = time_in_turn(compiled, weights, rounds=9)
    yield row("256 latent paths, 30 ragged times each, gradient of weights", seconds, "ms")
    yield row("256 latent paths: trace + compile", compile_seconds, "s")
    continuous = solvers("backsolve", diffrax.BacksolveAdjoint())
    fns = {name: gradient(fn) for name, fn in continuous.items()}
    compiled, _ = compile_in_turn(lambda _: fns, weights, rounds=1)
    check(compiled, (weights,), exact, 5e-2)
    yield row(
        "256 latent paths, gradient by backsolve", time_in_turn(compiled, weights, rounds=5), "ms"
    )


def by_c(rho, tolerance, end):
    """Seconds of the C program; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "lorenz.so"
        flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-o", library]
        subprocess.run([compiler, *flags, HERE / "lorenz.c", "-lm"], check=True)
        solve = ctypes.CDLL(str(library)).solve
        solve.restype = ctypes.c_double
        pointer = lambda x: x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        out = np.zeros((len(rho), 3), np.float32)
        single = ctypes.c_float
        run = lambda: solve(len(rho), pointer(rho), single(end), single(tolerance), pointer(out))
        return min(run() for _ in range(5))


def ensemble_rows():
    yield from forward_rows()
    yield from gradient_rows()
    yield from network_rows()
