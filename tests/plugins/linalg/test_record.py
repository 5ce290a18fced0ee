from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.plugins.linalg import GGNOperator, HessianOperator, LossGraph, record_loss
from tests.plugins.linalg.dense import Dense, batch, network


def recorded(loss: Callable[[], Tensor], **kwargs: Any) -> LossGraph:
    with record_loss(**kwargs) as rec:
        loss().backward()
    return rec.graph


def flat_grad(module: nn.Module) -> Tensor:
    return torch.cat([param.grad.flatten() for param in module.parameters() if param.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_an_unrecorded_backward_to_the_bit(dtype: torch.dtype) -> None:
    net, (x, y) = network().to(dtype), batch()
    F.cross_entropy(net(x.to(dtype)), y).backward()
    plain = flat_grad(net)
    net.zero_grad()
    graph = recorded(lambda: F.cross_entropy(net(x.to(dtype)), y))
    assert torch.equal(flat_grad(net), plain)
    for kind in (HessianOperator, GGNOperator):
        assert torch.equal(kind(graph, net.parameters()).gradient, plain)
    assert graph.loss == F.cross_entropy(net(x.to(dtype)), y).item()
    assert {id(param) for param in graph.params} == {id(param) for param in net.parameters()}


@pytest.mark.parametrize(
    "call",
    [F.cross_entropy, nn.CrossEntropyLoss(), lambda z, y: F.cross_entropy(input=z, target=y, label_smoothing=0.1)],
    ids=["functional", "module", "keyword"],
)
def test_the_prediction_is_found_however_the_loss_is_called(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    net, (x, y) = network(), batch()
    graph = recorded(lambda: call(net(x), y))
    assert len(graph.outputs) == 1
    assert torch.equal(graph.outputs[0], net(x))
    (found,) = graph.calls
    assert (found.name, found.target is y, found.input is graph.outputs[0]) == ("cross_entropy", True, True)
    assert found.output.item() == graph.loss


def test_a_call_keeps_its_other_arguments() -> None:
    net, (x, _) = network(), batch()
    (call,) = recorded(lambda: F.huber_loss(net(x), net(x).detach() + 1, reduction="sum", delta=2.0)).calls
    assert (call.name, call.kwargs["reduction"], call.kwargs["delta"]) == ("huber_loss", "sum", 2.0)


@pytest.mark.parametrize("log_softmax", [F.log_softmax, torch.log_softmax, Tensor.log_softmax, nn.LogSoftmax(1)])
def test_nll_of_log_softmax_is_cross_entropy_of_logits(log_softmax: Callable[..., Tensor]) -> None:
    net, (x, y) = network(), batch()
    dims = () if isinstance(log_softmax, nn.Module) else (1,)
    graph = recorded(lambda: F.nll_loss(log_softmax(net(x), *dims), y))
    assert torch.equal(graph.outputs[0], net(x))
    assert graph.calls[0].name == "cross_entropy"
    torch.testing.assert_close(GGNOperator(graph, net.parameters()).to_dense(), Dense(net, x, y).ggn())


def test_a_submodule_gives_the_outputs_of_a_loss_written_by_hand() -> None:
    net, (x, _) = network(), batch()
    graph = recorded(lambda: (net(x) ** 2).mean() * 0.5, outputs=net)
    assert torch.equal(graph.outputs[0], net(x))
    assert not graph.calls
    assert not net._forward_hooks
    assert not recorded(lambda: F.mse_loss(net(x), x[:, :3]), outputs=None).outputs


def test_what_needs_no_gradient_is_no_output() -> None:
    net, (x, y) = network(), batch()
    graph = recorded(lambda: F.cross_entropy(net(x), y) + F.mse_loss(x, x + 1))
    assert len(graph.outputs) == len(graph.calls) == 1


def test_attention_has_a_second_derivative() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    step = lambda: F.mse_loss(layer(x), torch.zeros_like(x))  # noqa: E731
    dense = HessianOperator(recorded(step), layer.parameters())
    vector = torch.randn(dense.shape[0], dtype=torch.float64)
    other = torch.randn_like(vector)
    assert torch.allclose(other @ (dense @ vector), vector @ (dense @ other))
    with pytest.raises(RuntimeError, match=r"flash_attention.*`params`"):
        HessianOperator(recorded(step, double_backward=False), layer.parameters()) @ vector


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network().float()

    def training_step(self, data: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(data[0]), data[1])

    def configure_optimizers(self) -> "Recording":
        return Recording(self.parameters(), lr=0.1)


class Recording(torch.optim.SGD):
    """Compares the recorded gradient with what the closure left in ``.grad``."""

    seen = 0

    def step(self, closure: Any = None) -> Any:
        with record_loss() as rec:
            loss = closure()
        op = HessianOperator(rec.graph, self.param_groups[0]["params"])
        grads = [param.grad for param in self.param_groups[0]["params"]]
        assert torch.equal(op.gradient, op.flatten(grads))
        assert rec.graph.outputs[0].shape == (5, 3)
        assert op.matvec(op.gradient).isfinite().all()
        assert torch.equal(op.flatten(grads), op.gradient)  # products write no gradients
        Recording.seen += 1
        super().step()
        return loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_records_inside_automatic_optimization(precision: Any) -> None:
    x, y = batch()
    Recording.seen = 0
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=2, precision=precision, enable_model_summary=False, **options)
    trainer.fit(Net(), DataLoader(TensorDataset(x.float(), y), 5))
    assert Recording.seen == 4


def test_released_graphs_raise_and_are_free() -> None:
    net, (x, y) = network(), batch()
    graph = recorded(lambda: F.cross_entropy(net(x), y))
    op = GGNOperator(graph, net.parameters())
    op @ torch.ones(op.shape[0])
    graph.release()
    for use in (lambda: op @ torch.ones(op.shape[0]), lambda: op.gradient):
        with pytest.raises(RuntimeError, match="was released"):
            use()
    assert not graph.outputs
    assert graph.root.grad_fn is None


def test_errors_of_a_recording() -> None:
    net, (x, y) = network(), batch()
    loss = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    with record_loss():
        loss().backward()
        with pytest.raises(RuntimeError, match="ran twice"):
            loss().backward()
    with pytest.raises(RuntimeError, match=r"call `loss.backward\(\)` inside the closure"), record_loss():
        loss()
    with pytest.raises(ValueError, match=r"scalar tensor, got \(10, 3\)"), record_loss() as rec:
        rec.finish(net(x))
    with pytest.raises(ValueError, match="no parameter"), record_loss() as rec:
        rec.finish(x.sum())
    with pytest.raises(RuntimeError, match=r"backward\(gradient\)"), record_loss():
        loss().backward(torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode(), record_loss():
        pass
    with pytest.raises(ValueError, match="`outputs` must be 'loss_input'"):
        record_loss("logits")  # type: ignore[arg-type]
    assert torch.overrides._get_current_function_mode() is None


def test_a_scaled_loss_is_refused_and_scalers_work_again_afterwards() -> None:
    net, (x, y) = network(), batch()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="bf16-mixed"), record_loss():
        scaler.scale(F.cross_entropy(net(x), y)).backward()
    assert scaler.scale(torch.ones(())) > 1
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert recorded(lambda: off.scale(F.cross_entropy(net(x), y))).outputs


def test_compiled_and_reentrant_graphs_are_refused() -> None:
    net, (x, y) = network(), batch()
    logits = torch.compile(net, backend="aot_eager")(x)  # before: torch 2.8 compiles nothing while a loss is recorded
    with pytest.raises(RuntimeError, match="_orig_mod"):
        recorded(lambda: F.cross_entropy(logits, y))
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        recorded(lambda: F.cross_entropy(checkpoint(net, x, use_reentrant=True), y))
    graph = recorded(lambda: F.cross_entropy(checkpoint(net, x, use_reentrant=False), y))
    torch.testing.assert_close(HessianOperator(graph, net.parameters()).to_dense(), Dense(net, x, y).hessian())
