"""Speed and memory of krontune beside its rivals: `python -m benchmarks run`, from the root of a checkout."""
