"""The sandbox against programs that mean harm. What they try stays on this machine, and is bounded in itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from krontune.recipes.sandbox import api, confine
from krontune.recipes.sandbox.api import Limits, Outcome, SandboxError, run_program, run_programs
from krontune.recipes.sandbox.supervisor import larger_than

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
QUICK = Limits(seconds=60.0, memory_bytes=256 << 20, output_bytes=1 << 16, folder_bytes=4 << 20, processes=16)
SHORT = Limits(seconds=1.0)
ROOT = Path(__file__).resolve().parents[2]


def outcome(source: str, limits: Limits = QUICK) -> Outcome:
    return run_program(source, limits)


def processes_with(mark: str) -> list[str]:
    """Command lines of the living processes whose arguments hold `mark`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if mark in line:
                found.append(line)
    return found


def settle(mark: str) -> list[str]:
    """`processes_with`, once those that have been killed have also gone."""
    until = time.monotonic() + 10
    while (left := processes_with(mark)) and time.monotonic() < until:
        time.sleep(0.02)
    return left


# -------------------------------------------------------------------------------------------------------- good programs


def test_a_program_runs_with_the_standard_library_and_its_own_folder() -> None:
    result = outcome(
        "import collections, json, math, os, subprocess, sys, tempfile, threading\n"
        "open('note.txt', 'w').write('x'); os.mkdir('d'); os.rename('note.txt', 'd/note.txt')\n"
        "with tempfile.TemporaryFile() as f: f.write(b'1')\n"
        "t = threading.Thread(target=lambda: None); t.start(); t.join()\n"
        "print(subprocess.run([sys.executable, '-c', 'print(6 * 7)'], capture_output=True, text=True).stdout)\n"
        "print(__name__)\n"
    )
    assert result.passed, result
    assert result.output.split() == ["42", "__main__"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("assert 1 == 2, 'wrong answer'", "wrong answer"),
        ("def f(:\n  pass", "SyntaxError"),
        ("x = (1,\n", "SyntaxError"),
        ("'''never closed", "SyntaxError"),
        ("raise SystemExit(0)", ""),
        ("import os; os._exit(0)", ""),
        ("import os; os._exit(255)", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ""),
        ("import ctypes; ctypes.string_at(0)", ""),
        ("def f(): f()\nf()", "RecursionError"),
        ("print('\\ud800')", "UnicodeEncodeError"),
        ("\0", ""),
    ],
)
def test_only_a_program_that_reaches_its_end_has_passed(source: str, message: str) -> None:
    result = outcome(source)
    assert result.status == "exit"
    assert not result.passed
    assert message in result.output


@pytest.mark.parametrize(
    "source",
    [
        "import io, sys; sys.stdout = io.StringIO()",
        "import sys; sys.stdout.close()",
        "import os; os.close(1)",
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): print('hidden')",
        "import os\nif os.fork() == 0: os._exit(0)\nos.wait()",
        "import unittest\nclass T(unittest.TestCase):\n  def test(self): pass\nunittest.main(exit=False)",
        "import pickle\nclass T: pass\nassert type(pickle.loads(pickle.dumps(T()))) is T",
        "# coding: latin-1\nassert len('\u00e9') == 1",
    ],
)
def test_a_program_passes_whatever_it_does_to_its_output(source: str) -> None:
    result = outcome(source)
    assert result.passed, result


