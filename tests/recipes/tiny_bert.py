"""A BERT of a few thousand parameters, and task files for it, in a folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

GOOD = ["good", "great", "fine", "lovely"]
BAD = ["bad", "awful", "poor", "dull"]
PLAIN = ["the", "film", "was", "a", "story", "of", "it"]


def make_model(folder: Path) -> Path:
    """Write a model with its tokenizer; returns the folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLAIN]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.3,
    }
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def make_data(folder: Path, n: int = 120) -> Path:
    """Write sst2 and stsb rows that a single word decides; returns the folder."""
    draw = random.Random(0)
    for task in ("sst2", "stsb"):
        for split, rows in (("train", n), ("validation", 40)):
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                for _ in range(rows):
                    file.write(json.dumps(_row(task, draw)) + "\n")
    return folder


def _row(task: str, draw: random.Random) -> dict[str, object]:
    label = draw.randrange(2)
    text = " ".join([*draw.choices(PLAIN, k=draw.randrange(2, 6)), draw.choice(GOOD if label else BAD)])
    if task == "sst2":
        return {"sentence": text, "label": label}
    return {"sentence1": text, "sentence2": "the film", "label": 4.5 if label else 0.5}
