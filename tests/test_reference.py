"""The reference: what is public has a description, and `dir`, `help` and the pages show that alone."""

import importlib
import inspect
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import jaxode

ROOT = Path(__file__).parent.parent
PACKAGES = ["jaxode", *(f"jaxode.{name}" for name in jaxode.PACKAGES)]
each = pytest.mark.parametrize("package", PACKAGES)


def public(package):
    """The names of a package that are made in jaxode, with what they are."""
    module = importlib.import_module(package)
    for name in dir(module) if package == "jaxode" else getattr(module, "__all__", dir(module)):
        value = getattr(module, name)
        if not name.startswith("_") and not inspect.ismodule(value):
            yield name, value


@each
def test_everything_public_has_a_description(package):
    for name, value in public(package):
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert "__doc__" in vars(value) or inspect.isfunction(value), f"{package}.{name}"
        words = (value.__doc__ or "").split()
        assert len(words) >= 4, f"{package}.{name} is not described"
        assert not words[0].startswith(f"{name}("), (
            f"{package}.{name} is described by its signature alone"
        )


@each
def test_functions_of_public_classes_have_a_description_of_their_own_or_inherit_one(package):
    for name, value in public(package):
        if inspect.isclass(value):
            for part, function in vars(value).items():
                if inspect.isfunction(function) and not part.startswith("_"):
                    assert inspect.getdoc(getattr(value, part)), f"{package}.{name}.{part}"


def test_dir_and_the_table_that_help_begins_with_are_what_is_public():
    assert dir(jaxode) == sorted(jaxode.__all__)
    shown = pydoc.plain(pydoc.render_doc(jaxode)).split("PACKAGE CONTENTS")[0]
    table = [line.split("|")[2] for line in shown.splitlines() if line.strip().startswith("| ")]
    named = [
        name.strip(" `").removeprefix("jaxode.") for cell in table[1:] for name in cell.split(",")
    ]
    assert named == jaxode.__all__


def test_packages_are_there_without_an_import_of_their_own():
    program = (
        "import jaxode as j; print(j.nn.NeuralODE, j.train.fit, j.problems.problems['kepler'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "NeuralODE" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'odes'; it has odeint, solve"):
        jaxode.odes  # noqa: B018


def test_the_reference_builds_and_its_links_lead_somewhere(tmp_path):
    notes = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    command = shlex.split(re.search(r"^python -m pdoc .*$", notes, re.MULTILINE)[0])
    command = [sys.executable, *command[1:]]
    command[command.index("runs/reference")] = str(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert not done.stderr
    without_programs = lambda text: re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    pages = {page: without_programs(page.read_text()) for page in tmp_path.rglob("*.html")}
    assert {f"{name.replace('.', '/')}.html" for name in PACKAGES} <= {
        str(page.relative_to(tmp_path)) for page in pages
    }
    for page, text in pages.items():
        for link in re.findall(r'href="([^"]+)"', text):
            file, _, place = link.partition("#")
            if "://" in file:
                continue
            target = (page.parent / file).resolve() if file else page
            assert target in pages, f"{page.name} has a link to {link}"
            assert not place or f'id="{place}"' in pages[target], f"{page.name} links to {link}"


@each
def test_names_of_the_library_in_descriptions_are_names_that_it_has(package):
    module = importlib.import_module(package)
    texts = [module.__doc__, *(v.__doc__ or "" for _, v in public(package) if callable(v))]
    for name in re.findall(r"`(jaxode(?:\.\w+)+)", "\n".join(texts)):
        assert pydoc.locate(name) is not None, f"{package} speaks of {name}"
