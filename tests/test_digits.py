"""The main job, at its smallest, and its command line."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxode import data
from jaxode.experiments import command_line, digits

SMALL = digits.Settings().quick()


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """Optax's Adam multiplies floats and its integer count: strict promotion refuses that."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    return out, digits.run(out, SMALL, progress=False)


def test_the_job_writes_what_it_promises(ran):
    out, results = ran
    written = {path.name for path in out.iterdir()}
    assert {"results.json", "training.png", "tolerance.png", "between.png"} <= written
    assert all((out / name / "metrics.jsonl").exists() for name in digits.NAMES)
    assert json.loads((out / "results.json").read_text()) == results


def test_the_table_has_a_line_for_each_network(ran):
    text = digits.table(ran[1])
    assert all(any(line.startswith(name) for line in text.splitlines())
               for name in digits.LABELS.values())  # fmt: skip


def test_rk_net_evaluates_and_transposes_as_often_as_it_steps(ran):
    row = ran[1]["networks"]["rk-net"]
    assert (row["forward_evaluations"], row["backward_vjps"]) == (9, 9)
    assert row["rebuilding_evaluations"] == 0


def test_a_smaller_tolerance_costs_more_and_errs_less(ran):
    first, *_, last = ran[1]["tolerances"]
    assert last["evaluations"] > first["evaluations"]
    assert last["feature error"] < first["feature error"]


def test_the_second_run_goes_on_from_the_first_and_keeps_its_numbers(ran, monkeypatch):
    out, results = ran
    monkeypatch.setattr(digits, "cost_of_gradient", lambda *_: {})
    monkeypatch.setattr(digits, "tolerances", lambda *_: results["tolerances"])
    again = digits.run(out, SMALL, progress=False)
    for name, row in again["networks"].items():
        assert row == {key: results["networks"][name][key] for key in row}


def test_a_folder_with_other_settings_is_refused(ran):
    other = dataclasses.replace(SMALL, seed=1)
    with pytest.raises(ValueError, match=r"seed = 0.*--fresh"):
        digits.run(ran[0], other, progress=False)


def test_the_published_settings_give_an_ode_net_of_half_a_resnet():
    key = jax.random.key(0)
    size = {name: digits.parameters(digits.network(name, digits.Settings(), key))
            for name in ("resnet", "ode-net")}  # fmt: skip
    assert 2 * size["ode-net"] <= size["resnet"]


def test_the_loss_of_an_untrained_network_is_about_that_of_guessing():
    images, _ = data.digits()
    net = digits.network("mlp", SMALL, jax.random.key(0))
    value, metrics = digits.loss(net, (images.x[:64], images.y[:64]), jax.random.key(1))
    assert abs(float(value) - float(jnp.log(10.0))) < 0.5
    assert 0 <= float(metrics["accuracy"]) <= 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["digits", "--epochs", "0"], "--epochs"),
        (["digits", "--adjoint", "magic"], "magic"),
        (["digits", "--rtol", "-1"], "--rtol"),
        (["digits", "--colour"], "--colour"),
        (["letters"], "letters"),
    ],
)
def test_a_bad_option_gets_one_line_and_exit_code_2(arguments, words, capsys):
    assert command_line.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_help_explains_every_option(capsys):
    assert command_line.main(["digits", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--out", "--epochs", "--seed", "--quick", "--adjoint", "--rtol", "--fresh"):
        assert option in text


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
