"""Random inputs of the networks that satisfy the tensor contract."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.contract import ModelShape, network_specs

FloatArray = NDArray[np.float32]


def example_inputs(
    shape: ModelShape, name: str, batch: int, seed: int = 0, train_steps: int = 1000
) -> dict[str, FloatArray]:
    """Inputs of a network for `batch` objects: images in [0, 1], the rest normal; t from 0.9 T to 0.1 T."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": batch, "samples": batch * shape.views}
    inputs: dict[str, FloatArray] = {}
    for tensor in network_specs(shape)[name].inputs:
        size = [sizes[s] if isinstance(s, str) else s for s in tensor.shape]
        if tensor.name == "timestep":
            value = np.round(np.linspace(0.9, 0.1, batch) * train_steps)
        elif tensor.name == "focal":
            value = np.linspace(-1.0, 2.0, batch)
        elif tensor.name in ("image", "color", "normal"):
            value = rng.random(size)
        else:
            value = rng.standard_normal(size)
        inputs[tensor.name] = value.astype(tensor.dtype)
    return inputs
