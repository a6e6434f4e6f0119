"""krontune compare: sizes, schedule, fairness, records; killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from krontune.errors import CheckpointError, ConfigError
from krontune.recipes.compare.grid import Grid, resolve_methods, run_spec, sizes
from krontune.recipes.compare.methods import Method, adapt, norm_parameters, parameter_groups, with_knob
from krontune.recipes.compare.schedule import due
from krontune.recipes.compare.training import load_problem, run
from krontune.recipes.compare.tuning import best_rate, next_rate
from krontune.recipes.compare.workers import compare, labels
from krontune.recipes.problems import Problem
from krontune.recipes.yaml_files import dump_yaml
from krontune.report.compared import ComparedRun, Journal
from tests.recipes.tiny_bert import make_data, make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    make_model(root / "model")
    make_data(root / "data")
    return root


def raw_grid(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": str(folder / "model"),
        "tasks": ["sst2"],
        "data_dir": str(folder / "data"),
        "target_modules": r".*encoder.*\.(query|value|dense)",
        "training": {"steps": 12, "batch_size": 8, "max_length": 16, "log_every": 4},
        "tuning": {"trials": 2, "rows": 20},
        "seeds": [0, 1],
        "reference": "LoRA",
        "methods": [
            {"label": "LoRA", "method": {"name": "lora", "r": 4}, "rate": 1e-2},
            {"label": "LSR", "method": {"name": "lsr", "r": 4}, "budget": "0.6x", "rate": 1e-2},
        ],
        **changes,
    }


def make_grid(folder: Path, **changes: Any) -> Grid:
    return Grid.from_mapping(raw_grid(folder, **changes))


def reference_row(**changes: Any) -> dict[str, Any]:
    return {"label": "LoRA", "method": {"name": "lora"}, "rate": 1e-2, **changes}


def load(grid: Grid, task: str = "sst2") -> Problem:
    return load_problem(grid, task)


# ----------------------------------------------------------------------------------------------------------- the grid


def test_budgets_are_met_from_below_and_counted_on_the_real_model(folder: Path) -> None:
    rows = [
        {"label": "LoRA", "method": {"name": "lora", "r": 8}, "rate": 1e-3},
        {"label": "LoRA half", "method": "lora", "budget": "0.5x", "rate": 1e-3},
        {
            "label": "LSR",
            "method": {"name": "lsr", "r": 4},
            "budget": ["0.5x", "1x"],
            "norms": [False, True],
            "rate": 1,
        },
        {"label": "SoKA", "method": "soka", "budget": "0.75x", "rate": 1},
        {"label": "norms", "method": "ln_tuning", "rate": 1},
        {"label": "full", "method": "full", "rate": 1},
    ]
    grid = make_grid(folder, methods=rows)
    methods = {method.label: method for method in resolve_methods(grid)}
    counts = sizes(grid, list(methods.values()))
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    lora = get_peft_model(base, LoraConfig(r=8, target_modules=grid.target_modules))
    assert counts["LoRA"] == sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert methods["LoRA half"].settings["r"] == 4
    assert methods["SoKA"].settings["r"] == 6
    for label, share in (("LSR @0.5x", 0.5), ("LSR @0.5x + norms", 0.5), ("LSR @1x", 1), ("LSR @1x + norms", 1)):
        larger = with_knob(methods[label], methods[label].settings["separation_rank"] + 1)
        assert counts[label] <= share * counts["LoRA"] < sizes(grid, [larger])[label]
    assert counts["norms"] == 5 * 2 * 16
    fresh = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert counts["full"] == sum(p.numel() for name, p in fresh.named_parameters() if "classifier" not in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["sst3"]}, "Did you mean 'sst2'"),
        ({"reference": "Lora"}, "Did you mean 'LoRA'"),
        ({"seeds": [0, 1000]}, "fresh ones"),
        ({"tasks": ["sst2", "gsm8k"]}, "a grid each"),
        ({"training": {"step": 3}}, "training.step"),
        ({"per_task": {"sst2": {"stops": 3}}}, "stops"),
        ({"tuning": {"tasks": ["cola"]}}, "not among the tasks"),
        ({"tasks": ["humaneval"]}, "no rows for training"),
        ({"methods": [reference_row(budget=["100", "200"])]}, "one size"),
        ({"methods": [reference_row(budget="0.5x")]}, "no share of itself"),
        ({"methods": [reference_row(norms=[True, False])]}, "put false first"),
    ],
)
def test_mistakes_in_a_grid_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_grid(folder, **changes)


def test_a_budget_that_cannot_be_met_is_an_error(folder: Path) -> None:
    rows = [
        *raw_grid(folder)["methods"],
        {"label": "small", "method": {"name": "lsr", "r": 4}, "budget": 10, "rate": 1},
    ]
    with pytest.raises(ConfigError, match="above the budget of 10"):
        resolve_methods(make_grid(folder, methods=rows))


def test_ranks_that_the_weights_decide_have_a_size_once_they_are_trained(folder: Path) -> None:
    """So they take no budget, and are no reference for one."""
    soka = {"label": "SoKA", "method": {"name": "soka", "rank_selection": "energy", "energy_threshold": 0.5}, "rate": 1}
    grid = make_grid(folder, methods=[reference_row(), soka])
    methods = resolve_methods(grid)
    assert sizes(grid, methods).keys() == {"LoRA"}
    record = run(run_spec(grid, methods[1], "final", "sst2", 1e-3, 0), load(grid))
    assert record.error is None and record.n_trainable > 0
    with pytest.raises(ConfigError, match="leave its budget out, or use rank_selection='budget'"):
        resolve_methods(make_grid(folder, methods=[reference_row(), {**soka, "budget": "1x"}]))
    with pytest.raises(ConfigError, match="Choose another reference"):
        resolve_methods(make_grid(folder, reference="SoKA", methods=[reference_row(), soka]))


def test_shares_are_of_the_reference_as_it_is_sized(folder: Path) -> None:
    """With its own budget and its norms."""
    rows = [reference_row(budget=600, norms=True), {**reference_row(budget="1x", norms=True), "label": "LoRA 1x"}]
    grid = make_grid(folder, methods=[rows[0], {**rows[1], "method": "lsr"}])
    counts = sizes(grid, resolve_methods(grid))
    assert counts["LoRA"] <= 600
    assert counts["LoRA 1x"] <= counts["LoRA"]
    half = make_grid(folder, methods=[reference_row(norms=True), {**rows[1], "budget": "0.5x", "method": "lsr"}])
    found = sizes(half, resolve_methods(half))
    assert found["LoRA 1x"] <= 0.5 * found["LoRA"]


@pytest.mark.parametrize(
    "other",
    [
        {"label": "again", "method": {"name": "lora", "r": 8}, "budget": "1x", "rate": 1e-3},
        {"label": "LoRA + norms", "method": {"name": "lora", "r": 2}, "rate": 1e-3},
    ],
)
def test_no_two_methods_are_the_same(folder: Path, other: dict[str, Any]) -> None:
    """They would be one run with two names, or two with one."""
    grid = make_grid(folder, methods=[reference_row(method={"name": "lora", "r": 8}, norms=[False, True]), other])
    with pytest.raises(ConfigError, match="are the same method; leave one of them out"):
        resolve_methods(grid)


def test_one_method_at_two_rates_is_two_methods(folder: Path) -> None:
    rows = [{**reference_row(rate=rate, tuned=False), "label": f"LoRA {rate}"} for rate in (1e-3, 1e-2)]
    methods = resolve_methods(make_grid(folder, methods=rows, reference="LoRA 0.01"))
    assert [method.rate for method in methods] == [1e-3, 1e-2]


# ---------------------------------------------------------------------------------------------------------- the search


def search(quality: dict[float, float], trials: int) -> dict[float, float]:
    scores: dict[float, float] = {}
    while (rate := next_rate(scores, 1e-3, 10, trials)) is not None:
        scores[rate] = quality.get(rate, float("-inf"))
    return scores


def test_the_search_follows_a_method_until_it_gets_worse() -> None:
    rising = {10.0**k: float(k) for k in range(-6, 2)}
    assert max(search(rising, 5)) == 1.0
    falling = {10.0**k: float(-k) for k in range(-8, 2)}
    assert min(search(falling, 5)) == 1e-6


def test_every_method_gets_as_many_trials_even_when_all_diverge() -> None:
    assert len(search({}, 5)) == 5
    assert len(search({1e-3: 1.0}, 5)) == 5
    assert best_rate({1e-3: 0.5, 1e-2: float("-inf")}) == 1e-3


def record(grid: Grid, method: Method, phase: str, rate: float, seed: int, score: float | None) -> ComparedRun:
    spec = run_spec(grid, method, phase, "sst2", rate, seed)
    return ComparedRun(
        spec.key, phase, "sst2", method.label, method.name, {}, False, seed, rate, "score", True, score=score
    )


def test_final_runs_use_the_rate_that_won_and_wait_for_it(folder: Path) -> None:
    grid = make_grid(folder)
    method = Method("LoRA", "lora", {"r": 4}, rate=1e-2)
    records: dict[str, ComparedRun] = {}
    seen = []
    for score in (0.6, 0.8):
        (spec,) = due(grid, [method], records)
        seen.append((spec.phase, spec.rate, spec.seed))
        run_record = record(grid, method, "tune", spec.rate, spec.seed, score)
        records[run_record.key] = run_record
    assert seen == [("tune", 1e-2, 1000), ("tune", 3e-2, 1000)]
    assert [(s.phase, s.rate, s.seed) for s in due(grid, [method], records)] == [("final", 3e-2, 0), ("final", 3e-2, 1)]
    final = record(grid, method, "final", 3e-2, 0, 0.7)
    assert [s.seed for s in due(grid, [method], {**records, final.key: final})] == [1]


# ------------------------------------------------------------------------------------------------------------ one run


def test_tuning_rows_are_never_trained_or_reported_on(folder: Path) -> None:
    problem = load(make_grid(folder))
    assert (len(problem.train), len(problem.tune), len(problem.dev)) == (100, 20, 40)
    train = (folder / "data/sst2/train.jsonl").read_text().splitlines()
    encoded = [problem.encode(json.loads(line), 16) for line in train]
    assert sorted(map(repr, encoded)) == sorted(map(repr, problem.train + problem.tune))


def test_rows_are_set_aside_only_where_rates_are_tuned(folder: Path) -> None:
    untuned = [{**row, "tuned": False} for row in raw_grid(folder)["methods"]]
    problem = load(make_grid(folder, methods=untuned))
    assert (len(problem.train), len(problem.tune)) == (120, 0)


def test_other_data_is_another_run(folder: Path, tmp_path: Path) -> None:
    """Records of a data set are not taken for those of another under the same name."""
    shutil.copytree(folder / "data", tmp_path / "data")
    with (tmp_path / "data/sst2/train.jsonl").open("a") as file:
        file.write(json.dumps({"sentence": "one more", "label": 1}) + "\n")
    method = Method("LoRA", "lora", {"r": 4})
    specs = [
        run_spec(make_grid(folder, data_dir=str(data)), method, "final", "sst2", 1e-3, 0)
        for data in (folder / "data", tmp_path / "data")
    ]
    assert specs[0].key != specs[1].key


def test_the_floor_is_the_best_constant_answer(folder: Path) -> None:
    problem = load(make_grid(folder))
    labels = [item.label for item in problem.dev]
    assert problem.floor(problem.dev) == {"constant": max(labels.count(0), labels.count(1)) / len(labels)}


def test_every_method_sees_the_same_head_and_the_same_order(folder: Path) -> None:
    problem = load(make_grid(folder))
    heads = []
    for name in ("lora", "lsr", "full"):
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
        problem.prepare_head(model, seed=3)
        settings = {} if name == "full" else {"target_modules": ["query"]}
        adapted = adapt(Method(name, name, settings), model, "SEQ_CLS")
        trained = [p for n, p in adapted.named_parameters() if "classifier" in n and p.requires_grad]
        heads.append(torch.cat([p.detach().flatten() for p in trained]))
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert heads[0].abs().sum() > 0
    first = problem.batches(8, seed=3)
    again = problem.batches(8, seed=3)
    other = problem.batches(8, seed=4)
    batches = [next(first) for _ in range(30)]
    assert batches == [next(again) for _ in range(30)]
    assert batches != [next(other) for _ in range(30)]
    one_pass = [item for batch in batches[:13] for item in batch]
    assert len({id(item) for item in one_pass}) == len(one_pass) == 100


def test_the_loop_learns(folder: Path) -> None:
    grid = make_grid(folder, training={"steps": 80, "batch_size": 16, "max_length": 16, "head_rate": 1e-2})
    result = run(run_spec(grid, Method("full", "full"), "final", "sst2", 1e-2, 0), load(grid))
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < 0.5 * losses[0]
    assert result.score is not None and result.score > 0.8


def test_a_run_is_the_same_again_and_its_record_is_true(folder: Path) -> None:
    grid = make_grid(folder, training={"steps": 12, "batch_size": 8, "max_length": 16, "eval_every": 5, "log_every": 4})
    problem = load(grid)
    method = resolve_methods(grid)[1]
    spec = run_spec(grid, method, "final", "sst2", 2e-2, 0)
    first, again = run(spec, problem), run(spec, problem)
    assert first.error is None
    assert (first.score, first.history) == (again.score, again.history)
    assert [row["step"] for row in first.history if "held_out" in row] == [5, 10]
    assert [row["step"] for row in first.history if "loss" in row] == [4, 8, 12]
    assert first.n_trainable == sizes(grid, [method])["LSR"]
    assert first.adapter_bytes == 4 * first.n_trainable


def test_a_gradient_start_and_norms_run_too(folder: Path) -> None:
    grid = make_grid(folder)
    settings = {"r": 4, "init_weights": "gradient", "target_modules": grid.target_modules}
    method = Method("g", "lsr", settings, norms=True)
    result = run(run_spec(grid, method, "tune", "sst2", 1e-2, 0), load(grid))
    assert result.error is None
    assert result.n_trainable == sizes(grid, [method])["g"]


def test_what_diverges_or_fails_is_recorded_as_that(folder: Path) -> None:
    grid = make_grid(folder)
    problem = load(grid)
    lora = Method("LoRA", "lora", {"r": 4, "target_modules": ["query", "value"]})
    wild = run(run_spec(grid, lora, "tune", "sst2", 1e30, 0), problem)
    assert wild.score is None and wild.error is None
    nowhere = run(run_spec(grid, replace(lora, settings={"target_modules": ["x"]}), "tune", "sst2", 1e-3, 0), problem)
    assert nowhere.score is None and "No modules were targeted" in (nowhere.error or "")


def test_rates_can_differ_between_factors(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    method = Method("x", "lsr", {"target_modules": ["query"]}, multipliers={r"lsr_B": 4.0})
    groups = parameter_groups(adapt(method, model, "SEQ_CLS"), method, rate=0.5, head_rate=0.1)
    assert sorted(group["lr"] for group in groups) == [0.1, 0.5, 2.0]


def test_norms_beside_an_adapter_have_their_own_rate(folder: Path) -> None:
    def rates(method: Method) -> set[float]:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
        adapted = adapt(method, model, "SEQ_CLS")
        norms = {id(p) for p in norm_parameters(adapted)}
        groups = parameter_groups(adapted, method, rate=0.5, head_rate=0.1, norm_rate=0.2)
        return {group["lr"] for group in groups for parameter in group["params"] if id(parameter) in norms}

    assert rates(Method("beside", "lsr", {"target_modules": ["query"]}, norms=True)) == {0.2}
    assert rates(Method("alone", "head", norms=True)) == {0.5}


def test_a_rate_of_norms_makes_new_runs_of_the_methods_that_train_them(folder: Path) -> None:
    plain = make_grid(folder)
    training = {**plain.training.model_dump(), "norm_rate": 2e-3}
    slower = make_grid(folder, training=training)

    def key(grid: Grid, **settings: Any) -> str:
        return run_spec(grid, Method("x", "lsr", {"r": 4}, **settings), "tune", "sst2", 1e-2, 0).key

    assert key(plain) == key(slower)
    assert key(plain, norms=True) != key(slower, norms=True)


def test_scores_on_the_way_make_new_final_runs_and_no_new_trials(folder: Path) -> None:
    plain = make_grid(folder)
    curves = make_grid(folder, training={**plain.training.model_dump(), "eval_every": 5})

    def key(grid: Grid, phase: str) -> str:
        return run_spec(grid, Method("x", "lsr", {"r": 4}), phase, "sst2", 1e-2, 0).key

    assert key(plain, "tune") == key(curves, "tune")
    assert key(plain, "final") != key(curves, "final")


# -------------------------------------------------------------------------------------------------------- the records


def test_a_record_that_was_cut_short_is_passed_over_and_its_place_reused(tmp_path: Path, folder: Path) -> None:
    grid = make_grid(folder)
    journal = Journal(tmp_path / "runs.jsonl")
    method = Method("LoRA", "lora", {"r": 4})
    one, two = (record(grid, method, "final", 1e-2, seed, 0.5) for seed in (0, 1))
    journal.append(one)
    journal.path.write_bytes(journal.path.read_bytes() + b'{"key": "cut sh')
    assert journal.read() == [one]
    journal.repair()
    journal.append(two)
    assert journal.read() == [one, two]
    journal.append(two)
    with pytest.raises(CheckpointError, match="twice"):
        journal.read()


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"key": 1\n{"version": 1}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        Journal(tmp_path / "runs.jsonl").read()


START = (
    "import os, sys; from pathlib import Path\n"
    "os.sched_getaffinity = lambda pid: {0}  # one thread: more of them wait for each other on a busy machine\n"
    "from krontune.recipes.compare.grid import Grid\n"
    "from krontune.recipes.compare.workers import compare\n"
    "if __name__ == '__main__':\n"
    "    compare(Grid.load(Path(sys.argv[1])), Path(sys.argv[2]), jobs=1)\n"
)


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_bytes().rpartition(b")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.slow
def test_killed_and_resumed_no_run_is_lost_or_doubled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    raw = raw_grid(folder, seeds=list(range(8)), training={"steps": 40, "batch_size": 8, "max_length": 16})
    (tmp_path / "grid.yaml").write_text(dump_yaml(raw))
    (tmp_path / "start.py").write_text(START)
    output = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(tmp_path / "start.py"), str(tmp_path / "grid.yaml"), str(output)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        journal, until = Journal(output / "runs.jsonl"), time.monotonic() + 120
        while len(journal.read()) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        workers = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
    before = journal.read()
    assert 3 <= len(before) < 20
    while (alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive == []
    grid = Grid.from_mapping(raw)
    compare(grid, output, jobs=1)
    after = journal.read()
    assert after[: len(before)] == before
    wanted = {("tune", label, 1000) for label in ("LoRA", "LSR")} | {
        ("final", label, seed) for label in ("LoRA", "LSR") for seed in range(8)
    }
    assert {(r.phase, r.label, r.seed) for r in after} == wanted
    assert len(after) == 2 * 2 + 2 * 8  # two trials and eight seeds a method
    again = compare(grid, output, jobs=1)
    assert journal.read() == after
    assert {r.key for r in again} == {r.key for r in after}


def test_a_report_holds_the_runs_of_its_grid_alone(folder: Path, tmp_path: Path) -> None:
    """A folder keeps the records of every grid that was run there; a new label is shown, an old setting is not."""
    grids = [make_grid(folder, training={"steps": steps, "batch_size": 8, "max_length": 16}) for steps in (4, 2)]
    for grid in (*grids, grids[0]):
        ran = compare(grid, tmp_path, jobs=1)
    assert len(Journal(tmp_path / "runs.jsonl").read()) == 16
    raw = raw_grid(folder, training={"steps": 4, "batch_size": 8, "max_length": 16})
    raw["methods"][1]["label"] = "LSR, renamed"
    known = labels(Grid.from_mapping(raw), tmp_path)
    assert known.keys() == {run.key for run in ran} and set(known.values()) == {"LoRA", "LSR, renamed"}
    assert {run.steps for run in ran} == {4}


def test_what_cannot_be_loaded_is_said_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file: .*nowhere/sst2/train.jsonl"):
        compare(make_grid(folder, data_dir=str(tmp_path / "nowhere")), tmp_path / "out", jobs=1)
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        (tmp_path / "data" / "sst2" / f"{split}.jsonl").write_text('{"sentence": "alone", "label": 1}\n')
    with pytest.raises(ConfigError, match="leaves none of them"):  # found out in the other process
        compare(make_grid(folder, data_dir=str(tmp_path / "data")), tmp_path / "out2", jobs=1)


def test_two_comparisons_do_not_share_a_folder(folder: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use"):
            compare(make_grid(folder), tmp_path)
