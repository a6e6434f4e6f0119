"""YAML as people expect it: 1e-3 is a number, `no` is a word, and a key that is given twice is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from krontune.errors import ConfigError

FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
BOOL_TAG = "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where 1e-3 is a string and `save_strategy: no` is false; YAML 1.2 mended both."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own way to say it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL_TAG]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key is a word, not {key.id} in brackets", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(BOOL_TAG, BOOL, list("tTfF"))


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text.

    Raises:
        ConfigError: not YAML; names `source`, the line and the reason.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark and "\n" in text.strip() else source
        raise ConfigError(f"{where}: {getattr(error, 'problem', None) or error}.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold settings as `key: value` lines, not {_kind(value)}.")
    return value


def dump_yaml(value: Any) -> str:
    """YAML text that `parse_yaml` reads back to the same value, keys in their given order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _kind(value: Any) -> str:
    return "an empty file" if value is None else f"a {type(value).__name__}"
