"""Training of any pytree model with any optax optimiser: progress, checkpoints, metrics.

A loss is a function `loss(model, batch, key) -> value` or `-> (value, metrics)`, metrics a dict of
scalars. Over a mesh of devices each computes the loss of its part of the batch, by loops of its own;
what is exchanged is the gradient, once a step. What a folder holds is in `jaxode.run_folder`.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxode import run_folder
from jaxode.run_folder import TrainState, described, is_key, resume, save

__all__ = [  # noqa: RUF022 - in the order of their use
    "start",
    "fit",
    "TrainState",
    "NonFiniteError",
    "train_step",
    "save",
    "resume",
    "placed",
]


class NonFiniteError(FloatingPointError):
    """A step that would have spoiled the run: `state` is the run before it, `history` its metrics."""

    def __init__(self, message: str, state: TrainState | None = None, history: Sequence[dict] = ()):
        super().__init__(message)
        self.state, self.history = state, history


def start(model: PyTree, optimiser: optax.GradientTransformation, key) -> TrainState:
    """A run at step 0.

    Raises:
        ValueError: the model has no weights, which are its arrays of floating-point numbers.

    >>> import jax, jax.numpy as jnp, optax
    >>> int(start({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0)).step)
    0
    """
    weights = eqx.filter(model, eqx.is_inexact_array)
    if not jax.tree.leaves(weights):
        kinds = sorted({described(x) for x in jax.tree.leaves(model)})
        raise ValueError(
            "The model has no weights, that is, no arrays of floating-point numbers among its leaves "
            f"({', '.join(kinds) or 'there are none'}): there is nothing to train. Arrays that a "
            "function closes over are not seen: make them fields of an equinox.Module, or a dict."
        )
    return TrainState(model, optimiser.init(weights), jnp.zeros((), jnp.int32), key)


def train_step(
    loss: Callable,
    optimiser: optax.GradientTransformation,
    mesh: Mesh | None = None,
    batch_spec: PyTree = None,
) -> Callable:
    """The compiled function (state, batch) -> (state, metrics); metrics gain `loss` and `skipped`.

    The random key of a step is that of the run, folded with the step: nothing is drawn twice, and a
    resumed run draws what an uninterrupted one would. For `mesh` and `batch_spec` see `fit`.

    `skipped` is true if the loss is not finite, or if a number in the weights or in the state of the
    optimiser would no longer be. Such a step changes none of them, as in `optax.apply_if_finite`; what
    is asked is what the optimiser makes of a gradient, so that one may deal with NaN itself, by
    `optax.zero_nans`.
    """
    gradient = eqx.filter_value_and_grad(with_metrics(loss), has_aux=True)
    if mesh is not None:
        gradient = over(mesh, batch_spec, gradient)

    @eqx.filter_jit
    def step(state: TrainState, batch):
        key = jax.random.fold_in(state.key, state.step)
        (value, metrics), grads = gradient(state.model, batch, key)
        weights = eqx.filter(state.model, eqx.is_inexact_array)
        updates, slots = optimiser.update(grads, state.optimiser, weights)
        old = weights, state.optimiser
        new = eqx.apply_updates(weights, updates), slots
        good = jnp.isfinite(value) & stays_finite(new, old)
        choose = lambda new, old: jnp.where(good, new, old) if eqx.is_array(new) else new
        weights, slots = jax.tree.map(choose, new, old)
        model = eqx.combine(weights, state.model)
        metrics = {**metrics, "loss": value, "skipped": ~good}
        return TrainState(model, slots, state.step + 1, state.key), metrics

    return step


def stays_finite(new: PyTree, old: PyTree):
    """Whether every number of a tree that was finite still is.

    Some are not, and may stay so: the best loss so far of an optimiser that has seen none, a mask of -inf.
    """
    pairs = zip(*(jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)) for tree in (new, old)))
    kept = [jnp.all(jnp.isfinite(x) | ~jnp.isfinite(y)) for x, y in pairs]
    return jnp.all(jnp.stack(kept))


def with_metrics(loss: Callable) -> Callable:
    """A loss that always returns its metrics too, and says so if it is no loss."""

    def told(model, batch, key):
        found = loss(model, batch, key)
        value, metrics = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
        metrics = {} if metrics is None else metrics
        if not (is_number(value) and jnp.issubdtype(jnp.result_type(value), jnp.floating)):
            raise TypeError(
                "`loss` must return one real number, or (number, metrics), for instance the mean over "
                f"the batch; it returned {described(value)}."
            )
        if not isinstance(metrics, dict):
            raise TypeError(
                f"The metrics that `loss` returns must be a dict of numbers, got {described(metrics)}."
            )
        for name, x in metrics.items():
            if not is_number(x):
                raise TypeError(
                    f"The metric {name!r} that `loss` returns must be one number, got {described(x)}."
                )
        return value, metrics

    return told


def is_number(x) -> bool:
    """Whether this is a number, or an array of shape ()."""
    return eqx.is_array_like(x) and jnp.shape(x) == ()


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
            data = jax.device_put(jax.random.key_data(x), where)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jax.device_put(x, where)

    is_spec = lambda x: isinstance(x, PartitionSpec)
    arrays, rest = eqx.partition(tree, eqx.is_array_like)
    specs = jax.tree.broadcast(specs, arrays, is_leaf=is_spec)
    return eqx.combine(jax.tree_util.tree_map_with_path(place, arrays, specs), rest)


def fit(
    loss: Callable,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    batches: Callable[[int], Any] | Sequence,
    steps: int,
    *,
    folder: str | Path | None = None,
    every: int = 50,
    evaluate: Callable[[PyTree], dict] | None = None,
    label: str = "training",
    progress: bool = True,
    fresh: bool = False,
    skip_non_finite: int = 0,
    mesh: Mesh | None = None,
    batch_spec: PyTree = None,
    step: Callable | None = None,
) -> tuple[TrainState, list[dict]]:
    """Train until `steps` steps are done, going on from the checkpoint in `folder` if there is one.

    A run that was cut off, by Ctrl-C, an error, a full disk or `kill -9`, and is started again, ends
    with the numbers of one that was not: at most the steps since the last checkpoint are done twice.

    A step that is not finite spoils nothing: the loss, or a number in the weights or the optimiser's
    state after the step, is NaN or infinite. It changes neither weights nor optimiser, and stops the
    run, or is left out and counted: see `skip_non_finite`.

    Args:
        loss: `loss(model, batch, key) -> value`, or `-> (value, metrics)`, metrics a dict of numbers.
        optimiser: any optax optimiser.
        state: the run at its start, from `start`.
        batches: the batch of a step, a function of its number (so that a run that is resumed goes on
            with the batch that is next); or a list of batches, taken in turn, again and again. A batch
            whose arrays have other shapes, or in which a Python number is another one, compiles the
            step once more: give a horizon that grows at every step as an array, or let it grow in a few
            stages.
        steps: how many steps the whole run has.
        folder: where `checkpoint.eqx`, the one before it and `metrics.jsonl` are kept; None: nowhere.
            One process at a time may have it.
        every: a checkpoint, and an evaluation, after so many steps, and after the last.
        evaluate: `evaluate(model) -> dict` of numbers, for instance the test error.
        label: what the progress bar says.
        progress: whether to draw a progress bar.
        fresh: start over, whatever is in the folder: the run there is removed.
        skip_non_finite: so many steps in a row that are not finite are left out; one more stops the
            run. If it is not 0, the metric `skipped` says how many have been left out so far.
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
        NonFiniteError: a `FloatingPointError`; more than `skip_non_finite` steps in a row are not
            finite. The run before them is in the checkpoint, and in the error.
        OSError: the checkpoint cannot be written. The last one that could is whole.
        TypeError: `batches` or `loss` is not what it must be.
        ValueError: the folder is in use, or cannot be made; the checkpoint is that of another model,
            optimiser or random key, or damaged; the batch cannot be split.

    >>> import jax, jax.numpy as jnp, optax
    >>> def distance(model, batch, key):
    ...     return jnp.sum((model["w"] - batch) ** 2)
    >>> optimiser = optax.sgd(0.25)
    >>> state = start({"w": jnp.zeros(2)}, optimiser, jax.random.key(0))
    >>> state, history = fit(distance, optimiser, state, lambda step: jnp.ones(2), 3, progress=False)
    >>> [record["loss"] for record in history]
    [2.0, 0.5, 0.125]
    """
    from tqdm import tqdm

    batches, first = by_number(batches), jax.process_index() == 0
    step = step or train_step(loss, optimiser, mesh, batch_spec)
    with run_folder.held(folder if first else None):
        if folder and fresh and first:
            run_folder.forget(folder)
        state, history = resume(folder, state) if folder and not fresh else (state, [])
        folder = folder if first else None  # only one writes
        if folder:
            run_folder.restore_metrics(folder, history)
        if mesh is not None:
            state = placed(mesh, PartitionSpec(), state)
            whole, specs = batches, specs_of(mesh, batch_spec)
            batches = lambda n: placed(mesh, specs, whole(n))
        began = time.perf_counter() - (history[-1]["seconds"] if history else 0.0)
        done = int(state.step)
        quiet = not (progress and first)
        bar = tqdm(total=steps, initial=done, desc=label, disable=quiet, leave=False)
        try:
            for n in range(done, steps):
                after, metrics = step(state, batches(n))
                record = {"step": n + 1, **{name: float(x) for name, x in metrics.items()}}
                skipped = int(record.pop("skipped"))
                if skipped and in_a_row(history) >= skip_non_finite:
                    raise NonFiniteError(
                        not_finite(n, record["loss"], history, folder), state, history
                    )
                if skip_non_finite or skipped_until(history):
                    record["skipped"] = skipped_until(history) + skipped
                due = (n + 1) % every == 0 or n + 1 == steps
                if due and evaluate:
                    record |= {name: float(x) for name, x in evaluate(after.model).items()}
                record["seconds"] = time.perf_counter() - began
                history.append(record)  # before the state: what is cut off here is cut to the state
                state = after
                shown = {k: f"{v:.4g}" for k, v in record.items() if k not in ("step", "seconds")}
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if due and folder:
                    save(folder, state, history)
        except run_folder.NotSavedError:
            raise
        except BaseException:
            if folder and int(state.step) > done:  # else there is nothing new
                save(folder, state, history[: int(state.step)])
            raise
        finally:
            bar.close()
    return state, history


def by_number(batches: Callable[[int], Any] | Sequence) -> Callable[[int], Any]:
    """The batch of each step, as a function of its number."""
    if isinstance(batches, Sequence) and not isinstance(batches, tuple | str) and len(batches):
        several = batches
        return lambda n: several[n % len(several)]
    if not callable(batches):
        raise TypeError(
            "`batches` must be a function of the step's number, or a list of batches to be taken in "
            f"turn, got {described(batches)}. A run that is resumed asks for its next batch by number, "
            "which an iterator cannot give: keep what it yields in a list, or index the data, for "
            "instance with `jaxode.data.batch_indices`. For one batch at every step write "
            "`lambda step: batch`."
        )

    def checked(n):
        batch = batches(n)
        if isinstance(batch, Iterator):
            raise TypeError(
                f"batches({n}) is an iterator ({described(batch)}), and must be one batch: return it."
            )
        return batch

    return checked


def skipped_until(history: list[dict]) -> int:
    """How many steps have been left out."""
    return history[-1].get("skipped", 0) if history else 0


def in_a_row(history: list[dict]) -> int:
    """How many of the last steps have been left out, with none between them that has not.

    >>> in_a_row([{"skipped": 1}, {"skipped": 1}, {"skipped": 2}, {"skipped": 3}])
    2
    """
    counts = [0, *(record.get("skipped", 0) for record in history)]
    rises = (b > a for b, a in itertools.pairwise(reversed(counts)))
    return sum(1 for _ in itertools.takewhile(bool, rises))


def not_finite(n: int, value: float, history: list[dict], folder: str | Path | None) -> str:
    """What to do about step n + 1, which is not finite, with a loss of `value`."""
    what = f"the loss is {value}"
    if math.isfinite(value):
        what = f"the loss is {value:.6g}, but with its gradient the weights would not be finite"
    before = in_a_row(history)
    so_far = f", after {before} such steps in a row that were left out" if before else ""
    kept = f", and the checkpoint in {folder} is that of step {n}" if folder and n else ""
    return (
        f"Step {n + 1} (batch {n}) is not finite: {what}{so_far}. The weights are those before this "
        f"step{kept}. See whether batches({n}) is finite, and call `loss` on it without jit: a solve "
        "that fails says why. If steps have grown too large, take a smaller learning rate or "
        "`optax.clip_by_global_norm`. `skip_non_finite=10` leaves out such steps, and counts them, "
        "unless there are more than 10 in a row."
    )
