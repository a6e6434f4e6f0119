"""DistributedDataParallel over two processes on the CPU: the gradients and weights of one process with both batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

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


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_do_as_one(tmp_path, request):
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            cwd=request.config.rootpath,
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    outputs = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    for method in ("lsr", "soka"):
        model = make(method)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for i in range(STEPS):
            step(model, optimizer, rows(i))
        for name, expected in adapter_tensors(model).items():
            torch.testing.assert_close(outputs[0][method][name], expected, rtol=1e-4, atol=1e-6, msg=name)
            assert torch.equal(outputs[0][method][name], outputs[1][method][name])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
