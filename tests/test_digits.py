"""The main job, at its smallest, and the command line of all experiments."""

import dataclasses
import json
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import jaxode
from jaxode.experiments import classification, command_line, digits, mnist
from jaxode.experiments.experiment import Results, carry_out, option
from jaxode.nn import MLPField, NeuralODE

SMALL = digits.Settings.at("quick")


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """Optax's Adam multiplies floats and its integer count: strict promotion refuses that."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    return out, carry_out(digits, SMALL, out, progress=False)


def test_the_job_writes_what_it_promises(ran):
    out, results = ran
    written = {path.name for path in out.iterdir()}
    assert {"results.json", "training.png", "tolerance.png", "between.png"} <= written
    assert all((out / name / "metrics.jsonl").exists() for name in classification.LABELS)
    assert json.loads((out / "results.json").read_text())["more"] == results.more


def test_the_table_has_a_line_for_each_network_and_the_claims_hold(ran):
    text = str(ran[1])
    assert all(any(line.startswith(name) for line in text.splitlines())
               for name in classification.LABELS.values())  # fmt: skip
    assert ran[1].claims and all(ran[1].claims.values())


def test_rk_net_evaluates_and_transposes_as_often_as_it_steps(ran):
    row = ran[1].more["networks"]["rk-net"]
    assert (row["forward_evaluations"], row["backward_vjps"]) == (9, 9)
    assert row["rebuilding_evaluations"] == 0


def test_direct_makes_a_vjp_of_each_evaluation():
    counts = [0, 0]

    def report(is_vjp, t):
        counts[int(is_vjp)] += 1

    field = classification.Counted(MLPField(2, width=4, key=jax.random.key(0)), report)
    net = NeuralODE(field, method="rk4", dt=0.5, adjoint="direct")  # as RK-Net has it
    weights, rest = eqx.partition(net, eqx.is_inexact_array)

    @jax.jit
    def gradient(weights, y):
        return jax.grad(lambda w, y: jnp.sum(eqx.combine(w, rest)(y) ** 2), (0, 1))(weights, y)

    jax.block_until_ready(gradient(weights, jnp.ones((3, 2))))
    jax.effects_barrier()
    assert counts == [9, 9]


def test_the_memory_of_backsolve_is_constant_and_that_of_direct_is_not():
    task = digits.task()
    net = classification.network("ode-net", task, SMALL, jax.random.key(0))
    sweep = classification.tolerances(net, task.test, (1e-1, 1e-4), {})
    loose, tight = classification.gradient_memory(net, task.images.x[:4], sweep)
    assert tight["steps"] > 2 * loose["steps"]
    assert tight["backsolve"] == loose["backsolve"] < loose["replay"]
    assert tight["direct"] / loose["direct"] > tight["replay"] / loose["replay"] > 1


def test_the_second_run_goes_on_from_the_first_and_keeps_its_numbers(ran, monkeypatch):
    out, results = ran
    counted = {name: x for name, x in results.more["networks"]["ode-net"].items()
               if name in classification.evaluations(None, [{"evaluations": 0}])}  # fmt: skip
    monkeypatch.setattr(classification, "counter", lambda *_: lambda _: counted)
    monkeypatch.setattr(classification, "tolerances", lambda *_: results.more["tolerances"])
    monkeypatch.setattr(classification, "rows_of", lambda _: results.rows)
    again = carry_out(digits, SMALL, out, progress=False)
    for name, row in again.more["networks"].items():
        assert row == {key: results.more["networks"][name][key] for key in row}


def test_a_folder_with_other_settings_is_refused(ran):
    other = dataclasses.replace(SMALL, seed=1)
    with pytest.raises(ValueError, match=r"seed = 0.*--fresh"):
        carry_out(digits, other, ran[0], progress=False)


def test_the_default_settings_give_an_ode_net_of_half_a_resnet():
    key = jax.random.key(0)
    size = {name: classification.parameters(
                classification.network(name, digits.task(), digits.Settings(), key))
            for name in ("resnet", "ode-net")}  # fmt: skip
    assert 2 * size["ode-net"] <= size["resnet"]


def test_the_loss_of_an_untrained_network_is_about_that_of_guessing():
    task = digits.task()
    net = classification.network("mlp", task, SMALL, jax.random.key(0))
    batch = task.images.x[:64], task.images.y[:64]
    value, metrics = classification.loss_of(1)(net, batch, jax.random.key(1))
    assert abs(float(value) - float(jnp.log(10.0))) < 0.5
    assert 0 <= float(metrics["accuracy"]) <= 1


def test_validation_holds_out_training_images_and_leaves_the_test_images_alone():
    task = digits.task()
    held = classification.prepared(task, digits.Settings(validate=True))
    assert len(held.test.y) + len(held.images.y) == len(task.images.y)
    seen = {x.tobytes() for x in task.test.x}
    assert not any(x.tobytes() in seen for x in held.test.x)


@pytest.mark.parametrize("experiment", [digits, mnist])
def test_one_network_alone_is_the_one_among_four(ran, experiment, monkeypatch, tmp_path):
    monkeypatch.setattr(mnist, "task", lambda settings: digits.task())
    same = {f.name: getattr(SMALL, f.name) for f in dataclasses.fields(SMALL)}
    settings = experiment.Settings.at("quick", **{**same, "networks": "mlp"})
    alone = carry_out(experiment, settings, tmp_path, progress=False)
    assert list(alone.more["networks"]) == ["mlp"] and not alone.claims
    row, among = (results.more["networks"]["mlp"] for results in (alone, ran[1]))
    assert row["test error"] == among["test error"]
    assert (tmp_path / "training.png").exists() and not (tmp_path / "ode-net").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["digits", "--epochs", "0"], "--epochs"),
        (["digits", "--adjoint", "magic"], "magic"),
        (["digits", "--networks", "mlp,lstm"], "lstm"),
        (["digits", "--rtol", "-1"], "--rtol"),
        (["digits", "--colour"], "--colour"),
        (["digits", "--quick", "--full"], "exclude"),
        (["letters"], "letters"),
        (["mnist", "--quick", "--data", "/nowhere"], "/nowhere"),
    ],
)
def test_a_bad_option_gets_one_line_and_exit_code_2(arguments, words, capsys, tmp_path):
    out = ["--out", str(tmp_path)] if len(arguments) > 1 else []
    assert command_line.main([*arguments, *out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_a_file_as_out_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert command_line.main(["digits", "--quick", "--out", str(tmp_path / "file")]) == 2
    assert "file is a file" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxode {jaxode.__version__}\n"


def test_a_quick_run_says_that_it_is_a_smoke_test(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(digits, "run", lambda *_: Results([{"network": "none"}], {}))
    assert command_line.main(["digits", "--quick", "--out", str(tmp_path)]) == 0
    assert "smoke test" in capsys.readouterr().out
    assert command_line.main(["digits", "--out", str(tmp_path), "--fresh"]) == 0
    assert "smoke test" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "written, message",
    [
        ('{"experiment": "resnet_limit"}', "a run of `jaxode resnet-limit`: .*--fresh"),
        ('{"experiment": "digits", "seed": 0, "old": 1}', "old = 1, now not there"),
        ('{"seed": 0, "ep', "damaged: remove it.*--out"),
        ("[1, 2]", "damaged"),
    ],
)
def test_a_folder_of_something_else_is_refused_in_the_users_words(tmp_path, written, message):
    (tmp_path / "settings.json").write_text(written)
    with pytest.raises(ValueError, match=message):
        carry_out(digits, SMALL, tmp_path, progress=False)


@pytest.mark.parametrize("name", list(command_line.EXPERIMENTS))
def test_help_explains_every_option(name, capsys):
    assert command_line.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    settings = command_line.module_of(name).Settings
    for name in ("out", "quick", "full", "fresh", *(f.name for f in dataclasses.fields(settings))):
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize("name", list(command_line.EXPERIMENTS))
def test_every_setting_is_an_option_with_a_default_in_its_range(name):
    for field in dataclasses.fields(command_line.module_of(name).Settings):
        low, high = field.metadata["low"], field.metadata["high"]
        for value in (field.default, field.metadata["quick"], field.metadata["full"]):
            if value is not None and field.type in (int, float):
                assert (low is None or value >= low) and (high is None or value <= high)
        assert field.metadata.keys() == option(0, "").metadata.keys() and field.metadata["help"]


def test_the_list_of_experiments_has_a_line_each(capsys):
    assert command_line.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in command_line.EXPERIMENTS)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert command_line.main(["digits", "--quick"]) == 1
    assert "jaxode[experiments]" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "run", interrupted)
    assert command_line.main(["digits", "--quick", "--out", str(tmp_path)]) == 130
    assert "checkpoint" in capsys.readouterr().err
