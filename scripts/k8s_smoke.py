"""Apply an overlay, wait, stream an answer, delete the pod under load, count the streams that are lost.

The pod gets SIGTERM when its preStop is over, and only streams that are open then say whether it drains. So the default
is a synthetic engine that takes 40 s for an answer.

Unproven: this has run against a stand-in of kubectl only (tests/k8s/fake_kubectl.py), never on a cluster.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roundhouse import deployment as deployments
from roundhouse.kubernetes import overlay

ROOT = Path(__file__).resolve().parents[1]
SERVER = "app.kubernetes.io/name=roundhouse,app.kubernetes.io/component=server"
ENDS = ("stop", "length")  # finish reasons of whole answers
TOKENS_PER_SECOND = 12.5  # of each stream of the overlay that is rendered here


class SmokeError(Exception):
    """The cluster did not do what it should. The message says what, and where to look."""


@dataclass(frozen=True)
class Cluster:
    """kubectl, for one namespace."""

    namespace: str
    context: str | None = None

    def command(self, *arguments: str) -> list[str]:
        context = [f"--context={self.context}"] if self.context is not None else []
        return ["kubectl", *context, f"--namespace={self.namespace}", *arguments]

    def run(self, *arguments: str) -> str:
        """Standard output. Raises SmokeError."""
        done = subprocess.run(self.command(*arguments), stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise SmokeError(f"kubectl {' '.join(arguments)}: exit code {done.returncode}")
        return done.stdout

    def rolled_out(self, seconds: int) -> None:
        print(self.run("rollout", "status", "deployment/roundhouse", f"--timeout={seconds}s"), end="")

    def ready_pods(self) -> list[str]:
        """Names of the server's pods that are ready and not about to end."""
        found = json.loads(self.run("get", "pods", f"--selector={SERVER}", "--output=json"))["items"]
        return [pod["metadata"]["name"] for pod in found if _ready(pod)]

    @contextmanager
    def forwarded(self, pod: str) -> Iterator[int]:
        """A port of this machine that leads to the pod's port 8000."""
        command = self.command("port-forward", f"pod/{pod}", ":8000")
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if (match := re.search(r"127\.0\.0\.1:(\d+) ->", line)) is None:
                    raise SmokeError(f"kubectl port-forward pod/{pod}: no port, but {line!r}")
                yield int(match[1])
            finally:
                process.terminate()


def _ready(pod: dict[str, Any]) -> bool:
    conditions = {c["type"]: c["status"] for c in pod.get("status", {}).get("conditions", [])}
    return "deletionTimestamp" not in pod["metadata"] and conditions.get("Ready") == "True"


@dataclass
class Stream:
    """One streamed answer. `error` says why it is not whole; `ended`: when, by time.monotonic()."""

    text: str = ""
    finish_reason: str = ""
    error: str = "no response"
    seconds_to_first_token: float = 0.0
    ended: float = 0.0
    started: threading.Event = field(default_factory=threading.Event)

    def read(self, port: int, prompt: str, max_tokens: int) -> None:
        began = time.monotonic()
        try:
            for event in _events(port, prompt, max_tokens):
                if not self.started.is_set():
                    self.seconds_to_first_token = time.monotonic() - began
                    self.started.set()
                if "error" in event:
                    self.error = str(event["error"])
                    return
                self.text += event.get("text_output", "")
                self.finish_reason = event.get("finish_reason") or self.finish_reason
            self.error = "" if self.finish_reason in ENDS else f"ended early ({self.finish_reason or 'cut'})"
        except (OSError, http.client.HTTPException) as error:
            self.error = f"connection lost: {type(error).__name__}"
        finally:
            self.ended = time.monotonic()
            self.started.set()


