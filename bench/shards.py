"""An ensemble over two simulated devices, each with a loop of its own, against one device.

JAX fixes its devices when it starts: `python -m bench.shards N` is the program for N of them, and
`shard_rows` runs it for one and for two.
"""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxode
from bench.timing import row


def lorenz(y, t, rho):
    x, y, z = y
    return jnp.stack([10 * (y - x), x * (rho - z) - y, x * y - 8 / 3 * z])


def seconds() -> float:
    """8,192 Lorenz systems, split over the devices there are: the fastest of ten."""
    mesh, split = Mesh(np.array(jax.devices()), "x"), PartitionSpec("x")
    one = lambda rho: jaxode.odeint(lorenz, jnp.ones(3), [0.0, 10.0], rho, rtol=1e-5, atol=1e-5)
    ends = jax.jit(
        jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    )
    # Chaotic ones (large rho) take more steps: each device gets some of all.
    rho = jnp.linspace(0, 100, 8192).reshape(-1, 2).T.reshape(-1)
    rho = jax.device_put(rho, NamedSharding(mesh, split))
    jax.block_until_ready(ends(rho))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(ends(rho))
        times.append(time.perf_counter() - began)
    return min(times)


def shard_rows():
    found = {}
    for count in (1, 2):
        flags = f"--xla_force_host_platform_device_count={count}"
        command = [sys.executable, "-m", "bench.shards"]
        out = subprocess.run(
            command, env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, check=True
        ).stdout
        found[count] = float(out)
    yield row("8,192 Lorenz systems, one device over two", {"jaxode": found[1] / found[2]}, "times")


if __name__ == "__main__":
    print(seconds())
