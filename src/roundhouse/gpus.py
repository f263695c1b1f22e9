"""The GPU products that a deployment may name, as the node label nvidia.com/gpu.product spells them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Product:
    """`memory` is what one GPU offers, in bytes; `compute_capability` is what an engine is compiled for."""

    memory: int
    compute_capability: str


PRODUCTS: dict[str, Product] = {
    "NVIDIA-L40S": Product(int(44.9 * GIB), "8.9"),
    "NVIDIA-H100-80GB-HBM3": Product(int(79.6 * GIB), "9.0"),
    "NVIDIA-H200": Product(139 * GIB, "9.0"),
}


def find(name: str) -> Product:
    """Raises ValueError, naming the key and what is allowed, for an unknown product."""
    if name not in PRODUCTS:
        raise ValueError(f"gpu.product: {name!r} is not known (known: {', '.join(PRODUCTS)})")
    return PRODUCTS[name]
