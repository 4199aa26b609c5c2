"""Writes data/lpips.npz: LPIPS (version 0.1, VGG-16's layout) in PyTorch on random weights, narrow so that they need not be stored.

pip install 'keysync-jax[torch]' && python tests/helpers/make_lpips.py
"""

import numpy as np
import torch
import torch.nn.functional as F
from lpips_case import FILE, POSITIONS, images, weights


def features(x, tensors):
    """What the first activations after each group of convolutions are."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    x, out = (x - shift) / scale, []
    for group, positions in enumerate(POSITIONS):
        if group:
            x = F.max_pool2d(x, 2, 2)
        for position in positions:
            x = F.relu(F.conv2d(x, tensors[f"features.{position}.weight"], tensors[f"features.{position}.bias"], padding=1))
        out.append(x)
    return out


def lpips(first, second, tensors):
    total = 0
    for group, (a, b) in enumerate(zip(features(first, tensors), features(second, tensors), strict=True)):
        a, b = (x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10) for x in (a, b))
        total = total + F.conv2d((a - b) ** 2, tensors[f"lin{group}.model.1.weight"]).mean((1, 2, 3))
    return total


if __name__ == "__main__":
    tensors = {name: torch.from_numpy(value).double() for name, value in weights().items()}
    first, second = (torch.from_numpy(np.moveaxis(x, -1, 1).copy()).double() for x in images())
    first.requires_grad_(True)
    value = lpips(first, second, tensors)
    value.sum().backward()
    np.savez_compressed(FILE, value=value.detach().numpy(), gradient=np.moveaxis(first.grad.numpy(), 1, -1).astype(np.float32))
    print(value)
