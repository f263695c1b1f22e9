"""Locust for LLM servers: `locust -f loadtests/locustfile.py --host localhost:8001`; see README.md beside it.

Options and events are here, the users in llm_users.py, what they share in llm_run.py.
"""

from __future__ import annotations

import grpc.experimental.gevent as grpc_gevent

grpc_gevent.init_gevent()  # before any channel: without it, users hang for ever in Locust's patched process

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
from locust import LoadTestShape, events  # noqa: E402
from locust.runners import WorkerRunner  # noqa: E402

from llm_run import Run  # noqa: E402
from llm_users import GrpcUser, HttpUser, LlmUser, OpenAiUser, UnaryUser  # noqa: E402
from roundhouse.bench.prompts import PromptError  # noqa: E402
from roundhouse.bench.records import Records, report  # noqa: E402
from roundhouse.bench.scenario import Closed, ScenarioError  # noqa: E402
from roundhouse.deployment import DeploymentError  # noqa: E402

DEPLOYMENT = Path(__file__).resolve().parents[1] / "deployments/local-cpu.yaml"
CLIENTS: dict[str, type[LlmUser]] = {"grpc": GrpcUser, "http": HttpUser, "unary": UnaryUser, "openai": OpenAiUser}
STEP_SECONDS = 10.0  # of a ramp, if there is no run time to divide


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    add = parser.add_argument_group("LLM", "what is sent").add_argument
    add("--client", choices=sorted(CLIENTS), default="grpc", help="protocol of the users")
    add("--scenario", default="fixed-512-256", help="a name in loadtests/scenarios, or a path")
    add("--rate", type=float, default=None, help="open loop: requests a second")
    add("--deployment", default=str(DEPLOYMENT), help="deployment file: tokenizer, limits, SLO")
    add("--model", default="ensemble", help="model that is asked")
    add("--seed", type=int, default=1, help="of prompts and arrivals")
    add("--prompts", type=int, default=500, help="different sessions that each process makes before it starts")
    add("--response-timeout", type=float, default=120.0, help="seconds without a response after which a request fails")
    add("--of-workers", type=int, default=None, help="workers that share an open loop; default: --processes")
    add("--summary", default=None, help="JSON file to write the summary to")


class Steps(LoadTestShape):
    """A ramp: so many users for so long, then more."""

    abstract = True  # chosen by the scenario, not by Locust

    def __init__(self, users: list[int], seconds: float) -> None:
        super().__init__()
        self._users = users
        self._seconds = seconds

    def tick(self) -> tuple[int, float] | None:
        step = int(self.get_run_time() / self._seconds)
        return (self._users[step], float(self._users[step])) if step < len(self._users) else None


@events.init.add_listener
def on_init(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    try:
        run = environment.roundhouse = Run(environment)
    except (DeploymentError, ScenarioError) as error:
        sys.exit(str(error))
    except (PromptError, OSError, ValueError) as error:
        sys.exit(f"prompts cannot be made: {error}")
    environment.user_classes[:] = [CLIENTS[options.client]]
    environment.available_user_classes = {user.__name__: user for user in environment.user_classes}
    levels = run.scenario.levels()
    if len(levels) > 1 and not isinstance(environment.runner, WorkerRunner):
        users = [level.streams for level in levels if isinstance(level, Closed)]
        environment.shape_class = Steps(users, (options.run_time or 0) / len(users) or STEP_SECONDS)
    if environment.web_ui is not None:
        show = lambda: json.dumps(report(run.records, run.objective), indent=1)  # noqa: E731
        environment.web_ui.app.add_url_rule("/slo", "slo", show)
    _share_records(run)
    gevent.get_hub().loop.update_now()  # else Locust's run time would start before the imports and the prompts


def _share_records(run: Run) -> None:
    """Between workers and master, along with Locust's own statistics."""

    @events.report_to_master.add_listener
    def on_report_to_master(client_id: str, data: dict[str, Any]) -> None:
        sent, run.records = run.records, Records()
        data["roundhouse"] = sent.as_message()

    @events.worker_report.add_listener
    def on_worker_report(client_id: str, data: dict[str, Any]) -> None:
        if "roundhouse" in data:
            run.records.merge(Records.from_message(data["roundhouse"]))


@events.test_start.add_listener
def on_test_start(environment: Any, **_: Any) -> None:
    environment.roundhouse.start()


@events.quitting.add_listener
def on_quitting(environment: Any, **_: Any) -> None:
    run: Run | None = getattr(environment, "roundhouse", None)
    if run is None or isinstance(environment.runner, WorkerRunner):
        return
    found = report(run.records, run.objective)
    print("\n".join(found["lines"]), flush=True)
    if run.options.summary:
        Path(run.options.summary).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not run.records.responses or any(not verdict["met"] for verdict in found["verdicts"]):
        environment.process_exit_code = 1


@events.quit.add_listener
def on_quit(exit_code: int) -> None:
    """Leave at once: a gRPC channel that the interpreter tears down after gevent's hub waits for ever (1 in 40)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
