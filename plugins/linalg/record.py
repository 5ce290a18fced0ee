"""Keeps the autograd graph of the loss that somebody else computes and differentiates."""

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

Outputs = Literal["loss_input"] | nn.Module | None

_LOSSES: set[Callable[..., Any]] = {
    F.cross_entropy,
    F.nll_loss,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.kl_div,
    F.gaussian_nll_loss,
    F.poisson_nll_loss,
    F.cosine_embedding_loss,
    F.ctc_loss,
}
_SIGNATURES = {loss: inspect.signature(loss) for loss in _LOSSES}
_LOG_SOFTMAX = {F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax}
_BACKWARD = inspect.signature(torch.Tensor.backward)
_TWICE = {  # nodes that cannot be differentiated twice
    "CompiledFunctionBackward": "`torch.compile` has no double backward: use the uncompiled module, `module._orig_mod`",
    "CheckpointFunctionBackward": "reentrant checkpointing has no double backward: pass `use_reentrant=False`",
}


@dataclass(eq=False)
class LossCall:
    """A call of a function of :mod:`torch.nn.functional` that compares a prediction with a target.

    Attributes:
        name: of the function; where ``log_softmax`` was called on its own, ``nll_loss`` is ``cross_entropy`` and the
            others end in ``_with_logits``.
        input: the prediction, in the graph: the logits where ``log_softmax`` was called on its own.
        target: what it is compared with; None where the function has no such argument.
        kwargs: the other arguments that were given.
        output: what the function returned, in the graph.
    """

    name: str
    input: Tensor
    target: Tensor | None
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(eq=False)
class LossGraph:
    """A scalar loss with its graph, which lasts until :meth:`release`.

    Attributes:
        root: the loss, ``()``, as ``backward`` got it.
        outputs: predictions that entered it: where the Gauss-Newton and Fisher matrices split the loss.
        params: the parameters it depends on, in no particular order.
        calls: the calls of loss functions, one for each prediction of ``outputs`` that was found by one.
    """

    root: Tensor
    outputs: list[Tensor]
    params: list[nn.Parameter]
    calls: list[LossCall] = field(default_factory=list)
    _kept: dict[Hashable, Any] | None = field(default_factory=dict, repr=False)

    @property
    def loss(self) -> float:
        """The loss's value."""
        return float(self.root.detach())

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned when ``key`` came first: derivatives that several products use.

        Raises:
            RuntimeError: after :meth:`release`.
        """
        if self._kept is None:
            raise RuntimeError("this `LossGraph` was released: record the loss again and make a new operator from it")
        if key not in self._kept:
            self._kept[key] = make()
        value: T = self._kept[key]
        return value

    def release(self) -> None:
        """Frees the graph and what was derived from it; products with it raise from now on."""
        self.root = self.root.detach()
        self._kept = None
        self.outputs, self.calls = [], []


class record_loss(TorchFunctionMode):  # noqa: N801, RUF100  reads as a verb: `with record_loss() as rec`
    """Records the loss on which ``backward`` is called within the block, and keeps its graph.

    It goes around a closure, so it works inside automatic optimization. Gradients come out as always.

    Args:
        outputs: ``"loss_input"`` records what loss functions of :mod:`torch.nn.functional` get as their prediction; a
            submodule, what it returns, for losses written by hand; None nothing, which is enough for the Hessian.
        double_backward: switch off kernels that have no second derivative: fused attention, and cuDNN's recurrent nets.

    Attributes:
        graph: the :class:`LossGraph`, from the end of the block on.

    Raises:
        RuntimeError: on a second ``backward``, on none, on a loss scaled by a ``GradScaler``, under ``inference_mode``.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> with record_loss() as rec:
        ...     nn.MSELoss()(net(torch.ones(3, 2)), torch.zeros(3, 1)).backward()
        >>> [tuple(output.shape) for output in rec.graph.outputs], [call.name for call in rec.graph.calls]
        ([(3, 1)], ['mse_loss'])
    """

    graph: LossGraph

    def __init__(self, outputs: Outputs = "loss_input", *, double_backward: bool = True) -> None:
        super().__init__()
        if not (outputs in ("loss_input", None) or isinstance(outputs, nn.Module)):
            raise ValueError(f"`outputs` must be 'loss_input', a submodule or None, got {outputs!r}")
        self._watched, self._double_backward = outputs, double_backward
        self._root: Tensor | None = None
        self._params: list[nn.Parameter] = []
        self._outputs: list[Tensor] = []
        self._calls: list[LossCall] = []
        self._logits: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of what log_softmax made of them
        self._stack = ExitStack()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            return self._backward(*args, **kwargs)
        result = func(*args, **kwargs)
        if self._watched == "loss_input":
            if func in _LOSSES:
                self._loss_function(func, args, kwargs, result)
            elif func in _LOG_SOFTMAX:
                self._logits[id(result)] = (result, args[0] if args else kwargs["input"])
        return result

    def __enter__(self) -> Self:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("`torch.inference_mode` keeps no graph: leave it before `record_loss`")
        if self._double_backward:
            self._stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
            self._stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if isinstance(self._watched, nn.Module):
            hook = self._watched.register_forward_hook(
                lambda module, args, output: self._outputs.extend(_tensors(output))
            )
            self._stack.callback(hook.remove)
        self._stack.enter_context(mock.patch.object(torch.amp.GradScaler, "scale", _refuse_scaler))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._stack.close()
        root, outputs, calls = self._root, self._outputs, self._calls
        self._root, self._outputs, self._calls, self._logits = None, [], [], {}
        if kind is not None:
            return
        if root is None:
            raise RuntimeError("no `backward` ran within `record_loss`: call `loss.backward()` inside the closure")
        outputs = list({id(output): output for output in outputs if output.requires_grad}.values())
        self.graph = LossGraph(root, outputs, self._params, calls)
        self._params = []

    def finish(self, loss: Tensor) -> None:
        """Takes ``loss`` as the root where no ``backward`` runs; within the block."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"`loss` must be a scalar tensor, got {got}")
        if not loss.requires_grad:
            raise ValueError("`loss` depends on no parameter that requires a gradient")
        if self._root is not None:
            raise RuntimeError(
                "`backward` ran twice within one `record_loss`: record each loss on its own, or their sum"
            )
        self._root = loss.reshape(())
        self._params = _parameters(self._root)  # before a backward, in which a compiled graph fails in other words

    def _backward(self, *args: Any, **kwargs: Any) -> None:
        arguments = _BACKWARD.bind(*args, **kwargs).arguments
        loss = arguments.pop("self")
        if arguments.get("gradient") is not None:
            raise RuntimeError("`backward(gradient)` scales the loss: call `backward()` on a scalar")
        self.finish(loss)
        torch.Tensor.backward(loss, **arguments | {"retain_graph": True})  # type: ignore[no-untyped-call]

    def _loss_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        given = _SIGNATURES[func].bind(*args, **kwargs).arguments
        name, prediction = func.__name__, given.pop(next(iter(given)))
        if id(prediction) in self._logits:
            prediction = self._logits[id(prediction)][1]
            name = {"nll_loss": "cross_entropy"}.get(name, f"{name}_with_logits")
        if prediction.requires_grad:
            self._outputs.append(prediction)
            self._calls.append(LossCall(name, prediction, given.pop("target", None), given, result))


