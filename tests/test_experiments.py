"""Every experiment at its quick scale: it ends with its table, its figures, and claims that hold."""

import json
from pathlib import Path

import jax
import pytest

from jaxode import train
from jaxode.experiments import command_line, flow, regularize, resnet_limit
from jaxode.experiments.experiment import carry_out

REAL = Path(__file__).parents[2] / "shared" / "data" / "mnist10k"
FIGURES = {
    "flow": {"figure_4.png", "figure_5.png", "film.png"},
    "latent": {"figure_8.png", "latent.png", "co2.png"},
    "poisson": {"figure_7.png"},
    "augment": {"augment.png"},
    "regularize": {"regularize.png"},
    "physics": {"physics.png"},
    "hyper": {"hyper.png"},
    "resnet-limit": {"resnet_limit.png"},
    "cde": {"cde.png"},
    "match": {"clouds.png", "digits.png", "evaluations.png"},
    "mnist": {"training.png", "figure_3.png", "memory.png", "between.png"},
}


@pytest.fixture(autouse=True, scope="module")
def as_users_have_it():
    """Standard promotion and float32: what `jaxode` runs in."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield


@pytest.mark.parametrize("name", list(FIGURES))
def test_an_experiment_ends_with_its_table_its_figures_and_claims_that_hold(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(flow, "SAMPLES", 2000)  # enough for its claims
    module, given = command_line.module_of(name), {}
    if name == "mnist":
        if not REAL.exists():
            pytest.skip("no real data here")
        given = {"data": str(REAL)}
    results = carry_out(module, module.Settings.at("quick", **given), tmp_path, progress=False)
    assert results.rows and str(results).count("\n") > len(results.rows)
    assert not [claim for claim, held in results.claims.items() if not held]
    assert FIGURES[name] <= {path.name for path in tmp_path.iterdir()}
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"] == results.rows and written["settings"]
    assert list(tmp_path.glob("*/metrics.jsonl"))


def test_every_experiment_is_tested():
    assert set(FIGURES) | {"digits"} == set(command_line.EXPERIMENTS)


def test_an_interrupted_experiment_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    settings = resnet_limit.Settings.at("quick", steps=12, layers=2)
    whole = carry_out(resnet_limit, settings, tmp_path / "whole", progress=False)
    save, saved = train.save, []

    def stop_in_the_third(*arguments):
        save(*arguments)
        saved.append(arguments)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        carry_out(resnet_limit, settings, tmp_path / "stopped", progress=False)
    monkeypatch.setattr(train, "save", save)
    resumed = carry_out(resnet_limit, settings, tmp_path / "stopped", progress=False)
    assert resumed.more["runs"] == whole.more["runs"]


@pytest.mark.parametrize(
    "given, message",
    [({"clouds": "circles,sqares"}, "sqares"), ({"sizes": "2,x"}, "whole numbers")],
)
def test_a_list_with_a_wrong_word_is_refused_with_the_words_there_are(given, message):
    with pytest.raises(ValueError, match=message):
        flow.Settings.at("quick", **given)


def test_penalties_always_have_none_to_compare_with():
    assert regularize.Settings(penalties="STEER,RNODE").listed("penalties")[0] == "none"
    with pytest.raises(ValueError, match="RNODE"):
        regularize.Settings(penalties="rnode")
