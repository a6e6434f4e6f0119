"""Greedy answers to many prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    special_tokens: bool = True,
) -> list[str]:
    """Continue texts greedily, as one batch.

    Args:
        model: a causal language model, adapted or not; put in eval mode.
        tokenizer: its tokenizer.
        texts: what to continue.
        max_new_tokens: where a continuation is cut off.
        stop: a continuation ends when it holds one of these; they are left in it.
        special_tokens: let the tokenizer put its marks around a text; a rendered chat has them already.

    Returns:
        One continuation a text, without special tokens.
    """
    model.eval()
    batch = tokenizer(
        list(texts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special_tokens
    ).to(model.device)
    options = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    made = output[:, batch["input_ids"].shape[1] :]
    continued: list[str] = tokenizer.batch_decode(made, skip_special_tokens=True)
    return continued


def render(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> str:
    """A conversation as text, up to where the assistant's turn begins."""
    text: str = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return text


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
    texts = [render(tokenizer, prompt) for prompt in prompts]
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = [""] * len(texts)
    for start in range(0, len(texts), batch_size):
        chosen = by_length[start : start + batch_size]
        part = [texts[i] for i in chosen]
        replies = complete(model, tokenizer, part, max_new_tokens=max_new_tokens, special_tokens=False)
        for i, reply in zip(chosen, replies, strict=True):
            answers[i] = reply.strip()
        done(len(chosen))
    return answers
