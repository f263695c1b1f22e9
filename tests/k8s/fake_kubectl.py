"""A stand-in for kubectl and a cluster of one node: it runs the server of an overlay as a process of this machine.

It keeps to what scripts/k8s_smoke.py sees of a cluster: a pod that is deleted goes on for a moment, gets SIGTERM, and
another one comes. State lies in $FAKE_CLUSTER; with $FAKE_CLUSTER_KILLS set pods are killed and not asked to end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

STATE = Path(os.environ["FAKE_CLUSTER"])
ROOT = Path(__file__).resolve().parents[2]
PRE_STOP = 1.0  # seconds; real pods take those of the manifest


def main(arguments: list[str]) -> int:
    words = [argument for argument in arguments if not argument.startswith("--")]
    with (STATE / "calls").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    match words:
        case ["apply", "-k", folder]:
            apply(folder)
        case ["rollout", "status", "deployment/roundhouse"]:
            wait_ready()
        case ["get", "pods"]:
            print(json.dumps({"items": [described(pod) for pod in pods()]}))
        case ["port-forward", target, ":8000"]:
            (pod,) = [pod for pod in pods() if f"pod/{pod['name']}" == target]
            print(f"Forwarding from 127.0.0.1:{pod['port']} -> 8000", flush=True)
            signal.pause()
        case ["delete", "pod", name]:
            subprocess.Popen([sys.executable, __file__, "end", name], stdout=subprocess.DEVNULL, start_new_session=True)
        case ["end", name]:
            end(name)
        case _:
            print(f"error: unknown command {words}", file=sys.stderr)
            return 1
    return 0


def apply(folder: str) -> None:
    real = os.environ["REAL_KUBECTL"]
    done = subprocess.run([real, "kustomize", folder], stdout=subprocess.PIPE, text=True, check=True)
    objects = [o for o in yaml.safe_load_all(done.stdout) if o]
    (server,) = [o for o in objects if o["kind"] == "Deployment"]
    (config,) = [o for o in objects if o["kind"] == "ConfigMap"]
    text = config["data"]["deployment.yaml"].replace("/opt/roundhouse", str(ROOT))
    (STATE / "deployment.yaml").write_text(text)
    (STATE / "server.json").write_text(json.dumps(server))
    start(0)
    for o in objects:
        print(f"{o['kind'].lower()}/{o['metadata']['name']} created")


def start(number: int) -> None:
    """Start a pod: the server's own command line, on ports of its own."""
    container = json.loads((STATE / "server.json").read_text())["spec"]["template"]["spec"]["containers"][0]
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for sock in (one, two, three):
            sock.bind(("127.0.0.1", 0))
        http, grpc, metrics = (sock.getsockname()[1] for sock in (one, two, three))
    ports = {"--http-port": http, "--grpc-port": grpc, "--metrics-port": metrics}
    command = [sys.executable, "-m", "roundhouse.cli", *container["command"][1:], "--log-verbose"]
    command[command.index("/deployment/deployment.yaml")] = str(STATE / "deployment.yaml")
    for index, argument in enumerate(command):
        name = argument.split("=")[0]
        if name in ports:
            command[index] = f"{name}={ports[name]}"
        elif name.endswith("-address"):
            command[index] = f"{name}=127.0.0.1"
    with (STATE / f"log-{number}").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    pod = {"name": f"roundhouse-{number}", "number": number, "pid": process.pid, "port": http, "ending": False}
    write(pod)


def end(name: str) -> None:
    (pod,) = [pod for pod in pods() if pod["name"] == name]
    write({**pod, "ending": True})
    start(pod["number"] + 1)
    time.sleep(PRE_STOP)
    if "FAKE_CLUSTER_KILLS" in os.environ:
        for process in [psutil.Process(pod["pid"]), *psutil.Process(pod["pid"]).children(recursive=True)]:
            process.kill()
    else:
        os.kill(pod["pid"], signal.SIGTERM)
    while alive(pod["pid"]):
        time.sleep(0.05)
    (STATE / f"{name}.pod").unlink()


def wait_ready() -> None:
    deadline = time.monotonic() + 120
    while not any(is_ready(pod) for pod in pods()):
        if time.monotonic() > deadline:
            logs = "".join(path.read_text() for path in sorted(STATE.glob("log-*")))
            sys.exit(f"error: timed out waiting for the condition\n{logs}")
        time.sleep(0.1)
    print('deployment "roundhouse" successfully rolled out')


def is_ready(pod: dict[str, Any]) -> bool:
    with suppress(urllib.error.URLError, OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{pod['port']}/v2/health/ready", timeout=2).close()
        return not pod["ending"]
    return False


def described(pod: dict[str, Any]) -> dict[str, Any]:
    """As much of a Pod as is looked at."""
    metadata = {"name": pod["name"], **({"deletionTimestamp": "now"} if pod["ending"] else {})}
    ready = "True" if is_ready(pod) else "False"
    return {"metadata": metadata, "status": {"conditions": [{"type": "Ready", "status": ready}]}}


def pods() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(STATE.glob("*.pod"))]


def write(pod: dict[str, Any]) -> None:
    beside = STATE / f"{pod['name']}.new"
    beside.write_text(json.dumps(pod))
    beside.rename(STATE / f"{pod['name']}.pod")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
