"""From a deployment to the model repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roundhouse import deployment as deployments
from roundhouse import repository

PATH = Path(__file__).parents[1] / "deployments/local-cpu.yaml"


def render(target: Path, **sections: Any) -> dict[str, Any]:
    raw = {"model": {"path": "m"}, "engine": {"kind": "transformers"}, **sections}
    repository.render(deployments.parse(raw, source="x", base=Path("/base")), PATH, target / "models")
    return {folder.name: repository.read(folder) for folder in (target / "models").iterdir()}


def inputs(config: Any) -> set[tuple[str, int, bool]]:
    return {(tensor.name, tensor.data_type, tensor.optional) for tensor in config.input}


def test_the_limits_of_the_deployment_are_in_it(tmp_path: Path) -> None:
    configs = render(tmp_path, limits={"request_batch": 7}, fronts={"tensorrt_llm_bls": 3, "preprocessing": 2})
    assert {config.max_batch_size for config in configs.values()} == {7}
    assert configs["tensorrt_llm_bls"].instance_group[0].count == 3
    assert configs["preprocessing"].instance_group[0].count == 2
    assert configs["tensorrt_llm"].instance_group[0].count == 1


def test_the_models_find_the_deployment(tmp_path: Path) -> None:
    for name, config in render(tmp_path).items():
        if name != "ensemble":
            assert config.parameters["deployment"].string_value == str(PATH.resolve())


@pytest.mark.parametrize("decoupled", [True, False])
def test_decoupled_or_not(tmp_path: Path, decoupled: bool) -> None:
    configs = render(tmp_path, serving={"decoupled": decoupled})
    for name in repository.STREAMING_MODELS:
        assert configs[name].model_transaction_policy.decoupled is decoupled


def test_the_prompt_is_left_out_if_the_deployment_says_so(tmp_path: Path) -> None:
    configs = render(tmp_path, serving={"exclude_input_in_output": True})
    for name in repository.STREAMING_MODELS:
        assert configs[name].parameters["exclude_input_in_output"].string_value == "true"


def test_a_fused_ensemble_takes_what_the_steps_take(tmp_path: Path) -> None:
    steps = render(tmp_path / "steps")["ensemble"]
    fused = render(tmp_path / "fused", serving={"ensemble": "fused"})["ensemble"]
    assert steps.platform == "ensemble"
    assert fused.backend == "python"
    assert inputs(steps) <= inputs(fused)  # plus what only `tensorrt_llm_bls` takes upstream
    assert {tensor.name for tensor in steps.output} == {tensor.name for tensor in fused.output}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    render(tmp_path)
    with pytest.raises(FileExistsError):
        render(tmp_path)
