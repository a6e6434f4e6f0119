"""The process that runs one program: it starts it confined, watches its limits, and leaves nothing of it behind.

    krontune -> supervisor -> first -> program -> whatever the program starts

`first` is the first process of a process-id namespace, where there is one: when it ends, the kernel kills all that is
left in there. Where there is none, orphans come back to the supervisor, which kills them one by one.

The request comes as JSON on standard input, the outcome leaves as JSON on standard output.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from . import confine, inside

POLL_S = 0.02
FOLDER_POLL_S = 0.2
KEPT_BYTES = 8192  # of the end of the output
KILL_DEADLINE_S = 10.0
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Serve one request."""
    confine.die_with_parent(signal.SIGTERM)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit(1))
    print(json.dumps(run(json.load(sys.stdin))))


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run the program of a request (see api.py) and say how it ended."""
    confine.adopt_orphans()
    missing = confine.missing()
    in_namespace = confine.new_namespaces()
    if not in_namespace:
        missing.append("namespaces (processes)")
    if missing and not request["allow_weaker"]:
        return {"missing": missing}
    output, its_output = os.pipe()
    status, its_status = os.pipe()
    its_token, token_end = os.pipe()
    reached, its_reached = os.pipe()
    token = os.urandom(16).hex().encode()
    os.write(token_end, token)
    first = os.fork()
    if first == 0:
        for end in (output, status, token_end, reached):
            os.close(end)
        _first(request, Ends(its_token, its_output, its_status, its_reached), in_namespace, missing)
    for end in (its_output, its_status, its_token, token_end, its_reached):
        os.close(end)
    watch = Watch(request, first, output)
    try:
        ended = watch.until_end(status)
    finally:
        leftover = kill_all(first)
    watch.read()
    report = os.read(status, 4096).decode()
    if report.startswith("error"):
        return {"error": report}
    returncode = int(report) if report else -int(signal.SIGKILL)
    return {
        "status": ended,
        "returncode": returncode,
        "passed": (ended, returncode, leftover) == ("exit", 0, 0) and os.read(reached, 4096) == token,
        "output": bytes(watch.tail).decode("utf-8", "replace"),
        "seconds": watch.seconds,
        "leftover": leftover,
        "missing": missing,
    }


# ------------------------------------------------------------------------------------------------- the processes inside


class Ends(NamedTuple):
    """The program's ends of the pipes to the supervisor."""

    token: int
    output: int
    status: int
    reached: int


def _first(request: dict[str, Any], ends: Ends, in_namespace: bool, missing: list[str]) -> NoReturn:
    """Start the program, reap whatever ends, and report how the program ended."""
    try:
        confine.die_with_parent(signal.SIGKILL)
        os.setsid()
        program = os.fork()
        if program == 0:
            _program(request, ends, in_namespace, missing)
        os.close(ends.output)
        while True:
            pid, ended = os.wait()
            if pid == program:
                break
        os.write(ends.status, str(os.waitstatus_to_exitcode(ended)).encode())
    finally:
        os._exit(0)


