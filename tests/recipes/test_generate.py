from __future__ import annotations

from pathlib import Path

import torch

from krontune.recipes.config import ModelSettings
from krontune.recipes.generate import answer
from krontune.recipes.models import load_base


def test_batched_answers_equal_single_greedy_ones(tiny_model: Path) -> None:
    """Against a loop of whole forward passes: no cache, no padding, no generate()."""
    model, tokenizer = load_base(ModelSettings(path=str(tiny_model), dtype="float32"))
    contents = ["a", "a much longer question, with words", "medium size", "b", "?"]
    prompts = [[{"role": "user", "content": content}] for content in contents]
    done: list[int] = []
    replies = answer(model, tokenizer, prompts, max_new_tokens=6, batch_size=2, done=done.append)
    assert done == [2, 2, 1]
    for content, reply in zip(contents, replies, strict=True):
        ids = tokenizer(f"<|user|>{content}<|end|><|assistant|>", return_tensors="pt").input_ids
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
        assert reply == tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
