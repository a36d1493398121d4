"""DWDP (Distributed Weight Data Parallelism, arXiv 2604.01621) for Mixture-of-Experts models in SGLang.

docs/architecture.md says where everything is.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout srt_patches/ lies beside this package, in a wheel inside it. Without this line,
# `python -m sglang.launch_server` started in the root of a checkout (which puts the working
# directory first on the path) would find this package but not sglang_dwdp.srt_patches.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "srt_patches" / "ledger.md").is_file():
    __path__.append(str(_checkout))
