"""Another SGLang is unsupported, unless the user insists."""

from __future__ import annotations

import tomllib

import pytest

from sglang_dwdp.errors import DwdpConfigError
from sglang_dwdp.support import release
from tests import ROOT


@pytest.mark.parametrize("installed", ["0.5.23", "0.5.23.post1", "0.5.23+cu130", "0.5.23rc1"])
def test_this_release(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(release, "version", lambda _name: installed)
    release.check_release()


def test_the_package_asks_for_it() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f"sglang=={release.SGLANG}" in tomllib.loads(text)["project"]["dependencies"]


@pytest.mark.parametrize("installed", ["0.5.24", "0.6.0.dev1", "main"])
def test_another_release(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(release, "version", lambda _name: installed)
    with pytest.raises(DwdpConfigError, match=f"SGLang {installed} is installed.*sglang==0.5.23"):
        release.check_release()
    monkeypatch.setenv(release.OVERRIDE, "1")
    release.check_release()
