"""A layer that settles forward, and learns by settling again."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from fulgurite.plugins.equilibrium.activations import ScaledSigmoid, check_activation, is_holomorphic
from fulgurite.plugins.equilibrium.field import EquilibriumField
from fulgurite.plugins.equilibrium.once import without_second_derivative
from fulgurite.plugins.equilibrium.relaxation import (
    adjoint_response,
    check_points,
    check_relaxation,
    nudged_response,
    settle,
)

_NO_SECOND = "EquilibriumLayer has no second derivative with `gradient` 'ep' or 'adjoint': use 'unroll'"


class Backward(NamedTuple):
    """What a backward pass by ``"ep"`` or ``"adjoint"`` saw and found, each without a graph.

    Attributes:
        state: ``(B, n)``.
        input: ``(B, ...)``, in the type of the state.
        signal: the gradients that came in, each of unit length, ``(B, n)``.
        response: to the signal, ``(B, n)``.
    """

    state: Tensor
    input: Tensor
    signal: Tensor
    response: Tensor


class EquilibriumLayer(nn.Module):
    """The activities at which a network settles; its backward pass is equilibrium propagation (arXiv 2309.02214).

    A module like any other, for any loss, optimizer and strategy: gradients reach the field's weights, and ``x``, as
    ``(dH/dtheta)' d`` with ``d`` the response to a nudge along the loss's gradient. That gradient has length 1 in each
    sample while the network is nudged, so ``beta`` does not depend on batch size, loss scale or reduction. The
    response is the exact error for a symmetric ``dH/dr``, towards which
    :class:`~fulgurite.callbacks.JacobianHomeostasis` trains it.

    Nothing is kept of the relaxation but its end. Under mixed precision it runs in the type of the field's weights.
    In evaluation there is a free phase alone.

    Args:
        field: what drives the units, with float32 or float64 weights.
        activation: a module, elementwise, deterministic and without weights; :class:`ScaledSigmoid` by default.
        gradient: ``"ep"``; ``"adjoint"`` for exact gradients by the transposed network, at most ``free_steps`` long;
            ``"unroll"`` for autograd through all steps, which keeps them all.
        beta: radius of the nudges, above 0.
        points: number of nudges (N), at least 1. Two are a central difference; more are complex numbers.
        free_steps: most steps of the free phase (T1).
        nudged_steps: steps of the nudged phase (T2).
        step_size: of both, in (0, 1]; 0.5 to 0.7 where steps of 1 swing.
        tol: the free phase ends when no unit is further from its input, looked at every tenth step; 0 takes all steps.
        readout: the block that is the output.

    Attributes:
        last_state: state of the last call, ``(B, n)``, without a graph.
        last_input: its input, in the type of the state.
        last_residual: its largest ``|H(phi(u), x) - u|``, ``()``.
        last_steps: the steps that it took.
        last_backward: state, input, signal and response of the last backward pass by ``"ep"`` or ``"adjoint"``, which
            need not be that of the last call; None before one.

    Raises:
        TypeError: ``field`` or ``activation`` is no such module.
        ValueError: an argument is out of its range; an activation with weights, with chance, or not elementwise; more
            than two points with one that is not holomorphic.

    Example:
        >>> from fulgurite.plugins.equilibrium import DenseField
        >>> layer = EquilibriumLayer(DenseField(64, {"l1": 32, "out": 16}))
        >>> layer(torch.rand(5, 64)).shape
        torch.Size([5, 16])
    """

    last_state: Tensor
    last_input: Tensor
    last_residual: Tensor
    last_steps: int
    last_backward: Backward | None = None

    def __init__(
        self,
        field: EquilibriumField,
        activation: nn.Module | None = None,
        gradient: Literal["ep", "adjoint", "unroll"] = "ep",
        beta: float = 0.1,
        points: int = 2,
        free_steps: int = 150,
        nudged_steps: int = 20,
        step_size: float = 1.0,
        tol: float = 1e-6,
        readout: str = "out",
    ) -> None:
        super().__init__()
        self.field, self.activation = field, ScaledSigmoid() if activation is None else activation
        self.gradient, self.beta, self.points = gradient, beta, points
        self.free_steps, self.nudged_steps, self.step_size, self.tol = free_steps, nudged_steps, step_size, tol
        self._validate(readout)
        self.readout = field.block(readout)

    def _validate(self, readout: str) -> None:
        if not isinstance(self.field, EquilibriumField):
            raise TypeError(f"`field` must be an EquilibriumField, such as a DenseField, got {self.field!r}")
        check_activation(self.activation, self.field.n)
        if self.gradient not in ("ep", "adjoint", "unroll"):
            raise ValueError(f"`gradient` must be 'ep', 'adjoint' or 'unroll', got {self.gradient!r}")
        check_points(self.beta, self.points)
        for name in ("free_steps", "nudged_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        check_relaxation(1, self.step_size)
        if not self.tol >= 0:
            raise ValueError(f"`tol` must be at least 0, got {self.tol}")
        if readout not in self.field.sizes:
            raise ValueError(f"`readout` must be a block of the field ({', '.join(self.field.sizes)}), got {readout!r}")
        if self.gradient == "ep" and self.points > 2 and not is_holomorphic(self.activation):
            raise ValueError(
                f"`points` is {self.points}, above 2, which takes an `activation` that is holomorphic; "
                f"{type(self.activation).__name__} is not (neither is ReLU, or any max): use ScaledSigmoid or DSiLU"
            )

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(B, ...)`` to ``(B, sizes[readout])``."""
        if not x.is_floating_point():
            raise ValueError(f"`x` must be real and floating, got {x.dtype}: convert it, as by `x.float()`")
        x = x.to(self._dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            if self.gradient == "unroll":
                r: Tensor = self.activation(self._free(x))
                return r[:, self.readout]
            params = [param for param in self.field.parameters() if param.requires_grad]
            out: Tensor = _Equilibrium.apply(self, x, *params)  # type: ignore[no-untyped-call]
            return out

    def _dtype(self, x: Tensor) -> torch.dtype:
        dtype = next((param.dtype for param in self.field.parameters()), torch.promote_types(x.dtype, torch.float32))
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the field's weights are {dtype}, too coarse to settle: use '32-true' or 'bf16-mixed'")
        return dtype

    def _free(self, x: Tensor) -> Tensor:
        start = x.new_zeros(len(x), self.field.n)
        at = self.field.at(x)
        u, residual, steps = settle(at, self.activation, start, self.free_steps, self.step_size, self.tol)
        self.last_state, self.last_input = u.detach(), x.detach()
        self.last_residual, self.last_steps = residual, steps
        return u

    def _response(self, u: Tensor, x: Tensor, g: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        g = g / torch.where(norm > 0, norm, 1)
        if self.gradient == "ep":
            d = nudged_response(
                self.field,
                self.activation,
                u,
                x,
                g,
                beta=self.beta,
                points=self.points,
                steps=self.nudged_steps,
                step_size=self.step_size,
            )
        else:
            d = self.exact_response(u, x, g)
        self.last_backward = Backward(u, x.detach(), g, d)
        return d * norm

    def exact_response(self, u: Tensor, x: Tensor, g: Tensor) -> Tensor:
        """:func:`adjoint_response` with this layer's settings."""
        return adjoint_response(
            self.field, self.activation, u, x, g, steps=self.free_steps, tol=self.tol, step_size=self.step_size
        )


class _Equilibrium(torch.autograd.Function):
    """Settles without a graph; its inputs are the weights too, so that DDP and GradScaler see their gradients."""

    @staticmethod
    def forward(ctx: Any, layer: EquilibriumLayer, x: Tensor, *params: Tensor) -> Tensor:
        with torch.no_grad():
            u = layer._free(x)
        ctx.layer = layer
        ctx.save_for_backward(u, x, *params)  # the weights too: an in-place change before the backward pass is noticed
        r: Tensor = layer.activation(u)
        return r[:, layer.readout]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        layer: EquilibriumLayer = ctx.layer
        u, x, *params = ctx.saved_tensors
        sources = [grad_out, x, *params]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            g = torch.zeros_like(u)
            g[:, layer.readout] = grad_out
            d = layer._response(u, x, g)
            with torch.enable_grad():
                x = x.detach().requires_grad_(ctx.needs_input_grad[1])
                h = layer.field(layer.activation(u), x)
                wanted = [tensor for tensor in (x, *params) if tensor.requires_grad]
            found = torch.autograd.grad(h, wanted, d, allow_unused=True, materialize_grads=True)
        grads = without_second_derivative(found, sources, _NO_SECOND)
        grad_x = grads.pop(0) if x.requires_grad else None
        return None, grad_x, *grads
