"""`shmroute stat`: what it shows, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from cli_programs import CHECKPOINT
from runtimes import Residency, small_config, unique_name

from shmroute.cli.output import human_bytes, human_duration, human_share
from shmroute.cli.stat import with_interval
from shmroute.config import RouterConfig
from shmroute.lifecycle import create
from shmroute.shared.atomic import WORD
from shmroute.shared.lanes import lane_identities
from shmroute.shared.layout import HEADER_TURNED_DOWN, LANE_SHARD, LANE_WAIT
from shmroute.shared.metrics import LaneCounter, Predictor
from shmroute.shared.words import pack_wait


def test_json_has_the_documented_keys_and_takes_no_lane(cli, segment, name):
    result = cli("stat", name, "--json")
    assert lane_identities(segment) == {}
    shot = json.loads(result.stdout)
    assert shot["name"] == name
    assert shot["uuid"] == segment.uuid
    assert shot["state"] == "live"
    assert shot["checkpoint"] == str(CHECKPOINT)
    assert (shot["num_layers"], shot["num_experts"], shot["top_k"], shot["slots"]) == (6, 8, 2, 24)
    assert shot["budget_bytes"] == 24 * shot["slot_bytes"]
    assert shot["total_bytes"] == shot["budget_bytes"] + shot["control_bytes"] == len(segment.buffer)
    assert 0 < shot["slot_header_bytes"] < shot["control_bytes"]
    assert shot["owner"] == {"pid": os.getpid(), "state": "alive"}
    assert shot["pager"] == shot["standby"] == {"pid": None, "state": "none"}
    assert shot["workers"] == []
    assert shot["hit_rate"] is None
    assert shot["pager_counters"].keys() >= {"loads", "evictions", "bytes_read", "failures", "prefetches", "queued"}
    assert len(shot["layers"]) == 6
    assert shot["layers"][5].keys() == {
        "layer", "number", "resident", "requested", "loading", "failed", "leased", "bonus", "spent", "adjustments",
    }  # fmt: skip


def test_a_quality_budget_is_shown_with_what_each_layer_spends(cli):
    router = RouterConfig(quality_budget=0.05, budget_measure="changed")
    with create(unique_name(), small_config(router=router), progress=None) as runtime:
        Residency(runtime).load(0, 0, 2, 4, 6)
        plain = cli("stat", runtime.name).stdout
        assert "5.00% of a token (changed)" in plain
        assert re.search(r"SPENT\s+ADJUSTED\n\s*0 .* -\s+0\n", plain)
        logits = np.random.default_rng(0).normal(0, 1, (4000, 8)).astype(np.float32)
        for batch in np.split(logits, 40):
            runtime.router(0).route(batch)
        layer = json.loads(cli("stat", runtime.name, "--json").stdout)["layers"][0]
    assert layer["adjustments"] >= 10
    assert layer["spent"] == pytest.approx(0.05, rel=0.5)
    assert layer["bonus"] != 0.15


def test_predictors_that_are_turned_down_are_shown_with_what_workers_withheld(cli, segment, name):
    assert json.loads(cli("stat", name, "--json").stdout)["turned_down"] == []
    assert "turned down" not in cli("stat", name).stdout
    segment.write(HEADER_TURNED_DOWN, 1 << Predictor.GATE | 1 << Predictor.TRANSITIONS)
    segment.write(segment.layout.lane(0) + LANE_SHARD + LaneCounter.WITHHELD * WORD, 17)
    shot = json.loads(cli("stat", name, "--json").stdout)
    assert shot["turned_down"] == ["transitions", "gate"]
    assert shot["total"]["withheld"] == 17
    shown = re.sub(r"\s+", " ", cli("stat", name).stdout)
    assert "turned down now: transitions, gate; 17 speculations withheld" in shown


def test_what_gpus_did_is_shown_once_they_did_something(cli, segment, name):
    assert "GPU" not in cli("stat", name).stdout
    for counter, value in ((LaneCounter.HITS, 30), (LaneCounter.MISSES, 10), (LaneCounter.DEVICE_HITS, 20),
                           (LaneCounter.DEVICE_COPIES, 5)):  # fmt: skip
        segment.write(segment.layout.lane(0) + LANE_SHARD + counter * WORD, value)
    copied = human_bytes(5 * segment.config.expert_bytes)
    wanted = f"hit rate {human_share(0.5)}, 5 experts copied ({copied})"
    assert re.search(rf"GPU +{re.escape(wanted)}", cli("stat", name).stdout)
    total = json.loads(cli("stat", name, "--json").stdout)["total"]
    assert (total["device_hits"], total["device_copies"]) == (20, 5)


def test_every_key_is_in_the_help(cli, segment, name):
    shot = json.loads(cli("stat", name, "--json").stdout)
    words = set(re.findall(r"\w+", cli("stat", "--help").stdout))
    assert shot.keys() | shot["layers"][0].keys() <= words


def test_a_worker_is_shown_alive_stopped_and_dead(pager, worker, cli, segment, name):
    client = worker()
    client.process.stdin.write("3 4\n")  # there is no pager, so it waits
    client.process.stdin.flush()

    def shown():
        return json.loads(cli("stat", name, "--json").stdout)["workers"]

    while not (found := shown()) or found[0]["waits_for"] is None:
        assert client.process.poll() is None
    (lane,) = lane_identities(segment)
    assert segment.read(segment.layout.lane(lane) + LANE_WAIT) == pack_wait(3, 4)
    assert (found[0]["pid"], found[0]["state"], found[0]["layer"]) == (client.pid, "alive", None)
    assert found[0]["waits_for"] == {"layer": 3, "expert": 4}
    assert "3.4" in cli("stat", name).stdout
    client.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, client.pid, os.WSTOPPED | os.WNOWAIT)
    assert shown()[0]["state"] == "stopped"
    client.kill()
    assert shown()[0]["state"] == "dead"


def test_text_shows_budget_and_control_part(cli, segment, name):
    text = cli("stat", name).stdout
    for part in ("4.5 MiB in 24 slots", "on top of the budget", f"owner {os.getpid()} alive", "pager -", "0/8"):
        assert part in text


def test_no_segment_is_an_error(cli, name):
    result = cli("stat", name)
    assert result.exit_code == 1
    assert result.stderr.startswith("shmroute: SegmentNotFoundError: ")
    assert result.stderr.count("\n") == 1
    assert cli("stat", "a/b").exit_code == 2


def test_watch_prints_one_json_line_each_time_and_ends_with_ctrl_c(start, segment, name):
    watch = start("stat", name, "--json", "--watch", "0.1")
    shots = [json.loads(watch.process.stdout.readline()) for _ in range(3)]
    assert shots[0]["time"] < shots[1]["time"] < shots[2]["time"]
    assert watch.stop(signal.SIGINT) == 130
    assert "Traceback" not in watch.messages


def test_watch_ends_when_the_segment_goes(start, cli, segment, name):
    watch = start("stat", name, "--watch")
    assert watch.process.stdout.readline().startswith("segment")
    assert cli("destroy", name, "--force").exit_code == 0
    watch.process.stdout.read()
    assert watch.process.wait(60) == 0
    assert f"the segment '{name}' is gone" in watch.messages


def test_watch_redraws_on_a_terminal(cli, environment, segment, name):
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "shmroute", "stat", name, "--watch", "0.1"]
    with subprocess.Popen(command, stdout=inside, stderr=inside, env=environment | {"TERM": "xterm"}) as watch:
        os.close(inside)
        seen = b""
        while seen.count(b"LAYER") < 3:
            seen += os.read(terminal, 65536)
        assert b"\x1b[1A" in seen, "the cursor goes up to draw over the last"
        watch.send_signal(signal.SIGINT)
        with pytest.raises(OSError):  # the end of a terminal
            while True:
                seen += os.read(terminal, 65536)
    os.close(terminal)
    assert watch.returncode == 130
    assert b"Traceback" not in seen


def test_watch_may_stand_without_its_number():
    assert with_interval(["x", "--watch"]) == ["x", "--watch", "1.0"]
    assert with_interval(["--watch", "x"]) == ["--watch", "1.0", "x"]
    assert with_interval(["--watch", "--json", "x"]) == ["--watch", "1.0", "--json", "x"]
    assert with_interval(["--watch", "2.5", "x"]) == ["--watch", "2.5", "x"]
    assert with_interval(["--watch=3", "x"]) == ["--watch=3", "x"]


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf"])
def test_watch_refuses_what_is_no_interval(cli, segment, name, interval):
    assert cli("stat", name, f"--watch={interval}").exit_code == 2


def test_sizes_and_durations_are_for_people():
    assert [human_bytes(size) for size in (0, 1023, 1024, 3 << 19, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "5.0 TiB",
    ]  # fmt: skip
    assert [human_duration(us) for us in (None, 2.75, 1500.0, 2e6)] == ["-", "2.8 µs", "1.5 ms", "2.0 s"]
