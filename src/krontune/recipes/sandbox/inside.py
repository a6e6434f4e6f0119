"""What the confined interpreter runs: the answer, and after its last line the report that it was reached.

The supervisor hands this file's text to the interpreter, which may not read it here. The report is a token that comes
over standard input and leaves over a descriptor of its own, so that an answer passes neither by what it prints nor by
ending early, and fails by neither. This is no wall: the answer runs in the same process, and one that sets out to find
the token there finds it.
"""

import os
import sys
import types

REPORT_FD = 100  # below confine's limit on open files, above what an answer gets
ANSWER = "program.py"


def main() -> None:
    """Run the answer as the main module."""
    pid, token = os.getpid(), os.read(0, 64)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(REPORT_FD, False)
    sys.argv, sys.excepthook = [ANSWER], show
    with open(ANSWER, encoding="utf-8", newline="") as file:
        source = file.read()
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(source, "<answer>", "exec"), module.__dict__)
    if os.getpid() == pid:  # not in a child that went on with the answer
        os.write(REPORT_FD, token)


def show(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Print an error of the answer without the lines of this file."""
    while trace and trace.tb_frame.f_code.co_filename != "<answer>":
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


if __name__ == "__main__":
    main()
