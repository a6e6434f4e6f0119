"""`krontune spectrum`: the KPSVD spectra of a model's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krontune_cli.sources import (
    ExcludeOption,
    ForceOption,
    JsonOption,
    LayersOption,
    ModelArgument,
    Opened,
    TargetOption,
    matching,
    open_model,
)
from krontune_cli.tables import bar, make_table
from krontune_cli.terminal import console, one_line_errors, print_json, quiet_libraries

if TYPE_CHECKING:
    from krontune.plan import Spectrum

#: What is written anew; spectra.jsonl beside them is a cache, and is only added to.
REPORTS = ("spectrum.json", "report.html")


def command(
    model: ModelArgument,
    target_modules: TargetOption = None,
    exclude_modules: ExcludeOption = None,
    layers: LayersOption = None,
    shapes: Annotated[
        str, typer.Option(help="Factor shapes: auto, square, a number p, or MxN. Ranks are chosen for the first.")
    ] = "auto,1,2,8,square",
    terms: Annotated[int, typer.Option("--terms", min=1, help="Terms to compute of each spectrum.")] = 32,
    rule: Annotated[str, typer.Option(help="energy, elbow, spectrum (the smaller of both) or budget.")] = "spectrum",
    theta: Annotated[float, typer.Option(help="The energy threshold.")] = 0.9,
    budget: Annotated[str | None, typer.Option(metavar="N", help="Parameters in all, for the rule budget.")] = None,
    channel_sort: Annotated[
        str | None, typer.Option(metavar="HOW", help="Also with sorted channels: svd or norm.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: spectrum-NAME.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute Kronecker spectra weight by weight: energy, elbow, noise edge, chosen rank.

    Writes spectrum.json, report.html and spectra.jsonl into DIR. The last is a cache: an interrupted run goes on from
    there, and other rules or thresholds cost nothing. One weight is in memory at a time.
    """
    quiet_libraries(progress=False)
    with one_line_errors():
        from krontune.plan import find_targets, parse_amount, parse_shapes, spectrum_report
        from krontune.plan.spectra import check_budget
        from krontune.report.files import write_json
        from krontune.report.spectrum import write_spectrum_page

        folder = out or Path("spectrum-" + re.sub(r"[^\w.-]+", "-", model).strip("-."))
        _check_output(folder, force)
        wanted = parse_shapes(shapes)
        opened = open_model(model)
        settings = matching(target_modules or "all-linear", exclude_modules, layers, None)
        targets = find_targets(opened.model, **settings).targets
        limit = (
            None if budget is None else parse_amount(budget, whole=sum(p.numel() for p in opened.model.parameters()))
        )
        spectrum_report([], rule, theta, None, limit)  # a wrong rule is said now, not after the work
        if limit is not None:
            check_budget(targets, wanted, limit)
        found = _compute(opened, targets, wanted, terms, channel_sort, folder / "spectra.jsonl")
        report = {"model": model, **spectrum_report(found, rule, theta, None, limit)}
        write_json(folder / REPORTS[0], report)
        write_spectrum_page(folder / REPORTS[1], report, model)
        if as_json:
            print_json({"output": str(folder), **report})
        else:
            _show(report, folder)


def _check_output(folder: Path, force: bool) -> None:
    from krontune.errors import ConfigError

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder.")
    there = [name for name in REPORTS if (folder / name).exists()]
    if there and not force:
        raise ConfigError(f"{folder}/{there[0]} exists. Choose another --out, or overwrite it with --force.")


def _compute(
    opened: Opened, targets: list[Any], shapes: list[Any], terms: int, channel_sort: str | None, cache: Path
) -> list[Spectrum]:
    from krontune.plan import spectrum
    from krontune.weights import open_weights

    return spectrum(
        open_weights(opened.source, opened.model),
        opened.model,
        targets,
        shapes,
        terms,
        channel_sort=channel_sort,
        cache=cache,
        progress=bar("spectra"),
    )


def _show(report: dict[str, Any], folder: Path) -> None:
    from krontune.report.spectrum import introduction, kind_table, sort_table

    header, rows, numeric = kind_table(report)
    kept = [i for i, name in enumerate(header) if name != "factors"]
    texts = sum(not numeric[i] for i in kept)
    cells = [[row[i] for i in kept] for row in rows]
    out = console()
    out.print(
        make_table([header[i].replace(" ", "\n", 1) for i in kept], cells, f"KPSVD spectra of {report['model']}", texts)
    )
    if report["channel_sort"]:
        titles, gains, _ = sort_table(report)
        out.print(make_table(titles, gains, f"Channels sorted: {report['channel_sort']}"))
    out.print(introduction(report), soft_wrap=True)
    out.print(
        f"{folder}/report.html  the pictures\n{folder}/spectrum.json  everything\n{folder}/spectra.jsonl  the cache"
    )
