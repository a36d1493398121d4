"""Memory that the ranks of a group share: one protocol (base.py), one module for each kind of memory."""
