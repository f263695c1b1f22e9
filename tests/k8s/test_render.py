"""`roundhouse render k8s`: what it writes, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from roundhouse import deployment as deployments
from roundhouse.cli import app
from roundhouse.deployment import Deployment, DeploymentError, OpenAi, TensorrtLlmEngine
from roundhouse.kubernetes import mounts, overlay, sizes
from roundhouse.plan import Shape
from roundhouse.trtllm.commands import TENSORRT_LLM
from tests.k8s import manifests
from tests.k8s.manifests import IMAGE, ROOT, Combination, Objects, environment, find, of_kind, pods, size

GPU = "llama-3-8b-h200"


def load(name: str, **changes: dict[str, Any]) -> Deployment:
    """A shipped deployment with some keys changed."""
    raw = yaml.safe_load((ROOT / f"deployments/{name}.yaml").read_text())
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    return deployments.parse(raw, source=name, base=ROOT / "deployments")


def render(deployment: Deployment, folder: Path, **options: Any) -> Path:
    overlay.render(deployment, folder, **{"image": IMAGE, **options})
    return folder


def test_the_shipped_overlay_is_rendered(tmp_path: Path) -> None:
    render(load("local-cpu"), tmp_path / "overlay", image="roundhouse:local")
    shipped = ROOT / "k8s/overlays/local-cpu"
    assert {path.name for path in shipped.iterdir()} == {path.name for path in (tmp_path / "overlay").iterdir()}
    for written in (tmp_path / "overlay").iterdir():
        if written.name != "kustomization.yaml":  # its paths start at the folder
            assert written.read_text() == (shipped / written.name).read_text()
    assert manifests.build(tmp_path / "overlay") == manifests.build(shipped)


def test_each_component_can_be_chosen_or_is_implied() -> None:
    shipped = {path.parent.name for path in (ROOT / "k8s/components").glob("*/kustomization.yaml")}
    implied = {"gpu", "models", "engine-build", "tensor-parallel", "multi-node", "model-download"}
    assert shipped == implied | set(overlay.CHOICES)


@pytest.mark.parametrize("path", sorted((ROOT / "deployments").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_pod_reads_the_deployment_that_was_meant(path: Path, tmp_path: Path) -> None:
    meant = deployments.load(path)
    render(meant, tmp_path / "overlay")
    read = deployments.load(tmp_path / "overlay/deployment.yaml")
    assert read == mounts.mounted(meant, TENSORRT_LLM)
    unchanged = {"model", "engine", "speculative"}
    assert read.model_dump(exclude=unchanged) == meant.model_dump(exclude=unchanged)


def test_models_of_the_image_need_no_volume(local_cpu: Objects) -> None:
    assert not of_kind(local_cpu, "PersistentVolumeClaim")
    assert "path: /opt/roundhouse/models/tiny" in yaml.dump(of_kind(local_cpu, "ConfigMap"))


def test_a_model_of_ones_own_is_read_from_the_volume(tmp_path: Path) -> None:
    own = tmp_path / "my-model"
    own.mkdir()
    (own / "model.safetensors").write_bytes(bytes(3 * sizes.GIB // 1024))
    render(load("local-cpu", model={"path": str(own)}), tmp_path / "overlay")
    objects = manifests.build(tmp_path / "overlay")
    assert find(objects, "PersistentVolumeClaim", "roundhouse-models")
    (pod,) = pods(objects)
    mounted = {m["mountPath"] for m in pod.container("server")["volumeMounts"]}
    assert mounts.MODELS in mounted
    assert "path: /models/my-model" in (tmp_path / "overlay/deployment.yaml").read_text()


def test_calibration_data_of_ones_own_lies_beside_the_models() -> None:
    own = mounts.mounted(load(GPU, engine={"calibration": "/data/mine"}), TENSORRT_LLM)
    assert isinstance(own.engine, TensorrtLlmEngine)
    assert own.engine.calibration == "/models/mine"
    shipped = mounts.mounted(load(GPU), TENSORRT_LLM)
    assert isinstance(shipped.engine, TensorrtLlmEngine)
    assert shipped.engine.calibration == "cnn_dailymail"


def test_memory_grows_with_the_model_the_instances_and_the_host_cache(tmp_path: Path) -> None:
    def memory(name: str, model: Path = Path("missing"), **changes: dict[str, Any]) -> int:
        return size(sizes.server(load(name, **changes), model)["limits"]["memory"])

    shutil.copy(ROOT / "models/tiny/config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * sizes.MIB))
    per_token = Shape.read(tmp_path).kv_bytes_per_token("float32")
    assert memory("local-cpu", tmp_path) - memory("local-cpu") == pytest.approx(
        6 * sizes.MIB + 64 * 2048 * per_token, abs=sizes.MIB
    )
    assert memory("local-cpu", fronts={"tensorrt_llm_bls": 4}) - memory("local-cpu") == 3 * sizes.SHM_PER_INSTANCE
    assert memory(GPU, kv_cache={"host_memory_bytes": 7 * sizes.GIB}) - memory(GPU) == 7 * sizes.GIB


def test_shared_memory_counts_the_instances_that_triton_starts(tmp_path: Path) -> None:
    """As many as the rendered repository asks for."""
    from roundhouse import repository

    deployment = load("local-cpu", serving={"ensemble": "fused"}, fronts={"tensorrt_llm_bls": 3, "preprocessing": 2})
    repository.render(deployment, ROOT / "deployments/local-cpu.yaml", tmp_path / "repository")
    configs = [repository.read(folder) for folder in (tmp_path / "repository").iterdir()]
    instances = sum(group.count or 1 for config in configs for group in config.instance_group)
    assert sizes.shm_bytes(deployment) == instances * sizes.SHM_PER_INSTANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": {"weights": "bfloat16", "kv_cache": "bfloat16"}},
        {"limits": {"max_seq_len": 4096}},
        {"limits": {"max_batch_size": 64}},
        {"limits": {"max_num_tokens": 4096}},
        {"kv_cache": {"tokens_per_block": 64}},
        {"gpu": {"product": "NVIDIA-L40S"}},
        {"gpu": {"count": 2, "tensor_parallel": 2}},
        {"model": {"path": "/checkpoints/another"}},
    ],
)
def test_an_engines_folder_is_keyed_by_what_it_is_compiled_for(changes: dict[str, Any]) -> None:
    def path(deployment: Deployment, version: str = "1.2.1") -> str:
        return mounts.engine_path(deployment, deployment.model.path, version)

    assert path(load(GPU, **changes)) != path(load(GPU))
    assert path(load(GPU)) != path(load(GPU), "1.2.0")
    assert path(load(GPU)) == path(load(GPU, limits={"queue": 7}, slo={"ttft_ms": 1.0, "itl_ms": 1.0}))


def test_the_server_waits_for_what_the_job_writes_last(everything: dict[Any, Objects]) -> None:
    objects = everything[Combination("llama-3-70b-2xh100-speculative", ())]
    server = next(pod for pod in pods(objects) if pod.name == "Deployment/roundhouse")
    waited = environment(server.container("wait-for-engine"))["MANIFESTS"].split()
    inside = yaml.safe_load(find_deployment(objects))
    engines = [inside["engine"]["path"], inside["speculative"]["draft_engine"]]
    assert waited == [f"{engine}/manifest.json" for engine in engines]
    (job,) = of_kind(objects, "Job")
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][:2] == ["roundhouse", "build"]


def test_the_waiting_says_what_it_waits_for_and_ends(tmp_path: Path, everything: dict[Any, Objects]) -> None:
    """The init container's own script, run here."""
    objects = everything[Combination(GPU, ())]
    script = next(pod for pod in pods(objects) if pod.serves).container("wait-for-engine")
    manifest = tmp_path / "manifest.json"
    command = [*script["command"], script["args"][0].replace("sleep 10", "sleep 0.1")]
    waiting = subprocess.Popen(command, env={"MANIFESTS": str(manifest)}, stdout=subprocess.PIPE, text=True)
    try:
        assert waiting.stdout is not None
        assert f"waiting for {manifest}, which the Job" in waiting.stdout.readline()
        assert waiting.poll() is None
        manifest.touch()
        began = time.monotonic()
        assert waiting.wait(timeout=5) == 0
        assert time.monotonic() - began < 5
    finally:
        waiting.kill()
        waiting.communicate()


