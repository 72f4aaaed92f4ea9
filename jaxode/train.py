"""Training of any pytree model with any optax optimiser: progress, checkpoints, metrics.

A loss is a function `loss(model, batch, key) -> (value, metrics)`, metrics a dict of scalars. Over a
mesh of devices each computes the loss of its part of the batch, by loops of its own; what is exchanged
is the gradient, once a step.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


class TrainState(NamedTuple):
    """All that a run is, at one step: what a checkpoint holds."""

    model: PyTree
    optimiser: PyTree
    step: jax.Array
    key: jax.Array


def start(model: PyTree, optimiser: optax.GradientTransformation, key) -> TrainState:
    """A run at step 0.

    >>> import jax, jax.numpy as jnp, optax
    >>> int(start({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0)).step)
    0
    """
    slots = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    return TrainState(model, slots, jnp.zeros((), jnp.int32), key)


def train_step(
    loss: Callable,
    optimiser: optax.GradientTransformation,
    mesh: Mesh | None = None,
    batch_spec: PyTree = None,
) -> Callable:
    """The compiled function (state, batch) -> (state, metrics); metrics gain the loss.

    The random key of a step is that of the run, folded with the step: nothing is drawn twice, and a
    resumed run draws what an uninterrupted one would. For `mesh` and `batch_spec` see `fit`.
    """
    gradient = eqx.filter_value_and_grad(loss, has_aux=True)
    if mesh is not None:
        gradient = over(mesh, batch_spec, gradient)

    @eqx.filter_jit
    def step(state: TrainState, batch):
        key = jax.random.fold_in(state.key, state.step)
        (value, metrics), grads = gradient(state.model, batch, key)
        weights = eqx.filter(state.model, eqx.is_inexact_array)
        updates, slots = optimiser.update(grads, state.optimiser, weights)
        model = eqx.apply_updates(state.model, updates)
        return TrainState(model, slots, state.step + 1, state.key), {"loss": value, **metrics}

    return step


def over(mesh: Mesh, batch_spec: PyTree, gradient: Callable) -> Callable:
    """The mean over the devices of a mesh of gradient(model, part of the batch, key of the device)."""
    names = mesh.axis_names

    def whole(model, batch, key):
        arrays, rest = eqx.partition(model, eqx.is_array)

        def part(arrays, batch, key):
            key = jax.random.fold_in(key, lax.axis_index(names))
            return lax.pmean(gradient(eqx.combine(arrays, rest), batch, key), names)

        specs = PartitionSpec(), specs_of(mesh, batch_spec), PartitionSpec()
        return jax.shard_map(
            part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )(arrays, batch, key)

    return whole


def specs_of(mesh: Mesh, batch_spec: PyTree) -> PyTree:
    """How a batch is split: by default its leading axis, over all devices."""
    return PartitionSpec(mesh.axis_names) if batch_spec is None else batch_spec


def placed(mesh: Mesh, specs: PyTree, tree: PyTree) -> PyTree:
    """The arrays of a tree on the devices of a mesh."""

    def place(path, x, spec):
        where = NamedSharding(mesh, spec)
        try:
            where.shard_shape(jnp.shape(x))
        except ValueError as error:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} of shape {jnp.shape(x)} cannot be split as {spec} "
                f"over a mesh of {dict(mesh.shape)}: make the axis a multiple of the devices, or give "
                "`batch_spec`, in which PartitionSpec() means all of it on every device."
            ) from error
        if is_key(x):
            return jax.random.wrap_key_data(jax.device_put(jax.random.key_data(x), where))
        return jax.device_put(x, where)

    is_spec = lambda x: isinstance(x, PartitionSpec)
    arrays, rest = eqx.partition(tree, eqx.is_array_like)
    specs = jax.tree.broadcast(specs, arrays, is_leaf=is_spec)
    return eqx.combine(jax.tree_util.tree_map_with_path(place, arrays, specs), rest)


def fit(
    loss: Callable,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    batches: Callable[[int], Any],
    steps: int,
    *,
    folder: str | Path | None = None,
    every: int = 50,
    evaluate: Callable[[PyTree], dict] | None = None,
    label: str = "training",
    progress: bool = True,
    fresh: bool = False,
    mesh: Mesh | None = None,
    batch_spec: PyTree = None,
    step: Callable | None = None,
) -> tuple[TrainState, list[dict]]:
    """Train until `steps` steps are done, going on from the checkpoint in `folder` if there is one.

    Args:
        loss: `loss(model, batch, key) -> (value, metrics)`.
        optimiser: any optax optimiser.
        state: the run at its start, from `start`.
        batches: the batch of a step, a function of its number (so that a resumed run goes on).
        steps: how many steps the whole run has.
        folder: where `checkpoint.eqx` and `metrics.jsonl` are kept; None: nowhere.
        every: a checkpoint, and an evaluation, after so many steps, and after the last.
        evaluate: `evaluate(model) -> dict` of numbers, for instance the test error.
        label: what the progress bar says.
        progress: whether to draw a progress bar.
        fresh: start over, whatever is in the folder.
        mesh: train on all devices of this mesh: weights on each, the batch split. The loss and the
            metrics are means over the devices, each of which has a random key of its own. With
            `jax.distributed` every process calls `fit` with the same batches, and the first one
            writes. A checkpoint does not know how many devices there were.
        batch_spec: how the batch is split, a `PartitionSpec` or a prefix of the batch of them; by
            default the leading axis of every array, over all devices.
        step: what `train_step` made of the loss, the optimiser, the mesh and `batch_spec`, for a
            caller who uses it as well; by default it is made here.

    Returns:
        The state after the last step, and the metrics of every step, as in metrics.jsonl: its
        number, the loss, what `loss` and `evaluate` said, and the seconds since the run began.

    Raises:
        KeyboardInterrupt: Ctrl-C; the steps done are in the checkpoint, and the next call goes on.
        ValueError: the checkpoint is of another model or optimiser; the batch cannot be split.
    """
    from tqdm import tqdm

    state, history = resume(folder, state) if folder and not fresh else (state, [])
    began = time.perf_counter() - (history[-1]["seconds"] if history else 0.0)
    step = step or train_step(loss, optimiser, mesh, batch_spec)
    if mesh is not None:
        state = placed(mesh, PartitionSpec(), state)
        whole, specs = batches, specs_of(mesh, batch_spec)
        batches = lambda n: placed(mesh, specs, whole(n))
    first = jax.process_index() == 0
    folder = folder if first else None  # only one writes
    quiet = not (progress and first)
    bar = tqdm(total=steps, initial=int(state.step), desc=label, disable=quiet, leave=False)
    try:
        while (n := int(state.step)) < steps:
            state, metrics = step(state, batches(n))
            record = {"step": n + 1, **{name: float(x) for name, x in metrics.items()}}
            due = (n + 1) % every == 0 or n + 1 == steps
            if due and evaluate:
                record |= {name: float(x) for name, x in evaluate(state.model).items()}
            record["seconds"] = time.perf_counter() - began
            history.append(record)
            bar.set_postfix(
                {k: f"{v:.4g}" for k, v in record.items() if k not in ("step", "seconds")},
                refresh=False,
            )
            bar.update()
            if due and folder:
                save(folder, state, history)
    except KeyboardInterrupt:
        if folder:
            save(folder, state, history[: int(state.step)])
        raise
    finally:
        bar.close()
    return state, history


def save(folder: str | Path, state: TrainState, history: list[dict]) -> None:
    """Write the checkpoint and the metrics; whenever this is cut off, the last ones are whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in history)
    for name, write in {
        "metrics.jsonl": lambda file: file.write(lines.encode()),
        "checkpoint.eqx": lambda file: eqx.tree_serialise_leaves(file, savable(state)),
    }.items():
        with open(folder / (name + ".part"), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / (name + ".part"), folder / name)


def resume(folder: str | Path, state: TrainState) -> tuple[TrainState, list[dict]]:
    """The run in a folder, and its metrics up to the checkpoint; `state` itself if there is none."""
    path = Path(folder) / "checkpoint.eqx"
    if not path.exists():
        return state, []
    try:
        loaded = eqx.tree_deserialise_leaves(path, savable(state))
    except Exception as error:
        raise ValueError(
            f"The checkpoint {path} does not fit this model and optimiser ({error}). Use another "
            "folder, or start over with fresh=True."
        ) from error
    state = loaded._replace(key=jax.random.wrap_key_data(loaded.key))
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return state, [json.loads(line) for line in lines][: int(state.step)]


def is_key(x) -> bool:
    """Whether this is an array of random keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def savable(state: TrainState) -> TrainState:
    """The state with its key as plain numbers, which can be written to a file."""
    return state._replace(key=jax.random.key_data(state.key))
