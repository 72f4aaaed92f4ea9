"""Every block of code in README.md runs, in order, as one program."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_code_blocks_run_as_one_program(capsys):
    assert len(blocks("python")) >= 4
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks("python"):
            exec(compile(block, str(README), "exec"), namespace)
    assert "status: success" in capsys.readouterr().out


def test_the_commands_name_things_that_exist():
    commands = "".join(blocks("sh"))
    project = (README.parent / "pyproject.toml").read_text()
    for extra in re.findall(r"\.\[(\w+)\]", commands):
        assert f"\n{extra} = [" in project
    assert 'jaxode = "jaxode.experiments.command_line:main"' in project


def test_the_table_of_speed_is_the_one_that_the_bench_wrote():
    import json

    results = README.parent / "bench" / "results.json"
    if not results.exists():
        pytest.skip("no bench results")
    table = README.read_text().split("<!-- bench -->")[1].split("<!-- /bench -->")[0]
    lines = (line.strip("| ").split(" | ") for line in table.splitlines())
    cells = {work: shown for work, *shown in lines}
    for row in json.loads(results.read_text())["results"]:
        (found, *others), seconds = cells[row["work"]], row["seconds"]
        scale, ours = {"ms": 1e3, "s": 1.0, "times": 1.0}[row["unit"]], seconds.pop("jaxode")
        assert float(found.split()[0]) == pytest.approx(scale * ours, rel=0.01, abs=0.006)
        seconds.pop("gradsolve, whole", None)  # told in words
        ratios = [peer / ours for peer in seconds.values() if row["unit"] != "times"]
        shown = [float(other[:-1]) for other in others if other.endswith("x")]
        assert sorted(shown) == pytest.approx(sorted(ratios), rel=0.06)


def test_the_table_of_adjoints_is_the_one_that_the_code_has():
    from jaxode.adjoints.names import table

    assert f"\n\n{table()}\n\n" in README.read_text()