@pytest.mark.parametrize(
    "source",
    [
        "import glob, os, re\nprint(*re.findall('[0-9a-f]{32}', ' '.join(open(f).read() for f in glob.glob('*'))))",
        "import os, sys; print('\\n'.join([*sys.argv, *sys.orig_argv, *os.environ.values()]))",
        "import os; os.write(100, b'done')",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import os; os.write(100, b\"done\")'])",
        "import os\nif os.fork(): os.wait(); os._exit(0)",
    ],
)
def test_a_program_does_not_pass_by_what_it_writes(source: str) -> None:
    ends_early = source if "fork" in source else source + "\nimport os, sys; sys.stdout.flush(); os._exit(0)"
    result = outcome(ends_early)
    assert (result.status, result.returncode, result.passed) == ("exit", 0, False)


def test_an_error_is_shown_with_the_answer_s_own_lines() -> None:
    result = outcome("def f():\n    return 1 / 0\n\nf()\n")
    lines = result.output.splitlines()
    assert [line.strip() for line in lines if "File" in line] == [
        'File "<answer>", line 4, in <module>',
        'File "<answer>", line 2, in f',
    ]
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert outcome("x = (1,\n").output.splitlines()[0].strip() == 'File "<answer>", line 1'


def test_many_programs_come_back_in_their_order() -> None:
    results = run_programs([f"print({i})" for i in range(6)], QUICK, jobs=3)
    assert [result.output for result in results] == [str(i) for i in range(6)]


# ----------------------------------------------------------------------------------------------------- hostile programs


def test_an_infinite_loop_is_ended() -> None:
    result = outcome("while True: pass", SHORT)
    assert (result.status, result.passed) == ("time", False)
    assert 1.0 <= result.seconds < 4.0


def test_sleeping_and_ignoring_signals_is_ended() -> None:
    source = "import signal as s, time\nfor i in range(1, 32):\n  try: s.signal(i, s.SIG_IGN)\n  except OSError: pass\n"
    assert outcome(source + "time.sleep(100)", SHORT).status == "time"


def test_endless_output_is_ended_and_only_its_end_is_kept() -> None:
    result = outcome("while True: print('x' * 1000)")
    assert result.status == "output"
    assert len(result.output) <= 8192


def test_one_line_without_end_is_ended() -> None:
    assert outcome("import sys\nwhile True: sys.stderr.write('y' * 65536)").status == "output"


def test_a_memory_hog_gets_no_more_than_its_limit() -> None:
    result = outcome("keep = []\nfor i in range(10_000):\n  keep.append(bytearray(1 << 20)); n = i\n")
    assert not result.passed
    assert "MemoryError" in result.output


def test_children_share_one_memory_limit() -> None:
    source = (
        "import os, time\n"
        "for _ in range(6):\n  if os.fork() == 0:\n    keep = bytearray(100 << 20); time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    assert outcome(source).status == "memory"


@pytest.mark.parametrize(
    "attempt",
    [
        "open({outside!r} + '/new', 'w')",
        "open({outside!r} + '/there', 'a')",
        "os.truncate({outside!r} + '/there', 0)",
        "os.remove({outside!r} + '/there')",
        "os.rename({outside!r} + '/there', 'here')",
        "os.link({outside!r} + '/there', 'here')",
        "os.symlink({outside!r} + '/there', 'link'); open('link', 'w')",
        "os.chmod({outside!r} + '/there', 0o777)",
        "os.utime({outside!r} + '/there', (0, 0))",
        "os.chown({outside!r} + '/there', 1, 1)",
        "os.mkdir({outside!r} + '/folder')",
        "open({outside!r} + '/there').read()",
        "os.listdir({outside!r})",
        "open('/dev/shm/krontune-sandbox-test', 'w')",
        "open('/proc/self/environ').read()",
        "os.mknod('device', 0o600 | 0o060000, 0)",
        "os.chroot('.')",
        "os.unshare(0x10000000)" if sys.version_info >= (3, 12) else "ctypes.CDLL(None).unshare(0x10000000) and 1/0",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "os.setuid(12345)",
    ],
)
def test_nothing_outside_the_folder_can_be_touched(tmp_path: Path, attempt: str) -> None:
    (tmp_path / "there").write_text("untouched")
    before = (tmp_path / "there").stat()
    result = outcome("import ctypes, os, resource\n" + attempt.format(outside=str(tmp_path)))
    assert not result.passed
    assert "Error" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    after = (tmp_path / "there").stat()
    assert (tmp_path / "there").read_text() == "untouched"
    assert (before.st_mode, before.st_uid, before.st_mtime_ns) == (after.st_mode, after.st_uid, after.st_mtime_ns)
    assert not Path("/dev/shm/krontune-sandbox-test").exists()


@pytest.mark.parametrize(
    "source",
    [
        "f = open('big', 'wb')\nwhile True: f.write(b'x' * (1 << 20))",
        "i = 0\nwhile True:\n  open(f'{i}', 'wb').write(b'x' * 100_000); i += 1",
        "i = 0\nwhile True:\n  open(f'{i}', 'wb'); i += 1",
        "import os\nwhile True:\n  os.mkdir('d'); os.chdir('d')",
    ],
)
def test_a_full_folder_ends_the_program_and_is_removed(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = outcome(source)
    assert not result.passed
    assert result.status == "files" or "File too large" in result.output
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import mmap, os, time
held = []
for i in range(30):
    with open('file', 'wb+') as file:
        file.write(b'x' * (1 << 20))
        file.flush()
        held.append({hold})
    os.unlink('file')
{then}
time.sleep(60)
"""


@pytest.mark.parametrize("hold", ["os.dup(file.fileno())", "mmap.mmap(file.fileno(), 4096)"])
@pytest.mark.parametrize("then", ["", "if os.fork(): held.clear(); os.closerange(3, 64)"])
def test_files_without_a_name_count_while_they_are_held(hold: str, then: str) -> None:
    result = outcome(HOLDER.format(hold=hold, then=then))
    assert (result.status, result.passed) == ("files", False)
    assert result.seconds < 30


def test_files_that_are_gone_for_good_do_not_count() -> None:
    assert outcome(HOLDER.format(hold="None", then="time.sleep(0.5); raise SystemExit")).status == "exit"


def test_a_folder_that_cannot_be_listed_is_removed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert outcome("import os; os.makedirs('a/b'); os.mkdir('a/c', 0)").passed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('127.0.0.1', {port}), timeout=2)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket().bind(('127.0.0.1', 0))",
    ],
)
def test_no_network_not_even_to_this_machine(attempt: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        result = outcome("import socket\n" + attempt.format(port=server.getsockname()[1]))
        assert not result.passed
        assert "PermissionError" in result.output
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("kind", ["SOCK_DGRAM", "SOCK_SEQPACKET", "SOCK_DGRAM | socket.SOCK_NONBLOCK"])
def test_no_socket_of_this_machine_is_reached_through_a_pair(kind: str) -> None:
    """Landlock does not keep a datagram from a socket that has a path."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        path = f"{folder}/listener"  # pytest's own folders are too long for a socket's path
        listener.bind(path)
        os.chmod(folder, 0o755)
        os.chmod(path, 0o777)
        listener.setblocking(False)
        source = f"import socket\none, _ = socket.socketpair(socket.AF_UNIX, socket.{kind})\none.sendto(b'x', {path!r})"
        result = outcome(source)
        assert not result.passed
        assert "PermissionError" in result.output
        with pytest.raises(BlockingIOError):
            listener.recv(1)


def test_a_pair_of_stream_sockets_works_and_hands_no_file_on() -> None:
    source = (
        "import asyncio, os, socket\none, other = socket.socketpair()\n"
        "one.sendall(b'ping'); print(other.recv(4)); asyncio.run(asyncio.sleep(0))\n"
        "try: socket.send_fds(one, [b'x'], [0])\nexcept PermissionError: print('refused')\n"
    )
    result = outcome(source)
    assert result.passed, result
    assert result.output.splitlines() == ["b'ping'", "refused"]


FORKER = """
import os, subprocess, sys, time
for _ in range(64):
    if os.fork() == 0:
        os.setsid()
        os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(300)', {mark!r}])
{then}
"""


@pytest.mark.parametrize("then", ["time.sleep(0.3)", "os._exit(0)", "time.sleep(300)", "os.kill(os.getppid(), 9)"])
def test_a_forkers_64_children_are_all_gone_afterwards(then: str) -> None:
    mark = f"forker-{os.getpid()}-{time.monotonic_ns()}"
    limits = Limits(seconds=2.0, memory_bytes=2 << 30, processes=128)
    result = outcome(FORKER.format(mark=mark, then=then), limits)
    assert result.status in ("exit", "time")
    assert settle(mark) == []


def test_too_many_children_end_the_program() -> None:
    mark = f"many-{os.getpid()}"
    assert outcome(FORKER.format(mark=mark, then="time.sleep(300)")).status == "processes"
    assert settle(mark) == []


def test_a_process_that_flees_by_forking_again_and_again_is_caught() -> None:
    source = "import os, time\nfor _ in range(20_000):\n  if os.fork(): os._exit(0)\n"
    assert not outcome(source, SHORT).passed


def test_processes_outside_get_no_signal() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        attempt = f"import os, signal\nos.kill({bystander.pid}, signal.SIGKILL)\n"
        assert not outcome(attempt).passed
        assert not outcome(f"import os, signal\nos.kill({os.getpid()}, signal.SIGTERM)\n").passed
        assert bystander.poll() is None
        bystander.kill()


def request(source: str, folder: Path, allow_weaker: bool = False) -> dict[str, Any]:
    """What the supervisor is asked on its standard input."""
    (folder / "program.py").write_text(source)
    limits = Limits(seconds=2.0, memory_bytes=2 << 30, processes=128)
    return {"work": str(folder), "allow_weaker": allow_weaker, **asdict(limits)}


def plain_python(code: str) -> list[str]:
    """The command that runs code with the sandbox importable, and without krontune, which takes seconds to import."""
    start = f"import sys; sys.path.append({str(ROOT / 'src/krontune/recipes')!r})\n"
    return [sys.executable, "-I", "-S", "-c", start + code]


def test_nothing_is_left_when_the_caller_is_killed(tmp_path: Path) -> None:
    mark = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    wanted = {**request(FORKER.format(mark=mark, then="time.sleep(300)"), tmp_path), "seconds": 60}
    supervisor = plain_python("from sandbox.supervisor import main; main()")
    code = f"import subprocess\nsubprocess.run({supervisor!r}, input={json.dumps(wanted)!r}.encode())"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as caller:
        until = time.monotonic() + 60
        while len(processes_with(mark)) < 64 and time.monotonic() < until:
            time.sleep(0.02)
        assert len(processes_with(mark)) >= 64
        caller.send_signal(signal.SIGKILL)
    assert settle(mark) == []


# ------------------------------------------------------------------------------------------------ where less is allowed


def run_where_nothing_may_unshare(wanted: dict[str, Any]) -> dict[str, Any]:
    """The supervisor's answer under a filter of our own, as in a container that allows no namespaces."""
    code = (
        "import json; from sandbox import confine, supervisor\n"
        "confine.drop_privileges(); confine.filter_system_calls(signals=True)\n"
        f"print(json.dumps(supervisor.run(json.loads({json.dumps(wanted)!r}))))"
    )
    output = subprocess.run(plain_python(code), capture_output=True, check=True, timeout=120).stdout
    answer: dict[str, Any] = json.loads(output)
    return answer


def test_it_refuses_where_protection_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = run_where_nothing_may_unshare(request("open('ran', 'w')", tmp_path))
    assert answer == {"missing": ["namespaces (processes)"]}
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr(api, "_START", f"print({json.dumps(answer)!r})")
    with pytest.raises(SandboxError, match="does not offer namespaces"):
        run_program("pass")


@pytest.mark.parametrize("then", ["os._exit(0)", "time.sleep(300)"])
def test_weaker_protection_has_to_be_allowed_and_still_leaves_no_child(tmp_path: Path, then: str) -> None:
    mark = f"weaker-{os.getpid()}-{time.monotonic_ns()}"
    answer = run_where_nothing_may_unshare(request(FORKER.format(mark=mark, then=then), tmp_path, allow_weaker=True))
    assert answer["leftover"] == 0
    assert settle(mark) == []


def test_weaker_protection_keeps_signals_in_as_well(tmp_path: Path) -> None:
    source = "import os\ntry: os.kill(os.getppid(), 9)\nexcept PermissionError: print('refused')"
    assert run_where_nothing_may_unshare(request(source, tmp_path, allow_weaker=True))["output"] == "refused\n"


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="Linux"):
        run_program("pass")


def test_the_filter_knows_this_machine() -> None:
    assert confine.missing() == []


@pytest.mark.parametrize(("version", "reason"), [(0, "this kernel has none"), (2, "version 2, which lets files be em")])
def test_landlock_that_does_not_keep_files_from_being_emptied_is_not_enough(
    version: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confine, "landlock_version", lambda: version)
    (found,) = confine.missing()
    assert "Landlock version 3 (Linux 6.2;" in found and reason in found


def test_files_are_restricted_as_far_as_an_older_landlock_can(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    wanted = request(f"open({str(tmp_path / 'new')!r}, 'w')", tmp_path / "work", allow_weaker=True)
    code = (
        "import json; from sandbox import confine, supervisor\n"
        "confine.landlock_version = lambda: 1\n"
        f"print(json.dumps(supervisor.run(json.loads({json.dumps(wanted)!r}))))"
    )
    answer = json.loads(subprocess.run(plain_python(code), capture_output=True, check=True, timeout=120).stdout)
    assert answer["missing"] and "PermissionError" in answer["output"]
    assert not (tmp_path / "new").exists()


def test_folder_size_counts_many_small_files(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / str(i)).touch()
    assert larger_than(str(tmp_path), 9 * 4096)
    assert not larger_than(str(tmp_path), 11 * 4096)


@pytest.mark.parametrize("mode", [0o300, 0o600])
def test_a_folder_that_cannot_be_looked_into_counts_as_full(tmp_path: Path, mode: int) -> None:
    """Without the capabilities that let root look into everything."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").touch()
    (tmp_path / "d").chmod(mode)
    code = (
        "from sandbox import confine, supervisor; confine.drop_privileges()\n"
        f"print(supervisor.larger_than({str(tmp_path)!r}, 1 << 30))"
    )
    try:
        output = subprocess.run(plain_python(code), capture_output=True, check=True, timeout=60).stdout
    finally:
        (tmp_path / "d").chmod(0o700)
    assert output == b"True\n"
