"""Copies and reads between GPUs, by this package's own memory, views, plans and copy engine."""
