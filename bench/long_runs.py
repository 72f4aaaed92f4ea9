"""Memory over thousands of eager calls: `python -m bench.long_runs --calls 10000`.

Each kind of call runs in a process of its own. Printed are the memory of the process, the arrays that are
alive and the programs that are compiled, after a tenth of the calls and after all of them.
"""

import argparse
import gc
import multiprocessing
import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxode import SolveError, odeint

TS = np.linspace(0.0, 1.0, 4)
TWO = np.array([1.0, 2.0], "float32")
PAGE = os.sysconf("SC_PAGE_SIZE")


def decay(y, t, rate):
    return -rate * y


def the_same_function(i):
    odeint(decay, TWO, TS, 1.0 + i)


def a_new_lambda(i):
    odeint(lambda y, t, rate: -rate * y * t, TWO, TS, 1.0 + i)


def an_array_closed_over(i):
    rate = jnp.asarray(1.0 + i)
    odeint(lambda y, t: -rate * y, TWO, TS)


def a_new_module(i):
    mlp = eqx.nn.MLP(2, 2, 16, 1, key=jax.random.key(i))
    odeint(lambda y, t, mlp: mlp(y), TWO, TS, mlp)


def a_gradient(i):
    jax.grad(lambda y: odeint(lambda y, t, rate: -rate * y, y, TS, 1.0 + i).sum())(TWO)


def a_gradient_of_a_new_module(i):
    mlp = eqx.nn.MLP(2, 2, 16, 1, key=jax.random.key(i))
    eqx.filter_grad(lambda mlp: odeint(lambda y, t: mlp(y), TWO, TS).sum())(mlp)


def a_batch_of_gradients(i):
    loss = lambda y: odeint(lambda y, t, rate: -rate * y, y, TS, 1.0 + i).sum()
    jax.vmap(jax.grad(loss))(np.ones((3, 2), "float32"))


def a_failure(i):
    try:
        odeint(lambda y, t, rate: rate * y**2, TWO, 9 * TS, 1.0 + i % 10, max_steps=100)
    except SolveError as error:
        assert error.solution is not None
    else:
        raise AssertionError("it was to fail")


def a_refusal(i):
    try:
        odeint(lambda y, t: y[:1], TWO + i, TS)
    except TypeError:
        pass
    else:
        raise AssertionError("it was to be refused")


def a_failed_gradient(i):
    y0_bar = jax.grad(lambda y: odeint(lambda y, t: y**2, y, 9 * TS, max_steps=100).sum())(
        TWO + i % 10
    )
    assert np.all(np.isnan(y0_bar))


KINDS = {kind.__name__.replace("_", " "): kind for kind in (
    the_same_function, a_new_lambda, an_array_closed_over, a_new_module, a_gradient,
    a_gradient_of_a_new_module, a_batch_of_gradients, a_failure, a_refusal, a_failed_gradient,
)}  # fmt: skip


def memory() -> float:
    """MiB that the process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def measured(name: str, calls: int) -> list:
    """(memory, arrays alive, programs compiled) after a tenth of the calls and after all."""
    compiled, found = [], []
    note = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(note)
    for i in range(calls):
        KINDS[name](i)
        if i + 1 in (max(1, calls // 10), calls):
            found.append((memory(), len(jax.live_arrays()), len(compiled)))
    return found


def main(calls: int, kinds: list[str]) -> None:
    print(f"after {calls // 10:,} and after {calls:,} calls")
    print("| call | MiB | arrays alive | programs compiled |\n|---|---|---|---|")
    for name in kinds:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            (early, *of_early), (late, *of_late) = pool.apply(measured, (name, calls))
        counts = " | ".join(f"{a} → {b}" for a, b in zip(of_early, of_late))
        print(f"| {name} | {early:.1f} → {late:.1f} | {counts} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    main(options.calls, options.kinds)
