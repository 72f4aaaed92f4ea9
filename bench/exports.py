"""Every method with every adjoint, exported for CPU, CUDA and TPU: `python -m bench.exports`.

`jax.export` of one solve and of a batch, with values alone and with gradients, in float32 and float64, and
of whatever else a solve can be asked for (`tests/export_cases.py`). In a program for another platform
there is nothing that a CPU alone knows, and no custom call that is not there. That for a CPU is
serialised, read back and called, and gives what the plain call gives, to the last bit.

It takes about half an hour on one core. Each case is a line of a file, `--file`; a run that was stopped goes on
from there. What an adjoint does not do is refused in words, and counted.
"""

import argparse
import collections
import json
import os
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the cases are the tests'


def outcome(case) -> dict:
    """What came of a case."""
    import jax
    from export_cases import PLATFORMS, wrong
    from random_options import is_documented

    began = time.monotonic()
    try:
        with jax.enable_x64(case.dtype == "float64"):
            found, exports = wrong(case), len(PLATFORMS)
    except Exception as error:
        if is_documented(error):
            return dict(case=str(case), exports=0, refused=str(error)[:200], wrong=[])
        text = "".join(traceback.format_exception(error, limit=-4))
        found, exports = [text[-2000:]], 0
    seconds = round(time.monotonic() - began, 2)
    return dict(case=str(case), exports=exports, refused="", wrong=found, seconds=seconds)


def finished(file: Path) -> dict[str, dict]:
    """What was done before, by case; a line that was cut off is done again."""
    lines = file.read_text().splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["case"]: record for record in records}


def table(records) -> str:
    """Exports and failures by kind."""
    exports, refused, failed = (collections.Counter() for _ in range(3))
    for record in records:
        adjoint, form = record["case"].split()[1:3]
        kind = f"{adjoint}, {form}"
        exports[kind] += record["exports"]
        refused[kind] += bool(record["refused"])
        failed[kind] += bool(record["wrong"])
    columns = exports, refused, failed
    lines = [f"{'adjoint':24} {'exports':>8} {'refused':>8} {'failed':>8}"]
    row = lambda name, numbers: f"{name:24} " + " ".join(f"{n:8,}" for n in numbers)
    lines += [row(kind, [column[kind] for column in columns]) for kind in exports]
    return "\n".join([*lines, row("all", [sum(column.values()) for column in columns])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file", type=Path, default=ROOT / "runs" / "exports.jsonl")
    parser.add_argument("--only", default="", help="cases with this in their names alone")
    parser.add_argument("--again", action="store_true", help="begin anew")
    given = parser.parse_args()
    from compile_flags import QUICK

    os.environ.setdefault("XLA_FLAGS", QUICK)
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from export_cases import cases

    given.file.parent.mkdir(parents=True, exist_ok=True)
    if given.again:
        given.file.unlink(missing_ok=True)
    before = finished(given.file)
    chosen = [case for case in cases() if given.only in str(case)]
    with given.file.open("a") as file:
        for i, case in enumerate(chosen):
            if str(case) not in before:
                before[str(case)] = record = outcome(case)
                file.write(json.dumps(record) + "\n")
                file.flush()
                if record["wrong"]:
                    print(f"FAILED {case}: {record['wrong']}", flush=True)
                jax.clear_caches()
            if i % 50 == 49:
                print(f"{i + 1} of {len(chosen)} cases", flush=True)
    records = [before[str(case)] for case in chosen]
    print(table(records))
    failed = [record for record in records if record["wrong"]]
    for record in failed:
        print(f"failed: {record['case']}: {record['wrong'][0][:300]}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
