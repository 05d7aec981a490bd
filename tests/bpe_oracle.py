"""Byte-level BPE as slowly and plainly as it can be written: the truth for small corpora.

Source: Sennrich et al. 2016, algorithm 1, on bytes instead of characters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

# GPT-2's pre-tokens, for ASCII text.
PRE_TOKEN = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
)
Word = tuple[bytes, ...]


def words(text: str) -> list[Word]:
    """Cut a text into pre-tokens, each as its bytes."""
    return [tuple(bytes([byte]) for byte in match.encode()) for match in PRE_TOKEN.findall(text)]


def merged(word: Word, pair: tuple[bytes, bytes]) -> Word:
    """Join each occurrence of `pair`, from the left."""
    out: list[bytes] = []
    at = 0
    while at < len(word):
        if word[at : at + 2] == pair:
            out.append(pair[0] + pair[1])
            at += 2
        else:
            out.append(word[at])
            at += 1
    return tuple(out)


def learn(
    texts: Iterable[str], vocab: Sequence[bytes], vocab_size: int
) -> list[tuple[bytes, bytes]]:
    """Merge the most frequent pair, among equals the one of the smallest ids, again and again."""
    id_of = {token: id_ for id_, token in enumerate(vocab)}
    counts = Counter(word for text in texts for word in words(text))
    merges: list[tuple[bytes, bytes]] = []
    while len(id_of) < vocab_size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in counts.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], id_of[pair[0]], id_of[pair[1]]))
        merges.append(best)
        id_of.setdefault(best[0] + best[1], len(id_of))
        counts = Counter({merged(word, best): count for word, count in counts.items()})
    return merges


def encode(text: str, merges: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    """Apply the merges in the order they were learned."""
    tokens: list[bytes] = []
    for word in words(text):
        for pair in merges:
            word = merged(word, pair)
        tokens += word
    return tokens
