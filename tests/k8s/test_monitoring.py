"""The rules do what they say (promtool), and every query has an answer from a real server (a real Prometheus)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.k8s.manifests import ROOT, Combination, Objects, find, of_kind
from tests.server import client
from tests.server.conftest import Server, free_ports, write_deployment

MONITORING = ROOT / "k8s/components/monitoring"
ADAPTER = ROOT / "k8s/components/autoscaling-hpa/prometheus-adapter-rules.yaml"
FOREIGN = (
    "kube_deployment_status_replicas_available",
    "kube_statefulset_status_replicas_ready",
    "kube_horizontalpodautoscaler_status_condition",
)
WITHOUT_DRAFTS = "roundhouse_accepted_draft_tokens_total"  # a ratio over drafts that this engine does not make


def program(name: str) -> str:
    found = shutil.which(name, path=str(ROOT / ".state/prometheus")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing, rules are not checked: scripts/get-prometheus")
    return found


def groups(objects: Objects) -> list[dict[str, Any]]:
    return [group for o in of_kind(objects, "PrometheusRule") for group in o["spec"]["groups"]]


def rules(objects: Objects) -> list[dict[str, Any]]:
    return [rule for group in groups(objects) for rule in group["rules"]]


def keda_queries(objects: Objects) -> list[str]:
    return [trigger["metadata"]["query"] for trigger in find(objects, "ScaledObject", "roundhouse")["spec"]["triggers"]]


def panels() -> list[dict[str, Any]]:
    return list(json.loads((MONITORING / "roundhouse.json").read_text())["panels"])


def dashboard_queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def filled(query: str, namespace: str = "roundhouse", interval: str = "1m") -> str:
    """As Grafana sends it."""
    return query.replace("$namespace", namespace).replace("$__rate_interval", interval)


@pytest.fixture(scope="module")
def monitored(everything: dict[Any, Objects]) -> Objects:
    """local-cpu, which has objectives, with rules and KEDA."""
    both = [everything[Combination("local-cpu", (name,))] for name in ("monitoring", "autoscaling-keda")]
    return both[0] + of_kind(both[1], "ScaledObject")


def promtool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("promtool"), *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def write_tests(folder: Path, objects: Objects) -> None:
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups(objects)}, width=10_000))
    tests = (ROOT / "tests/k8s/rules-test.yaml").read_text()
    waiting, fraction = (query.replace('"roundhouse"', '"a"') for query in keda_queries(objects))
    tests = tests.replace("KEDA_WAITING", json.dumps(waiting)).replace("KEDA_ACTIVE_FRACTION", json.dumps(fraction))
    (folder / "rules-test.yaml").write_text(tests)


def test_the_rules_do_what_they_say(tmp_path: Path, monitored: Objects) -> None:
    write_tests(tmp_path, monitored)
    done = promtool(tmp_path, "test", "rules", "rules-test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_rule_has_a_unit_test(monitored: Objects) -> None:
    tests = (ROOT / "tests/k8s/rules-test.yaml").read_text()
    for rule in rules(monitored):
        name = rule.get("alert") or rule["record"]
        assert f"alertname: {name}\n" in tests or f"expr: {name}" in tests, name


@pytest.mark.parametrize("change", [("> 0.95", "> 0.995"), ("[2m]", "[30m]"), ('"waiting"', '"active"')], ids=str)
def test_the_unit_tests_fail_if_a_rule_is_changed(change: tuple[str, str], tmp_path: Path, monitored: Objects) -> None:
    write_tests(tmp_path, monitored)
    text = (tmp_path / "rules.yaml").read_text()
    assert change[0] in text
    (tmp_path / "rules.yaml").write_text(text.replace(*change))
    assert promtool(tmp_path, "test", "rules", "rules-test.yaml").returncode != 0


def test_every_query_is_promql(tmp_path: Path, monitored: Objects) -> None:
    queries = [filled(query) for query in dashboard_queries()] + keda_queries(monitored)
    each = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    text = yaml.safe_dump({"groups": [*groups(monitored), {"name": "queries", "rules": each}]})
    (tmp_path / "rules.yaml").write_text(text)
    done = promtool(tmp_path, "check", "rules", "--lint=all", "--lint-fatal", "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_say_where_to_read_on(monitored: Objects) -> None:
    page = (ROOT / "docs/operations.md").read_text()
    for rule in rules(monitored):
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning")
            runbook = re.fullmatch(r'docs/operations.md, "(.+)"', rule["annotations"]["runbook"])
            assert runbook is not None
            assert f"\n### {runbook[1]}\n" in page, runbook[1]


def test_the_custom_metrics_api_gives_what_the_autoscaler_asks_for(
    everything: dict[Any, Objects], monitored: Objects
) -> None:
    recorded = {rule["record"] for rule in rules(monitored) if "record" in rule}
    given = {}
    for rule in yaml.safe_load(ADAPTER.read_text())["rules"]:
        series = rule["seriesQuery"].split("{")[0]
        assert series in recorded
        assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
        given[rule["name"]["as"]] = series
    scaler = find(everything[Combination("local-cpu", ("autoscaling-hpa",))], "HorizontalPodAutoscaler", "roundhouse")
    assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} == set(given)


def test_autoscalers_go_up_at_once_and_down_slowly(everything: dict[Any, Objects], monitored: Objects) -> None:
    """A pod that goes drains for minutes, and the next one loads for minutes."""
    scaler = find(everything[Combination("local-cpu", ("autoscaling-hpa",))], "HorizontalPodAutoscaler", "roundhouse")
    keda = find(monitored, "ScaledObject", "roundhouse")["spec"]
    behaviour = scaler["spec"]["behavior"]
    assert behaviour == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] >= 600


def test_without_data_keda_neither_sees_a_zero_nor_scales_down(monitored: Objects) -> None:
    keda = find(monitored, "ScaledObject", "roundhouse")["spec"]
    assert "fallback" not in keda  # it would answer in the place of the data, and hide that there is none
    for trigger in keda["triggers"]:
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert trigger["metricType"] == "AverageValue"
        assert trigger["metadata"]["query"].startswith("sum(")  # KEDA refuses more than one series


class Prometheus:
    """A real one that scrapes one server as a PodMonitor would, every half second."""

    def __init__(self, folder: Path, server: Server, rule_groups: list[dict[str, Any]]) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        quick = [{**group, "interval": "500ms"} for group in rule_groups]
        (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": quick}, width=10_000))
        target = {
            "targets": [server.metrics_url.removeprefix("http://")],
            "labels": {"namespace": "roundhouse", "pod": "roundhouse-1"},
        }
        scrape = {"job_name": "roundhouse/roundhouse", "scrape_interval": "500ms", "static_configs": [target]}
        config = {"rule_files": ["rules.yaml"], "scrape_configs": [scrape]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        self._log.close()

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series that a query gives now."""
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        answer = requests.get(url, timeout=10).json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, monitored: Objects) -> Iterator[Prometheus]:
    """It has watched a real server answer, refuse, cancel, and queue; two requests still wait."""
    program("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    deployment = {
        "engine": {"kind": "synthetic", "tokens_per_second_per_sequence": 100},
        "limits": {"max_batch_size": 2, "max_seq_len": 8192},
    }
    endless = {"text_input": "copy: word", "max_tokens": 4000, "stream": True, "end_id": 1048576}
    with Server(write_deployment(folder, deployment), folder / "server.log") as server:
        watching = Prometheus(folder, server, groups(monitored))
        try:
            time.sleep(1.5)  # counters must be seen before they grow
            client.answer(server, "ensemble", "copy: word", 8)
            with client.opened(server, "ensemble", endless) as one:
                next(one.replies())
            with (
                client.opened(server, "ensemble", endless),
                client.opened(server, "ensemble", endless),
                client.opened(server, "ensemble", endless),
                client.opened(server, "ensemble", endless),
            ):
                client.until(
                    lambda: values(watching, 'nv_trt_llm_request_metrics{request_type="waiting"}') == [2], 20, ""
                )
                time.sleep(1.5)
                yield watching
        finally:
            watching.stop()


