"""The command line. Each command is a thin function that imports what it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "deployments/local-cpu.yaml"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
rendering = typer.Typer(no_args_is_help=True, help="Write what is derived from a deployment.")
app.add_typer(rendering, name="render")
DeploymentPath = Annotated[Path, typer.Argument(help="deployment file")]
Port = Annotated[int, typer.Option(min=1, max=65535)]


@app.command()
def check(deployment: DeploymentPath = DEFAULT) -> None:
    """Check a deployment file and print it with its defaults."""
    import yaml

    from roundhouse import deployment as deployments

    try:
        parsed = deployments.load(deployment)
    except deployments.DeploymentError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(yaml.safe_dump(parsed.model_dump(exclude_none=True), sort_keys=False), end="")


@rendering.command("models")
def render_models(
    deployment: DeploymentPath, output: Annotated[Path, typer.Option(help="folder to write; must not exist")]
) -> None:
    """Write the model repository of a deployment."""
    from roundhouse import deployment as deployments
    from roundhouse import repository

    try:
        repository.render(deployments.load(deployment), deployment, output)
    except deployments.DeploymentError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:
        _refuse_output(output, error)


@rendering.command("k8s")
def render_k8s(
    deployment: DeploymentPath,
    output: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    image: Annotated[str, typer.Option(help="NAME@sha256:DIGEST, or roundhouse:local")],
    component: Annotated[list[str] | None, typer.Option("--with", help="a component; may be given again")] = None,
    namespace: str = "roundhouse",
    trtllm_version: Annotated[str | None, typer.Option(help="of the image, if it is not the pinned one")] = None,
    load_test_image: Annotated[str | None, typer.Option(help="for --with load-test: one with Locust")] = None,
    download: Annotated[
        list[str] | None, typer.Option(help="OWNER/NAME on Hugging Face that a Job is to fetch; may be given again")
    ] = None,
    vllm_image: Annotated[str | None, typer.Option(help="for --with vllm-comparison")] = None,
    endpoint_picker_image: Annotated[str | None, typer.Option(help="for --with inference-gateway")] = None,
) -> None:
    """Write a kustomize overlay for a deployment."""
    from roundhouse import deployment as deployments
    from roundhouse.kubernetes import overlay
    from roundhouse.trtllm.commands import TENSORRT_LLM

    images = {
        "load-test": load_test_image,
        "vllm-comparison": vllm_image,
        "inference-gateway": endpoint_picker_image,
    }
    try:
        overlay.render(
            deployments.load(deployment),
            output,
            image=image,
            other_images={name: given for name, given in images.items() if given is not None},
            trtllm_version=trtllm_version or TENSORRT_LLM,
            namespace=namespace,
            components=tuple(component or ()),
            downloads=tuple(download or ()),
        )
    except deployments.DeploymentError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:
        _refuse_output(output, error)


def _refuse_output(output: Path, error: OSError) -> NoReturn:
    print(f"--output {output}: {error.strerror}; name a new folder in one that exists", file=sys.stderr)
    raise typer.Exit(1)


@app.command()
def plan(deployment: DeploymentPath) -> None:
    """Print what fits on the GPUs of a deployment: weights, KV cache, sequences. Exit code 1 if it does not fit."""
    from roundhouse import deployment as deployments
    from roundhouse import plan as planning

    try:
        print("\n".join(planning.plan(deployments.load(deployment)).lines()))
    except (deployments.DeploymentError, planning.PlanError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def build(
    deployment: DeploymentPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the commands, run nothing")] = False,
    examples: Annotated[
        Path, typer.Option(envvar="ROUNDHOUSE_TRTLLM_EXAMPLES", help="folder of TensorRT-LLM's examples")
    ] = Path("/app/examples"),
) -> None:
    """Compile the TensorRT-LLM engines of a deployment, those that are not up to date. Needs the image of build/."""
    import signal

    from rich.console import Console

    from roundhouse import deployment as deployments
    from roundhouse.trtllm import build as building

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # unwinds: what runs is ended, what is half done is removed

    signal.signal(signal.SIGTERM, stop)
    try:
        parsed = deployments.load(deployment)
        if dry_run:
            print("\n".join(building.dry_run(parsed, examples=examples)))
        else:
            building.build(parsed, examples=examples, console=Console(stderr=True, soft_wrap=True))
    except (deployments.DeploymentError, building.BuildError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def serve(
    deployment: DeploymentPath = DEFAULT,
    http_port: Port = 8000,
    grpc_port: Port = 8001,
    metrics_port: Port = 8002,
    http_address: Annotated[str, typer.Option(help="0.0.0.0 for all interfaces")] = "127.0.0.1",
    grpc_address: str = "127.0.0.1",
    metrics_address: str = "127.0.0.1",
    openai: Annotated[bool, typer.Option("--openai", help="that door too; default: if the deployment says so")] = False,
    openai_port: Port = 9000,
    openai_address: str = "127.0.0.1",
    drain_seconds: Annotated[int, typer.Option(min=0, help="how long open streams may go on after SIGTERM")] = 60,
    ready_file: Annotated[
        Path | None, typer.Option(help="a file that exists while requests are taken, for a readiness probe")
    ] = None,
    log_verbose: Annotated[bool, typer.Option("--log-verbose", help="Triton's whole log")] = False,
) -> None:
    """Serve a deployment in the foreground. SIGTERM drains: open streams finish, exit code 0."""
    from roundhouse import serve as serving

    addresses = serving.Addresses(
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        openai_port=openai_port,
        http_address=http_address,
        grpc_address=grpc_address,
        metrics_address=metrics_address,
        openai_address=openai_address,
    )
    code = serving.serve(
        deployment,
        addresses,
        openai=openai,
        drain_seconds=drain_seconds,
        ready_file=ready_file,
        verbose=log_verbose,
    )
    raise typer.Exit(code)


@app.command("openai")
def openai_door(
    deployment: DeploymentPath = DEFAULT,
    port: Port = 9000,
    address: Annotated[str, typer.Option(help="0.0.0.0 for all interfaces")] = "127.0.0.1",
    grpc_url: Annotated[
        str | None, typer.Option(help="which server of this machine, if several run the deployment: HOST:PORT")
    ] = None,
    drain_seconds: Annotated[int, typer.Option(min=0, help="how long open answers may go on after SIGTERM")] = 60,
) -> None:
    """Open an OpenAI-compatible front door of a running server, in the foreground. SIGTERM drains."""
    from roundhouse.deployment import DeploymentError
    from roundhouse.openai import server

    try:
        raise typer.Exit(server.run(deployment, address, port, grpc_url, drain_seconds=drain_seconds))
    except (DeploymentError, server.DoorError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="deployment files, started for it, or running servers: grpc://HOST:PORT, http://, openai://"
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="several targets in turn, against the first")] = False,
    scenario: Annotated[str, typer.Option(help="a name in loadtests/scenarios, or a path")] = "fixed-512-256",
    streams: Annotated[str, typer.Option(help="closed loops instead of the scenario's load: 1,8,64")] = "",
    rate: Annotated[str, typer.Option(help="open loops of so many requests a second: 2,4,8")] = "",
    seconds: Annotated[float, typer.Option(help="measured time of each load")] = 20,
    warm_up: Annotated[float, typer.Option(help="seconds of load before it")] = 5,
    repeats: Annotated[int, typer.Option(help="runs of everything; two or more give confidence intervals")] = 1,
    processes: Annotated[int | None, typer.Option(help="client processes; default: half of the cores")] = None,
    prompts: Annotated[int, typer.Option(help="different sessions made for each load")] = 1000,
    seed: int = 1,
    deployment: Annotated[Path, typer.Option(help="says tokenizer, limits and SLO of running servers")] = DEFAULT,
    protocol: Annotated[str, typer.Option(help="grpc or http, of deployments")] = "grpc",
    model: Annotated[str, typer.Option(help="the model of deployments that is asked")] = "ensemble",
    output: Annotated[Path | None, typer.Option(help="folder for report.json and report.html")] = None,
    check_slo: Annotated[bool, typer.Option("--check-slo", help="exit code 1 if an SLO is missed at any load")] = False,
) -> None:
    """Measure servers: latencies, throughput, goodput; a table, JSON, and an HTML report with plots."""
    from roundhouse.bench import command

    asked = command.Asked(
        targets=targets or [str(DEFAULT)],
        compare=compare,
        scenario=scenario,
        streams=streams,
        rate=rate,
        seconds=seconds,
        warm_up=warm_up,
        repeats=repeats,
        processes=processes,
        prompts=prompts,
        seed=seed,
        deployment=deployment,
        protocol=protocol,
        model=model,
        output=output,
        check_slo=check_slo,
    )
    raise typer.Exit(command.bench(asked))


@app.command()
def tune(
    deployment: DeploymentPath,
    scenario: Annotated[str, typer.Option(help="a name in loadtests/scenarios, or a path")] = "fixed-512-256",
    streams: Annotated[str, typer.Option(help="a closed loop instead of the scenario's load")] = "",
    rate: Annotated[str, typer.Option(help="an open loop of so many requests a second")] = "",
    goal: Annotated[str, typer.Option(help="goodput or tokens; default: goodput if the deployment has an SLO")] = "",
    minutes: Annotated[float, typer.Option(help="how long it may take in all")] = 10,
    trials: Annotated[int | None, typer.Option(help="new trials at most; default: as time allows")] = None,
    seconds: Annotated[float, typer.Option(help="measured time of each trial")] = 6,
    warm_up: Annotated[float, typer.Option(help="seconds of load before it")] = 2,
    repeats: Annotated[int, typer.Option(help="runs of start and tuned deployment at the end")] = 3,
    processes: Annotated[int | None, typer.Option(help="client processes; default: half of the cores")] = None,
    prompts: Annotated[int, typer.Option(help="different sessions of each trial")] = 1000,
    model: Annotated[str, typer.Option(help="the model that is asked")] = "ensemble",
    output: Annotated[Path | None, typer.Option(help="folder; one that holds trials is gone on with")] = None,
) -> None:
    """Search a deployment's settings on your load; ends with the tuned file, all trials, a report, and advice."""
    try:
        from roundhouse.tune import command
    except ImportError as error:
        print(f"roundhouse tune: {error}; scripts/setup --dev installs what it needs", file=sys.stderr)
        raise typer.Exit(1) from None
    asked = command.Asked(
        deployment=deployment,
        scenario=scenario,
        streams=streams,
        rate=rate,
        goal=goal,
        minutes=minutes,
        trials=trials,
        seconds=seconds,
        warm_up=warm_up,
        repeats=repeats,
        processes=processes,
        prompts=prompts,
        model=model,
        output=output,
    )
    raise typer.Exit(command.tune(asked))


@app.command()
def quickstart(
    prompt: Annotated[str, typer.Option(help="what to ask")] = "a happy story in English about a rabbit in the garden:",
    once: Annotated[bool, typer.Option("--once", help="stop after the answer")] = False,
    deployment: Annotated[Path, typer.Option(help="deployment file")] = DEFAULT,
) -> None:
    """Start a server, stream one answer, go on serving until Ctrl-C."""
    from roundhouse import quickstart as starting
    from roundhouse.deployment import DeploymentError
    from roundhouse.serve import ServeError
    from roundhouse.tritonserver import TritonError

    try:
        raise typer.Exit(starting.run(deployment, prompt, once=once))
    except (DeploymentError, TritonError, ServeError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
