"""DistributedDataParallel over two processes on the CPU: the gradients and weights of one process with both batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from krontune import SokaConfig, preprocess_gradient
from tests.tuners.conftest import build
from tests.tuners.helpers import METHODS, TARGETS, adapted, adapter_tensors

WORKER = """
import os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.tuners.conftest import build
from tests.tuners.helpers import adapter_tensors
from tests.tuners.test_distributed import STEPS, make, rows, step

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
out = {}
for method in ("lsr", "soka"):
    model = DistributedDataParallel(make(method))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for i in range(STEPS):
        step(model, optimizer, rows(i)[rank : rank + 1])
    out[method] = adapter_tensors(model.module)
torch.save(out, f"{sys.argv[1]}/rank{rank}.pt")
dist.destroy_process_group()
"""
STEPS = 3


def make(method: str):
    """The same adapted model in every process; the norms train as well."""
    model = build("llama")
    torch.manual_seed(7)
    return adapted(model, METHODS[method](target_modules=TARGETS, train_norms=True), trained=False).train()


def rows(i: int) -> torch.Tensor:
    return torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(i))


def step(model, optimizer, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


SPREAD = """
import os, sys, torch
import torch.distributed as dist
from krontune import ConfigError, SokaConfig, spread_over_ranks
from krontune.tuners.soka import model as soka_model
from tests.tuners.conftest import build
from tests.tuners.helpers import TARGETS, adapted, adapter_tensors

rank, seen = int(os.environ["RANK"]), []
dist.init_process_group("gloo")
nearest_kron = soka_model.nearest_kron
soka_model.nearest_kron = lambda W, *rest: seen.append(W) or nearest_kron(W, *rest)

def adapter(targets):
    torch.manual_seed(7)
    with spread_over_ranks():
        return adapted(build("llama"), SokaConfig(target_modules=targets, channel_sort="norm"), trained=False)

def refusal(targets):
    try:
        adapter(targets)
    except ConfigError as error:
        return str(error)

out = {"tensors": adapter_tensors(adapter(TARGETS)), "shares": len(seen)}
out["other modules"] = refusal(["q_proj"] if rank else ["q_proj", "v_proj"])

def fails(*_):
    raise ConfigError("rank 1 cannot")

if rank == 1:
    soka_model.nearest_kron = fails
out["failure"] = refusal(TARGETS)
torch.save(out, f"{sys.argv[1]}/rank{rank}.pt")
dist.destroy_process_group()
"""

GRADIENT = """
import os, sys, torch
import torch.distributed as dist
from krontune import ConfigError, preprocess_gradient
from tests.tuners.helpers import adapter_tensors
from tests.tuners.test_distributed import METHODS, TARGETS, from_gradient, rows

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
out = {method: adapter_tensors(from_gradient(method, rows(0)[rank : rank + 1])) for method in METHODS}
try:
    from_gradient("soka", rows(0)[:1], scale=float("nan") if rank else 1.0)
except ConfigError as error:
    out["error"] = str(error)
torch.save(out, f"{sys.argv[1]}/rank{rank}.pt")
dist.destroy_process_group()
"""


def from_gradient(method: str, ids: torch.Tensor, scale: float = 1.0):
    """A model with the gradient start of these rows."""
    model, config = build("llama"), METHODS[method](target_modules=TARGETS, init_weights="gradient")
    preprocess_gradient(model, config, lambda: (scale * model(input_ids=ids, labels=ids).loss).backward())
    torch.manual_seed(7)
    return adapted(model, config, trained=False)


two_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")


def outputs_of_two(worker: str, tmp_path, root) -> list[dict]:
    """What two processes of one group saved."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", worker, str(tmp_path)], cwd=root, env={**environment, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@two_processes
def test_two_processes_share_the_kpsvds_out(tmp_path, request):
    ranks = outputs_of_two(SPREAD, tmp_path, request.config.rootpath)
    torch.manual_seed(7)
    alone = adapted(build("llama"), SokaConfig(target_modules=TARGETS, channel_sort="norm"), trained=False)
    expected = adapter_tensors(alone)
    n_modules = sum(name.endswith("soka_dA") for name in expected)
    assert sorted(rank["shares"] for rank in ranks) == [n_modules // 2, n_modules - n_modules // 2]
    for rank in ranks:
        assert rank["tensors"].keys() == expected.keys()
        assert all(torch.equal(rank["tensors"][name], tensor) for name, tensor in expected.items())
        assert rank["failure"] == "rank 1 cannot"
        assert "the ranks adapt different modules" in rank["other modules"]


@two_processes
def test_two_processes_do_as_one(tmp_path, request):
    outputs = outputs_of_two(WORKER, tmp_path, request.config.rootpath)

    for method in ("lsr", "soka"):
        model = make(method)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for i in range(STEPS):
            step(model, optimizer, rows(i))
        for name, expected in adapter_tensors(model).items():
            torch.testing.assert_close(outputs[0][method][name], expected, rtol=1e-4, atol=1e-6, msg=name)
            assert torch.equal(outputs[0][method][name], outputs[1][method][name])


@two_processes
def test_two_processes_start_from_their_mean_gradient(tmp_path, request):
    ranks = outputs_of_two(GRADIENT, tmp_path, request.config.rootpath)
    for method in METHODS:
        for name, expected in adapter_tensors(from_gradient(method, rows(0))).items():
            assert torch.equal(ranks[0][method][name], ranks[1][method][name]), name
            torch.testing.assert_close(ranks[0][method][name], expected, rtol=1e-2, atol=1e-3, msg=name)
    assert all("holds NaN or Inf" in rank["error"] for rank in ranks)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
