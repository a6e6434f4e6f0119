"""A merged GGUF file holds every tensor that the merged folder holds, under llama.cpp's names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from krontune import LsrConfig
from krontune.convert import merge
from tests.convert.helpers import randomise

gguf = pytest.importorskip("gguf")

#: llama.cpp's names, written down from its own list.
BLOCK = {
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_gate": (48, 32),
    "ffn_up": (48, 32),
    "ffn_down": (32, 48),
    "attn_norm": (32,),
    "ffn_norm": (32,),
}


def save_tied_gguf(file: Path) -> Path:
    """A llama of one layer with tied embeddings, as llama.cpp's converter writes it: without output.weight."""
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 48),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, 64),
        (writer.add_tokenizer_model, "gpt2"),
    ):
        add(value)
    writer.add_token_list(["a", "b", "ab", *(f"<{i}>" for i in range(61))])
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)
    sizes = {"token_embd": (64, 32), "output_norm": (32,)} | {f"blk.0.{name}": shape for name, shape in BLOCK.items()}
    for name, shape in sizes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32) * 0.2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tensors(file: Path) -> dict[str, Tensor]:
    return {t.name: torch.from_numpy(np.array(t.data)).float() for t in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "down_proj"])
def test_tied_ends_part_ways_in_the_file_too(target: str, tmp_path: Path) -> None:
    file = save_tied_gguf(tmp_path / "base.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", dtype=torch.float32)
    assert model.config.tie_word_embeddings
    adapted = randomise(get_peft_model(model, LsrConfig(r=4, separation_rank=2, target_modules=[target])))
    adapted.peft_config["default"].base_model_name_or_path = str(file)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(file), gguf=True, check=False)
    before, after, folder = (
        tensors(file),
        tensors(tmp_path / "out/model.gguf"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    head, embedding = folder.get("lm_head.weight"), folder["model.embed_tokens.weight"]
    assert ("output.weight" in after) == (target != "down_proj")
    if head is not None:
        torch.testing.assert_close(after["output.weight"], head, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(after["output.weight"], after["token_embd.weight"], rtol=0.01)
    torch.testing.assert_close(after["token_embd.weight"], embedding, rtol=1e-3, atol=1e-3)
    changed = {name for name in before if not torch.allclose(before[name], after[name], rtol=0.01)}
    assert changed == {"lm_head": set(), "embed_tokens": {"token_embd.weight"}}.get(target, {"blk.0.ffn_down.weight"})
