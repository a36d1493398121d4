"""kernels/build.py as a module: `kernels` is no package, which would hide the one that transformers imports."""

import importlib.util
import sys
from typing import Any

from tests import ROOT

_spec = importlib.util.spec_from_file_location("dwdp_kernels_build", ROOT / "kernels" / "build.py")
assert _spec is not None
assert _spec.loader is not None
script: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = script
_spec.loader.exec_module(script)
