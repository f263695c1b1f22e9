"""Writes a TensorRT-LLM checkpoint for a Hugging Face folder: config.json as ModelOpt would, and no real weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import surface

QUANT_ALGO = {"full_prec": None, "fp8": "FP8", "int4_awq": "W4A16_AWQ", "w4a8_awq": "W4A8_AWQ", "nvfp4": "NVFP4"}
KNOWN_DATA = ("cnn_dailymail", "pileval")


def checkpoint(arguments: Any, config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    dtype = arguments.dtype if arguments.dtype != "auto" else config.get("torch_dtype", "float16")
    algorithm = QUANT_ALGO[arguments.qformat]
    ranks = arguments.tp_size * arguments.pp_size * arguments.cp_size
    return {
        "architecture": config["architectures"][0],
        "dtype": "float16" if dtype == "float32" else dtype,
        "logits_dtype": "float16",
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads", heads),
        "head_size": config.get("head_dim") or config["hidden_size"] // heads,
        "hidden_act": config["hidden_act"],
        "intermediate_size": config["intermediate_size"],
        "norm_epsilon": config["rms_norm_eps"],
        "position_embedding_type": "rope_gpt_neox",
        "mapping": {
            "world_size": ranks,
            "tp_size": arguments.tp_size,
            "pp_size": arguments.pp_size,
            "cp_size": arguments.cp_size,
        },
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": {"fp8": "FP8", "int8": "INT8"}.get(arguments.kv_cache_dtype),
            "group_size": arguments.awq_block_size,
            "exclude_modules": ["lm_head"] if algorithm else None,
        },
    }


def main() -> None:
    arguments = surface.parser("quantize.py").parse_args()
    if arguments.model_dir is None:
        raise ValueError("One source checkpoint must be named: --model_dir or --nemo_ckpt_path")
    model = Path(arguments.model_dir)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    calibrates = arguments.qformat != "full_prec" or arguments.kv_cache_dtype is not None
    data = arguments.calib_dataset
    if calibrates and not any(name in data for name in KNOWN_DATA) and not Path(data).is_dir():
        raise NotImplementedError(f"Unsupported dataset name or local folder: {data}")
    output = Path(arguments.output_dir)
    written = checkpoint(arguments, config)
    surface.write_json(output / "config.json", {**written, "stand_in_model": str(model.resolve())})
    for rank in range(written["mapping"]["world_size"]):
        file = output / f"rank{rank}.safetensors"
        surface.fault("quantize", file)
        file.write_bytes(b"no weights: written by the stand-in of quantize.py")
    print(f"exported to {output}")


if __name__ == "__main__":
    main()
