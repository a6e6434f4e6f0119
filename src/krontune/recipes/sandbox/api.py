"""What the project calls to run a program that a model wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from krontune.errors import KrontuneError

# The supervisor is started without krontune, which would import torch: by file, as a package called `sandbox`.
_START = "import sys; sys.path.append(sys.argv[1]); from sandbox.supervisor import main; main()"
_GRACE_S = 30.0  # beyond the program's own time: the interpreter's start and the killing


class SandboxError(KrontuneError):
    """A program was not run, because it could not be confined or its processes could not be ended."""


@dataclass(frozen=True)
class Limits:
    """What one program may use, its children included."""

    seconds: float = 10.0  # wall time
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20  # standard output and error together
    folder_bytes: int = 64 << 20
    processes: int = 32


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    `status` is "exit" where it ended by itself, else the limit that it broke: "time", "memory", "output", "files" or
    "processes". `returncode` is negative for a signal. `output` is the last 8 KiB of standard output and error.
    """

    status: str
    returncode: int
    output: str
    seconds: float
    passed: bool


def run_program(source: str, limits: Limits | None = None, *, allow_weaker: bool = False) -> Outcome:
    """Run a Python program confined: no network, no file outside a temporary folder, limited, killed with its children.

    It runs in this interpreter's version with the standard library alone, unprivileged even when started by root. It
    counts as passed only if its last line was reached: a program that exits early, with whatever code or output, has
    not passed. That holds against wrong programs, not against one that is written to be judged right: tests that run in
    the program's own process cannot keep it from changing them, or from looking for what reports the end.

    Args:
        source: the program's text.
        limits: what it may use.
        allow_weaker: run it with what protection there is where Linux, or the container, does not offer all of it
            (Landlock, seccomp filters, process-id namespaces). Only inside a machine that may be harmed.

    Raises:
        SandboxError: the system cannot confine it and `allow_weaker` is not set, or its processes could not be ended.

    >>> run_program("print(6 * 7)", allow_weaker=True).output.splitlines()[0]
    '42'
    """
    if sys.platform != "linux":
        raise SandboxError("programs written by a model are run on Linux only; use a Linux container or machine.")
    work = tempfile.mkdtemp(prefix="krontune-sandbox-")
    try:
        Path(work, "program.py").write_text(source, encoding="utf-8", errors="backslashreplace", newline="")
        answer = _supervise({"work": work, "allow_weaker": allow_weaker, **asdict(limits or Limits())})
    finally:
        _remove(work)
    if answer["leftover"]:
        raise SandboxError(f"{answer['leftover']} processes of a sandboxed program could not be killed.")
    return Outcome(
        answer["status"], answer["returncode"], answer["output"].strip(), answer["seconds"], answer["passed"]
    )


def run_programs(
    sources: Sequence[str], limits: Limits | None = None, *, allow_weaker: bool = False, jobs: int | None = None
) -> list[Outcome]:
    """`run_program` for many, `jobs` at a time (the number of cores if None), in their order."""
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda source: run_program(source, limits, allow_weaker=allow_weaker), sources))


def missing_protection() -> list[str]:
    """What this system lacks for `run_program` without `allow_weaker`; empty where nothing is missing."""
    try:
        run_program("pass")
    except SandboxError as error:
        return [str(error)]
    return []


def _supervise(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-I", "-S", "-B", "-c", _START, str(Path(__file__).resolve().parent.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            output, errors = process.communicate(json.dumps(request).encode(), timeout=request["seconds"] + _GRACE_S)
        except BaseException as error:
            process.terminate()  # on which it kills what it has started
            if isinstance(error, subprocess.TimeoutExpired):
                raise SandboxError("the supervisor of a sandboxed program does not answer.") from None
            raise
    if process.returncode != 0:
        raise SandboxError(f"the supervisor of a sandboxed program failed: {errors.decode(errors='replace').strip()}")
    answer: dict[str, Any] = json.loads(output)
    if "error" in answer:
        raise SandboxError(f"a program could not be confined: {answer['error']}")
    if "status" not in answer:
        raise SandboxError(
            f"this system does not offer {', '.join(answer['missing'])}, which it takes to confine a program that a "
            "model wrote. Run it on a Linux that does, or allow weaker protection if this machine may be harmed."
        )
    return answer


def _remove(folder: str) -> None:
    """Remove a folder however deep it is and whatever modes it holds; shutil's version recurses."""
    for command in (["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
