"""Hessian, generalised Gauss-Newton and Fisher matrices of a recorded loss."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import one_hot

from fulgurite.plugins.linalg.distributed import Peers, in_pieces
from fulgurite.plugins.linalg.module_loss import ModuleLoss
from fulgurite.plugins.linalg.operators import CurvatureOperator
from fulgurite.plugins.linalg.record import LossCall, LossGraph, edge_of, walk
from fulgurite.plugins.seeds import derived_seed

_LINEAR = ("nll_loss", "kl_div")


class NoOutputs(ValueError):
    """Nothing tells where the loss splits."""


class LossOperator(CurvatureOperator):
    """A curvature matrix of the loss of ``source``, averaged over the ranks as DDP averages gradients.

    Vectors hold the parameters one after the other. They are float32, or float64 where a parameter is.

    Args:
        source: a recorded graph, or a :class:`~fulgurite.plugins.linalg.ModuleLoss`.
        params: the parameters, and so the principal block; None for all: a graph knows them in no particular order.
        group: the data-parallel ranks; None for all.
        sync: False for this rank's loss alone.

    Raises:
        ValueError: for parameters that FSDP or DeepSpeed hold in pieces, or that live on several devices.
        RuntimeError: by products after the graph's ``release()``, and where a second derivative is missing.
    """

    def __init__(
        self,
        source: LossGraph | ModuleLoss,
        params: Iterable[Tensor] | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        sync: bool = True,
    ) -> None:
        self.source = source
        self.params = list(source.params if params is None else params)
        _check_params(self.params)
        dtypes = {param.dtype for param in self.params}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        size = sum(param.numel() for param in self.params)
        super().__init__(size, dtype, self.params[0].device, Peers(group, sync))
        self._key = tuple(map(id, self.params))
        self._kinds = [(param.dtype, param.device) for param in self.params]

    @abstractmethod
    def _of_graph(self, graph: LossGraph, index: int, vector: list[Tensor]) -> Sequence[Tensor | None]:
        """The product of the ``index``-th graph's matrix with a vector."""

    @property
    def gradient(self) -> Tensor:
        """The gradient of the same loss, ``(P,)``; computed by the graph when asked for, and one all-reduce."""
        return self.peers.mean_(self._mean(self.flatten(self._gradient(graph)) for graph in self._graphs()))

    @property
    def loss(self) -> Tensor:
        """The loss, ``()``; one all-reduce."""
        return self.peers.mean_(self._mean(graph.root.detach().to(self.dtype, copy=True) for graph in self._graphs()))

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """The pieces of ``(P,)`` in the shapes and types of the parameters."""
        pieces = torch.split(vector, [param.numel() for param in self.params])
        return [piece.view(param.shape).to(param.dtype) for piece, param in zip(pieces, self.params, strict=True)]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One tensor a parameter as one vector, ``(P,)``; None counts as zeros."""
        pairs = zip(tensors, self.params, strict=True)
        pieces = [torch.zeros_like(param) if tensor is None else tensor for tensor, param in pairs]
        return torch.cat([piece.detach().reshape(-1).to(self.dtype) for piece in pieces])

    def _products(self, vectors: Tensor) -> Tensor:
        if [(param.dtype, param.device) for param in self.params] != self._kinds:
            raise RuntimeError("the parameters changed their type or device and are cut off the graph: record anew")
        rows = [self.unflatten(vector) for vector in vectors]
        return self._mean(
            torch.stack([self.flatten(self._of_graph(graph, index, row)) for row in rows])
            for index, graph in enumerate(self._graphs())
        )

    def _graphs(self) -> Iterator[LossGraph]:
        if isinstance(self.source, LossGraph):
            yield self.source
        else:
            for _, graph in self.source.graphs():
                yield graph

    def _mean(self, values: Iterable[Tensor]) -> Tensor:
        """The weighted mean of one value a graph."""
        weights = [1.0] if isinstance(self.source, LossGraph) else self.source.weights
        total: Tensor | None = None
        for weight, value in zip(weights, values, strict=True):
            part = value if weight == 1 else value * weight
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _gradient(self, graph: LossGraph) -> Sequence[Tensor | None]:
        """The gradient with its graph where a product will need or has needed that."""
        return graph.keep(("gradient", self._key), lambda: vjp([graph.root], self.params))


class HessianOperator(LossOperator):
    """The Hessian of a loss: products by double backward through the kept graph (Pearlmutter 1994).

    Example:
        >>> from fulgurite.plugins.linalg import record_loss
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> with record_loss() as rec:
        ...     (theta**3).sum().backward()
        >>> HessianOperator(rec.graph) @ torch.ones(2)
        tensor([ 6., 12.])
    """

    def _gradient(self, graph: LossGraph) -> Sequence[Tensor | None]:
        key = ("differentiable gradient", self._key)
        return graph.keep(key, lambda: vjp([graph.root], self.params, create_graph=True))

    def _of_graph(self, graph: LossGraph, index: int, vector: list[Tensor]) -> Sequence[Tensor | None]:
        return vjp(self._gradient(graph), self.params, vector)


class GGNOperator(LossOperator):
    """The generalised Gauss-Newton matrix of a loss (Schraudolph 2002; Martens, arXiv 1412.1193).

    ``sum_ij J_i' (d^2 L / dz_i dz_j) J_j + R``: ``z_i`` are the recorded outputs, ``J_i`` their Jacobians, and ``R`` is
    the Hessian of what reaches the loss past the outputs, such as a weight penalty.

    Raises:
        ValueError: where no output was recorded, or where the split at the outputs is not defined.
    """

    def __init__(
        self,
        source: LossGraph | ModuleLoss,
        params: Iterable[Tensor] | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        sync: bool = True,
    ) -> None:
        super().__init__(source, params, group=group, sync=sync)
        if isinstance(source, LossGraph):
            self._outputs(source)

    def _of_graph(self, graph: LossGraph, index: int, vector: list[Tensor]) -> Sequence[Tensor | None]:
        outputs = self._outputs(graph)
        bent = self._bend(graph, index, self._jacobian_product(graph, vector))
        product = vjp(outputs, self.params, bent)
        bypass = graph.keep(("bypass", self._key), lambda: self._bypass(graph))
        if not any(part is not None and part.requires_grad for part in bypass):
            return product
        past = vjp(bypass, self.params, vector)
        return [a if b is None else b if a is None else a + b for a, b in zip(product, past, strict=True)]

    def _outputs(self, graph: LossGraph) -> list[Tensor]:
        return graph.keep("outputs", lambda: split(graph))

    def _jacobian_product(self, graph: LossGraph, vector: list[Tensor]) -> list[Tensor]:
        """``J v`` by the double backward trick: the transposed Jacobian is linear in the vector it meets."""
        outputs = self._outputs(graph)

        def transposed() -> tuple[list[Tensor], Sequence[Tensor | None]]:
            duals = [torch.zeros_like(output, requires_grad=True) for output in outputs]
            return duals, vjp(outputs, self.params, duals, create_graph=True)

        duals, image = graph.keep(("transposed", self._key), transposed)
        return _filled(vjp(image, duals, vector), outputs)

    def _bend(self, graph: LossGraph, index: int, tangents: list[Tensor]) -> list[Tensor]:
        """The curvature of the loss at its outputs, times ``tangents``."""
        return _filled(vjp(self._output_gradient(graph), self._outputs(graph), tangents), tangents)

    def _output_gradient(self, graph: LossGraph) -> list[Tensor]:
        outputs = self._outputs(graph)
        gradients = graph.keep("output gradient", lambda: vjp([graph.root], outputs, create_graph=True))
        return _filled(gradients, outputs)

    def _bypass(self, graph: LossGraph) -> Sequence[Tensor | None]:
        """The gradient of what reaches the loss past the outputs."""
        outputs = self._outputs(graph)
        if not {id(getattr(node, "variable", None)) for node in walk([graph.root], outputs)} & set(self._key):
            return []
        # An undefined gradient, unlike zeros, costs nothing on its way through the network.
        hooks = [edge_of(output)[0].register_prehook(_without(edge_of(output)[1])) for output in outputs]
        try:
            return vjp([graph.root], self.params, create_graph=True)
        finally:
            for hook in hooks:
                hook.remove()


class FisherOperator(GGNOperator):
    """A Fisher matrix of a loss that is a sum of one term a sample (Martens, arXiv 1412.1193).

    ``sum_n (1 / c_n) (J_n' q_n) (J_n' q_n)' + R``: the samples are the rows of the outputs, ``q_n = dL / dz_n``, and
    ``c_n`` is the weight of sample n's loss in ``L``, ``1 / N`` for a mean. ``R`` is as in :class:`GGNOperator`.

    Args:
        source: a recorded graph, or a :class:`~fulgurite.plugins.linalg.ModuleLoss`.
        params: as for :class:`GGNOperator`.
        kind: ``"empirical"`` takes the targets of the batch; ``"mc"`` draws them from the model, once for this
            operator: its mean over draws is the Gauss-Newton matrix. Only for cross entropy and squared error.
        n_samples: draws.
        generator: draws a seed; None for torch's own.
        group: the data-parallel ranks; None for all.
        sync: False for this rank's loss alone.

    Raises:
        ValueError: for an argument out of its range, for outputs of which a row is not a sample, for ``"mc"`` with
            another loss, and as :class:`GGNOperator`.
    """

    def __init__(
        self,
        source: LossGraph | ModuleLoss,
        params: Iterable[Tensor] | None = None,
        kind: Literal["empirical", "mc"] = "empirical",
        n_samples: int = 1,
        generator: torch.Generator | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        sync: bool = True,
    ) -> None:
        if kind not in ("empirical", "mc"):
            raise ValueError(f"`kind` must be 'empirical' or 'mc', got {kind!r}")
        if n_samples < 1:
            raise ValueError(f"`n_samples` counts draws and must be at least 1, got {n_samples}")
        super().__init__(source, params, group=group, sync=sync)
        self.kind, self.n_samples = kind, n_samples
        self._seed = 0
        if kind == "mc":
            device = generator.device if generator is not None else None
            self._seed = int(torch.randint(2**62, (), generator=generator, device=device))
        if isinstance(source, LossGraph):
            self._rows(source, 0)

    def _bend(self, graph: LossGraph, index: int, tangents: list[Tensor]) -> list[Tensor]:
        # One sample's outputs and terms belong together: w_in = q_in sum_j <q_jn, t_jn>, summed over draws.
        rows = graph.keep(("rows", self._seed, self.n_samples, self.kind), lambda: self._rows(graph, index))
        moved = [_rows_of(tangent, call) for tangent, call in zip(tangents, self._calls(graph), strict=True)]
        overlap = sum(torch.einsum("snc,nc->sn", q, t.to(q.dtype)) for q, t in zip(rows, moved, strict=True))
        bent = []
        for q, tangent, call in zip(rows, tangents, self._calls(graph), strict=True):
            flat = torch.einsum("snc,sn->nc", q, overlap)
            bent.append(_from_rows(flat.to(tangent.dtype), tangent, call))
        return bent

    def _calls(self, graph: LossGraph) -> list[LossCall | None]:
        """The loss call of each output; None where it was recorded by a submodule."""
        calls = [_calls_of(graph, output) for output in self._outputs(graph)]
        if any(len(found) > 1 for found in calls):
            raise ValueError(
                "two loss functions got the same prediction: the loss of a sample is not defined by one of them"
            )
        return [found[0] if found else None for found in calls]

    def _rows(self, graph: LossGraph, index: int) -> list[Tensor]:
        """``q_n / sqrt(c_n)`` of each output, ``(draws, N, C)``."""
        outputs, calls = self._outputs(graph), self._calls(graph)
        counts = {len(_rows_of(output, call)) for output, call in zip(outputs, calls, strict=True)}
        if len(counts) > 1:
            raise ValueError(
                f"the recorded outputs have {sorted(counts)} rows: a row must be one sample in each of them"
            )
        generator = torch.Generator(self.device).manual_seed(derived_seed(self._seed, index, self.peers.rank))
        rows = []
        for output, call, gradient in zip(outputs, calls, self._output_gradient(graph), strict=True):
            weight = _sample_weights(graph.root, output, call)
            if self.kind == "empirical":
                rows.append((_rows_of(gradient.detach(), call) * weight.rsqrt().where(weight != 0, 0))[None])
            else:
                drawn = [_drawn(output.detach(), call, generator) for _ in range(self.n_samples)]
                rows.append(torch.stack(drawn) * (weight / self.n_samples).sqrt())
        return rows


def vjp(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """Vector-Jacobian product through kept graphs; hooks of DDP stay silent and ``.grad`` untouched."""
    pairs = zip(outputs, [None] * len(outputs) if vectors is None else vectors, strict=True)
    used = [(output, vector) for output, vector in pairs if output is not None and output.requires_grad]
    if not used:
        return [None] * len(inputs)
    try:
        gradients = torch.autograd.grad(
            [output for output, _ in used],
            inputs,
            [vector for _, vector in used],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        if create_graph:
            _check_twice(gradients)
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            f"the recorded loss lacks a derivative: {error}. Replace that operation, or leave the parameters below it "
            "out of `params`; weights that an optimizer stepped need a new recording"
        ) from error
    return gradients


def _check_twice(gradients: Sequence[Tensor | None]) -> None:
    """The node at which ``once_differentiable`` would raise leads to no parameter, so the engine never gets there."""
    nodes = walk([gradient for gradient in gradients if gradient is not None and gradient.requires_grad])
    if any(node.name() == "torch::autograd::Error" for node in nodes):
        raise RuntimeError("a custom `autograd.Function` is `once_differentiable`")


def _filled(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(b) if a is None else a for a, b in zip(tensors, like, strict=True)]


def _without(index: int) -> Any:
    return lambda grads: (*grads[:index], None, *grads[index + 1 :])


def _reaches(graph: LossGraph, tensor: Tensor) -> bool:
    """Whether the loss depends on a recorded tensor: what a step only logs does not count."""
    return edge_of(tensor)[0] in graph.keep("nodes", lambda: set(walk([graph.root])))


def _calls_of(graph: LossGraph, output: Tensor) -> list[LossCall]:
    return [call for call in graph.calls if call.input is output and _reaches(graph, call.output)]


def _check_params(params: list[Tensor]) -> None:
    if not params:
        raise ValueError("`params` is empty: the loss depends on no parameter that requires a gradient")
    for param in params:
        if in_pieces(param):
            raise ValueError(
                "`params` are held in pieces by FSDP, tensor parallelism or DeepSpeed: train with DDP, or take the "
                "curvature of a copy under DDP"
            )
        if param.is_complex() or not param.requires_grad:
            raise ValueError(f"`params` must be real and require gradients, got {param.dtype} of {tuple(param.shape)}")
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise ValueError(f"`params` live on {sorted(map(str, devices))}: a vector is on one device")


def split(graph: LossGraph) -> list[Tensor]:
    """The outputs that the loss depends on; refuses what would make the Gauss-Newton matrix wrong."""
    outputs = [output for output in graph.outputs if _reaches(graph, output)]
    if not outputs:
        raise NoOutputs(
            "no known loss function was called with a prediction: pass `outputs=<submodule>` to the recorder, or take "
            "the `HessianOperator`, which is `curvature='hessian'` of an optimizer"
        )
    if any(output.is_leaf for output in outputs):
        raise ValueError(
            "a recorded output is itself a parameter: take the `HessianOperator`, which is `curvature='hessian'` of an "
            "optimizer"
        )
    for output in outputs:
        others = {edge_of(other) for other in outputs if other is not output}
        if any(edge in others for node in walk([output]) for edge in node.next_functions):
            raise ValueError("one recorded output depends on another: pass `outputs=<submodule>` for one of them")
    for output in outputs:
        names = [call.name for call in _calls_of(graph, output)]
        if not names or any(name not in _LINEAR for name in names):
            continue
        raise ValueError(
            f"`{names[0]}` is linear in its input, so the Gauss-Newton matrix there is zero: call `cross_entropy` on "
            "logits, or pass `outputs=<submodule>` with what returns them"
        )
    return outputs


def _class_axis(output: Tensor, call: LossCall | None) -> int:
    return 1 if call is not None and call.name == "cross_entropy" and output.dim() > 2 else -1


def _rows_of(output: Tensor, call: LossCall | None) -> Tensor:
    """``(N, C)``: one row a sample; one number a sample where there is one axis."""
    if output.dim() < 2:
        return output.reshape(-1, 1) if call is None or call.name != "cross_entropy" else output.reshape(1, -1)
    axis = _class_axis(output, call)
    return output.movedim(axis, -1).reshape(-1, output.shape[axis])


def _from_rows(rows: Tensor, like: Tensor, call: LossCall | None) -> Tensor:
    if like.dim() < 2:
        return rows.reshape(like.shape)
    axis = _class_axis(like, call)
    return rows.reshape(like.movedim(axis, -1).shape).movedim(-1, axis)


def _sample_weights(root: Tensor, output: Tensor, call: LossCall | None) -> Tensor:
    """The weight of each sample's loss in ``root``: ``()``, or ``(N, 1)``."""
    n = len(_rows_of(output, call))
    if call is None:
        return root.new_tensor(1 / n)
    (weight,) = _filled(vjp([root], [call.output]), [call.output])
    reduction = call.kwargs.get("reduction", "mean")
    if reduction == "none":
        return _rows_of(weight, None).sum(1, keepdim=True) if weight.numel() != n else weight.reshape(-1, 1)
    if reduction in ("mean", "batchmean"):
        ignored = call.kwargs.get("ignore_index", -100)
        is_class = call.target is not None and not call.target.is_floating_point()
        return weight / ((call.target != ignored).sum() if is_class and call.name == "cross_entropy" else n)
    return weight


def _drawn(output: Tensor, call: LossCall | None, generator: torch.Generator) -> Tensor:
    """``dl_n / dz_n`` for a target that the model draws, ``(N, C)``."""
    rows = _rows_of(output, call).to(torch.promote_types(output.dtype, torch.float32))
    if call is None or call.name not in ("cross_entropy", "mse_loss") or call.kwargs.get("weight") is not None:
        name = "a loss written by hand" if call is None else f"`{call.name}` with a weight"
        raise ValueError(f"`kind='mc'` knows cross_entropy and mse_loss without weights, got {name}: use 'empirical'")
    if call.name == "cross_entropy":
        probabilities = rows.softmax(-1)
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        residual = probabilities - one_hot(labels, rows.shape[1])
        if call.target is not None and not call.target.is_floating_point():
            residual[call.target.reshape(-1) == call.kwargs.get("ignore_index", -100)] = 0
        return residual
    # The loss of a sample is the mean over its C numbers, or their sum: its second derivative is 2 / C, or 2.
    mean = call.kwargs.get("reduction", "mean") != "sum"
    noise = torch.empty_like(rows).normal_(generator=generator)
    return noise * (2 / rows.shape[1] if mean else 2) ** 0.5
