"""Two functions of vLLM 0.25.1 that do not work on CPUs, put right. tests/engines/test_conformance.py finds both."""

from __future__ import annotations

import torch
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler


def mend() -> None:
    """Call it before an engine is loaded."""
    # The sampler for CPUs ignores seeds unless all sequences of a batch have one; and it is compiled for half a minute.
    TopKTopPSampler.forward_cpu = TopKTopPSampler.forward_native
    # While drafting, top_k was expanded into a copy that nobody reads, so that the step failed or took any k.
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """x: [batch]; cu_num_tokens: [batch], summed up. Each value for each token of its sequence: [num_tokens]."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts, output_size=num_tokens)
