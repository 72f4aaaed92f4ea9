"""Training: a run that was cut off is the run that was not."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxode import train
from jaxode.nn import MLPField, NeuralODE

TARGET = jnp.array([[0.5, -1.0]])


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """Optax's Adam multiplies floats and its integer count: strict promotion refuses that."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss(model, batch, key):
    noise = 0.01 * jax.random.normal(key, batch.shape)
    solution = model.solve(batch + noise)
    value = jnp.mean((solution.ys[-1] - TARGET) ** 2)
    return value, {"evaluations": solution.stats.evaluations}


def batches(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(5), step), (4, 2))


def beginning(width=8):
    field = MLPField(2, width=width, depth=1, key=jax.random.key(0))
    optimiser = optax.adam(1e-2)
    net = NeuralODE(field, method="rk4", dt=0.5)
    return optimiser, train.start(net, optimiser, jax.random.key(1))


def fit(steps, *, batches=batches, width=8, **options):
    optimiser, state = beginning(width)
    return train.fit(loss, optimiser, state, batches, steps, progress=False, **options)


def same(a, b):
    a, b = (jax.tree.leaves(eqx.filter(train.savable(x), eqx.is_array)) for x in (a, b))
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_goes_down_and_every_step_has_its_metrics():
    state, history = fit(60)
    assert int(state.step) == 60 and [r["step"] for r in history] == list(range(1, 61))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[0]["evaluations"] == 9


def timeless(history):
    """The metrics without the clock, which always goes forward."""
    clock = [record["seconds"] for record in history]
    assert clock == sorted(clock)
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_interrupted(tmp_path):
    fit(4, folder=tmp_path)
    resumed, history = fit(9, folder=tmp_path)
    whole, expected = fit(9)
    assert same(resumed, whole) and timeless(history) == timeless(expected)
    assert history == lines(tmp_path)


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path):
    def stopped(step):
        if step == 5:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        fit(9, batches=stopped, folder=tmp_path, every=2)
    assert len(lines(tmp_path)) == 5
    resumed, history = fit(9, folder=tmp_path)
    whole, expected = fit(9)
    assert same(resumed, whole) and timeless(history) == timeless(expected)


def test_a_run_killed_between_metrics_and_checkpoint_loses_only_later_metrics(tmp_path):
    fit(4, folder=tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0, "seconds": 9.0}\n')
    (tmp_path / "checkpoint.eqx.part").write_bytes(b"half")
    _, history = fit(6, folder=tmp_path)
    assert timeless(history) == timeless(fit(6)[1]) and history == lines(tmp_path)


def test_a_fresh_run_forgets_the_folder(tmp_path):
    fit(4, folder=tmp_path)
    assert [r["step"] for r in fit(2, folder=tmp_path, fresh=True)[1]] == [1, 2]


def test_a_checkpoint_of_another_model_is_refused_with_a_remedy(tmp_path):
    fit(2, folder=tmp_path)
    with pytest.raises(ValueError, match="fresh=True"):
        fit(4, width=9, folder=tmp_path)


def test_evaluation_happens_when_due_and_after_the_last_step():
    history = fit(5, every=2, evaluate=lambda model: {"test": 1.0})[1]
    assert [r["step"] for r in history if "test" in r] == [2, 4, 5]


def test_the_second_step_does_not_compile_again():
    optimiser, state = beginning()
    traces = []

    def counted(*arguments):
        traces.append(None)
        return loss(*arguments)

    step = train.train_step(counted, optimiser)
    for i in range(3):
        state, _ = step(state, batches(i))
    assert len(traces) == 1


def test_any_pytree_is_a_model():
    optimiser = optax.sgd(0.1)
    square = lambda model, batch, key: (jnp.sum(model["w"] ** 2), {})
    state = train.start({"w": jnp.ones(3), "name": "w"}, optimiser, jax.random.key(0))
    state, _ = train.fit(square, optimiser, state, lambda step: None, 2, progress=False)
    np.testing.assert_allclose(state.model["w"], 0.64, rtol=1e-6)
