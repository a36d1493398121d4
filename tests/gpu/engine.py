"""One engine of the comparison in `test_models.py`, in a process of its own: python engine.py SPEC OUT"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

LENGTHS = (1, 5, 17, 63, 64, 65, 130, 257, 513, 900, 1025, 1500)
NEW_TOKENS = 12
CHUNK = 1024


def prompts() -> list[list[int]]:
    """Prompts on both sides of the limit of direct views and of a chunk; every third goes on where an earlier one
    ended, so that it finds a prefix in the radix cache."""
    draw = random.Random(0)
    result: list[list[int]] = []
    for index, length in enumerate(LENGTHS):
        known = result[index - 2] if index % 3 == 2 else []
        result.append([*known, *(draw.randrange(10, 2000) for _ in range(length - len(known)))])
    return result


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Every rank's answers, one request at a time on each, so that batches are the same; and the ranks' reports.

    An answer is the tokens, their log-probabilities, and for each the two highest log-probabilities.
    """
    import sglang

    engine = sglang.Engine(
        skip_tokenizer_init=True,
        attention_backend="triton",
        disable_custom_all_reduce=True,
        cuda_graph_max_bs_decode=4,
        chunked_prefill_size=CHUNK,
        max_prefill_tokens=CHUNK,
        max_total_tokens=8192,
        max_running_requests=12,  # shared out among ranks
        mem_fraction_static=0.9,  # of what the other engines leave; the number of tokens is what limits the cache
        log_level="info",
        **options,
    )
    ranks = options["tp_size"]
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}

    async def of_rank(rank: int) -> list[Any]:
        where = {"routed_dp_rank": rank} if ranks > 1 else {}
        answers = []
        for prompt in prompts():
            answer = await engine.async_generate(
                input_ids=prompt, sampling_params=sampling, return_logprob=True, top_logprobs_num=2, **where
            )
            meta = answer["meta_info"]
            chosen = [entry[0] for entry in meta["output_token_logprobs"]]
            best = [[entry[0] for entry in pair] for pair in meta["output_top_logprobs"]]
            answers.append((answer["output_ids"], chosen, best))
        return answers

    async def of_all() -> list[Any]:
        return await asyncio.gather(*(of_rank(rank) for rank in range(ranks)))

    answers = engine.loop.run_until_complete(of_all())
    states = engine.get_server_info()["internal_states"]
    return {"answers": answers, "reports": [state.get("dwdp") for state in states]}


if __name__ == "__main__":
    result = measure(json.loads(Path(sys.argv[1]).read_text()))
    out = Path(sys.argv[2])
    out.with_suffix(".part").write_text(json.dumps(result))
    out.with_suffix(".part").rename(out)
