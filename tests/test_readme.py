"""The front page and the guide: the code of each runs, in order, as one program, and tables are true."""

import json
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "notebooks" / "README.md"
RESULTS = ROOT / "bench" / "results.json"
# The columns of the tables of speed whose names are not those of the bench.
PEERS = {
    "diffrax takes": "diffrax",
    "jax.experimental.ode": "jax",
    "gradsolve, steps given": "gradsolve",
}
PEERS |= {f"scipy {name}": name for name in ("LSODA", "Radau", "BDF")} | {"scipy RK45": "scipy"}
PEERS |= {"a plain vmap": "plain vmap"}


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("path", [README, GUIDE], ids=["front page", "guide"])
def test_the_code_blocks_run_as_one_program(path, capsys):
    assert blocks(path, "python")
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks(path, "python"):
            exec(compile(block, str(path), "exec"), namespace)
    assert "status: success" in capsys.readouterr().out


def test_the_commands_name_things_that_exist():
    commands = "".join(blocks(README, "sh"))
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\.\[(\w+)\]", commands):
        assert f"\n{extra} = [" in project
    assert 'jaxode = "jaxode.experiments.command_line:main"' in project


PAGES = [path for path in ROOT.rglob("*.md") if not {".venv", "runs"} & set(path.parts)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_inside_of_the_repository_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert link.startswith("http") or (path.parent / link).exists(), link
    for notebook in re.findall(r"`(\d\d_\w+)`", path.read_text()):
        assert (ROOT / "notebooks" / f"{notebook}.ipynb").exists(), notebook


def test_every_address_of_the_repository_is_that_of_one_setting():
    project = (ROOT / "pyproject.toml").read_text()
    home = re.search(r'Repository = "https://github.com/([^"]+)"', project)[1]
    notebooks = list((ROOT / "notebooks").glob("*.ipynb"))
    for path in [*PAGES, *notebooks, ROOT / "pyproject.toml"]:
        addresses = re.findall(r"github(?:\.com)?/([\w-]+/jaxode)\b", path.read_text())
        assert set(addresses) <= {home}, path
        assert addresses or path not in notebooks


@pytest.mark.parametrize("path, rows", [(README, 15), (ROOT / "bench" / "README.md", 100)])
def test_the_table_of_speed_is_the_one_that_the_bench_wrote(path, rows):
    table = path.read_text().split("<!-- bench -->")[1].split("<!-- /bench -->")[0]
    (head, *lines) = (line.strip().strip("|").split("|") for line in table.strip().splitlines())
    cells = {work.strip(): [cell.strip() for cell in shown] for work, *shown in lines}
    peers = [PEERS.get(name.strip(), name.strip()) for name in head[2:]]
    found = {row["work"]: row for row in json.loads(RESULTS.read_text())["results"]}
    shown = {work: cells[work] for work in found if work in cells}
    assert len(shown) >= rows
    for work, (ours, *others) in shown.items():
        seconds, unit = found[work]["seconds"], found[work]["unit"]
        scale = {"ms": 1e3, "s": 1.0, "times": 1.0}[unit]
        assert float(ours.split()[0]) == pytest.approx(
            scale * seconds["jaxode"], rel=0.01, abs=0.006
        )
        for peer, other in zip(peers, others):
            assert bool(other) == (peer in seconds), (work, peer)
            if other and unit != "times":
                assert float(other[:-1]) == pytest.approx(
                    seconds[peer] / seconds["jaxode"], rel=0.06
                )


def test_the_table_of_adjoints_is_the_one_that_the_code_has():
    from jaxode.adjoints.names import table

    for path in (README, GUIDE):
        assert f"\n\n{table()}\n\n" in path.read_text()
