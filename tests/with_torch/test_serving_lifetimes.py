"""Deaths, signals and wrong commands of `shmroute serve`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
import transformers
from family_models import SHIPPED
from served import Server, eventually, streamed

import shmroute
from shmroute.shared.segment import SHM, attach_segment, segment_path

PROMPT = "In the beginning God created"
LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 300, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def serve(servable, tmp_path):
    """``serve(*options, checkpoint=…)``: a server, of which nothing may be left at the end."""
    started = []

    def start(*options, checkpoint=servable):
        log = tmp_path / f"{os.urandom(4).hex()}.log"
        started.append(Server(checkpoint, log, "--port", "0", "--bonus", "0", "--served-model-name", "tiny", *options))
        return started[-1]

    yield start
    for server in started:
        server.end()
        assert not segment_path(server.name).exists()


def identifier(server):
    segment = attach_segment(server.name)
    uuid = segment.uuid
    segment.close()
    return uuid


def routed(server):
    """Tokens that each worker has routed, by pid."""
    with shmroute.attach(server.name) as runtime:
        return {worker.pid: worker.counters["tokens"] for worker in runtime.metrics().workers}


def first_text(stream):
    """A stream whose first chunk was read, and that chunk's text."""
    return next(iter(stream)).choices[0].text


# ------------------------------------------------------------------ deaths


def test_a_worker_killed_in_a_stream_costs_the_client_nothing(serve):
    server = serve("--workers", "2")
    client = server.client()
    whole = client.completions.create(**LONG).choices[0].text
    uuid = identifier(server)
    before = set(server.children("shmroute.serving.worker"))
    client.completions.create(**LONG | {"n": 2})  # so that both have routed
    earlier = routed(server)
    stream = client.completions.create(**LONG, stream=True)
    text = first_text(stream)
    now = routed(server)
    (victim,) = (pid for pid in before if now[pid] != earlier[pid])
    os.kill(victim, signal.SIGKILL)
    assert text + streamed(stream) == whole
    assert server.metric("shmroute_retries_total") == 1
    eventually(lambda: server.get("/health").json()["workers"] == 2)
    after = set(server.children("shmroute.serving.worker"))
    assert len(after) == 2
    assert len(before & after) == 1
    assert server.metric("shmroute_worker_deaths_total") == 1
    assert client.completions.create(**LONG).choices[0].text == whole
    assert server.stop() == 0
    assert not [path.name for path in SHM.iterdir() if uuid in path.name]


def test_the_only_worker_killed_in_a_stream_is_replaced_and_continues(serve):
    server = serve("--workers", "1")
    client = server.client()
    sampled = LONG | {"temperature": 0.8, "seed": 5}
    for asked in (LONG, sampled):
        whole = client.completions.create(**asked).choices[0].text
        deaths = server.metric("shmroute_worker_deaths_total")
        stream = client.completions.create(**asked, stream=True)
        text = first_text(stream)
        (victim,) = server.children("shmroute.serving.worker")
        os.kill(victim, signal.SIGKILL)
        assert text + streamed(stream) == whole
        assert server.metric("shmroute_worker_deaths_total") == deaths + 1
    assert server.metric("shmroute_retries_total") == 2


def test_a_request_that_outlives_two_workers_fails_and_the_server_lives_on(serve):
    server = serve("--workers", "1")
    client = server.client()
    stream = client.completions.create(**LONG, stream=True)
    first_text(stream)
    for retries in (0, 1):
        eventually(lambda n=retries: server.metric("shmroute_retries_total") == n)
        eventually(lambda: server.metric("shmroute_jobs_running") == 1)
        (victim,) = server.children("shmroute.serving.worker")
        os.kill(victim, signal.SIGKILL)
        eventually(lambda n=retries: server.metric("shmroute_worker_deaths_total") == n + 1)
    with pytest.raises(openai.APIError, match="died"):
        streamed(stream)
    assert client.completions.create(**LONG).usage.completion_tokens == 300


def test_a_pager_killed_in_a_stream_is_replaced_and_the_cache_is_warm(serve):
    server = serve("--workers", "2")
    client = server.client()
    whole = client.completions.create(**LONG).choices[0].text
    stream = client.completions.create(**LONG, stream=True)
    text = first_text(stream)
    (victim,) = server.children("shmroute.pager")
    os.kill(victim, signal.SIGKILL)
    assert text + streamed(stream) == whole
    server.says("a pager is at work again")
    assert server.metric("shmroute_pager_restarts_total") == 1
    assert server.metric("shmroute_experts_resident") > 12
    assert server.metric("shmroute_worker_deaths_total") == 0
    assert server.children("shmroute.pager") != [victim]
    assert client.completions.create(**LONG).choices[0].text == whole


def test_workers_and_pager_end_when_the_server_is_killed(serve):
    server = serve("--workers", "2")
    server.says("ready at")
    uuid = identifier(server)
    pids = server.children("shmroute.serving.worker") + server.children("shmroute.pager")
    assert len(pids) == 3
    server.process.kill()
    server.process.wait()
    for pid in pids:
        eventually(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
    eventually(lambda: not [path for path in SHM.iterdir() if uuid in path.name or path.name.endswith(server.name)])


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_turns_away_new_ones(serve, number):
    server = serve("--workers", "1", "--drain-timeout", "100")
    client, url = server.client(), server.url
    whole = client.completions.create(**LONG).choices[0].text
    with ThreadPoolExecutor(1) as threads:
        stream = client.completions.create(**LONG, stream=True)
        text = first_text(stream)
        waiting = threads.submit(client.completions.create, **LONG)  # behind it in the queue: under way as well
        eventually(lambda: server.metric("shmroute_jobs_waiting") == 1)
        server.process.send_signal(number)
        server.says("stopping when 2 requests are finished")
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**LONG)
        assert (caught.value.status_code, caught.value.code) == (503, "stopping")
        assert httpx.get(url + "/health").status_code == 503
        assert text + streamed(stream) == whole
        assert waiting.result().choices[0].text == whole
    assert server.process.wait(60) == 0


