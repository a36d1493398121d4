"""SGLang is imported by some tests: on a machine without a GPU that takes its CPU engine's arrangement."""

from sglang_dwdp import cpu_engine

if not cpu_engine.has_cuda_driver():
    cpu_engine.arrange(2)
