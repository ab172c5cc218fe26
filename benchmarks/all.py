"""The CPU benchmarks that have a quick version, one after the other: `make bench`. Eight to nine minutes, two cores.

Each runs in a process of its own, so that none inherits another's threads, memory or warm caches. The long versions
are run by name; `python -m benchmarks.NAME --help` lists what they take.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import Annotated

import typer

from benchmarks.common import DATA_DIR, RESULTS, ROOT, DataDir, Out, refuse_unknown

STOP_WITHIN_S = 60.0
QUICK = {
    "bare_loop": ["--turns", "8", "--seconds-per-block", "1"],
    "fabric_overhead": ["--rounds", "3"],
    "startup": ["--repeats", "3"],
    "memory": ["--nodes", "2", "--nodes", "8"],
    "demo_architecture": ["--cpu-seconds", "12", "--turns", "7", "--only", "demo", "--only", "adamw"],
}


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(QUICK)}; repeatable; default all.")] = None,
    data_dir: DataDir = DATA_DIR,
    out: Out = RESULTS,
) -> None:
    """Run the quick benchmarks; exits 1 if one fails, after having run the others."""
    refuse_unknown("--only", only, QUICK)
    failed = []
    for name in only or list(QUICK):
        command = [sys.executable, "-m", f"benchmarks.{name}", *QUICK[name]]
        command += ["--data-dir", data_dir] if data_dir != DATA_DIR else []
        command += ["--out", str(out.resolve())] if out != RESULTS else []
        began = time.monotonic()
        code = run(command)
        print(f"{name}: {'failed' if code else 'done'} after {time.monotonic() - began:.0f} s\n", flush=True)
        failed += [name] if code else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def run(command: list[str]) -> int:
    """The exit code. On Ctrl-C, which reaches the benchmark too, it has time to end its runs and remove its folders."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_WITHIN_S)
        raise
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    typer.run(main)
