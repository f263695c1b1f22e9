"""A stand-in for kubectl and a cluster of one node: it runs the server of an overlay as a process of this machine.

It keeps to what scripts/k8s_smoke.py sees of a cluster: a pod that is deleted runs its preStop, gets SIGTERM, and
another one comes. State lies in $FAKE_CLUSTER; with $FAKE_CLUSTER_KILLS set pods die at SIGTERM and do not drain.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

STATE = Path(os.environ["FAKE_CLUSTER"])
ROOT = Path(__file__).resolve().parents[2]
PRE_STOP = "1"  # seconds: what Deployments get instead of their own, as tests are in a hurry


def main(arguments: list[str]) -> int:
    words = [argument for argument in arguments if not argument.startswith("--")]
    with (STATE / "calls").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    match words:
        case ["apply", "-k", folder]:
            apply(folder)
        case ["rollout", "status", "deployment/roundhouse"]:
            wait_ready()
        case ["get", "deployment", "roundhouse"]:
            print((STATE / "server.json").read_text())
        case ["get", "pods"]:
            print(json.dumps({"items": [described(pod) for pod in pods()]}))
        case ["port-forward", target, ":8000"]:
            (pod,) = [pod for pod in pods() if f"pod/{pod['name']}" == target]
            print(f"Forwarding from 127.0.0.1:{pod['port']} -> 8000", flush=True)
            signal.pause()
        case ["delete", "pod", name]:
            (pod,) = [pod for pod in pods() if pod["name"] == name]
            write({**pod, "ending": True})
            start(pod["number"] + 1)
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
    server["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1] = PRE_STOP
    (STATE / "server.json").write_text(json.dumps(server))
    start(0)
    for o in objects:
        print(f"{o['kind'].lower()}/{o['metadata']['name']} created")


def container() -> dict[str, Any]:
    """That of the Deployment."""
    return json.loads((STATE / "server.json").read_text())["spec"]["template"]["spec"]["containers"][0]


def start(number: int) -> None:
    """Start a pod: the server's own command line, on ports and with a ready file of its own."""
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for sock in (one, two, three):
            sock.bind(("127.0.0.1", 0))
        http, grpc, metrics = (sock.getsockname()[1] for sock in (one, two, three))
    own = {
        "--http-port": http,
        "--grpc-port": grpc,
        "--metrics-port": metrics,
        "--ready-file": STATE / f"roundhouse-{number}.ready",
    }
    command = [sys.executable, "-m", "roundhouse.cli", *container()["command"][1:], "--log-verbose"]
    command[command.index("/deployment/deployment.yaml")] = str(STATE / "deployment.yaml")
    for index, argument in enumerate(command):
        name = argument.split("=")[0]
        if name in own:
            command[index] = f"{name}={own[name]}"
        elif name.endswith("-address"):
            command[index] = f"{name}=127.0.0.1"
    with (STATE / f"log-{number}").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    pod = {"name": f"roundhouse-{number}", "number": number, "pid": process.pid, "port": http, "ending": False}
    write(pod)


def end(name: str) -> None:
    (pod,) = [pod for pod in pods() if pod["name"] == name]
    subprocess.run(container()["lifecycle"]["preStop"]["exec"]["command"], check=True)
    with suppress(psutil.NoSuchProcess):  # the test is over
        server = psutil.Process(pod["pid"])
        if "FAKE_CLUSTER_KILLS" in os.environ:
            for process in [server, *server.children(recursive=True)]:
                process.kill()
        else:
            server.terminate()
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
    """As the readiness probe has it."""
    return (STATE / f"{pod['name']}.ready").exists() and not pod["ending"]


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
