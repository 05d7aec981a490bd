"""Does the tokenizer give back any bytes, and the ids that plain BPE would give?"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import bpe_oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cs336_systems.errors import UsageError
from cs336_systems.train.corpus import END_OF_TEXT, CorpusConfig, Piece, read_corpus
from cs336_systems.train.tokenizer import BpeTokenizer, about_path, train

SPECIALS = (END_OF_TEXT, "<|pad|>")
TRAPS = (
    "",
    "\0",
    "🙂👩‍👩‍👧",
    END_OF_TEXT,
    f"a{END_OF_TEXT}{END_OF_TEXT} b",
    "<|endoftext|",
    " \n\n  ",
)


def pieces_of(*texts: str) -> list[Piece]:
    return [Piece(text, True, "train") for text in texts]


@functools.cache
def builtin() -> BpeTokenizer:
    """Trained once for the tests that only encode."""
    return train(read_corpus(CorpusConfig(megabytes=0.3)), 1000, SPECIALS)


any_text = st.lists(
    st.one_of(st.text(), st.sampled_from((*SPECIALS, "<|", "|>", " the", "🙂", "\0")))
).map("".join)


@given(text=any_text, special=st.booleans())
def test_any_text_comes_back(text: str, special: bool) -> None:
    ids = builtin().encode(text, special=special)
    assert builtin().decode(ids) == text
    specials = set(builtin().special_tokens.values())
    num_special = sum(id_ in specials for id_ in ids)
    expected = text.count(END_OF_TEXT) + text.count("<|pad|>") if special else 0
    assert num_special == expected


@pytest.mark.parametrize("text", TRAPS)
@pytest.mark.parametrize("special", [True, False])
def test_texts_with_traps_come_back(text: str, special: bool) -> None:
    assert builtin().decode(builtin().encode(text, special=special)) == text


@given(data=st.one_of(st.binary(), any_text.map(str.encode)), special=st.booleans())
@example(data=bytes(range(256)), special=True)
@example(data=b"ok \xed\xa0\x80\xff<|endoftext|>\xc3", special=True)
def test_any_bytes_come_back(data: bytes, special: bool) -> None:
    ids = builtin().encode_bytes(data, special=special)
    assert builtin().decode_bytes(ids) == data


@given(text=any_text)
def test_bytes_and_text_agree(text: str) -> None:
    assert builtin().encode_bytes(text.encode()) == builtin().encode(text)


ascii_text = st.text("aab bcc \n12'.sS", min_size=1, max_size=60)


@given(texts=st.lists(ascii_text, min_size=1, max_size=6), unseen=ascii_text)
@example(texts=["low low low lower newest newest wider"], unseen="lowest it's  12 ...")
@example(texts=["aaaa aaa aa"], unseen="aaaaaaa")
def test_merges_and_ids_are_those_of_plain_bpe(texts: list[str], unseen: str) -> None:
    tokenizer = train(pieces_of(*texts), 257 + 40)
    vocab = [tokenizer.decode_bytes([id_]) for id_ in range(tokenizer.vocab_size)]
    merges = bpe_oracle.learn(texts, vocab[:257], 257 + 40)
    # Two merges may make the same token: a+aa and aa+a.
    assert vocab[257:] == list(dict.fromkeys(first + second for first, second in merges))
    for text in (*texts, unseen):
        assert [vocab[id_] for id_ in tokenizer.encode(text)] == bpe_oracle.encode(text, merges)


def test_training_twice_gives_the_same_file() -> None:
    again = train(read_corpus(CorpusConfig(megabytes=0.3)), 1000, SPECIALS)
    assert again.json_text == builtin().json_text
    assert again.trained_on == builtin().trained_on
    assert again.vocab_size == 1000


def test_special_tokens_and_bytes_have_the_first_ids() -> None:
    assert builtin().special_tokens == {END_OF_TEXT: 0, "<|pad|>": 1}
    assert builtin().end_of_text == 0
    singles = [builtin().decode_bytes([id_]) for id_ in range(2, 258)]
    assert sorted(singles) == [bytes([byte]) for byte in range(256)]


def test_only_the_training_split_is_learned_from() -> None:
    held_out = Piece("zq" * 500, True, "validation")
    text = pieces_of("some words and some more words")
    assert train([held_out, *text], 300).json_text == train(text, 300).json_text


def test_what_it_was_trained_on_is_recorded() -> None:
    first = train(pieces_of("ab", "é"), 300).trained_on
    other = train(pieces_of("a", "bé"), 300).trained_on
    assert (first.num_documents, first.num_bytes) == (2, 4)
    assert first.corpus_sha256 != other.corpus_sha256


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    builtin().save(path)
    loaded = BpeTokenizer.load(path)
    assert loaded.sha256 == builtin().sha256
    assert loaded.trained_on == builtin().trained_on
    text = f"Once upon a time 🙂{END_OF_TEXT}"
    # Others read it with the library alone.
    assert Tokenizer.from_file(str(path)).encode(text).ids == loaded.encode(text)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "tokenizer.about.json",
        "tokenizer.json",
    ]


def _other(path: Path) -> None:
    path.write_text(train(pieces_of("other"), 300).json_text)


def _no_hash(path: Path) -> None:
    about_path(path).write_text(json.dumps({"trained_on": {}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"tokenizer\.json: No such file"),
        (lambda path: about_path(path).unlink(), r"about\.json: No such file"),
        (lambda path: path.write_text(path.read_text()[:-100]), "is damaged: "),
        (lambda path: path.write_bytes(b"\xff"), "is damaged: "),
        (_no_hash, "is damaged: 'tokenizer_sha256'"),
        (_other, "must have sha256 "),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    builtin().save(path)
    damage(path)
    with pytest.raises(UsageError, match=message) as caught:
        BpeTokenizer.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocab_size", "specials", "message"),
    [
        (9, (END_OF_TEXT,), "vocab_size must be at least 257 (every byte and 1 special), got 9"),
        (257, SPECIALS, "vocab_size must be at least 258 (every byte and 2 special), got 257"),
        (300, (END_OF_TEXT, "pad"), "special token must look like <|name|>, got 'pad'"),
        (300, (END_OF_TEXT, "<||>"), "special token must look like <|name|>, got '<||>'"),
        (
            300,
            ("<|pad|>",),
            "special_tokens must include <|endoftext|> and be different, got ['<|pad|>']",
        ),
    ],
)
def test_a_vocabulary_that_cannot_be(vocab_size: int, specials: tuple, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        train(pieces_of("text"), vocab_size, specials)
    assert str(caught.value) == f"tokenizer: {message}"


def test_the_smallest_vocabulary_is_the_bytes() -> None:
    assert train(pieces_of("text text"), 257).encode("text") == [
        1 + b"text"[at] - 0x21 for at in range(4)
    ]


def test_a_corpus_without_training_text() -> None:
    with pytest.raises(UsageError, match="corpus must hold at least 2 documents"):
        train([Piece("only one", True, "validation")], 300)


@pytest.mark.parametrize("id_", [-1, 1000])
def test_an_id_outside_the_vocabulary(id_: int) -> None:
    with pytest.raises(UsageError, match=rf"id must be in \[0, 1000\), got {id_}"):
        builtin().decode([5, id_])


def test_a_lone_surrogate_has_no_utf8() -> None:
    with pytest.raises(UsageError, match="UTF-8 form: lone surrogate at character 2"):
        builtin().encode("ab\ud800")
