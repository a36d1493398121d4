"""The requests of the demo: the same ones for every server, each with a name and greedy answers."""

from __future__ import annotations

from pydoc_data.topics import topics

from sglang_dwdp.demo.server import Server

MAX_NEW_TOKENS = 16
_TEXT = " ".join(topics["class"].split())

# From a few tokens to several hundred: with --dwdp-view auto, short ones run on direct views and the long one's
# prefill on staged ones.
PROMPTS = (
    "The class statement",
    "A decorator is called with",
    _TEXT[:200],
    _TEXT[300:900],
    _TEXT[: 3 * 900],
)


def generate(server: Server, rank: int) -> list[list[int]]:
    """`/generate`, all prompts on one rank: their tokens."""
    return [server.generate(prompt, MAX_NEW_TOKENS, rank) for prompt in PROMPTS]


def chat(server: Server) -> str:
    """`/v1/chat/completions`: the answer's text."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "What does the with statement do?"}],
        "temperature": 0,
        "max_tokens": MAX_NEW_TOKENS,
    }
    answer = server.post("/v1/chat/completions", body)
    text: str = answer["choices"][0]["message"]["content"]
    return text


def frontend(server: Server) -> tuple[str, str, str]:
    """A frontend program that forks: both branches' texts, and what is generated after they joined."""
    import sglang as sgl

    @sgl.function
    def compare(s, first, second):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        s += "Two statements of the language. "
        forks = s.fork(2)
        for fork, word in zip(forks, (first, second), strict=True):
            fork += f"The {word} statement"
            fork += sgl.gen("text", max_tokens=MAX_NEW_TOKENS, temperature=0)
        s += f"One: {forks[0]['text']} Other: {forks[1]['text']} Both:"
        s += sgl.gen("both", max_tokens=MAX_NEW_TOKENS, temperature=0)
        s["first"], s["second"] = forks[0]["text"], forks[1]["text"]

    state = compare.run("while", "for", backend=sgl.RuntimeEndpoint(server.url))
    return state["first"], state["second"], state["both"]
