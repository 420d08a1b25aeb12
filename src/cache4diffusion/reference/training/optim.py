"""The two update rules of the reference models' training, written per parameter so that processes can share the work.

Matrices inside the blocks follow Muon (momentum, orthogonalised by Newton-Schulz); everything else follows Adam. Muon's
update is scaled to the size of Adam's, so one learning rate serves both.

Source: Muon, K. Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale, "Muon is scalable for LLM training",
arXiv:2502.16982, section 2.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Replace a matrix's singular values with values near 1 (0.7 to 1.2): ``[m, n]`` to ``[m, n]``, bfloat16."""
    a, b, c = _NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def muon_step(
    parameter: Tensor, grad: Tensor, momentum: Tensor, lr: float, beta: float = 0.95, decay: float = 0.0
) -> None:
    """One Muon step in place; kernels of more than two dimensions are taken as ``[out, rest]``."""
    momentum.lerp_(grad, 1 - beta)
    update = orthogonalise(grad.lerp(momentum, beta).flatten(1))
    scale = 0.2 * math.sqrt(max(update.shape))
    parameter.mul_(1 - lr * decay)
    parameter.add_(update.to(parameter.dtype).reshape(parameter.shape), alpha=-lr * scale)


def adam_step(
    parameter: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    lr: float,
    count: int,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
) -> None:
    """One Adam step in place; ``count`` is 1 at the first step."""
    mean.lerp_(grad, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (square / (1 - betas[1] ** count)).sqrt_().add_(eps)
    parameter.addcdiv_(mean, denominator, value=-lr / (1 - betas[0] ** count))
