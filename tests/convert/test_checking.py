"""The comparison of logits, for models that take more than token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    CLIPConfig,
    ConvNextConfig,
    PretrainedConfig,
    T5Config,
)

from krontune import LsrConfig
from krontune.convert import merge
from krontune.errors import ConfigError
from tests.convert.helpers import save_adapter

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved(folder: Path, config: PretrainedConfig, kind: Any, targets: list[str], task: str | None = None) -> Path:
    """A model with random weights, and an LSR adapter on it; returns the adapter's folder."""
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(folder / "base")
    settings = LsrConfig(r=2, separation_rank=2, target_modules=targets, task_type=task)
    return save_adapter(folder / "adapter", folder / "base", settings, kind)


@pytest.mark.parametrize("tied", [True, False])
def test_encoder_and_decoder_both_get_tokens(tied: bool, tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, tie_word_embeddings=tied, pad_token_id=0
    )
    adapter = saved(tmp_path, config, AutoModelForSeq2SeqLM, ["q", "v", "wo"], "SEQ_2_SEQ_LM")
    check = merge(adapter, tmp_path / "merged").check
    assert check is not None and check.difference < 1e-5 < check.effect


def test_a_vision_model_gets_pixels(tmp_path: Path) -> None:
    config = ConvNextConfig(image_size=32, hidden_sizes=[8] * 4, depths=[1] * 4, layer_scale_init_value=1.0)
    adapter = saved(tmp_path, config, AutoModelForImageClassification, ["pwconv1", "pwconv2"])
    check = merge(adapter, tmp_path / "merged").check
    assert check is not None and check.difference < 1e-5 < check.effect


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    config = CLIPConfig(
        text_config={**SMALL, "vocab_size": 64}, vision_config={**SMALL, "image_size": 8, "patch_size": 4}
    )
    adapter = saved(tmp_path, config, AutoModel, ["q_proj", "v_proj"])
    with pytest.raises(ConfigError, match=r"could not be compared: CLIPModel.*--no-check"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert merge(adapter, tmp_path / "merged", check=False).check is None
