"""`krontune plan`: what an adapter costs, and what a budget buys."""

from __future__ import annotations

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
    TaskOption,
    matching,
    open_model,
)
from krontune_cli.tables import bar, make_table
from krontune_cli.terminal import console, one_line_errors, print_json, quiet_libraries

if TYPE_CHECKING:
    from rich.table import Table

    from krontune.plan import Match, Plan


def command(
    model: ModelArgument,
    method: Annotated[str, typer.Option(help="lsr, soka or lora.")] = "lsr",
    budget: Annotated[
        str | None, typer.Option(metavar="N", help="Trained parameters: 990000, 990k, 0.99M, or 0.5% of the model.")
    ] = None,
    target_modules: TargetOption = None,
    exclude_modules: ExcludeOption = None,
    layers: LayersOption = None,
    task: TaskOption = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Keep this rank: r of LSR and LoRA, K of SoKA.")] = None,
    separation_rank: Annotated[int | None, typer.Option(help="Keep this number of terms of LSR, s.")] = None,
    shape: Annotated[
        str, typer.Option("--p", metavar="P", help="SoKA's factor shape: a number p, auto, square, or MxN.")
    ] = "auto",
    channel_sort: Annotated[
        str | None, typer.Option(metavar="HOW", help="Sort the channels for SoKA: svd or norm.")
    ] = None,
    train_norms: Annotated[bool, typer.Option("--train-norms", help="Train the normalisation layers too.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens a step, for the costs.")] = 2048,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Choose SoKA's ranks from shapes alone, without reading the weights.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the config here: a .json file, or a folder for it.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Plan an adapter for a budget of parameters, or see what given ranks cost.

    Prints factor shapes, ranks, exact parameter counts, bytes, multiply-adds and training memory for each kind of
    module, and writes the adapter_config.json that realises the plan. The weights are read for SoKA alone, where they
    are at hand: its terms then go where the spectra hold most.
    """
    quiet_libraries(progress=False)
    with one_line_errors():
        from krontune.errors import ConfigError
        from krontune.plan import find_targets, parse_shapes, plan
        from krontune.plan.planner import config_file

        if out is not None:
            config_file(out, force)  # a name that is taken is said now, not after the work
        opened = open_model(model, task)
        settings = matching(target_modules, exclude_modules, layers, task)
        if train_norms:
            settings["train_norms"] = True
        factor_shape, *others = parse_shapes(shape)
        if others:
            raise ConfigError(f"--p {shape} names {len(others) + 1} factor shapes, and an adapter has one. Leave one.")
        match = find_targets(opened.model, **settings)
        ranks = None
        if method == "soka" and budget is not None and rank is None and not config_only:
            ranks = _ranks_from_weights(opened, match, budget, factor_shape, channel_sort)
        made = plan(
            opened.model,
            method,
            budget,
            r=rank,
            separation_rank=separation_rank,
            factor_shape=factor_shape,
            channel_sort=channel_sort,
            tokens=tokens,
            name=model,
            ranks=ranks,
            match=match,
            **settings,
        )
        written = made.save(out, force) if out is not None else None
        if as_json:
            print_json({"model": model, "written": written and str(written), **made.to_dict()})
        else:
            _show(made, model, from_weights=ranks is not None)
            if written:
                console().print(f"wrote {written}")


def _ranks_from_weights(
    opened: Opened, match: Match, budget: str, factor_shape: Any, channel_sort: str | None
) -> list[int] | None:
    """SoKA's ranks from the spectra, where the weights are at hand."""
    from krontune.plan import parse_amount, soka_ranks
    from krontune.weights import has_weights, open_weights

    if not has_weights(opened.source):
        console(stderr=True).print(f"{opened.source.name} has no weights at hand: the ranks come from shapes alone.")
        return None
    total = parse_amount(budget, whole=sum(p.numel() for p in opened.model.parameters()))
    weights = open_weights(opened.source, opened.model)
    return soka_ranks(
        weights,
        opened.model,
        match.targets,
        total,
        factor_shape,
        channel_sort=channel_sort,
        progress=bar("spectra"),
    )


def _show(plan: Plan, model: str, from_weights: bool) -> None:
    from krontune.plan import human_count
    from krontune.report.tables import human_bytes

    kinds = plan.to_dict()["kinds"]
    lines = [f"{plan.n_params:,}" + (f", {plan.n_params / plan.budget:.1%} of the budget" if plan.budget else "")]
    lines[0] += f"; {plan.n_params / plan.base_params:.3%} of the base's {human_count(plan.base_params)}"
    facts = {"parameters": lines[0]}
    if plan.n_other:
        facts["trained besides"] = f"{plan.n_other:,} (heads, norms, biases), {plan.n_trainable:,} in all"
    halves = " and bfloat16" if plan.method == "soka" else ""
    facts["on disk"] = f"{human_bytes(plan.n_bytes)} in float32{halves}"
    facts["forward"] = (
        f"{human_count(plan.macs)} multiply-adds a token ({plan.tokens:,} tokens), "
        f"{plan.macs / plan.base_macs:.2%} of the base's linear layers"
    )
    memory = plan.training_bytes
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in memory.items())
    facts["training"] = f"{human_bytes(sum(memory.values()))} beside base and activations: {parts}"
    if plan.method == "soka":
        facts["ranks"] = "from the spectra of the weights" if from_weights else "from shapes alone"
    out = console()
    out.print(_table(kinds, f"{plan.method} on {model}"))
    out.print(_factors(kinds, plan.method == "soka"))
    for name, fact in facts.items():
        out.print(f"{name:16} {fact}", soft_wrap=True)
    for note in plan.notes:
        out.print(f"note: {note}", soft_wrap=True)


def _table(kinds: list[dict[str, Any]], title: str) -> Table:
    """One row a kind of module; its ranks may differ from layer to layer."""
    from krontune.plan import human_count
    from krontune.report.tables import human_bytes
    from krontune.report.words import layers_text, range_text, short_names

    groups: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds:
        groups.setdefault(kind["kind"], []).append(kind)
    names = short_names(groups)
    rows = [
        [
            names[name],
            layers_text([module for kind in group for module in kind["modules"]]),
            _weight(group[0]),
            range_text([kind["r"] for kind in group]),
            *([str(group[0]["separation_rank"])] if group[0]["separation_rank"] else []),
            f"{sum(kind['n_params'] for kind in group):,}",
            human_bytes(sum(kind["n_bytes"] for kind in group)),
            human_count(sum(kind["macs_per_token"] for kind in group)),
        ]
        for name, group in groups.items()
    ]
    s = ["s"] if kinds[0]["separation_rank"] else []
    header = ["module", "layers", "weight", "r", *s, "parameters", "bytes", "MACs\na token"]
    return make_table(header, rows, title, text_columns=3)


def _factors(kinds: list[dict[str, Any]], soka: bool) -> Table:
    """One row a choice of factors; the product's path may differ with the rank, and SoKA's with device and dtype."""
    from krontune.report.words import range_text

    groups: dict[tuple[str, str, str], list[int]] = {}
    for kind in kinds:
        groups.setdefault((_weight(kind), kind["factors"], kind["path"]), []).append(kind["r"])
    rows = [[weight, range_text(ranks), factors, path] for (weight, factors, path), ranks in groups.items()]
    expected = "product\n(CPU, float32)" if soka else "product"
    return make_table(["weight", "r", "factors", expected], rows, text_columns=4)


def _weight(kind: dict[str, Any]) -> str:
    return (f"{kind['experts']} x " if kind["experts"] else "") + "x".join(map(str, kind["weight"]))
