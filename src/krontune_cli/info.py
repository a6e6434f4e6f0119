"""`krontune info`: what an adapter is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krontune_cli.sources import JsonOption
from krontune_cli.tables import make_table
from krontune_cli.terminal import console, one_line_errors, print_json, quiet_libraries

if TYPE_CHECKING:
    from rich.table import Table


def command(
    path: Annotated[Path, typer.Argument(help="An adapter's folder, or a LyCORIS file.")],
    base: Annotated[str | None, typer.Option(help="The base model of a LyCORIS file.")] = None,
    each: Annotated[bool, typer.Option("--modules", help="One row for each module, in place of each kind.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an adapter is: method, base, ranks, shapes, size, norms of its updates, condition numbers, versions."""
    quiet_libraries(progress=False)
    with one_line_errors():
        from krontune.convert import info

        found = info(path, base)
        if as_json:
            print_json(found)
        else:
            _show(found, each)


def _show(found: dict[str, Any], each: bool) -> None:
    out = console()
    out.print(_each_module(found) if each else _modules(found))
    out.print(_factors(found))
    for name, fact in _facts(found).items():
        if fact:
            out.print(f"{name:16} {fact}", soft_wrap=True)


def _modules(found: dict[str, Any]) -> Table:
    """One row a kind of module."""
    from krontune.report.words import by_kind, layers_text, range_text, short_names

    groups = by_kind(found["modules"], lambda module: module["name"])
    names, lsr = short_names(groups), found["method"] == "lsr"
    rows = [
        [
            names[kind],
            layers_text([m["name"] for m in group]),
            _sizes(group[0]["shape"]),
            range_text([m["r"] for m in group]),
            *([range_text([m["separation_rank"] for m in group])] if lsr else []),
            f"{sum(m['n_params'] for m in group):,}",
            f"{min(m['norm'] for m in group):.2g}-{max(m['norm'] for m in group):.2g}",
            *([f"{max(m['condition'] or 1 for m in group):.1f}"] if lsr else []),
        ]
        for kind, group in groups.items()
    ]
    header = ["module", "layers", "weight", "r", *(["s"] if lsr else []), "parameters", "norm of dW"]
    return make_table([*header, *(["condition"] if lsr else [])], rows, f"{found['method']} adapter", text_columns=3)


def _each_module(found: dict[str, Any]) -> Table:
    """One row a module; its weight's shape is in the next table."""
    lsr = found["method"] == "lsr"
    rows = [
        [m["name"], str(m["r"]), f"{m['norm']:.3g}", *([f"{m['condition'] or 1:.2f}"] if lsr else [])]
        for m in found["modules"]
    ]
    header = ["module", "r", "norm of dW", *(["condition"] if lsr else [])]
    return make_table(header, rows, f"{found['method']} adapter")


def _factors(found: dict[str, Any]) -> Table:
    """One row a choice of factors."""
    sides = {(_sizes(m["shape"]), *(_product(f) for f in m["factors"].values())) for m in found["modules"]}
    one_product = found["method"] in ("soka", "lokr")
    rows = [[weight, f"{a} (x) {b}" if one_product else f"A {a}, B {b}"] for weight, a, b in sorted(sides)]
    return make_table(["weight", "factors"], rows, text_columns=2)


def _product(shapes: list[list[int]]) -> str:
    return " (x) ".join(map(_sizes, shapes))


def _sizes(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _facts(found: dict[str, Any]) -> dict[str, str]:
    from krontune.report.tables import human_bytes

    fingerprint = found["base_fingerprint"]
    storage = f", stored as {', '.join(found['base_storage'])}" if fingerprint else ""
    version = found["format_version"]
    return {
        "base": f"{found['base']}{storage}",
        "fingerprint": f"{fingerprint}, of the adapted weights of the base" if fingerprint else "",
        "task": found["task_type"] or "not said",
        "parameters": f"{found['n_params']:,} in {found['n_modules']} modules",
        "besides": f"{found['n_others']} tensors saved whole" if found["n_others"] else "",
        "file": f"{human_bytes(found['n_bytes'])}, {', '.join(found['dtypes'])}",
        "norm of dW": f"{found['norm']:.4g} in all",
        "settings": ", ".join(f"{name}={value}" for name, value in found["settings"].items()),
        "versions": f"peft {found['peft_version']}"
        + (f", format {version}; krontune's is not stored" if version else ""),
    }
