"""Which SGLang this package supports: its hooks replace functions of one release, whose sources the tests compare."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from sglang_dwdp.errors import DwdpConfigError

SGLANG = "0.5.23"
OVERRIDE = "SGLANG_DWDP_ANY_RELEASE"


def check_release() -> None:
    """Check that the installed SGLang is the one whose functions the hooks were written for.

    Raises:
        DwdpConfigError: another release is installed, and the variable OVERRIDE is not 1.
    """
    try:
        installed = version("sglang")
    except PackageNotFoundError:  # a source tree on the path
        return
    try:  # however it was built or packaged ("0.5.23.post1", "0.5.23+cu130")
        is_supported = Version(installed).release == Version(SGLANG).release
    except InvalidVersion:
        is_supported = False
    if os.environ.get(OVERRIDE) != "1" and not is_supported:
        raise DwdpConfigError(
            f"--enable-dwdp cannot be used here: SGLang {installed} is installed, and this plugin replaces functions "
            f"of {SGLANG}. Install sglang=={SGLANG}, or set {OVERRIDE}=1 to try, and compare tokens before trusting it."
        )