def values(prometheus: Prometheus, query: str) -> list[float]:
    try:
        return [float(series["value"][1]) for series in prometheus.ask(query)]
    except requests.ConnectionError:  # it has not opened its port yet
        return []


@pytest.mark.server
@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_every_panel_has_data_from_a_real_server(panel: dict[str, Any], prometheus: Prometheus) -> None:
    for target in panel["targets"]:
        if WITHOUT_DRAFTS in target["expr"]:
            assert prometheus.ask(WITHOUT_DRAFTS)
            continue
        found = prometheus.ask(filled(target["expr"]))
        assert found, target["expr"]
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert all(label in series["metric"] for series in found), f"{target['expr']}: no label {label}"


@pytest.mark.server
def test_every_recorded_series_has_data_from_a_real_server(prometheus: Prometheus, monitored: Objects) -> None:
    for rule in rules(monitored):
        if "record" in rule:
            assert prometheus.ask(rule["record"]), rule["record"]


@pytest.mark.server
def test_every_alert_looks_at_series_that_are_there(prometheus: Prometheus, monitored: Objects) -> None:
    """An alert that cannot fire looks like one that does not."""
    for rule in rules(monitored):
        if "alert" in rule:
            selectors = re.findall(
                r"[a-z_:0-9]+(?:_total|_metrics|_requests|_fraction|:p95|_available)\b(?:\{[^}]*\})?", rule["expr"]
            )
            selectors += [name for name in FOREIGN if name in rule["expr"]]
            assert selectors, rule["expr"]
            for selector in selectors:
                assert prometheus.ask(selector) or selector.startswith(FOREIGN), f"{rule['alert']}: {selector}"


@pytest.mark.server
def test_autoscalers_see_the_queue_of_a_real_server_as_one_series(prometheus: Prometheus, monitored: Objects) -> None:
    assert values(prometheus, "roundhouse:waiting_requests") == [2]
    assert values(prometheus, "roundhouse:active_fraction") == [2]  # four requests for two places
    assert [values(prometheus, query) for query in keda_queries(monitored)] == [[2], [2]]


@pytest.mark.server
def test_no_alert_fires_at_a_server_that_is_well(prometheus: Prometheus) -> None:
    assert prometheus.ask('ALERTS{alertstate="firing"}') == []
