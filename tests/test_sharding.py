"""Solves and training over many devices: simulated ones, and those of two processes.

JAX fixes its devices when it starts, so each test runs one of the programs below in a process of its
own.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

COMMON = """
import sys, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, PartitionSpec as P
from jaxode import odeint, train
from jaxode.nn import MLPField, NeuralODE

def loss(model, batch, key):
    x, ts = batch
    solution = model.solve(x, ts)
    return jnp.mean((solution.ys[-1] - 1.0) ** 2), {"evaluations": solution.stats.evaluations}

def batches(n):
    return jax.random.normal(jax.random.fold_in(jax.random.key(5), n), (16, 2)), jnp.array([0.0, 1.0])

optimiser = optax.adam(1e-2)
spec = (P("data"), P())

def beginning():
    field = MLPField(2, width=8, depth=1, key=jax.random.key(0))
    net = NeuralODE(field, rtol=1e-4, atol=1e-4, max_steps=64)
    return train.start(net, optimiser, jax.random.key(1))

def fit(steps, mesh=None, **options):
    options |= {"mesh": mesh, "batch_spec": spec} if mesh else {}
    _, history = train.fit(loss, optimiser, beginning(), batches, steps, progress=False, **options)
    return np.array([record["loss"] for record in history])
"""


def start(program, *args, devices=1):
    """A Python process with so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", COMMON + program, *map(str, args)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def of_loops(text: str) -> list[str]:
    """The lines of a compiled program with a collective that is not in its main part."""
    blocks = re.split(r"\n(?=\S)", text)
    collective = re.compile(r" (all-\w+|reduce-scatter|collective-\w+)(-start)?\(")
    return [
        line
        for block in blocks
        if not block.startswith("ENTRY")
        for line in block.splitlines()
        if collective.search(line)
    ]


TRAINING = """
folder, mesh = sys.argv[1], Mesh(np.array(jax.devices()), ("data",))
alone = fit(6)
assert len(jax.devices()) == 8
np.testing.assert_allclose(fit(6, mesh), alone, rtol=1e-5)
fit(3, mesh, folder=folder)
np.testing.assert_allclose(fit(6, folder=folder), alone, rtol=1e-5)  # goes on, on one device

step = train.train_step(loss, optimiser, mesh, spec)
state = train.placed(mesh, P(), beginning())
step = step.lower(state, train.placed(mesh, spec, batches(0))).compile()
print(step.compiled.as_text())
x, ts = batches(0)
for value, skipped in ((0.5, False), (np.nan, True)):  # of one number, on one device
    after, metrics = step(state, train.placed(mesh, spec, (x.at[3, 0].set(value), ts)))
    kept = jax.tree.map(np.array_equal, (after.model, after.optimiser), (state.model, state.optimiser))
    assert bool(metrics["skipped"]) == all(jax.tree.leaves(kept)) == skipped

try:
    train.fit(loss, optimiser, beginning(), lambda n: batches(n)[0][:9], 1, mesh=mesh, progress=False)
except ValueError as error:
    assert "batch of shape (9, 2) cannot be split" in str(error)
else:
    raise AssertionError("9 rows went over 8 devices")
"""


def test_training_over_eight_devices_is_that_on_one_and_exchanges_only_gradients(tmp_path):
    text = output(start(TRAINING, tmp_path, devices=8))
    assert "all-reduce" in text
    assert not of_loops(text)


SOLVING = """
jax.config.update("jax_enable_x64", True)
mesh = Mesh(np.array(jax.devices()), ("data",))

def lorenz(y, t, r):
    return jnp.stack([10 * (y[1] - y[0]), y[0] * (r - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])

def ends(y0, r):
    return jax.vmap(lambda y0: odeint(lorenz, y0, [0.0, 0.3, 0.6], r, rtol=1e-6)[-1])(y0)

def split(fn, out):
    return jax.shard_map(fn, mesh=mesh, in_specs=(P("data"), P()), out_specs=out, check_vma=False)

y0, r = jnp.linspace(1.0, 2.0, 48).reshape(16, 3), jnp.float64(28.0)
total = lambda y0, r: ends(y0, r).sum()
program = jax.jit(split(ends, P("data"))).lower(y0, r).compile()
np.testing.assert_allclose(program(y0, r), ends(y0, r), rtol=1e-12)
outside = jax.jit(jax.grad(lambda y0, r: split(ends, P("data"))(y0, r).sum(), (0, 1)))(y0, r)
inside = jax.jit(split(lambda y0, r: jax.lax.psum(jax.grad(total, 1)(y0, r), "data"), P()))(y0, r)
for found, wanted in zip(outside, jax.grad(total, (0, 1))(y0, r)):
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
np.testing.assert_allclose(inside, outside[1], rtol=1e-10)
print(program.as_text())

try:
    jax.shard_map(ends, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(y0, r)
except TypeError as error:
    assert "check_vma=False" in str(error)
else:
    raise AssertionError("a solve that varies over a mesh needs check_vma=False")
"""


EXPLICIT = """
from jax.sharding import AxisType, NamedSharding
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
ends = lambda y0: odeint(lambda y, t: -y, y0, [0.0, 1.0])[-1]
y0 = jnp.linspace(0.5, 1.5, 12).reshape(4, 3)
with jax.set_mesh(mesh):
    whole, split = (jax.device_put(y0, NamedSharding(mesh, spec)) for spec in (P(), P("data")))
    for fn in (ends, jax.vmap(ends), jax.grad(lambda y0: jax.vmap(ends)(y0).sum())):
        assert np.all(np.isfinite(jax.jit(fn)(whole)))
        try:
            jax.jit(fn)(split)
        except TypeError as error:
            assert "jax.shard_map(..., check_vma=False)" in str(error)
        else:
            raise AssertionError("an array that is split over an explicit mesh was taken")
    each = jax.shard_map(jax.vmap(ends), in_specs=P("data"), out_specs=P("data"), check_vma=False)
    np.testing.assert_allclose(jax.jit(each)(split), jax.vmap(ends)(y0), rtol=1e-6)
"""


def test_an_array_that_is_split_over_an_explicit_mesh_is_refused_with_the_remedy():
    output(start(EXPLICIT, devices=2))


def test_solves_inside_of_shard_map_run_loops_of_their_own():
    text = output(start(SOLVING, devices=8))
    assert " while(" in text
    assert not of_loops(text) and "all-reduce" not in text


PROCESSES = """
address, which, folder = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(which))
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("data",))
print(*fit(4, mesh, folder=folder))
"""


def test_training_over_two_processes_and_its_checkpoint_on_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [start(PROCESSES, address, i, tmp_path, devices=2) for i in range(2)]
    losses = [np.array(output(process).splitlines()[-1].split(), float) for process in both]
    np.testing.assert_array_equal(*losses)
    assert (Path(tmp_path) / "checkpoint.eqx").exists()
    more = output(start("print(*fit(6, folder=sys.argv[1])); print(*fit(6))", tmp_path))
    resumed, alone = (np.array(line.split(), float) for line in more.splitlines())
    np.testing.assert_allclose(resumed, alone, rtol=1e-5)
    np.testing.assert_allclose(losses[0], alone[:4], rtol=1e-5)
