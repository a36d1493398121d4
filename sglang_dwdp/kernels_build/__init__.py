"""Slim builds of FlashInfer's fused MoE for Hopper: only what one weight format needs.

FlashInfer compiles its module for all formats at once, some 250 files; a server that needs one format waits for all
of them. `sglang-dwdp build-kernels` compiles the sources of one format, unchanged, into a module of its own beside
FlashInfer's, and `load` lets FlashInfer use it where nothing better is installed.
"""