def _refuse_scaler(scaler: torch.amp.GradScaler, outputs: Any) -> Any:
    if scaler.is_enabled():
        raise RuntimeError("`record_loss` would record the loss times the scale of the `GradScaler`: use bf16-mixed")
    return outputs


def _tensors(output: Any) -> list[Tensor]:
    """The tensors that a submodule returned."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for item in output for tensor in _tensors(item)] if isinstance(output, list | tuple) else []


def edge_of(tensor: Tensor) -> tuple[Node, int]:
    """Where gradients of ``tensor`` enter the graph."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def walk(tensors: Sequence[Tensor], stop: Sequence[Tensor] = ()) -> Iterator[Node]:
    """The nodes that gradients of ``tensors`` reach without passing through one of ``stop``."""
    edges = [edge_of(tensor) for tensor in tensors]
    seen = {edge_of(other) for other in stop}
    nodes: set[Node] = set()
    while edges:
        edge = edges.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge[0] not in nodes:
            nodes.add(edge[0])
            yield edge[0]
            edges.extend((node, index) for node, index in reversed(edge[0].next_functions) if node is not None)


def _parameters(root: Tensor) -> list[nn.Parameter]:
    """The parameters that the loss depends on; refuses a graph that has no second derivative."""
    found = []
    for node in walk([root]):
        for name, remedy in _TWICE.items():
            if node.name() == name:
                raise RuntimeError(remedy)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            found.append(variable)
    return found
