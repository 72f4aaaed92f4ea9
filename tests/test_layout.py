"""Imports go down: a mechanism never imports what is built on it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "jaxode"
ORDER = (
    "tableaus", "splittings", "tree", "step", "scalars", "stages", "controllers", "solution", "poison", "field",
    "loop", "batching", "lanes", "lanes_backward", "sensitivities", "cotangents", "continuous_adjoint",
    "adjoints", "signals", "solve", "problems", "nn", "data", "train", "experiments",
)  # fmt: skip


def imported(path):
    """The parts of jaxode that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "jaxode"
        ):
            parts = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            yield from (part for part in parts if part in ORDER)
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("jax._src") for alias in node.names)


def test_every_file_has_a_place_and_imports_only_what_is_below_it():
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if place == "__init__":
            continue
        assert place in ORDER, f"{place} has no place in the order"
        above = [part for part in imported(path) if ORDER.index(part) > ORDER.index(place)]
        assert not above, f"{path} imports {above}, which is above it"


def test_nothing_private_of_jax_or_equinox_is_used_and_no_peer_is_imported():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for name in ("jax._src", "equinox.internal", "diffrax", "torchdiffeq"):
            assert f"import {name}" not in text and f"from {name}" not in text
