"""What a process can give up for good on Linux: Landlock, seccomp, capabilities, resource limits, namespaces.

Called through the C library, because Python has no binding for any of it. Nothing here can be taken back by the process
or by what it starts.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable, Sequence

PR_SET_PDEATHSIG, PR_GET_SECCOMP, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 21, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # on every architecture
EPERM, ENOSYS = 1, 38

# Landlock's rights to files by the version of its interface that brought them.
FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
LANDLOCK_NEEDED = 3  # before it, whoever may read a file may also empty it: open(path, O_RDONLY | O_TRUNC)
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a folder
OF_A_FILE = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # the rights that make sense for what is no folder
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# System calls refused with EPERM: the network and its back doors; handing open files on; what Landlock does not cover
# (modes, owners, times, attributes of files anywhere); memory that no limit counts; other processes; and parts of the
# kernel with a history.
DENIED = {
    "x86_64": {
        "socket": 41, "sendmsg": 46, "sendmmsg": 307, "io_uring_setup": 425,
        "truncate": 76, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132, "utimes": 235,
        "fchownat": 260, "futimesat": 261, "fchmodat": 268, "utimensat": 280, "fchmodat2": 452, "setxattr": 188,
        "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
        "setxattrat": 463, "removexattrat": 466,
        "shmget": 29, "semget": 64, "msgget": 68, "memfd_create": 319, "memfd_secret": 447,
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438,
        "unshare": 272, "setns": 308, "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321,
        "perf_event_open": 298, "userfaultfd": 323,
    },
    "aarch64": {
        "socket": 198, "sendmsg": 211, "sendmmsg": 269, "io_uring_setup": 425,
        "truncate": 45, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55, "utimensat": 88, "fchmodat2": 452,
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
        "setxattrat": 463, "removexattrat": 466,
        "shmget": 194, "semget": 190, "msgget": 186, "memfd_create": 279, "memfd_secret": 447,
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_getfd": 438,
        "unshare": 97, "setns": 268, "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280,
        "perf_event_open": 241, "userfaultfd": 282,
    },
}  # fmt: skip
# Refused too where no namespace keeps the program's signals from other processes.
SIGNALS = {
    "x86_64": {
        "kill": 62,
        "tkill": 200,
        "tgkill": 234,
        "rt_sigqueueinfo": 129,
        "rt_tgsigqueueinfo": 297,
        "pidfd_send_signal": 424,
    },
    "aarch64": {
        "kill": 129,
        "tkill": 130,
        "tgkill": 131,
        "rt_sigqueueinfo": 138,
        "rt_tgsigqueueinfo": 240,
        "pidfd": 424,
    },
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
# A pair of stream sockets is a pipe in both directions; one of datagrams would send to any socket that has a path.
SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
SOCK_STREAM, SOCKET_TYPE = 1, 0xF  # the rest of the argument is flags
X32 = 0x40000000  # x86_64's second set of system call numbers

_libc = ctypes.CDLL(None, use_errno=True)


class ConfineError(OSError):
    """The kernel refused a protection that it was asked for."""


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise ConfineError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(what: str, option: int, *values: int) -> int:
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return _check(_libc.prctl(option, *arguments), what)


def die_with_parent(signum: int) -> None:
    """Get `signum` when the process that started this one ends."""
    _prctl("PR_SET_PDEATHSIG", PR_SET_PDEATHSIG, signum)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none can slip away."""
    _prctl("PR_SET_CHILD_SUBREAPER", PR_SET_CHILD_SUBREAPER, 1)


def landlock_version() -> int:
    """The version of the kernel's Landlock; 0 where it has none."""
    return max(0, int(_libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)))


def missing() -> list[str]:
    """The protections that this kernel or container does not offer, apart from namespaces."""
    found = []
    if (version := landlock_version()) < LANDLOCK_NEEDED:
        has = f"has version {version}, which lets files be emptied" if version else "has none"
        found.append(f"Landlock version {LANDLOCK_NEEDED} (Linux 6.2; files; this kernel {has})")
    if _libc.prctl(PR_GET_SECCOMP, 0, 0, 0, 0) < 0 or platform.machine() not in DENIED:
        found.append("seccomp filters on x86_64 or aarch64 (network)")
    return found


