"""Greedy answers to many prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Answer chat prompts greedily; prompts of like length share a batch.

    Args:
        model: a causal language model, adapted or not; put in eval mode.
        tokenizer: its tokenizer, with a chat template.
        prompts: conversations that end with the user's turn.
        max_new_tokens: where an answer is cut off.
        batch_size: prompts at a time.
        done: called after each batch with the number of prompts in it.

    Returns:
        One answer a prompt, in their order, without special tokens and outer space.
    """
    model.eval()
    texts = [tokenizer.apply_chat_template(list(p), tokenize=False, add_generation_prompt=True) for p in prompts]
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = [""] * len(texts)
    for start in range(0, len(texts), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = tokenizer(
            [texts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(model.device)
        output = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        replies = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, reply in zip(chosen, replies, strict=True):
            answers[i] = reply.strip()
        done(len(chosen))
    return answers
