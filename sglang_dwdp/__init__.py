"""DWDP (Distributed Weight Data Parallelism, arXiv 2604.01621) for Mixture-of-Experts models in SGLang.

docs/architecture.md says where everything is.
"""

import os

__version__ = "0.1.0"

if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    # For `sglang.Engine` on a machine without the CUDA driver: SGLang imports its kernels before it loads plugins.
    from sglang_dwdp import cpu_engine

    cpu_engine.make_importable()
