"""Whether all ranks were given the same: a hash decides, and only where it differs the lines themselves travel."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

from sglang_dwdp.errors import DwdpSetupError
from sglang_dwdp.memory.handshake import Exchange

_NAMED = 4  # differences in a message


def check_same(exchange: Exchange, lines: Sequence[str], what: str) -> None:
    """Compare lines of text, none of which has a newline, on all ranks; all call this together.

    Args:
        exchange: With the peers.
        lines: This rank's.
        what: What a rank did whose lines differ, such as "loaded other experts".

    Raises:
        DwdpSetupError: They differ; it says how. Or a peer failed.
    """
    text = "\n".join(lines).encode()
    if len(set(exchange.all_gather(hashlib.sha256(text).digest()))) == 1:
        return
    texts = exchange.all_gather(text)
    peer = next(peer for peer, other in enumerate(texts) if other != text)
    pairs = zip_longest(lines, texts[peer].decode().split("\n"), fillvalue="nothing")
    different = [f"here {here}, there {there}" for here, there in pairs if here != there]
    more = f"; and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
    raise DwdpSetupError(f"rank {peer} {what}: {'; '.join(different[:_NAMED])}{more}")
