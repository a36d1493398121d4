"""Servers under SGLang's own serving benchmark, side by side."""
