"""16 prompts of mixed length, from 1 to about 600 tokens."""

from pydoc_data.topics import topics

MAX_NEW_TOKENS = 8
_WORDS = " ".join(" ".join(topics[name].split()) for name in ("class", "with", "for", "lambda", "import")).split()
_LENGTHS = (1, 2, 3, 5, 8, 12, 17, 25, 37, 55, 80, 110, 150, 190, 230, 270)  # words; a word is about two tokens

PROMPTS = tuple(" ".join(_WORDS[7 * i : 7 * i + length]) for i, length in enumerate(_LENGTHS))
