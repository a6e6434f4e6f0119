"""`python -m benchmarks run | table | plot | calibrate`; each has --help."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; torch is imported by those commands alone that measure."""
    options = _parser().parse_args(argv)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    _environment(options.threads)
    from benchmarks.cases import Setting
    from benchmarks.run import run
    from benchmarks.tables import all_tables

    setting = Setting(
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        repetitions=options.repetitions,
        seed=options.seed,
        seconds=0.0 if options.quick else options.seconds,
        quick=options.quick,
    )
    print(all_tables(run(setting, options.case, options.out)))


def _table(options: argparse.Namespace) -> None:
    from benchmarks.results import Results
    from benchmarks.tables import all_tables, target_table

    results = Results.load(options.results)
    print(target_table(results) if options.targets else all_tables(results))


def _plot(options: argparse.Namespace) -> None:
    from benchmarks.plots import draw
    from benchmarks.results import Results

    for path in draw(Results.load(options.results), options.out or options.results.parent):
        print(path)


def _calibrate(options: argparse.Namespace) -> None:
    _environment(options.threads)
    from benchmarks.calibrate import report
    from benchmarks.cases import Setting
    from benchmarks.results import Results
    from benchmarks.run import run

    if options.results is None:
        setting = Setting(options.device, options.dtype, options.threads)
        results = run(setting, ["paths/*"], options.out)
    else:
        results = Results.load(options.results)
    print(report(results))


def _environment(threads: int) -> None:
    """Pin the threads of every library, before torch is imported: some read these once."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler, which counts the memory, talks much


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="measure, write a results file and print its tables")
    run.add_argument("--quick", action="store_true", help="a sample of the cases, under 5 minutes")
    run.add_argument("--case", action="append", default=[], metavar="GLOB", help="only these; may be repeated")
    run.add_argument("--out", type=Path, default=Path("results.json"), help="cases already in it are replaced")
    run.add_argument("--repetitions", type=int, default=20)
    run.add_argument("--seconds", type=float, default=20.0, help="more rounds for so long a case; --quick adds none")
    run.add_argument("--seed", type=int, default=0)
    run.set_defaults(command=_run)

    table = commands.add_parser("table", help="print the tables of a results file, as Markdown")
    table.add_argument("results", type=Path)
    table.add_argument("--targets", action="store_true", help="only the figures to reach")
    table.set_defaults(command=_table)

    plot = commands.add_parser("plot", help="draw the plots of a results file")
    plot.add_argument("results", type=Path)
    plot.add_argument("--out", type=Path, help="folder; the file's own by default")
    plot.set_defaults(command=_plot)

    calibrate = commands.add_parser("calibrate", help="fit the cost model's constants to this machine, and print them")
    calibrate.add_argument("results", type=Path, nargs="?", help="fit to these results in place of a new run")
    calibrate.add_argument("--out", type=Path, default=Path("calibration.json"))
    calibrate.set_defaults(command=_calibrate)

    for command in (run, calibrate):
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
        command.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