def _program(request: dict[str, Any], ends: Ends, in_namespace: bool, missing: list[str]) -> NoReturn:
    """Become the program: give everything up, then start the interpreter anew."""
    try:
        work = request["work"]
        harness = Path(inside.__file__).read_text(encoding="utf-8")
        os.chdir(work)
        for end, number in ((ends.token, 0), (ends.output, 1), (ends.output, 2), (ends.reached, inside.REPORT_FD)):
            os.dup2(end, number)
        confine.limit_resources(request["memory_bytes"], int(request["seconds"]) + 2, request["folder_bytes"])
        confine.drop_privileges()
        if confine.landlock_version():  # an old one, where weaker protection is allowed, is better than none
            confine.restrict_files(readable(), work)
        if not any(name.startswith("seccomp") for name in missing):
            confine.filter_system_calls(signals=in_namespace)
        environment = {"PATH": "/usr/bin:/bin", "HOME": work, "TMPDIR": work, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        interpreter = os.path.realpath(sys.executable)
        os.execve(interpreter, [interpreter, "-I", "-S", "-B", "-c", harness], environment)
    except BaseException as error:
        os.write(ends.status, f"error: {error}".encode())
    finally:
        os._exit(1)


def readable() -> list[str]:
    """What an interpreter with its standard library reads."""
    libraries = [
        "/usr/lib",
        "/usr/lib64",
        "/lib",
        "/lib64",
        "/usr/local/lib",
        "/usr/bin",
        "/bin",
        "/usr/share/zoneinfo",
    ]
    return [os.path.realpath(sys.base_prefix), *libraries, "/etc/ld.so.cache", "/etc/localtime"]


# --------------------------------------------------------------------------------------------------------- the watching


class Watch:
    """The limits that the kernel does not keep by itself: wall time, and the sums over all processes and files."""

    def __init__(self, request: dict[str, Any], first: int, output: int) -> None:
        self.request = request
        self.first = first
        self.output = output
        self.tail = bytearray()
        self.n_bytes = 0
        self.begin = time.monotonic()
        self.seconds = 0.0
        self._folder_due = FOLDER_POLL_S
        os.set_blocking(output, False)

    def until_end(self, status: int) -> str:
        """Wait for the program to end ("exit") or to go over a limit (its name)."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            selector.register(status, selectors.EVENT_READ)
            due = 0.0
            while True:
                ready = {key.fd for key, _ in selector.select(POLL_S)}
                self.seconds = time.monotonic() - self.begin
                if self.output in ready and not self.read():
                    selector.unregister(self.output)  # closed by the program, which may go on
                if status in ready:
                    return "exit"
                if self.n_bytes > self.request["output_bytes"]:
                    return "output"
                if self.seconds >= due:
                    due = self.seconds + POLL_S
                    if over := self.over():
                        return over

    def read(self) -> bool:
        """Take what output there is; False at its end."""
        while True:
            try:
                data = os.read(self.output, 65536)
            except BlockingIOError:
                return True
            self.n_bytes += len(data)
            self.tail = (self.tail + data)[-KEPT_BYTES:]
            if not data or self.n_bytes > self.request["output_bytes"]:
                return bool(data)

    def over(self) -> str | None:
        """The limit that is broken now, if one is."""
        if self.seconds > self.request["seconds"]:
            return "time"
        pids = [pid for pid in descendants(os.getpid()) if pid != self.first]
        if len(pids) > self.request["processes"]:
            return "processes"
        if sum(map(resident_bytes, pids)) > self.request["memory_bytes"]:
            return "memory"
        if self.seconds >= self._folder_due:
            self._folder_due = self.seconds + FOLDER_POLL_S
            if larger_than(self.request["work"], self.request["folder_bytes"], pids):
                return "files"
        return None


def descendants(root: int) -> list[int]:
    """The processes below `root`, without itself, by the parents that /proc names."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue  # it has ended since
            children.setdefault(parent, []).append(int(name))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, what it shares with others included; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def larger_than(folder: str, most: int, pids: Iterable[int] = ()) -> bool:
    """Whether a folder's files sum up to more than `most` bytes, with those removed ones that processes still hold.

    What cannot be looked into counts as more: a folder that may not be listed, or that lies so deep that it has no path
    any more, and a process that hides what it holds.
    """
    total = 0
    try:
        for size in chain(sizes_in(folder), sizes_held(folder, pids)):
            total += size
            if total > most:
                return True
    except OSError:
        return True
    return False


def sizes_in(folder: str) -> Iterator[int]:
    """What every entry below a folder takes, a page at least."""
    queue = [folder]
    while queue:
        with suppress(FileNotFoundError), os.scandir(queue.pop()) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed since, which says nothing about the others
                    yield PAGE + entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        queue.append(entry.path)


def sizes_held(folder: str, pids: Iterable[int]) -> Iterator[int]:
    """What every file takes that has no name any more, but that a process has open or mapped."""
    seen = set()
    for pid in pids:
        try:
            holders = [f"fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")] + removed_mappings(folder, pid)
        except PermissionError:
            if resident_bytes(pid):
                raise
            continue  # it is ending, and nobody may look into what ends
        except (FileNotFoundError, ProcessLookupError):
            continue
        for holder in holders:
            with suppress(FileNotFoundError, ProcessLookupError):
                file = os.stat(f"/proc/{pid}/{holder}")
                if stat.S_ISREG(file.st_mode) and not file.st_nlink and (file.st_dev, file.st_ino) not in seen:
                    seen.add((file.st_dev, file.st_ino))
                    yield PAGE + file.st_blocks * 512


def removed_mappings(folder: str, pid: int) -> list[str]:
    """The mappings of files that have been removed from the folder, as names in /proc/PID."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        fields = [line.rstrip("\n").split(maxsplit=5) for line in lines]
    removed = (f for f in fields if f[-1].startswith(f"{folder}/") and f[-1].endswith(" (deleted)"))
    return ["map_files/{:x}-{:x}".format(*(int(end, 16) for end in f[0].split("-"))) for f in removed]


def kill_all(first: int) -> int:
    """Kill `first` and every process below this one, and wait for them; the number that could not be killed."""
    give_up = time.monotonic() + KILL_DEADLINE_S
    targets = [first]
    while True:
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return 0
        targets = descendants(os.getpid())
        if time.monotonic() > give_up:
            return len(targets)
        time.sleep(0.001)
