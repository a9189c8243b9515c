"""What clients may ask, and what they are told when it is something else."""

from __future__ import annotations

import json

import pytest

from shmroute.serving.completion import jobs_of
from shmroute.serving.protocol import NEUTRAL, ApiError, ChatRequest, CompletionRequest, parse


def completion(**fields):
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "hello"} | fields).encode())


def chat(**fields):
    asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}]} | fields
    return parse(ChatRequest, json.dumps(asked).encode())


def refusal(ask, **fields):
    with pytest.raises(ApiError) as caught:
        ask(**fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_is_text_or_tokens_one_or_several(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [5, [], [1, "a"], ["a", [1]], [True], {"a": 1}, [1.5], None])
def test_another_prompt_is_refused(prompt):
    assert refusal(completion, prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True),
        ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("n", 0), ("n", 129), ("n", 1.5), ("max_tokens", 0),
        ("stop", [""]), ("stop", ""), ("stop", [1]), ("stop", ["x"] * 17), ("stream", "yes"), ("seed", "x"),
        ("model", 3), ("echo", 1), ("stream_options", {"include_usage": True}), ("ignore_eos", "no"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_and_the_field_named(field, value):
    error = refusal(completion, **{field: value})
    assert (error.param, error.code) == (field, "invalid_value")
    assert field in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 0.5), ("logit_bias", {"5": 10}), ("logprobs", 0), ("logprobs", 3), ("logprobs", True),
        ("best_of", 2), ("suffix", "end"), ("tools", [{"type": "function"}]), ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}), ("min_p", 0.1), ("reasoning_effort", "high"),
    ],
)  # fmt: skip
def test_a_known_field_that_would_change_the_result_is_refused(field, value):
    error = refusal(completion, **{field: value})
    assert (error.param, error.code) == (field, "unsupported_parameter")


def test_an_unknown_field_is_refused():
    error = refusal(completion, temprature=0)
    assert (error.param, error.code) == ("temprature", "unknown_parameter")


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in NEUTRAL.items() for value in values])
def test_a_field_that_asks_for_nothing_is_accepted(field, value):
    assert completion(**{field: value}) == completion()


def test_nulls_are_defaults_and_harmless_fields_are_accepted():
    assert completion(temperature=None, stop=None, logprobs=None, user="me", store=True, metadata={}) == completion()


def test_a_number_may_be_written_as_another_kind_of_number():
    assert completion(presence_penalty=0.0, temperature=0).temperature == 0


@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b'{"model": "m", "prompt": "\xff"}', b"[" * 100_000])
def test_what_is_no_json_is_refused(body):
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"text"'])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, body)
    assert caught.value.status == 400


def test_a_missing_field_is_named():
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, b'{"prompt": "x"}')
    assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")


def test_messages_reach_the_template_as_text():
    asked = chat(
        messages=[
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]
    )
    assert [message.for_template() for message in asked.messages] == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "ab"},
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "hello",
    ],
)
def test_other_messages_are_refused(messages):
    assert refusal(chat, messages=messages).param == "messages"


def test_a_chat_has_one_limit():
    assert chat(max_tokens=3).limit == chat(max_completion_tokens=3).limit == 3
    assert chat(max_tokens=3, max_completion_tokens=3).limit == 3
    assert refusal(chat, max_tokens=3, max_completion_tokens=4).param == "max_tokens"


def test_errors_have_the_form_of_openais():
    assert refusal(completion, n=0).as_dict()["error"].keys() == {"message", "type", "param", "code"}
    assert ApiError(404, "x").as_dict()["error"]["type"] == "not_found_error"
    assert ApiError(429, "x").as_dict()["error"]["type"] == "rate_limit_error"
    assert ApiError(503, "x").as_dict()["error"]["type"] == "server_error"


def test_every_choice_of_every_prompt_is_a_job_and_choices_differ_in_their_seeds():
    jobs = jobs_of(completion(prompt=["a", "b"], n=3, seed=7, top_k=-1))
    assert [job.prompt for job in jobs] == ["a"] * 3 + ["b"] * 3
    assert len({job.seed for job in jobs}) == 3
    assert [job.seed for job in jobs[:3]] == [job.seed for job in jobs[3:]]
    assert jobs[0].top_k == 0
    assert jobs_of(completion(seed=7))[0].seed == jobs[0].seed
    assert jobs_of(completion())[0].seed != jobs_of(completion())[0].seed


def test_only_a_limit_that_nobody_asked_for_may_be_cut():
    (asked,), (default,), (talk,) = jobs_of(completion(max_tokens=5)), jobs_of(completion()), jobs_of(chat())
    assert (asked.max_tokens, asked.clip) == (5, False)
    assert (default.max_tokens, default.clip) == (16, True)
    assert talk.max_tokens is None
