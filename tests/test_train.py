"""Training: a run that was cut off is the run that was not."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxode import run_folder, train
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
    a, b = (jax.tree.leaves(eqx.filter(run_folder.savable(x), eqx.is_array)) for x in (a, b))
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
    fit(4, folder=tmp_path, every=2)
    assert [r["step"] for r in fit(2, folder=tmp_path, fresh=True)[1]] == [1, 2]
    assert not (tmp_path / "checkpoint.previous.eqx").exists()


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


# Steps that are not finite: a model of two numbers, whose batches 3 and 4 are not.


def distance(model, batch, key):
    return jnp.mean((model["w"] - batch) ** 2)


def spoilt(n):
    return jnp.full(2, jnp.nan if n in (3, 4) else 1.0 + n)


def fit_numbers(steps, optimiser, *, loss=distance, batches=spoilt, **options):
    state = train.start({"w": jnp.zeros(2), "name": "w"}, optimiser, jax.random.key(0))
    return train.fit(loss, optimiser, state, batches, steps, progress=False, **options)


def test_a_batch_of_nan_stops_the_run_and_spoils_nothing(tmp_path):
    optimiser = optax.adam(0.1)
    with pytest.raises(
        FloatingPointError, match=r"Step 4 \(batch 3\).* nan.*step 3.*skip"
    ) as stopped:
        fit_numbers(9, optimiser, folder=tmp_path)
    before, history = fit_numbers(3, optimiser)
    assert same(stopped.value.state, before) and len(stopped.value.history) == 3
    found, kept = train.resume(tmp_path, before)
    assert same(found, before) and timeless(kept) == timeless(history) and kept == lines(tmp_path)
    whole, expected = fit_numbers(9, optimiser, skip_non_finite=2)
    resumed, history = fit_numbers(9, optimiser, skip_non_finite=2, folder=tmp_path)
    assert same(resumed, whole) and [r["loss"] for r in history[5:]] == [
        r["loss"] for r in expected[5:]
    ]


def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path):
    optimiser = optax.sgd(0.1)
    with pytest.raises(FloatingPointError, match=r"Step 5.*after 1 such"):
        fit_numbers(9, optimiser, skip_non_finite=1, folder=tmp_path)
    state, history = fit_numbers(9, optimiser, skip_non_finite=2, folder=tmp_path)
    assert [r["skipped"] for r in history] == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    w = 0.0
    for n in (0, 1, 2, 5, 6, 7, 8):
        w -= 0.1 * (w - (1.0 + n))  # the mean over two numbers halves the 2 of the square
    np.testing.assert_allclose(state.model["w"], w, rtol=1e-6)


@pytest.mark.parametrize(
    "optimiser, spoils",
    [
        (optax.sgd(0.1), True),
        (optax.adam(0.1), True),
        (optax.chain(optax.add_noise(0.1, 0.1, jax.random.key(3)), optax.sgd(0.1)), True),
        (optax.MultiSteps(optax.sgd(0.1), 2), True),  # only its sums would be NaN at first
        (optax.chain(optax.zero_nans(), optax.sgd(0.1)), False),
        (optax.apply_if_finite(optax.sgd(0.1), 3), False),
    ],
    ids=["sgd", "adam", "noise", "sums", "zero_nans", "apply_if_finite"],
)
def test_a_gradient_of_nan_is_left_to_an_optimiser_that_can_deal_with_it(optimiser, spoils):
    length = lambda model, batch, key: jnp.sqrt(
        jnp.sum(model["w"] ** 2)
    )  # at 0: 0, its gradient NaN
    state = train.start(
        {"w": jnp.zeros(2), "low": jnp.array(-jnp.inf)}, optimiser, jax.random.key(0)
    )
    after, metrics = train.train_step(length, optimiser)(state, None)
    assert bool(metrics["skipped"]) == spoils and np.all(after.model["w"] == 0)
    assert same(after._replace(step=state.step), state) == spoils


# What a user may do at the door.


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"no weights.*int32\[3\], str"):
        train.start({"w": jnp.arange(3, dtype="int32"), "name": "w"}, optax.sgd(0.1), None)


@pytest.mark.parametrize(
    "found, message",
    [
        (lambda w: w, r"one real number.*float64\[2\]"),
        (lambda w: (w[0], w, w), "one real number.*tuple"),
        (lambda w: w[0] > 0, "one real number.*bool"),
        (lambda w: (w[0], w), "dict of numbers"),
        (lambda w: (w[0], {"all": w}), r"metric 'all'.*float64\[2\]"),
    ],
)
def test_what_is_no_loss_is_refused_and_leaves_no_checkpoint(tmp_path, found, message):
    loss = lambda model, batch, key: found(model["w"])
    with pytest.raises(TypeError, match=message):
        fit_numbers(1, optax.sgd(0.1), loss=loss, folder=tmp_path)
    assert not (tmp_path / "checkpoint.eqx").exists()


@pytest.mark.parametrize(
    "batches, message",
    [
        ((jnp.ones(2) for _ in range(9)), "function of the step's number.*generator"),
        ((jnp.ones(2), jnp.ones(2)), "lambda step: batch"),
        (jnp.ones((9, 2)), r"float64\[9,2\]"),
        ([], "list"),
        (lambda step: iter([step]), r"batches\(0\) is an iterator"),
    ],
)
def test_batches_without_numbers_are_refused(batches, message):
    with pytest.raises(TypeError, match=message):
        fit_numbers(1, optax.sgd(0.1), batches=batches)


def test_a_list_of_batches_is_taken_in_turn_again_and_again():
    several = [jnp.ones(2), 2 * jnp.ones(2), jnp.ones(1)]
    traces = []

    def counted(model, batch, key):
        traces.append(batch.shape)
        return distance(model, batch, key), None

    listed, _ = fit_numbers(7, optax.sgd(0.1), loss=counted, batches=several)
    assert traces == [(2,), (1,)]  # one program for each shape
    called, _ = fit_numbers(7, optax.sgd(0.1), batches=lambda n: several[n % 3])
    assert same(listed, called)


# What may happen to the folder. These runs are saved without being trained.


def run_of(steps, width=2, optimiser=None, key=None):
    optimiser = optax.adam(0.1) if optimiser is None else optimiser
    key = jax.random.key(0) if key is None else key
    state = train.start({"w": jnp.full(width, float(steps))}, optimiser, key)
    history = [{"step": n + 1, "loss": 0.1 * n, "seconds": float(n)} for n in range(steps)]
    return state._replace(step=jnp.asarray(steps, jnp.int32)), history


def saved(folder, *counts):
    for steps in counts:
        train.save(folder, *run_of(steps))


def step_found(folder):
    """The step of the run that is found in a folder, after all of it has been compared."""
    state, history = train.resume(folder, run_of(0)[0])
    expected, metrics = run_of(int(state.step))
    assert same(state, expected) and history == metrics
    return int(state.step)


@pytest.mark.parametrize("damage", [b"", b'{"step": 1, "lo', b"\x00\xff" * 9, None])
def test_damaged_metrics_are_written_again(tmp_path, damage):
    saved(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.unlink() if damage is None else path.write_bytes(path.read_bytes()[:-9] + damage)
    assert step_found(tmp_path) == 3
    fit_numbers(0, optax.adam(0.1), folder=tmp_path)
    assert lines(tmp_path) == run_of(3)[1]


DAMAGES = {
    "empty": lambda content: b"",
    "cut in its first line": lambda content: content[:18],
    "cut short": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "a byte changed": lambda content: content[:-50] + bytes([content[-50] ^ 1]) + content[-49:],
    "foreign": lambda content: b"PK\x03\x04" + content,
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_of_a_damaged_checkpoint_the_one_before_is_taken(tmp_path, damage):
    saved(tmp_path, 2, 4)
    newest = tmp_path / "checkpoint.eqx"
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    with pytest.warns(UserWarning, match=r"checkpoint.eqx .*goes on from .*previous.eqx, step 2"):
        assert step_found(tmp_path) == 2
    saved(tmp_path, 6)
    (tmp_path / "checkpoint.eqx").unlink()
    assert step_found(tmp_path) == 2  # what is whole was not replaced by what is damaged


def test_if_both_checkpoints_are_damaged_the_run_does_not_start_over(tmp_path):
    saved(tmp_path, 2, 4)
    for path in tmp_path.glob("*.eqx"):
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"damaged.*previous.eqx is damaged.*fresh=True"):
            train.resume(tmp_path, run_of(0)[0])


@pytest.mark.parametrize(
    "other, message",
    [
        ({"width": 3}, r"another model: \.model\['w'\] is float64\[2\] in it and float64\[3\] in"),
        (
            {"optimiser": optax.sgd(0.1)},
            r"another optimiser: .*count is int32\[\] in it and not there",
        ),
        ({"key": jax.random.key(1)}, "another random key"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path, other, message):
    saved(tmp_path, 2, 4)
    with pytest.raises(ValueError, match=message + r".*fresh=True"):
        train.resume(tmp_path, run_of(0, **other)[0])
    assert step_found(tmp_path) == 4


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    saved(tmp_path, 2, 4)
    path = tmp_path / "checkpoint.eqx"
    path.write_bytes(path.read_bytes().replace(b"checkpoint 1\n", b"checkpoint 2\n", 1))
    with pytest.raises(ValueError, match="newer jaxode"):
        train.resume(tmp_path, run_of(0)[0])


class Cut(BaseException):
    """The end of a process, as far as a test can have it."""


FULL = OSError(errno.ENOSPC, "No space left on device")


def fail_at(monkeypatch, call, error):
    """The system call of that number raises the error; there are those that write and those that rename."""
    calls = []

    def failing(function):
        def until(*arguments):
            calls.append(function)
            if len(calls) == call + 1:
                raise error
            return function(*arguments)

        return until

    for name in ("fsync", "replace"):
        monkeypatch.setattr(run_folder.os, name, failing(getattr(os, name)))


@pytest.mark.parametrize("error", [Cut(), FULL], ids=["killed", "full"])
@pytest.mark.parametrize("call", range(7))  # the file, its two names, its folder; the metrics
def test_wherever_writing_ends_the_folder_holds_a_whole_run(tmp_path, monkeypatch, call, error):
    saved(tmp_path, 2, 4)
    fail_at(monkeypatch, call, error)
    with contextlib.suppress(Cut, run_folder.NotSavedError):
        saved(tmp_path, 6)
    monkeypatch.undo()
    assert step_found(tmp_path) == (4 if call < 3 else 6)
    saved(tmp_path, 8)
    assert step_found(tmp_path) == 8


def test_a_full_disk_stops_the_run_and_says_so_and_it_goes_on_from_there(tmp_path, monkeypatch):
    optimiser, good = optax.adam(0.1), lambda n: jnp.full(2, 1.0 + n)
    fail_at(monkeypatch, 10, FULL)
    with pytest.raises(OSError, match=r"checkpoint of step 4 cannot be written .*No space left"):
        fit_numbers(9, optimiser, batches=good, every=2, folder=tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.part"))
    resumed, history = fit_numbers(9, optimiser, batches=good, folder=tmp_path)
    whole, expected = fit_numbers(9, optimiser, batches=good)
    assert same(resumed, whole) and timeless(history) == timeless(expected)


def test_random_keys_of_any_kind_and_anywhere_are_kept(tmp_path):
    optimiser = optax.add_noise(0.1, 0.1, jax.random.key(3))
    model = {"w": jnp.ones(2, "bfloat16"), "dropout": jax.random.key(2, impl="rbg"), "rate": 0.5}
    state = train.start(model, optimiser, jax.random.key(1, impl="rbg"))
    train.save(tmp_path, state, [])
    assert same(train.resume(tmp_path, state)[0], state)


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(" (4711)")
file.flush()
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_is_one_process_s_at_a_time_and_a_kill_sets_it_free(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / run_folder.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"Another process \(4711\) is training"):
            fit_numbers(0, optax.sgd(0.1), folder=tmp_path)
        other.send_signal(signal.SIGKILL)
    fit_numbers(0, optax.sgd(0.1), folder=tmp_path)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file\): choose another"):
        fit_numbers(0, optax.sgd(0.1), folder=tmp_path / "file" / "run")


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not():
    command = [sys.executable, "-m", "bench.kills", "--count", "2", "--steps", "60"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 kills") and "nothing was lost" in done.stdout
