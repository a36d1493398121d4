"""The parts of benchmarks/multi_gpu.py: copies and direct reads between GPUs, servers, and where DWDP begins to pay."""
