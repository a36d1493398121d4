"""Endpoints, logprobs, aborts and pauses."""

from __future__ import annotations

from typing import ClassVar

import pytest
from sglang.test.kits.abort_timeout_kit import AbortAllMixin, RunningTimeoutTwoWaveMixin
from sglang.test.kits.anthropic_messages_kit import AnthropicMessagesMixin
from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin
from sglang.test.kits.basic_decode_correctness_kit import BasicDecodeCorrectnessMixin
from sglang.test.kits.basic_scheduler_stress_kit import BasicSchedulerStressMixin
from sglang.test.kits.kl_divergence_kit import KLDivergenceMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin

from tests.kits.server import DwdpServer, use_own_prompts

pytestmark = pytest.mark.kits
use_own_prompts()


class TestApi(
    BasicAPIContractMixin,
    AnthropicMessagesMixin,
    BasicDecodeCorrectnessMixin,
    BasicSchedulerStressMixin,
    KLDivergenceMixin,
    AbortAllMixin,
    PauseResumeInPlaceMixin,
    DwdpServer,
):
    """What a random model can answer: those that want the capital of France are left out."""

    test_capital_france = test_basic_math = test_color_completion = test_ascii_ratio = None
    test_no_repetition_blowup = test_streaming_response = test_concurrent_requests = None
    kl_div_thres = 1e-6
    kl_div_max_samples = 12
    kl_div_prefill_max_new_tokens = kl_div_decode_max_new_tokens = 24
    abort_all_num_requests, abort_all_max_new_tokens = 8, 8000
    pause_num_requests, pause_max_new_tokens, pause_duration, pause_ignore_eos = 8, 400, 2, True


class TestRunningTimeout(RunningTimeoutTwoWaveMixin, DwdpServer):
    """Requests that end because they take too long."""

    server_env: ClassVar[dict[str, str]] = {"SGLANG_REQ_RUNNING_TIMEOUT": "2"}
    running_timeout_num_wave1 = running_timeout_num_wave2 = 4
    running_timeout_sleep = 1
    running_timeout_max_new_tokens = 8000
