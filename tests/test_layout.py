"""Imports go down: a mechanism never imports what is built on it; few files know JAX's inside."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "jaxode"
ORDER = """
    words tree solution switches kernels.rules methods.method methods.compensated methods.explicit
    methods.reversible methods.tables methods.symplectic
    methods.linear methods.blocks methods.structures methods.sparse methods.krylov methods.newton
    methods.implicit methods.rosenbrock methods.esdirk methods.kencarp methods.collocation methods.auto
    methods.names methods.hypersolver
    controllers kernels.one_call kernels.calls kernels.forms kernels.writes kernels.traces kernels.numbers
    stepping.field stepping.events stepping.budget stepping.stability stepping.integrator stepping.observers
    stepping.problems kernels.stages outputs kernels.eventful kernels.stepper
    stepping.checkpoints stepping.loop stepping.resuming
    batch.vmap_rules batch.layout batch.queue batch.plans batch.lanes
    adjoints.inputs adjoints.second_order adjoints.ends adjoints.failed adjoints.sensitivities
    adjoints.replay_in_lanes
    adjoints.replay adjoints.stretches adjoints.backsolve adjoints.reversible adjoints.direct adjoints.names
    signals functions traced_once arguments tolerances events folds corrections constraints stiffness dense
    resuming program switching integrate
    findings diagnosis perturbations trust evidence gradients
    problems.ends problems.problem problems.smooth problems.stiff problems.detest problems.grids
    problems.circuits nn data run_folder train experiments
""".split()
# Where JAX's interfaces for those who extend it are used, and why:
EXTENDS = {
    "kernels/traces.py": "a jaxpr as a comparable value",
    "kernels/forms.py": "which form of a step suits a field: reads its jaxpr",
    "kernels/numbers.py": "a function number by number: evaluates a jaxpr",
    "kernels/one_call.py": "which operations one call can hold: reads a jaxpr; the mark of the call",
    "kernels/writes.py": "a write into an array as pieces: reads a jaxpr",
    "kernels/rules.py": "a derivative rule that JAX does not forget is a primitive's",
    "kernels/calls.py": "the mark of a call that stays one",
    "batch/vmap_rules.py": "the parts of a solve are primitives, with rules of their own",
    "batch/plans.py": "how many operations a field has: reads its jaxpr",
    "signals.py": "signals are found in the jaxpr of func, by a primitive of their own",
    "adjoints/direct.py": "what has no transpose says so: a primitive",
    "adjoints/failed.py": "the derivatives of a failed solve are a primitive",
}


def place_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts[0] in ("nn", "experiments") else ".".join(parts)


def imported(path):
    """The parts of jaxode that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jaxode"):
            parts = node.module.split(".")[1:]
            for alias in node.names:
                full = ".".join([*parts, alias.name])
                known = [
                    name for name in (full, ".".join(parts), ".".join(parts[:1])) if name in ORDER
                ]
                yield from known[:1]


def test_every_file_has_a_place_and_imports_only_what_is_below_it():
    for path in PACKAGE.rglob("*.py"):
        if path.name == "__init__.py":
            continue
        place = place_of(path)
        assert place in ORDER, f"{place} has no place in the order"
        inside_functions = {
            "stepping.integrator": "stepping.loop",
            "adjoints.replay_in_lanes": "adjoints.replay",
        }
        above = [part for part in imported(path) if ORDER.index(part) > ORDER.index(place)]
        above = [part for part in above if inside_functions.get(place) != part]
        assert not above, f"{path} imports {above}, which is above it"


def test_nothing_private_of_jax_or_equinox_is_used_and_no_peer_is_imported():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for name in ("jax._src", "equinox.internal", "diffrax", "torchdiffeq"):
            assert f"import {name}" not in text and f"from {name}" not in text


def test_jaxs_interfaces_for_extensions_are_used_in_few_files_each_with_a_reason():
    names = ("jax.extend", "jax.interpreters", "jax.experimental.xla_metadata", "primitive.name")
    using = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name in path.read_text() for name in names)
    }
    assert using == set(EXTENDS)
    other = re.compile(
        r"from jax import core|import jax\.core|jax\.core import (?!Tracer$|ShapedArray$)", re.M
    )
    assert not [path for path in PACKAGE.rglob("*.py") if other.search(path.read_text())]


def test_no_table_is_read_and_no_kind_of_method_is_asked_for_outside_of_methods_and_kernels():
    for path in PACKAGE.rglob("*.py"):
        place = place_of(path)
        if place.startswith(("methods", "kernels", "experiments")):
            continue
        text = path.read_text()
        for name in ("Tableau", "Splitting", ".extra_c", "method.c,", "method.a,", "table.c"):
            assert name not in text.replace("Tableau,", "") or place in ("__init__",), (path, name)


def test_functions_and_classes_are_short():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            doc = ast.get_docstring(node, clean=False)
            first = node.body[1 if doc and len(node.body) > 1 else 0]
            lines = node.end_lineno - first.lineno + 1  # a signature has a line for each option
            most = 150 if isinstance(node, ast.ClassDef) else 60
            assert lines <= most, f"{path}: {node.name} has {lines} lines"


def test_what_the_notes_for_contributors_point_at_is_there():
    notes = (PACKAGE.parent / ".github" / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| .*\? .*\| `(.+)` \| `(.+)` \|$", notes, re.MULTILINE)
    assert len(rows) >= 20
    for file, name in rows:
        assert name in (PACKAGE.parent / file).read_text(), (file, name)
