"""The two models' shapes, and their folders in Hugging Face format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_model.data import CONTEXT
from tiny_model.tokenizer import BOS_ID, END_ID, EOS_ID, PAD_ID, VOCAB_SIZE

TINY, DRAFT = "tiny", "tiny-draft"
_SHAPES = {
    TINY: {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    DRAFT: {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def config_of(name: str) -> dict[str, Any]:
    """config.json of the model `name`, in the keys that transformers 4 and 5, vLLM and TensorRT-LLM all read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        **_SHAPES[name],
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID, END_ID],
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
    }


def create(name: str, seed: int) -> LlamaForCausalLM:
    """The model `name` with random weights, float32."""
    torch.manual_seed(seed)
    config = {key: value for key, value in config_of(name).items() if key not in ("torch_dtype", "architectures")}
    return LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa"))


def save(model: LlamaForCausalLM, name: str, folder: Path) -> None:
    """Write weights (bfloat16; the output layer is the embedding), config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        key: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for key, tensor in model.state_dict().items()
        if key != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID, END_ID],
        "pad_token_id": PAD_ID,
        "do_sample": False,
    }
    for file, content in (("config.json", config_of(name)), ("generation_config.json", generation)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