def test_downloads_land_where_the_server_reads(everything: dict[Any, Objects], tmp_path: Path) -> None:
    """The Job's own script, with a stand-in for Hugging Face's client."""
    objects = everything[Combination("llama-3-70b-2xh100-speculative", ("monitoring",))]
    (job,) = [pod for pod in pods(objects) if pod.name == "Job/roundhouse-model-download"]
    container = job.container("download")
    (tmp_path / "huggingface_hub.py").write_text(
        "def snapshot_download(*names, **options):\n    print(names, options)\n"
    )
    given = {**environment(container), "PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    command = [*container["command"], *container["args"]]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=10, check=True)
    inside = yaml.safe_load(find_deployment(objects))
    for path in (inside["model"]["path"], inside["speculative"]["draft_model"]):
        assert f"('owner/{Path(path).name}',) {{'local_dir': '{path}', 'ignore_patterns': ['original/*'," in done.stdout


def find_deployment(objects: Objects) -> str:
    """The deployment file in the ConfigMap."""
    (found,) = [o for o in of_kind(objects, "ConfigMap") if o["metadata"]["name"].startswith("roundhouse-deployment-")]
    return str(found["data"]["deployment.yaml"])


def test_a_job_is_another_one_when_its_inputs_change(tmp_path: Path) -> None:
    def name(folder: str, image: str = IMAGE, **changes: dict[str, Any]) -> str:
        objects = manifests.build(render(load(GPU, **changes), tmp_path / folder, image=image))
        return str(of_kind(objects, "Job")[0]["metadata"]["name"])

    assert name("a") == name("b")
    assert len({name("c"), name("d", limits={"max_seq_len": 4096}), name("e", image=IMAGE.replace("1", "2"))}) == 3


def test_pods_are_replaced_when_the_deployment_changes(tmp_path: Path) -> None:
    def config(folder: str, queue: int) -> str:
        objects = manifests.build(render(load("local-cpu", limits={"queue": queue}), tmp_path / folder))
        (pod,) = pods(objects)
        return next(str(v["configMap"]["name"]) for v in pod.spec["volumes"] if v["name"] == "deployment")

    assert config("a", 512) == config("b", 512) != config("c", 100)


def test_one_namespace_throughout(tmp_path: Path) -> None:
    everything = Combination("llama-3-8b-h200", tuple(c for c in overlay.CHOICES if c != "autoscaling-hpa"))
    objects = manifests.build(manifests.render(everything, tmp_path / "overlay", namespace="team-a"))
    assert {o["metadata"].get("namespace", "team-a") for o in objects} == {"team-a"}
    for trigger in find(objects, "ScaledObject", "roundhouse")["spec"]["triggers"]:
        assert 'namespace="team-a"' in trigger["metadata"]["query"]
        assert 'namespace="roundhouse"' not in trigger["metadata"]["query"]


def test_choosing_the_openai_door_sets_it_in_the_deployment(tmp_path: Path) -> None:
    render(
        load("local-cpu"),
        tmp_path / "chosen",
        components=("inference-gateway",),
        other_images={"inference-gateway": IMAGE},
    )
    assert deployments.load(tmp_path / "chosen/deployment.yaml").openai == OpenAi()
    render(load("local-cpu", openai={"workers": 3}), tmp_path / "said")
    assert "openai: 9000" in [f"{p['name']}: {p['port']}" for p in service_ports(manifests.build(tmp_path / "said"))]


def service_ports(objects: Objects) -> list[dict[str, Any]]:
    return list(find(objects, "Service", "roundhouse")["spec"]["ports"])


def test_adapters_lie_beside_the_models() -> None:
    adapted = load("llama-3-8b-h200-vllm", engine={"lora": {7: "adapters/seven"}})
    inside = mounts.mounted(adapted, "1")
    assert inside.engine.model_dump()["lora"] == {7: "/models/seven"}
    assert "/models/seven" in mounts.models_on_volume(inside)
    with pytest.raises(DeploymentError, match="would both be /models/seven"):
        mounts.mounted(load("llama-3-8b-h200-vllm", engine={"lora": {7: "a/seven", 8: "b/seven"}}), "1")


def test_keys_and_certificates_come_from_secrets(tmp_path: Path) -> None:
    section = {"api_key_file": "keys.txt", "tls_certificate": "cert.pem", "tls_key": "key.pem"}
    render(load("local-cpu", openai=section), tmp_path / "overlay")
    read = deployments.load(tmp_path / "overlay/deployment.yaml").openai
    assert read is not None
    assert (read.api_key_file, read.tls_certificate, read.tls_key) == ("/api-keys/keys", "/tls/tls.crt", "/tls/tls.key")
    (pod,) = pods(manifests.build(tmp_path / "overlay"))
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod.spec["volumes"] if "secret" in v}
    mounted = {m["name"]: m["mountPath"] for m in pod.container("server")["volumeMounts"]}
    assert secrets == {"api-keys": "roundhouse-api-keys", "tls": "roundhouse-tls"}
    assert (mounted["api-keys"], mounted["tls"]) == ("/api-keys", "/tls")
    assert pod.container("server")["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"


def test_behind_the_openai_door_its_page_is_scraped(everything: dict[Any, Objects], tmp_path: Path) -> None:
    """Triton's page knows nothing of the door's clients; the door's page has Triton's too."""
    (alone,) = find(everything[Combination("local-cpu", ("monitoring",))], "PodMonitor", "roundhouse")["spec"][
        "podMetricsEndpoints"
    ]
    assert alone["port"] == "metrics"
    render(load("local-cpu"), tmp_path / "both", components=("monitoring", "openai"))
    objects = manifests.build(tmp_path / "both")
    (door,) = find(objects, "PodMonitor", "roundhouse")["spec"]["podMetricsEndpoints"]
    assert door == {**alone, "port": "openai"}
    (monitoring,) = [
        rule
        for rule in find(objects, "NetworkPolicy", "roundhouse")["spec"]["ingress"]
        if {"port": "metrics"} in rule["ports"]
    ]
    assert {"port": "openai"} in monitoring["ports"]
    section = {"tls_certificate": "cert.pem", "tls_key": "key.pem"}
    render(load("local-cpu", openai=section), tmp_path / "tls", components=("monitoring",))
    (door,) = find(manifests.build(tmp_path / "tls"), "PodMonitor", "roundhouse")["spec"]["podMetricsEndpoints"]
    assert (door["port"], door["scheme"], door["tlsConfig"]) == ("openai", "https", {"insecureSkipVerify": True})


def test_without_the_door_a_pod_is_ready_while_its_file_is_there(everything: dict[Any, Objects]) -> None:
    (pod,) = pods(everything[Combination("local-cpu", ())])
    container = pod.container("server")
    (file,) = [a.split("=")[1] for a in container["command"] if a.startswith("--ready-file=")]
    assert container["readinessProbe"]["exec"]["command"] == ["/usr/bin/test", "-e", file]
    (door,) = pods(everything[Combination("local-cpu", ("openai",))])
    assert "exec" not in door.container("server")["readinessProbe"]


def test_an_objective_becomes_an_alert(everything: dict[Any, Objects]) -> None:
    rules = find(everything[Combination("local-cpu", ("monitoring",))], "PrometheusRule", "roundhouse-slo")
    expressions = [rule["expr"] for rule in rules["spec"]["groups"][0]["rules"]]
    assert expressions == [
        'roundhouse:time_to_first_token_seconds:p95{namespace="roundhouse"} > 0.5',
        'roundhouse:inter_token_latency_seconds:p95{namespace="roundhouse"} > 0.05',
    ]
    without = everything[Combination("llama-3-8b-h200-vllm", ("monitoring",))]
    assert load("llama-3-8b-h200-vllm").slo is None
    assert [o["metadata"]["name"] for o in of_kind(without, "PrometheusRule")] == ["roundhouse"]


REFUSED = {
    "tag": (GPU, {"image": "registry.example/roundhouse:latest"}, "--image registry.example/roundhouse:latest: a tag"),
    "unknown component": (GPU, {"components": ("gpus",)}, "--with gpus: not known (known: monitoring,"),
    "two autoscalers": (GPU, {"components": manifests.AUTOSCALERS}, "--with autoscaling-hpa: KEDA makes"),
    "no image of vLLM": (GPU, {"components": ("vllm-comparison",)}, "--vllm-image: missing"),
    "no image of the picker": (GPU, {"components": ("inference-gateway",)}, "--endpoint-picker-image: missing"),
    "image of nobody": (GPU, {"other_images": {"vllm-comparison": IMAGE}}, "--vllm-image: only --with vllm-comparison"),
    "download that nobody reads": (
        GPU,
        {"downloads": ("owner/other",)},
        "--download owner/other: the deployment reads",
    ),
    "vLLM without GPU": (
        "local-cpu",
        {"components": ("vllm-comparison",), "other_images": {"vllm-comparison": IMAGE}},
        "--with vllm-comparison: for deployments with `gpu`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_option_and_write_nothing(name: str, tmp_path: Path) -> None:
    deployment, options, said = REFUSED[name]
    with pytest.raises(DeploymentError) as refused:
        render(load(deployment), tmp_path / "overlay", **options)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "overlay").exists()


def test_two_models_that_would_be_one_folder_are_refused(tmp_path: Path) -> None:
    changed = load("llama-3-70b-2xh100-speculative", speculative={"draft_model": "/else/Meta-Llama-3-70B-Instruct"})
    with pytest.raises(DeploymentError, match="would both be /models/Meta-Llama-3-70B-Instruct in the pod"):
        render(changed, tmp_path / "overlay")


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    path, folder = str(ROOT / "deployments/local-cpu.yaml"), str(tmp_path / "overlay")
    run = CliRunner().invoke(app, ["render", "k8s", path, "--output", folder, "--image", "roundhouse:local"])
    assert run.exit_code == 0, run.output
    again = CliRunner().invoke(app, ["render", "k8s", path, "--output", folder, "--image", "roundhouse:local"])
    assert again.exit_code == 1
    assert f"--output {folder}: File exists; name a new folder" in again.output
    run = CliRunner().invoke(app, ["render", "k8s", path, "--output", "/proc/x", "--image", "roundhouse:local"])
    assert run.exit_code == 1
    assert "--output /proc/x: " in run.output
    with pytest.raises(DeploymentError, match=r"--namespace Foo_Bar: must be lower-case"):
        render(load("local-cpu"), tmp_path / "other", namespace="Foo_Bar")
