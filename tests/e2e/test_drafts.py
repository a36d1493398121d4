"""Speculative decoding: every rank gives the tokens of transformers, and accepts as many drafts as a server of one rank
that holds all experts. Run by `make test-models`."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_dwdp.demo.server import Server
from tests.e2e.conftest import FLAGS, Plugin, Running
from tests.e2e.prompts import PROMPTS
from tests.e2e.test_parity import MLA_PLUGIN
from tests.fixtures import cpu_drafts
from tests.fixtures.families import make_checkpoint, make_head
from tests.fixtures.model_modules import FEWER_MODELS
from tests.fixtures.reference import greedy_tokens

pytestmark = pytest.mark.models
NEW_TOKENS = 16
STEPS = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
Answer = tuple[list[int], int]  # tokens, and forwards that verified drafts


def ask(server: Server, prompt: str, rank: int | None) -> Answer:
    body: dict[str, Any] = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}}
    if rank is not None:
        body["routed_dp_rank"] = rank
    answer = server.post("/generate", body)
    return answer["output_ids"], answer["meta_info"]["spec_verify_ct"]


@pytest.mark.parametrize("algorithm", ["NEXTN", "EAGLE", "EAGLE3"])
def test_parity(running: Running, plugin: Plugin, tmp_path: Path, algorithm: str) -> None:
    model, head, flags = tmp_path / "model", tmp_path / "head", ("--speculative-algorithm", algorithm, *STEPS)
    plain = model  # transformers has no draft layers
    if algorithm == "NEXTN":
        plain = tmp_path / "plain"
        make_checkpoint(plain, "deepseek_v3", dtype=torch.float32, draftable=1)
        make_checkpoint(model, "deepseek_v3", dtype=torch.float32, draftable=1, draft_layers=1)
    else:
        make_checkpoint(model, dtype=torch.float32, draftable=1)
        make_head(head, "eagle" if algorithm == "EAGLE" else "eagle3", model)
        flags += ("--speculative-draft-model-path", str(head))
    environment: Mapping[str, str] = plugin("cpu_drafts", Path(cpu_drafts.__file__).read_text())
    if algorithm == "NEXTN":
        environment = plugin("mla_on_cpu", MLA_PLUGIN, environment)

    tokens = greedy_tokens(plain, PROMPTS, NEW_TOKENS)
    one_rank = (*FLAGS, *flags, "--disable-shared-experts-fusion")
    with Server(model, 1, tmp_path / "log", flags=one_rank, environment=FEWER_MODELS | environment) as server:
        server.wait()
        expected = [ask(server, prompt, None) for prompt in PROMPTS]
    assert [got for got, _ in expected] == tokens
    if algorithm != "EAGLE3":  # whose random head is never right
        assert sum(steps for _, steps in expected) < 0.9 * NEW_TOKENS * len(PROMPTS)

    dwdp = ("--dwdp-direct-max-tokens", "64")
    with running(model, 2, dwdp=dwdp, flags=flags, environment=environment) as server:
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            with ThreadPoolExecutor(2) as pool:
                assert list(pool.map(partial(ask, server, prompt), range(2))) == [wanted] * 2, prompt[:60]
        for report in server.reports():
            assert report["moe_layers"] == 4  # of NEXTN 3 and the draft layer's
            assert min(report[k] for k in ("bytes_copied", "direct_forwards", "staged_forwards")) > 0
