"""The options table in the README is the one of config.py."""

import dataclasses
import re

from sglang_dwdp.config import DwdpConfig, flag_of
from tests import ROOT

README = (ROOT / "README.md").read_text()


def test_every_flag_and_default() -> None:
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([^|]*) \|", README, re.MULTILINE))
    assert rows.pop("--enable-dwdp") == "`False`"
    expected = {flag_of(field.name): field.default for field in dataclasses.fields(DwdpConfig)}
    assert rows.keys() == expected.keys()
    for flag, default in expected.items():
        if default is None:
            assert "`" not in rows[flag], flag  # a default in words
        else:
            assert rows[flag] == f"`{default}`", flag


def test_one_page() -> None:
    assert len(README.splitlines()) <= 120


def test_links_lead_somewhere() -> None:
    root = ROOT
    for document in (root / "README.md", *(root / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if "://" not in link:
                assert (document.parent / link).exists(), (document.name, link)