def test_a_second_signal_stops_at_once(serve):
    server = serve("--workers", "1", "--drain-timeout", "100")
    stream = server.client().completions.create(**LONG | {"max_tokens": 500}, stream=True)
    first_text(stream)
    server.process.send_signal(signal.SIGTERM)
    server.says("stopping when 1 requests are finished")
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="stopping"):
        streamed(stream)
    assert server.process.wait(60) == 1
    assert "1 requests were cut off" in server.messages


def test_requests_that_take_too_long_are_cut_off(serve):
    server = serve("--workers", "1", "--drain-timeout", "0")
    stream = server.client().completions.create(**LONG | {"max_tokens": 500}, stream=True)
    first_text(stream)
    assert server.stop() == 1
    with pytest.raises(openai.APIError, match="stopping"):
        streamed(stream)


def test_an_idle_server_and_one_that_loads_stop_with_0(serve):
    idle = serve("--workers", "1")
    idle.says("ready at")
    assert idle.stop() == 0
    loading = serve("--workers", "1")
    loading.says("0 of 1 workers")
    assert loading.stop() == 0
    assert "stopped before it was ready" in loading.messages


# ------------------------------------------------------------------ wrong commands


def test_a_taken_port_is_refused_before_anything_is_made(serve):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = serve("--port", str(other.getsockname()[1]))
        assert server.process.wait(60) == 1
    assert "ServingError: cannot listen at 127.0.0.1 port" in server.messages
    assert "Address already in use" in server.messages
    assert "loading" not in server.messages


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--workers", "0"), "--workers must be an integer from 1 to 32, not 0"),
        (("--workers", "33"), "--workers must be an integer from 1 to 32, not 33"),
        (("--budget", "1kB"), "1kB"),
        (("--budget", "much"), "no size"),
        (("--port", "70000"), "--port must be an integer from 0 to 65535"),
        (("--threads", "0"), "--threads must be"),
        (("--max-model-len", "1000"), "the model was made for 512"),
        (("--max-model-len", "1"), "2 or more"),
        (("--chat-template", "/nowhere.jinja"), "--chat-template /nowhere.jinja cannot be read"),
        (("--drain-timeout", "-1"), "--drain-timeout"),
        (("--trace-logits",), "needs --trace"),
        (("--rule", "nonsense"), "nonsense"),
        (("--host-share", "2"), "host_share must be"),
        (("--device", "cuda:0"), "--device is cuda:0 and --device-budget None: give both"),
        (("--device", "cuda:0", "--device-budget", "3%"), "a device budget of '3%' holds 1 experts"),
    ],
)
def test_wrong_settings_are_refused(serve, options, says):
    server = serve(*options)
    assert server.process.wait(60) == 2
    assert says in server.messages


def test_a_host_that_is_none_is_refused(serve):
    server = serve("--host", "no such host")
    assert server.process.wait(60) == 1
    assert "is none to listen at" in server.messages


def test_a_folder_that_is_no_checkpoint_is_refused(serve, tmp_path):
    server = serve(checkpoint=tmp_path / "nothing")
    assert server.process.wait(60) == 1
    assert "CheckpointError" in server.messages


def test_a_checkpoint_without_a_tokenizer_is_refused_by_the_first_worker(serve, shipped_float32):
    server = serve("--workers", "2", checkpoint=shipped_float32)
    assert server.process.wait(60) == 1
    assert re.search(r"ServingError: no worker can load the model: CheckpointError: .*tokenizer", server.messages)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: nothing to refuse")
def test_a_gpu_that_is_not_there_is_refused_by_the_first_worker(serve):
    server = serve("--workers", "1", "--device", "cuda:0", "--device-budget", "50%")
    assert server.process.wait(60) == 1
    assert re.search(r"no worker can load the model: ConfigError: device is 'cuda:0', but torch", server.messages)


# ------------------------------------------------------------------ other checkpoints


def test_an_end_token_of_the_checkpoint_ends_the_text(serve, servable, tmp_path):
    """The shipped model does not end a text by itself, so a token that it does give is made one of two end tokens."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(servable / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(servable)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :].tolist()
    end = tokens[12]
    folder = tmp_path / "ending"
    shutil.copytree(servable, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, end]}))
    client = serve("--workers", "1", checkpoint=folder).client()
    asked = {key: value for key, value in LONG.items() if key != "extra_body"}
    answer = client.completions.create(**asked)
    assert answer.choices[0].text == tokenizer.decode(tokens[: tokens.index(end)])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == tokens.index(end) + 1
    assert streamed(client.completions.create(**asked, stream=True)) == answer.choices[0].text
    assert client.completions.create(**LONG).usage.completion_tokens == 300  # told to ignore it


def test_a_checkpoint_without_a_template_says_what_to_do(serve):
    server = serve("--workers", "1", checkpoint=SHIPPED)
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "no_chat_template"
    assert "--chat-template FILE" in caught.value.message


def test_a_template_that_refuses_is_the_clients_matter(serve, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('roles must alternate') }}")
    server = serve("--workers", "1", "--chat-template", str(template), checkpoint=SHIPPED)
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        server.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_what_is_served_is_recorded(serve, tmp_path):
    server = serve("--workers", "1", "--trace", str(tmp_path / "traces"))
    server.client().completions.create(**LONG)
    assert server.stop() == 0
    assert list((tmp_path / "traces").iterdir())
