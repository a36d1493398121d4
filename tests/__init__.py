"""All tests. unit/ needs neither a GPU nor a server, e2e/ starts servers on the CPU engine, gpu/ needs GPUs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
