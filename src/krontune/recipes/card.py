"""The README.md of a saved adapter: what it is and how to load it. PEFT's own is a form with nothing filled in."""

from __future__ import annotations

from krontune.report import RunRecord

from .models import model_source
from .tasks import Task

OUR_METHODS = ("lsr", "soka")

FROM_HUB = """base = AutoModelForCausalLM.from_pretrained("{model}")
tokenizer = AutoTokenizer.from_pretrained("{model}")"""

FROM_FILE = """base, tokenizer = load_base("{model}")"""

CLASSIFIER = """problem = load_classification(find_task("{task}"), ModelSettings(path="{model}"))
base, tokenizer = problem.base, problem.tokenizer"""


def model_card(record: RunRecord, task: Task | None = None, eval_options: str = "") -> str:
    """Markdown with the metadata block that the Hub reads."""
    ours = record.method in OUR_METHODS
    tags = [task.name if task else "sft", record.method, *(["krontune"] if ours else [])]
    settings = ", ".join(f"{key}={value}" for key, value in record.settings.items())
    scores = "".join(f"| {name.replace('_', ' ')} | {value:.4g} |\n" for name, value in record.scores.items())
    note = (
        "\n`import krontune` registers the method with PEFT; without it PEFT does not know "
        f'"{record.method.upper()}". Install it with `pip install krontune`.\n'
        if ours
        else ""
    )
    judged = f"\nIts score on the task:\n\n    krontune eval PATH/TO/THIS/FOLDER {eval_options}\n" if task else ""
    return f"""---
base_model: "{record.model}"
library_name: peft
tags: [{", ".join(tags)}]
---

# {record.name}

Adapter for `{record.model}`, method {record.method.upper()}, trained with krontune.

| | |
|---|---|
| settings | {settings.replace("|", "&#124;")} |
| trainable parameters | {record.n_trainable:,} |
| steps | {record.steps} |
| learning rate | {record.learning_rate:g} |
| seed | {record.seed} |
| training loss | {record.loss:.4f} |
{scores}
```python
{_loading_code(record, task, ours)}
```
{judged}{note}"""


def _loading_code(record: RunRecord, task: Task | None, ours: bool) -> str:
    if task is not None and not task.generates:
        imports = [
            "from peft import PeftModel",
            "from krontune.recipes.config import ModelSettings",
            "from krontune.recipes.problems import load_classification",
            "from krontune.recipes.tasks import find_task",
        ]
        return _code(imports, CLASSIFIER.format(task=task.name, model=record.model))
    needs_us = record.model.startswith("packaged:") or model_source(record.model).gguf_file is not None
    first = ["import krontune  # noqa: F401"] if ours and not needs_us else []
    imports = ["from peft import PeftModel"]
    imports += ["from krontune.recipes import load_base"] if needs_us else []
    imports += [] if needs_us else ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    return _code([*first, *imports], (FROM_FILE if needs_us else FROM_HUB).format(model=record.model))


def _code(imports: list[str], base: str) -> str:
    return "\n".join([*imports, "", base, 'model = PeftModel.from_pretrained(base, "PATH/TO/THIS/FOLDER")'])
