"""What somebody who reaches a port, or an account of the machine, can and cannot do."""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import requests
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from roundhouse.engine import runtime
from roundhouse.triton.fields import timeout_of
from tests.server import client
from tests.server.client import ask, generate, opened
from tests.server.conftest import Server

pytestmark = pytest.mark.server


def triton(server: Server) -> psutil.Process:
    (found,) = [p for p in server.processes("bin/tritonserver") if p.cmdline()[0].endswith("bin/tritonserver")]
    return found


def test_it_listens_on_loopback_only(shared: Server) -> None:
    listening = {c.laddr.ip for c in triton(shared).net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("systemsharedmemory/status", None),
        ("systemsharedmemory/region/x/register", {"key": "/x", "offset": 0, "byte_size": 1}),
        ("cudasharedmemory/status", None),
        ("trace/setting", None),
        ("logging", {"log_verbose_level": 1}),
    ],
)
def test_endpoints_that_change_what_is_the_servers_are_closed(shared: Server, path: str, body: Any) -> None:
    url = f"{shared.http_url}/v2/{path}"
    reply = requests.get(url, timeout=10) if body is None else requests.post(url, json=body, timeout=10)
    assert reply.status_code == 403


def test_they_are_closed_over_grpc_too(shared: Server) -> None:
    with grpcclient.InferenceServerClient(shared.grpc_url) as grpc:
        for call in (grpc.get_system_shared_memory_status, grpc.get_trace_settings, grpc.get_log_settings):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()


def test_models_can_be_neither_loaded_nor_unloaded(shared: Server) -> None:
    for what in ("load", "unload"):
        url = f"{shared.http_url}/v2/repository/models/ensemble/{what}"
        assert requests.post(url, json={}, timeout=10).status_code >= 400
    assert generate(shared, "ensemble", text_input="x", max_tokens=1).status_code == 200


def test_sockets_and_secret_are_the_owners_alone(shared: Server) -> None:
    folder = runtime.runtime_dir(triton(shared).pid)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {path.name.partition("-")[0] for path in folder.iterdir()}
    assert {runtime.SOCKET, runtime.SECRET, "mailbox"} <= names
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert len(runtime.read(folder / runtime.SECRET)) == 64


def test_prompts_are_not_logged(shared: Server) -> None:
    """Neither of good requests, nor of refused, cancelled or expired ones."""
    mark = "xyzzysecret"
    ask(shared, "ensemble", text_input=mark, max_tokens=2, stream=True)
    for model in ("ensemble", "tensorrt_llm_bls"):
        for change in ({"max_tokens": -1}, {"stop_words": mark * 9000}, {"timeout": 1}, {"timeout": mark}):
            assert generate(shared, model, **{"text_input": mark, "max_tokens": 50, **change}).status_code >= 400
        with opened(shared, model, {"text_input": mark, "max_tokens": 500, "stream": True}) as stream:
            next(stream.replies())
    with pytest.raises(InferenceServerException):
        ask(shared, "ensemble", text_input=mark.encode() + b"\xff", max_tokens=2)
    assert mark not in shared.log.read_text()


class TestTimeout:
    """Triton's request timeout is a deadline, whichever way it comes."""

    @pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
    def test_over_http(self, shared: Server, model: str) -> None:
        long = {"text_input": "a b c", "max_tokens": 4000, "end_id": 1048576, "timeout": 300_000}
        reply = generate(shared, model, **long)
        assert reply.json()["finish_reason"] == "timeout"
        expired = generate(shared, model, **{**long, "timeout": 1})
        assert "timeout expired" in expired.json()["error"]

    @pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
    def test_over_grpc(self, shared: Server, model: str) -> None:
        inputs = {"text_input": "a b c", "max_tokens": 4000, "end_id": 1048576}
        with grpcclient.InferenceServerClient(shared.grpc_url) as grpc:
            replies: client.queue.Queue[Any] = client.queue.Queue()
            grpc.start_stream(lambda result, error: replies.put((result, error)))
            grpc.async_stream_infer(model, client.grpc_inputs(shared.grpc_url, model, inputs), timeout=300_000)
            result, error = replies.get(timeout=10)
            grpc.stop_stream()
        assert error is None
        assert result.as_numpy("finish_reason")[0] == b"timeout"

    @pytest.mark.parametrize("wrong", ["soon", -1, 1.5, 2**63, True, [1]])
    def test_what_is_no_time_is_refused(self, wrong: object) -> None:
        from roundhouse.engine.base import RequestError

        with pytest.raises(RequestError, match="timeout"):
            timeout_of(0, wrong)

    def test_the_parameter_counts_where_triton_has_none(self) -> None:
        read: Callable[[int, object], int] = timeout_of
        assert (read(0, None), read(7, None), read(0, 9)) == (0, 7, 9)
