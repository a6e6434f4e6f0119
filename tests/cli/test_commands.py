"""plan, spectrum, export, merge, compress and info at the command line, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PretrainedConfig, RobertaConfig

from krontune.weights import meta_model
from tests.cli.conftest import run
from tests.convert.helpers import save_base, tiny_llama

GOLDEN = Path(__file__).parent / "golden"
#: {name: a command that works}; each writes to "out" if it writes at all.
WORKING = {
    "plan": "plan base --budget 2k --target-modules all-linear --out out",
    "plan-soka": "plan base --method soka --budget 3k --target-modules q_proj,up_proj --channel-sort norm --out out",
    "plan-lora": "plan base --method lora --rank 2 --train-norms --out out",
    "spectrum": "spectrum base --target-modules q_proj,up_proj --shapes 2,1 --terms 6 --channel-sort svd --out out",
    "export": "export lsr --out out",
    "export-soka": "export soka --out out --error 0.2 --vllm-rank",
    "merge": "merge lsr --out out --dtype bf16",
    "compress": "compress lora --out out --separation-rank 2",
    "info": "info lsr",
    "info-soka": "info soka-sorted",
    "info-modules": "info lsr --modules",
    "export-modules": "export soka --out out --error 0.2 --modules",
}
WRITING = {name: line for name, line in WORKING.items() if "--out" in line and name != "plan-lora"}


@pytest.mark.parametrize("name", [name for name in WORKING if name != "plan-lora"])
def test_what_people_see(name: str, at_work: Path) -> None:
    """The whole of standard output; KRONTUNE_GOLDEN=write takes what there is now as right."""
    code, stdout, _ = run(*WORKING[name].split())
    shown = "\n".join(line.rstrip() for line in stdout.splitlines()) + "\n"
    shown = re.sub(r"(?<=peft )[\d.]+|(?<=fingerprint {6})\w+", "...", shown)
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("KRONTUNE_GOLDEN") == "write":
        file.write_text(shown, encoding="utf-8")
    assert code == 0
    assert shown == file.read_text(encoding="utf-8")
    tables = [line for line in shown.splitlines() if line.startswith(" ")]
    assert all(len(line) <= 80 and "…" not in line for line in tables)


@pytest.mark.parametrize("name", [name for name in WORKING if name != "plan-lora"])
def test_json_is_all_that_is_printed(name: str, at_work: Path) -> None:
    code, stdout, _ = run(*WORKING[name].split(), "--json")
    assert code == 0
    assert isinstance(json.loads(stdout), dict)


@pytest.mark.parametrize("name", WRITING)
def test_nothing_is_overwritten_without_force(name: str, at_work: Path) -> None:
    line = WRITING[name].split()
    assert run(*line)[0] == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    code, stdout, stderr = run(*line)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ") and "--force" in stderr and stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    assert run(*line, "--force")[0] == 0


@pytest.mark.parametrize("name", WRITING)
def test_a_file_is_no_folder(name: str, at_work: Path) -> None:
    Path("out").write_text("years of work")
    code, stdout, stderr = run(*WRITING[name].split(), "--force")
    assert (code, stdout) == (2, "")
    assert "--out out is a file" in stderr and stderr.count("\n") == 1
    assert Path("out").read_text() == "years of work"


def test_every_report_of_a_spectrum_is_kept_without_force(at_work: Path) -> None:
    Path("out").mkdir()
    Path("out/report.html").write_text("years of work")
    code, _, stderr = run(*WORKING["spectrum"].split())
    assert code == 2 and "out/report.html exists" in stderr
    assert Path("out/report.html").read_text() == "years of work"


@pytest.mark.parametrize(
    ("config", "budget"),
    [(LlamaConfig(), "0.99M"), (RobertaConfig(vocab_size=50265), "0.3M")],
    ids=["llama", "roberta"],
)
@pytest.mark.parametrize("method", ["lsr", "soka", "lora"])
def test_a_config_alone_is_planned_for(config: PretrainedConfig, budget: str, method: str, at_work: Path) -> None:
    """LLaMA2-7B's and RoBERTa-base's shapes; the written file makes an adapter of just that size."""
    config.save_pretrained("model")
    line = f"plan model --method {method} --budget {budget} --config-only --out out --json"
    code, stdout, _ = run(*line.split())
    plan = json.loads(stdout)
    assert code == 0
    assert 0.98 * plan["budget"] <= plan["n_params"] <= plan["budget"]
    loaded = PeftConfig.from_pretrained("out")
    if method != "lora":
        loaded.init_weights = "zero"  # a principal start would look at weights
    assert get_peft_model(meta_model(config), loaded).get_nb_trainable_parameters()[0] == plan["n_params"]


def damaged(folder: str) -> str:
    """A copy of an adapter with a NaN in its first tensor."""
    shutil.copytree(Path(folder).resolve(), "damaged")
    tensors = load_file("damaged/adapter_model.safetensors")
    tensors[min(tensors)].view(-1)[0] = torch.nan
    save_file(tensors, "damaged/adapter_model.safetensors")
    return "damaged"


@pytest.mark.parametrize("line", ["export damaged --out out", "merge damaged --out out", "info damaged"])
@pytest.mark.parametrize("adapter", ["lsr", "soka-sorted"])
def test_nan_in_a_factor_fails(line: str, adapter: str, at_work: Path) -> None:
    damaged(adapter)
    code, stdout, stderr = run(*line.split())
    assert (code, stdout) == (1, "")
    assert "holds NaN or Inf" in stderr and stderr.count("\n") == 1
    assert not Path("out").exists()


def test_a_lora_with_nan_is_not_compressed(at_work: Path) -> None:
    damaged("lora")
    code, _, stderr = run("compress", "damaged", "--out", "out", "--separation-rank", "2")
    assert code == 1 and "holds NaN or Inf" in stderr


def test_an_order_that_is_no_permutation_fails(at_work: Path) -> None:
    shutil.copytree(Path("soka-sorted").resolve(), "damaged")
    tensors = load_file("damaged/adapter_model.safetensors")
    next(t for key, t in tensors.items() if key.endswith("soka_rows"))[:2] = 3
    save_file(tensors, "damaged/adapter_model.safetensors")
    code, _, stderr = run("info", "damaged")
    assert code == 1 and "no permutation" in stderr


def test_another_base_fails(at_work: Path) -> None:
    save_base(Path("other"), tiny_llama(intermediate_size=32))
    code, _, stderr = run("merge", "lsr", "--base", "other", "--out", "out")
    assert code == 1 and "another architecture" in stderr and not Path("out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan base --budget lots", "'lots' is not an amount"),
        ("plan base --budget 10", "below the least"),
        ("plan base --method dora", "method 'dora' is unknown"),
        ("plan base --channel-sort norm", "channel_sort is SoKA's"),
        ("plan nowhere/at/all --budget 2k", "does not exist"),
        ("plan base --method lora --train-norms", "train_norms is krontune's"),
        ("plan base --method lora --rank -3", "r is -3; it must be at least 1"),
        ("plan base --separation-rank 0", "separation_rank is 0; it must be at least 1"),
        ("plan base --method soka --p 1,2", "names 2 factor shapes"),
        ("plan base --task FOO", "task type 'FOO' is unknown; allowed: CAUSAL_LM"),
        ("spectrum base --rule best", "rule 'best' is unknown"),
        ("spectrum base --rule budget --budget 5", "the budget of 5 parameters is below the least that 14 modules"),
        ("spectrum base --channel-sort size", "'size' is unknown"),
        ("spectrum base --shapes 5x", "not a factor shape"),
        ("export base --out out", "is not an adapter"),
        ("export lsr --to gguf --out out", "format 'gguf' is unknown"),
        ("export lsr --out out --rank 2 --error 0.1", "not both"),
        ("merge base --out out", "is not an adapter"),
        ("merge lsr --out out --dtype int4", "dtype 'int4' is unknown"),
        ("merge lsr --out lsr --force", "the input"),
        ("compress soka --out out --separation-rank 2", "takes a LoRA"),
        ("compress lora --out out", "separation rank of at least 1, or a budget"),
        ("compress lora --out out --budget 0.001x", "below that of separation rank 1"),
        ("info base", "is not an adapter"),
        ("info nowhere", "does not exist"),
        *[(f"{line} ia3", "holds IA3, and krontune reads adapters of lsr") for line in ("info", "export --out out")],
    ],
)
def test_wrong_use_is_exit_code_2_and_one_line(line: str, message: str, at_work: Path) -> None:
    IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained("ia3")
    before = sorted(at_work.iterdir())
    code, stdout, stderr = run(*line.split())
    assert (code, stdout) == (2, "")
    assert message in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert sorted(at_work.iterdir()) == before


@pytest.mark.parametrize("command", ["plan", "spectrum"])
def test_layers_that_run_backwards_are_said(command: str, at_work: Path) -> None:
    code, stdout, stderr = run(command, "base", "--target-modules", "q_proj", "--layers", "3-0")
    assert (code, stdout) == (2, "")
    assert "'3-0' holds nothing; write 0-3" in stderr


#: Runs commands where no file can grow beyond 3,000 bytes, which is how a full disk looks to them.
FULL_DISK = """
import json, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from tests.cli.conftest import run
import krontune.convert, krontune.plan, krontune.report.spectrum  # compiles its bytecode before the limit holds
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
said = [run(*line.split()) for line in json.loads(sys.argv[1])]
sys.stdout.write(json.dumps(said))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_leaves_nothing(at_work: Path) -> None:
    names = ("export", "merge", "compress", "spectrum")
    lines = [WORKING[name].replace("--out out", f"--out {name}") for name in names]
    before = sorted(at_work.iterdir())
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    command = [sys.executable, "-B", "-c", FULL_DISK, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for (code, stdout, stderr), line in zip(json.loads(done.stdout), lines, strict=True):
        assert (code, stdout) == (1, ""), line
        assert "too large" in stderr.lower() and stderr.count("\n") == 1, line
    assert [path.name for path in at_work.iterdir() if path not in before] == ["spectrum"]
    assert [path.name for path in Path("spectrum").iterdir()] == ["spectra.jsonl"]  # what it had computed


@pytest.mark.parametrize("name", ["export", "merge", "compress"])
def test_ctrl_c_leaves_nothing(name: str, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensors: dict, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("krontune.convert.output.save_file", interrupted)
    before = sorted(at_work.iterdir())
    code, stdout, stderr = run(*WORKING[name].split())
    assert (code, stdout, stderr) == (130, "", "error: stopped\n")
    assert sorted(at_work.iterdir()) == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("name", ["export", "merge", "compress"])
def test_sigterm_leaves_nothing(name: str, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(tensors: dict, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("krontune.convert.output.save_file", terminated)
    before = sorted(at_work.iterdir())
    code, stdout, stderr = run(*WORKING[name].split())
    assert (code, stdout, stderr) == (143, "", "error: stopped by SIGTERM\n")
    assert sorted(at_work.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