def _events(port: int, prompt: str, max_tokens: int) -> Iterator[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {"text_input": prompt, "max_tokens": max_tokens, "stream": True}
    connection.request("POST", "/v2/models/ensemble/generate_stream", json.dumps(body))
    response = connection.getresponse()
    if response.status != 200:
        yield {"error": f"HTTP {response.status}: {response.read(500).decode(errors='replace')}"}
    for line in response:
        if line.startswith(b"data:"):
            yield json.loads(line[5:])
    connection.close()


def render(folder: Path, options: argparse.Namespace) -> Path:
    """Write the overlay of a server whose streams last --max-tokens / TOKENS_PER_SECOND seconds. Returns its folder."""
    slow = {
        "model": {"path": "models/tiny"},
        "engine": {"kind": "synthetic", "tokens_per_second_per_sequence": TOKENS_PER_SECOND},
        "limits": {"max_batch_size": options.streams},
    }
    deployment = deployments.parse(slow, source="k8s-smoke", base=ROOT)
    overlay.render(deployment, folder / "overlay", image=overlay.LOCAL_IMAGE, namespace=options.namespace)
    return folder / "overlay"


def pre_stop_seconds(deployment: dict[str, Any]) -> float:
    """From the deletion of a pod to its SIGTERM: how long preStop takes. Raises SmokeError."""
    (server,) = [c for c in deployment["spec"]["template"]["spec"]["containers"] if c["name"] == "server"]
    match server.get("lifecycle", {}).get("preStop"):
        case None:
            return 0.0
        case {"exec": {"command": ["/bin/sleep", seconds]}}:
            return float(seconds)
    raise SmokeError("deployment/roundhouse: preStop is not `/bin/sleep SECONDS`; nobody knows when SIGTERM comes")


def drain(cluster: Cluster, pod: str, port: int, options: argparse.Namespace) -> tuple[list[Stream], float]:
    """Delete the pod while streams are open, and read them to their end.

    Returns them and when the pod gets SIGTERM at the earliest, by time.monotonic().
    """
    pre_stop = pre_stop_seconds(json.loads(cluster.run("get", "deployment", "roundhouse", "--output=json")))
    streams = [Stream() for _ in range(options.streams)]
    threads = [
        threading.Thread(target=stream.read, args=(port, options.prompt, options.max_tokens)) for stream in streams
    ]
    for thread in threads:
        thread.start()
    for stream in streams:
        stream.started.wait(timeout=120)
    print(f"deleting {pod} under {len(streams)} open streams; it gets SIGTERM in {pre_stop:g} s")
    cluster.run("delete", "pod", pod, "--wait=false")
    sigterm = time.monotonic() + pre_stop
    while still_open := sum(thread.is_alive() for thread in threads):
        print(f"open streams: {still_open}", flush=True)
        time.sleep(1.0)
    return streams, sigterm


def lost(streams: list[Stream], expected: str) -> list[str]:
    """Why, for each stream that did not bring the whole answer."""
    return [
        stream.error or "another answer than without a drain"
        for stream in streams
        if stream.error or stream.text != expected
    ]


def check_open(streams: list[Stream], sigterm: float) -> None:
    """Raises SmokeError if a stream had ended before the pod got SIGTERM, which is by time.monotonic()."""
    if early := sum(stream.ended < sigterm for stream in streams):
        raise SmokeError(
            f"proves nothing: {early} of {len(streams)} streams had ended before the pod got SIGTERM; "
            "answers must be longer: --max-tokens"
        )


def smoke(cluster: Cluster, options: argparse.Namespace) -> int:
    """Returns the exit code: 0 if nothing was lost. Raises SmokeError."""
    with tempfile.TemporaryDirectory() as folder:
        applied = options.overlay or render(Path(folder), options)
        print(cluster.run("apply", "-k", str(applied)), end="")
    cluster.rolled_out(options.timeout)
    pods = cluster.ready_pods()
    if not pods:
        raise SmokeError(f"no pod is ready: kubectl --namespace {cluster.namespace} describe pods")
    with cluster.forwarded(pods[0]) as port:
        print(f"streaming an answer of {pods[0]}", flush=True)
        first = Stream()
        first.read(port, options.prompt, options.max_tokens)
        if first.error:
            raise SmokeError(f"{pods[0]}: the first answer failed: {first.error}")
        print(f"answer of {pods[0]} after {1e3 * first.seconds_to_first_token:.0f} ms: {first.text.strip()[:70]}")
        streams, sigterm = drain(cluster, pods[0], port, options)
    failures = lost(streams, first.text)
    if not failures:
        check_open(streams, sigterm)
    cluster.rolled_out(options.timeout)
    replaced = [name for name in cluster.ready_pods() if name != pods[0]]
    if not replaced:
        raise SmokeError(f"{pods[0]} was deleted and no other pod is ready")
    print(f"lost streams: {len(failures)} of {len(streams)}; {replaced[0]} has taken over")
    for reason in sorted(set(failures)):
        print(f"  {failures.count(reason)} x {reason}")
    return 1 if failures else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlay", type=Path, help="folder to apply instead of one with a slow synthetic engine")
    parser.add_argument("--namespace", default="roundhouse", help="that of the overlay")
    parser.add_argument("--context", default=None, help="of the kubeconfig; default: the current one")
    parser.add_argument("--streams", type=int, default=16, help="open while the pod is deleted")
    parser.add_argument("--prompt", default="count from 1 to 120:")
    parser.add_argument(
        "--max-tokens", type=int, default=500, help=f"of an answer; without --overlay, {TOKENS_PER_SECOND:g} a second"
    )
    parser.add_argument("--timeout", type=int, default=600, help="seconds for each rollout")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        return smoke(Cluster(options.namespace, options.context), options)
    except (SmokeError, deployments.DeploymentError, FileNotFoundError) as error:
        print(f"k8s-smoke: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
