"""Muon for matrices, AdamW for the rest: U = orthogonalise(momentum), w -= lr*U.

Muon (K. Jordan et al., 2024) replaces a matrix's update by the nearest orthogonal matrix, found by
five Newton-Schulz iterations. Convolutions count as [out, in*k*k] matrices. Matrices of one shape
are orthogonalised together, which is what makes it affordable on two cores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MOMENTUM = 0.95
_ADAM_BETAS = (0.9, 0.98)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[N, rows, columns] -> the same shape, singular values pushed to about 1."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdam:
    """One optimiser over a module.

    `keep_adam`: parts of the names of parameters that stay with AdamW. `scale` multiplies both
    learning rates, so a schedule is one number.
    """

    def __init__(
        self, module: nn.Module, *, lr: float, adam_lr: float, keep_adam: Iterable[str] = ()
    ) -> None:
        fragments = tuple(keep_adam)
        groups: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        adam: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2 or any(fragment in name for fragment in fragments):
                adam.append(parameter)
            else:
                groups[parameter.shape[0], parameter[0].numel()].append(parameter)
        self._groups = dict(groups)
        self._momentum = {shape: torch.zeros(len(ps), *shape) for shape, ps in groups.items()}
        self._lr, self._adam_lr = lr, adam_lr
        self._adam = torch.optim.AdamW(
            adam, lr=adam_lr, betas=_ADAM_BETAS, weight_decay=0.0, fused=True
        )
        self._parameters = list(module.parameters())

    def descend(self, loss: Tensor, scale: float = 1.0) -> None:
        """One step down the gradients of `loss`."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        self._step(scale)

    @torch.no_grad()
    def _step(self, scale: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = self._adam_lr * scale
        self._adam.step()
        for (rows, columns), parameters in self._groups.items():
            gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
            gradient = torch.stack([g.reshape(rows, columns) for g in gradients])
            momentum = self._momentum[rows, columns].mul_(_MOMENTUM).add_(gradient)
            update = orthogonalise(gradient.add_(momentum, alpha=_MOMENTUM))
            rate = self._lr * scale * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(parameters, update, strict=True):
                parameter.add_(change.reshape(parameter.shape), alpha=-rate)

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict(), "momentum": list(self._momentum.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state["adam"])
        for momentum, values in zip(self._momentum.values(), state["momentum"], strict=True):
            momentum.copy_(values)
