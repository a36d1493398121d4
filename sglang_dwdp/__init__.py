"""DWDP (Distributed Weight Data Parallelism, arXiv 2604.01621) for Mixture-of-Experts models in SGLang.

docs/architecture.md says where everything is.
"""

__version__ = "0.1.0"
