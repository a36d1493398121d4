"""README.md and docs/: short, with commands, files and options that exist."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_dwdp import cli
from sglang_dwdp.config import DwdpConfig, flag_of, option_names
from tests import ROOT

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
SGLANGS_OWN = {"--dwdp-size"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code(page: Path) -> str:
    """The code of a page, in blocks and in lines."""
    text = page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(blocks + re.findall(r"`([^`\n]+)`", text))


def anchors(page: Path) -> Iterator[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120


def test_the_docs_are_short() -> None:
    """Apart from the tables of faults and of models, which have each of them."""
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name not in ("models.md", "reliability.md")]
    assert sum(len(page.read_text().split()) for page in pages) <= 8000


def test_every_option_and_default() -> None:
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([^|]*) \|", (ROOT / "docs" / "usage.md").read_text(), re.MULTILINE))
    assert rows.pop("--enable-dwdp") == "`False`"
    expected = {flag_of(field.name): field.default for field in dataclasses.fields(DwdpConfig)}
    assert rows.keys() == expected.keys()
    for flag, default in expected.items():
        if default is None:
            assert "`" not in rows[flag], flag  # a default in words
        else:
            assert rows[flag] == f"`{default}`", flag


@pages
def test_options_exist(page: Path) -> None:
    options = {"--" + name.replace("_", "-") for name in option_names()} | SGLANGS_OWN
    assert set(re.findall(r"--(?:enable-)?dwdp[\w-]*\w", page.read_text())) <= options


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in set(anchors(target)), link


@pages
def test_commands_and_files_exist(page: Path) -> None:
    text = code(page)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets
    (commands,) = (a.choices for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(re.findall(r"\bsglang-dwdp ([a-z][\w-]*)", text)) <= set(commands)
    for path in re.findall(r"\b(?:benchmarks|docs|kernels|sglang_dwdp|srt_patches|tests)/[\w/.-]*\w", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"-m ((?:tests|benchmarks|sglang_dwdp)\.[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_rooms_and_modules_of_the_architecture_exist() -> None:
    for room, text in re.findall(
        r"^\| `([\w/]+?)/`(?:, `\w+/`)* \| (.*) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE
    ):
        folder = ROOT / room if room == "srt_patches" else ROOT / "sglang_dwdp" / room
        assert folder.is_dir(), room
        for module in re.findall(r"`(\w+\.(?:py|md))`", text):
            assert (folder / module).exists(), f"{room}/{module}"


def test_quoted_messages_are_those_of_the_code() -> None:
    text = "\n".join(
        path.read_text() for room in ("sglang_dwdp", "srt_patches") for path in (ROOT / room).rglob("*.py")
    )
    text = re.sub(r'"\s*\n\s*f?"', "", text)  # strings that go on in the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^(?:\| |- \*\*)`(?!sglang\.|unrecognized)([^`]+)`", page, re.MULTILINE)
    assert len(quoted) > 5
    for message in quoted:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert part.replace("300 s", "").replace("0.5.23", "").strip() in text, message
