"""A stub of FlashInfer, which takes seconds to import in every process of a server and has no kernels for CPUs.

The demo's servers find it first; SGLang does without FlashInfer where it cannot be imported.
"""

raise ImportError(f"this is sglang_dwdp's stub of flashinfer ({__file__}), for servers on the CPU engine")