def new_namespaces() -> bool:
    """Give the next child process ids, a network and IPC of its own; False where that is not allowed.

    A process-id namespace dies whole with its first process, whatever was started in it.
    """
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC
    return _libc.unshare(flags) == 0 or _libc.unshare(flags | CLONE_NEWUSER) == 0


def limit_resources(memory_bytes: int, cpu_seconds: int, file_bytes: int) -> None:
    """Set hard limits for this process and its children, each counted for itself."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 128,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for which, most in limits.items():
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))


def drop_privileges() -> None:
    """Give up every capability, which is what makes root more than a user, and the way back to them."""
    _prctl("PR_SET_NO_NEW_PRIVS", PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(64):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused for an ordinary user, who has none
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    _check(_libc.capset(header, ctypes.create_string_buffer(struct.pack("=6I", *[0] * 6))), "capset")


def restrict_files(readable: Iterable[str], writable: str) -> None:
    """Allow reading and running what lies in `readable`, everything in the folder `writable`, and no other file.

    Where the kernel's Landlock knows them: no TCP, and no signal or abstract socket to a process outside either.
    """
    version = landlock_version()
    rights = sum(bits for since, bits in FILE_RIGHTS.items() if since <= version)
    attributes = struct.pack("=QQQ", rights, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _libc.syscall(
        LANDLOCK_CREATE_RULESET, ctypes.create_string_buffer(attributes), ctypes.c_size_t(len(attributes)), 0
    )
    _check(ruleset, "landlock_create_ruleset")
    for path in readable:
        if os.path.exists(path):
            _allow(ruleset, path, READ & rights)
    for path in DEVICES:
        _allow(ruleset, path, (READ | 1 << 1) & rights)
    _allow(ruleset, writable, rights & ~(1 << 6 | 1 << 11 | 1 << 15))  # but no device files
    _check(_libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    if not os.path.isdir(path):
        rights &= OF_A_FILE
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, handle))
    _check(_libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
    os.close(handle)


def filter_system_calls(signals: bool) -> None:
    """Refuse the system calls in `DENIED`, and sending signals too unless `signals` is set."""
    machine = platform.machine()
    refused = [*DENIED[machine].values(), *(() if signals else SIGNALS[machine].values())]
    program = _filter(AUDIT_ARCH[machine], refused, CLONE[machine], SOCKETPAIR[machine])
    code = ctypes.create_string_buffer(b"".join(program))
    # struct sock_fprog: a count, padding, a pointer
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    _prctl("PR_SET_SECCOMP", PR_SET_SECCOMP, 2, ctypes.addressof(fprog))


def _filter(arch: int, refused: Sequence[int], clone: int, socketpair: int) -> list[bytes]:
    """The filter as classic BPF over struct seccomp_data: nr at 0, arch at 4, the first arguments at 16 and 24."""
    load, equal, at_least, any_bit, bit_and, done = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, kill, eperm, enosys = 0x7FFF0000, 0x80000000, 0x00050000 | EPERM, 0x00050000 | ENOSYS

    def step(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, jump_true, jump_false, k)

    program = [step(load, 4), step(equal, arch, 1, 0), step(done, kill), step(load, 0)]
    program += [step(at_least, X32, 0, 1), step(done, eperm)]
    for number in refused:
        program += [step(equal, number, 0, 1), step(done, eperm)]
    program += [step(equal, CLONE3, 0, 1), step(done, enosys)]  # its flags lie in memory; libc falls back to clone
    program += [step(equal, socketpair, 0, 5), step(load, 24), step(bit_and, SOCKET_TYPE)]
    program += [step(equal, SOCK_STREAM, 1, 0), step(done, eperm), step(done, allow)]
    program += [step(equal, clone, 0, 3), step(load, 16), step(any_bit, CLONE_NEWUSER, 0, 1), step(done, eperm)]
    return [*program, step(done, allow)]
