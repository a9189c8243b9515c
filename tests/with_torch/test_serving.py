"""`shmroute serve` as its clients see it: a real server, OpenAI's own client."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
import transformers
from family_models import SHIPPED
from served import Server, eventually, streamed

PROMPT = "In the beginning God created"
QUESTION = [{"role": "system", "content": "A chat."}, {"role": "user", "content": "What is anarchism?"}]
TEMPLATE = SHIPPED.parent / "chat-template.jinja"


@pytest.fixture(scope="module")
def server(servable, tmp_path_factory):
    """Two workers, no bonus: so that what they give does not depend on what is resident."""
    log = tmp_path_factory.mktemp("server") / "shared.log"
    running = Server(
        servable, log, "--workers", "2", "--port", "0", "--bonus", "0", "--chat-template", str(TEMPLATE),
        "--served-model-name", "tiny", "--max-queue", "4", "--verbose",
    )  # fmt: skip
    assert "(2 workers, 24 of 48 experts in slots)" in running.says(r"ready at.*")[0]
    yield running
    running.end()


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference(servable, tokenizer):
    """``reference(text, count)``: what Transformers alone generates greedily after a text: tokens, and their text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(servable, dtype=torch.float32)

    def generate(text, count):
        ids = tokenizer(text, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
        return output.tolist(), tokenizer.decode(output, skip_special_tokens=True)

    return generate


def complete(client, prompt=PROMPT, **fields):
    return client.completions.create(model="tiny", prompt=prompt, **({"max_tokens": 24, "temperature": 0} | fields))


def chat(client, **fields):
    asked = {"max_tokens": 24, "temperature": 0, "messages": QUESTION} | fields
    return client.chat.completions.create(model="tiny", **asked)


# ------------------------------------------------------------------ answers


def test_a_greedy_completion_is_what_transformers_alone_generates(client, reference, tokenizer):
    tokens, text = reference(PROMPT, 24)
    answer = complete(client)
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"
    prompt_tokens = len(tokenizer(PROMPT).input_ids)
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.completion_tokens == len(tokens) == 24
    assert answer.usage.total_tokens == prompt_tokens + 24
    assert (answer.object, answer.model) == ("text_completion", "tiny")


def test_a_stream_has_the_same_text_in_pieces(client):
    whole = complete(client).choices[0].text
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole
    assert len(pieces) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_a_stream_has_none(client):
    chunks = list(complete(client, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_a_chat_goes_through_the_template(client, reference):
    asked = "A chat.\n\nUser: What is anarchism?\nAssistant:"
    answer = chat(client)
    assert answer.choices[0].message.content == reference(asked, 24)[1]
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 24
    assert chat(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=5).usage.completion_tokens == 5


def test_a_chat_streams(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat(client).choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[0].object == "chat.completion.chunk"


def test_a_chat_without_a_limit_fills_the_context(client):
    answer = chat(client, max_tokens=openai.NOT_GIVEN, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_prompts_may_be_tokens_and_several(client, tokenizer):
    other = "Anarchism is"
    texts = complete(client, prompt=[PROMPT, other])
    ids = complete(client, prompt=[tokenizer(PROMPT).input_ids, tokenizer(other).input_ids])
    assert [choice.text for choice in texts.choices] == [choice.text for choice in ids.choices]
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert texts.choices[0].text == complete(client).choices[0].text
    assert texts.usage.prompt_tokens == len(tokenizer(PROMPT).input_ids) + len(tokenizer(other).input_ids)


def test_echo_begins_with_the_prompt(client, tokenizer):
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + plain
    assert complete(client, prompt=tokenizer(PROMPT).input_ids, echo=True).choices[0].text == PROMPT + plain
    assert streamed(complete(client, echo=True, stream=True)) == PROMPT + plain


def test_a_stop_string_ends_the_text_before_it(client):
    whole = complete(client).choices[0].text
    stop = whole[10:14]
    for stops in (stop, ["never to be seen", stop]):
        answer = complete(client, stop=stops)
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert streamed(complete(client, stop=stops, stream=True)) == whole[: whole.index(stop)]


def test_choices_differ_and_a_seed_makes_them_come_again(client):
    first = complete(client, n=3, temperature=1, seed=11)
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert [choice.text for choice in complete(client, n=3, temperature=1, seed=11).choices] == texts
    assert complete(client, temperature=1, seed=11).choices[0].text == texts[0]
    assert complete(client, temperature=1, seed=12).choices[0].text != texts[0]
    assert first.usage.completion_tokens == 72
    assert first.usage.prompt_tokens == complete(client).usage.prompt_tokens


def test_choices_stream_side_by_side(client):
    texts = {0: "", 1: ""}
    for chunk in complete(client, n=2, temperature=1, seed=11, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [choice.text for choice in complete(client, n=2, temperature=1, seed=11).choices]


@pytest.mark.parametrize("fields", [{"top_p": 1e-9}, {"extra_body": {"top_k": 1}}])
def test_a_narrow_choice_is_greedy(client, fields):
    greedy = complete(client).choices[0].text
    assert complete(client, temperature=1, seed=3, **fields).choices[0].text == greedy


def test_requests_at_once_are_spread_over_the_workers(server, client):
    def busiest():
        return server.metric("shmroute_jobs_running") == 2

    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(complete, client, max_tokens=200) for _ in range(6)]
        eventually(busiest)
        texts = {answer.result().choices[0].text for answer in answers}
    assert texts == {complete(client, max_tokens=200).choices[0].text}
    eventually(lambda: server.metric("shmroute_jobs_running") == server.metric("shmroute_jobs_waiting") == 0)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"logprobs": 2}, "logprobs", "not supported"),
        ({"extra_body": {"temprature": 1}}, "temprature", "not known"),
        ({"prompt": [5000]}, "prompt", "0 to 2047"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"max_tokens": 600}, "prompt", "holds 512 tokens, but the prompt has 8 and 600"),
        ({"prompt": [1] * 512}, "prompt", "holds 512 tokens, but the prompt has 512"),
        ({"n": 7}, "n", "2 workers and a queue of 4"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_field_and_the_reason(client, fields, param, says):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, stream=stream, **fields)
        assert caught.value.param == param
        assert says in caught.value.message


def test_a_default_limit_is_cut_to_what_there_is_room_for(client):
    answer = client.completions.create(model="tiny", prompt=[1] * 508, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 4


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == ("tiny", "shmroute", 512)
    assert client.models.retrieve("tiny").id == "tiny"


def test_malformed_json_is_refused(server):
    response = server.post("/v1/completions", b'{"model": "tiny", ')
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_unknown_routes_and_methods_are_refused_in_the_same_form(server):
    missing, wrong = server.get("/v1/nothing"), server.get("/v1/completions")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")


def test_too_large_a_body_is_refused(server):
    response = server.post("/v1/completions", {"model": "tiny", "prompt": "x" * (17 << 20)})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")


def test_a_full_queue_refuses_and_recovers(server, client):
    long = {"max_tokens": 500, "extra_body": {"ignore_eos": True}, "stream": True}
    streams = [complete(client, **long) for _ in range(2)]  # each has begun, so both workers are busy
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(complete, client) for _ in range(4)]
        eventually(lambda: server.metric("shmroute_jobs_waiting") == 4)
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client)
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"]
        for stream in streams:
            stream.close()
        assert len({answer.result().choices[0].text for answer in waiting}) == 1


# ------------------------------------------------------------------ clients that leave, and what is counted


def test_a_client_that_leaves_stops_its_generation(server, client):
    already = len(server.messages)
    stream = complete(client, max_tokens=400, extra_body={"ignore_eos": True}, stream=True)
    next(iter(stream))
    stream.close()
    eventually(lambda: "disconnected" in server.messages[already:])
    eventually(lambda: server.metric("shmroute_jobs_running") == 0)
    tokens = int(re.search(r"disconnected: \d+ \+ (\d+) tokens", server.messages[already:])[1])
    assert 0 < tokens < 400


def test_a_client_that_leaves_without_a_stream_stops_it_too(server):
    impatient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=0.3)
    before = server.messages.count("disconnected")
    with pytest.raises(openai.APITimeoutError):
        complete(impatient, n=6, max_tokens=500, prompt="x", extra_body={"ignore_eos": True})
    eventually(lambda: server.messages.count("disconnected") > before)
    eventually(lambda: server.metric("shmroute_jobs_running") == server.metric("shmroute_jobs_waiting") == 0)


def test_health_and_metrics(server, client):
    health = server.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "workers": 2, "of": 2})
    hits, loads = server.metric("shmroute_routing_hits_total"), server.metric("shmroute_pager_loads_total")
    complete(client)
    assert server.metric("shmroute_routing_hits_total") > hits
    assert server.metric("shmroute_pager_loads_total") >= loads > 0
    assert 0 < server.metric("shmroute_experts_resident") <= server.metric("shmroute_slots") == 24
    assert 'shmroute_requests_total{route="/v1/completions",status="200"}' in server.get("/metrics").text


def test_the_serving_process_never_imports_torch(server):
    def maps(pid):
        return Path(f"/proc/{pid}/maps").read_text()

    assert "libtorch" not in maps(server.process.pid)
    assert all("libtorch" in maps(pid) for pid in server.children("shmroute.serving.worker"))
