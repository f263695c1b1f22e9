"""The server's container as the manifests start it, run here: when it is ready, what it takes, how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from threading import Semaphore

import psutil
import pytest
import requests
import yaml

from roundhouse.kubernetes import sizes
from tests.k8s import manifests
from tests.k8s.manifests import ROOT, Combination, Objects, Pod, command, environment, find, pods, size
from tests.k8s.semantics import pre_stop
from tests.server import client
from tests.server.conftest import Server

pytestmark = pytest.mark.server
COUNT = "count from 1 to 40:"  # the little model is good at this, and takes its time


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """local-cpu with the OpenAI front door, as the Inference Extension wants it."""
    combination = Combination("local-cpu", ("inference-gateway",))
    return manifests.build(manifests.render(combination, tmp_path_factory.mktemp("overlay") / "overlay"))


@pytest.fixture(scope="module")
def pod(objects: Objects) -> Pod:
    return next(pod for pod in pods(objects) if pod.name == "Deployment/roundhouse")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, objects: Objects, pod: Pod) -> Iterator[Server]:
    """With the deployment, the arguments and the variables of the manifests; on loopback and on free ports."""
    folder = tmp_path_factory.mktemp("pod")
    container = pod.container("server")
    (config,) = [v["configMap"]["name"] for v in pod.spec["volumes"] if "configMap" in v]
    deployment = folder / "deployment.yaml"
    text = find(objects, "ConfigMap", config)["data"]["deployment.yaml"]
    deployment.write_text(text.replace("/opt/roundhouse", str(ROOT)))
    options = [a for a in command(container)[3:] if not re.match(r"--\w+-(port|address)=", a)]
    assert options == ["--drain-seconds=120", "--ready-file=/cache/ready"]
    options[1] = f"--ready-file={folder / 'ready'}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(container).items():
            if name != "NUMBA_CACHE_DIR":  # what is compiled already need not be compiled again
                patch.setenv(name, value.replace("/cache", str(folder / "cache")))
        with Server(deployment, folder / "server.log", *options) as started:
            client.until(lambda: is_open(started), 60, "the front door")
            yield started


def processes(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def is_open(server: Server) -> bool:
    with suppress(requests.ConnectionError):
        return requests.get(f"{server.openai_url}/ready", timeout=5).ok
    return False


def workers(server: Server) -> list[int]:
    """Bytes of each worker of the OpenAI front door."""
    return [process.memory_full_info().pss for process in server.processes("roundhouse.openai.worker")]


def resident(server: Server) -> int:
    """Bytes of all processes of the container, shared pages counted once, shared memory among them."""
    total = 0
    for process in processes(server):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def shared(server: Server) -> int:
    """Bytes of the files in /dev/shm that Triton has made."""
    (triton,) = server.processes("tritonserver")[:1]
    maps = Path(f"/proc/{triton.pid}/maps").read_text()
    return sum(os.stat(path).st_size for path in set(re.findall(r"/dev/shm/\S+", maps)))


def test_memory_and_shared_memory_under_load_are_within_their_limits(server: Server, pod: Pod) -> None:
    inputs = {"text_input": COUNT, "max_tokens": 150, "stream": True}
    with ExitStack() as stack:
        streams = [stack.enter_context(client.opened(server, "ensemble", inputs)) for _ in range(64)]
        for stream in streams:
            next(stream.replies())
        taken, in_shm = resident(server), shared(server)
        limit = size(pod.container("server")["resources"]["limits"]["memory"])
        (volume,) = [v["emptyDir"] for v in pod.spec["volumes"] if v["name"] == "shm"]
        doors = workers(server)
        print(f"workers of the front door: {[door // 2**20 for door in doors]} MiB")
        assert len(doors) == 2
        assert max(doors) < sizes.OPENAI_WORKER
        print(f"resident {taken / 2**20:.0f} MiB of {limit / 2**20:.0f}, shared {in_shm / 2**20:.0f} MiB")
        assert 64 * 2**20 <= in_shm < size(volume["sizeLimit"])
        assert taken < limit * 0.8


def test_the_probes_are_answered(server: Server, pod: Pod) -> None:
    urls = {"http": server.http_url, "openai": server.openai_url}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = pod.container("server")[probe]["httpGet"]
        assert requests.get(f"{urls[asked['port']]}{asked['path']}", timeout=5).status_code == 200
    assert pod.container("server")["readinessProbe"]["httpGet"]["port"] == "openai"  # which opens last


def test_the_endpoint_picker_finds_its_metrics_on_the_port_of_the_pool(server: Server, objects: Objects) -> None:
    """It takes the first series that matches and sums nothing: there must be one of each."""
    page = requests.get(f"{server.openai_url}/metrics", timeout=5).text
    for family, label, value in (
        ("nv_trt_llm_request_metrics", "request_type", "waiting"),
        ("nv_trt_llm_request_metrics", "request_type", "scheduled"),
        ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "fraction"),
        ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "tokens_per"),
        ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "max"),
    ):
        assert len(re.findall(rf'^{family}{{[^}}]*{label}="{value}"', page, flags=re.MULTILINE)) == 1, value
    picker = find(objects, "Deployment", "roundhouse-endpoint-picker")["spec"]["template"]["spec"]
    (config,) = [v["configMap"]["name"] for v in picker["volumes"] if "configMap" in v]
    settings = yaml.safe_load(find(objects, "ConfigMap", config)["data"]["endpoint-picker-config.yaml"])
    assert {"type": "core-metrics-extractor", "parameters": {"defaultEngine": "triton-tensorrt-llm"}} in settings[
        "plugins"
    ]


def test_what_the_gateway_routes_is_answered(server: Server, objects: Objects) -> None:
    (rule,) = find(objects, "HTTPRoute", "roundhouse")["spec"]["rules"]
    prefix = rule["matches"][0]["path"]["value"]
    body = {"model": "tiny", "prompt": "copy: one two =", "max_tokens": 20}
    reply = requests.post(f"{server.openai_url}{prefix}completions", json=body, timeout=30)
    assert "one two" in reply.json()["choices"][0]["text"]


def test_a_drain_loses_no_stream_and_fits_the_grace_period(server: Server, pod: Pod) -> None:
    """With an idle keep-alive connection, for which Triton's own exit waits as long as it may. The last test here."""
    address = server.http_url.removeprefix("http://")
    prompt = "count from 1 to 300:"  # so long that no stream has ended when the last one has begun
    body = {"text_input": prompt, "max_tokens": 1500, "stream": True, "exclude_input_in_output": True}
    begun = Semaphore(0)

    def joined(texts: Iterator[str]) -> str:
        answer = next(texts)
        begun.release()
        return answer + "".join(texts)

    def streamed(_: int) -> str:
        with client.opened(server, "ensemble", body) as stream:
            return joined(reply.text for reply in stream.replies())

    def over_http(_: int) -> str:
        url = f"{server.http_url}/v2/models/ensemble/generate_stream"
        with requests.post(url, json=body, stream=True, timeout=120) as reply:
            events = (line for line in reply.iter_lines() if line.startswith(b"data: "))
            return joined(json.loads(event[6:])["text_output"] for event in events)

    expected = client.answer(server, "ensemble", prompt, 1500)
    assert expected.endswith("300")
    with closing(http.client.HTTPConnection(address)) as idle, ThreadPoolExecutor(8) as pool:
        idle.request("GET", "/v2/health/live")
        idle.getresponse().read()
        answers = [pool.submit(streamed, n) for n in range(4)] + [pool.submit(over_http, n) for n in range(4)]
        assert all(begun.acquire(timeout=20) for _ in answers)
        assert not any(answer.done() for answer in answers)
        began = time.monotonic()
        assert server.stop() == 0
        took = time.monotonic() - began
        assert [answer.result() for answer in answers] == [expected] * 8
    assert pre_stop(pod.container("server")) + took < pod.spec["terminationGracePeriodSeconds"]
