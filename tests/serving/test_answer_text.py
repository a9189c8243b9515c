"""Tokens to text: whole characters, stop strings, and the reason of the end, whatever the pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shmroute.serving.answer_text import AnswerText
from shmroute.serving.detokenization import Detokenizer
from shmroute.serving.stop_strings import StopStrings

EOS = 256


def decode(tokens):
    """A tokenizer whose tokens are bytes, as the shipped model's rare characters are; others have no text."""
    return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


def expected(text, stops):
    """The text before the stop string that is complete first, of several the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - len(max(ending, key=len))], True
    return text, False


@given(st.text(), st.lists(st.integers(0, 255), max_size=8))
def test_pieces_are_whole_characters_and_add_up_to_the_text(text, prompt):
    tokens = list(text.encode())
    detokenizer = Detokenizer(decode, [*prompt, ord(".")])
    pieces = [detokenizer.add(token) for token in tokens]
    assert "".join(pieces) + detokenizer.flush() == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 255)))
def test_bytes_that_are_no_text_are_replaced_and_lose_nothing_around_them(tokens):
    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.add(token) for token in tokens) + detokenizer.flush()
    assert text.replace("\ufffd", "") == decode(tokens).replace("\ufffd", "")


def test_a_token_is_decoded_with_the_prompt_before_it():
    words = ["Hello", "▁world", "▁again"]

    def sentencepiece(tokens):
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    detokenizer = Detokenizer(sentencepiece, [0])
    assert [detokenizer.add(1), detokenizer.add(2)] == [" world", " again"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_do_not_depend_on_the_pieces(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    strings, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += strings.add(piece)
        assert expected(text, stops)[0].startswith(shown)
        if strings.matched:
            break
    else:
        shown += strings.flush()
    assert (shown, strings.matched) == expected(text, stops)


@given(
    st.lists(st.one_of(st.integers(0, 255), st.just(EOS), st.sampled_from(list(b"ab"))), min_size=1, max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
    st.integers(1, 20),
)
def test_an_answer_ends_and_its_tokens_give_the_same_pieces_again(tokens, stops, max_tokens):
    def run():
        answer, pieces = AnswerText(decode, [], stops, {EOS}, max_tokens), []
        for token in tokens:
            pieces.append(answer.add(token))
            if answer.ended:
                break
        return pieces, answer.ended

    pieces, ended = run()
    assert run() == (pieces, ended)
    text = "".join(pieces)
    assert not any(stop in text for stop in stops)
    if ended == "length":
        assert len(pieces) == max_tokens
    elif ended is None:
        assert len(pieces) == len(tokens) < max_tokens
    else:
        assert ended == "stop"


def test_the_end_shows_what_was_held_back():
    answer = AnswerText(decode, [], ["abc"], {EOS}, 10)
    assert [answer.add(token) for token in b"xab"] == ["x", "", ""]
    assert answer.add(EOS) == "ab"
    assert answer.ended == "stop"


def test_a_limit_shows_half_a_character_as_what_it_is():
    answer = AnswerText(decode, [], [], {EOS}, 2)
    assert [answer.add(token) for token in "aé".encode()[:2]] == ["a", "\ufffd"]
    assert answer.ended == "length"
