"""Comparing servers under SGLang's own serving benchmark; `benchmarks/compare_serving.py` is the command."""
