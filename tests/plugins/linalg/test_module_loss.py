from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fulgurite.plugins.linalg import GGNOperator, HessianOperator, ModuleLoss
from tests.plugins.linalg.dense import CLASSES, Dense, batch, network

close = torch.testing.assert_close


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, data: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(data[0]), data[1])}


class Busy(LightningModule):
    """Draws masks, normalises, logs and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, CLASSES)).double()
        self.steps = 0

    def training_step(self, data: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        loss = F.cross_entropy(self.net(data[0]), data[1])
        self.log("loss", loss)  # would raise without a Trainer
        return loss

    def hessian_loss(self, data: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(data[0]).square().mean()

    def manual(self, data: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.training_step(data, batch_idx).backward()

    def nothing(self, data: tuple[Tensor, Tensor], batch_idx: int) -> None:
        return


@pytest.mark.parametrize("keep_graphs", ["auto", True, False])
def test_the_loss_is_the_weighted_mean_over_batches(keep_graphs: Any) -> None:
    module, batches = Plain(), [(batch(n=n, seed=n), n) for n in (4, 10)]
    weights = [0.25, 1.0]
    loss = ModuleLoss(module, batches, weights=weights, keep_graphs=keep_graphs)
    dense = [Dense(module.net, *data) for data, _ in batches]
    op = HessianOperator(loss)
    for _ in range(2):
        close(op.to_dense(), sum(w * part.hessian() for w, part in zip(weights, dense, strict=True)))
    close(GGNOperator(loss).to_dense(), sum(w * part.ggn() for w, part in zip(weights, dense, strict=True)))
    close(op.gradient, sum(w * part.gradient() for w, part in zip(weights, dense, strict=True)))
    close(op.loss, sum(w * part.loss(part.theta) for w, part in zip(weights, dense, strict=True)))
    close(loss.value(), op.loss)
    assert [weight for weight, _ in ModuleLoss(module, batches).graphs()] == [0.5, 0.5]


def test_a_step_leaves_no_trace_and_repeats_its_masks() -> None:
    module = Busy()
    loss = ModuleLoss(module, [(batch(), 0), (batch(seed=2), 1)])
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    generator, numbers = torch.get_rng_state(), dict(vars(module))
    op = HessianOperator(loss)
    v = torch.randn(op.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(op @ v, op @ v)
    first, second = (graph.outputs[0] for _, graph in ModuleLoss(module, [(batch(), 0)] * 2, keep_graphs=True).graphs())
    assert not torch.equal(first, second)  # each batch has masks of its own
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
    assert vars(module) == numbers
    assert module.training
    assert all(param.grad is None for param in module.parameters())


def test_what_is_not_frozen_lasts() -> None:
    module = Busy()
    module.log = lambda *args: None  # type: ignore[method-assign, assignment]
    ModuleLoss(module, [(batch(), 0)], frozen=False).value()
    assert module.steps == 1


def test_the_module_may_be_in_eval_mode_and_have_another_step() -> None:
    module = Busy().eval()
    x, y = batch()
    loss = ModuleLoss(module, [((x, y), 0)], step="hessian_loss", outputs=module.net)
    close(GGNOperator(loss).gradient, Dense(module.net, x, y, lambda z, y: z.square().mean()).gradient())
    assert not module.training


def test_release_frees_and_the_next_product_sees_the_new_weights() -> None:
    module = Plain()
    x, y = batch()
    loss = ModuleLoss(module, [((x, y), 0)])
    op = HessianOperator(loss)
    op.to_dense()
    ((_, graph),) = loss.graphs()
    with torch.no_grad():
        module.net[2].weight.add_(0.5)
    loss.release()
    assert graph.root.grad_fn is None
    close(op.to_dense(), Dense(module.net, x, y).hessian())


def test_graphs_that_are_not_kept_are_released() -> None:
    loss = ModuleLoss(Plain(), [(batch(), 0)], keep_graphs=False)
    ((_, graph),) = loss.graphs()
    with pytest.raises(RuntimeError, match="was released"):
        graph.keep("key", list)


def test_the_context_is_entered_around_the_step() -> None:
    module = Plain().float()
    x, y = batch()
    loss = ModuleLoss(module, [((x.float(), y), 0)], context=lambda: torch.autocast("cpu", torch.bfloat16))
    ((_, graph),) = loss.graphs()
    assert graph.outputs[0].dtype == torch.bfloat16


def test_refusals() -> None:
    module, batches = Busy(), [(batch(), 0)]
    for compiled in (torch.compile(Plain(), backend="eager"), in_place(Plain())):
        with pytest.raises(ValueError, match="_orig_mod"):
            ModuleLoss(compiled, batches)
    with pytest.raises(ValueError, match=r"has no method `loss`; DDP's is `module.module`"):
        ModuleLoss(module, batches, step="loss")
    with pytest.raises(ValueError, match="`batches` is empty"):
        ModuleLoss(module, [])
    with pytest.raises(ValueError, match="`weights` has 2 numbers for 1 batches"):
        ModuleLoss(module, batches, weights=[1, 2])
    with pytest.raises(RuntimeError, match="`step` calls `backward`"):
        HessianOperator(ModuleLoss(module, batches, step="manual")).gradient  # noqa: B018
    with pytest.raises(ValueError, match="`nothing` returned NoneType for batch 0"):
        ModuleLoss(module, batches, step="nothing").value()
    assert torch.overrides._get_current_function_mode() is None


def in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def test_a_fresh_loss_is_of_the_first_batches_and_keeps_no_graph_of_the_old() -> None:
    module, batches = Busy(), [(batch(n=n, seed=n), n) for n in (4, 10)]
    loss = ModuleLoss(module, batches, keep_graphs=True)
    first = next(loss.graphs())[1]
    (weight, graph), *others = loss.fresh(1).graphs()
    assert (weight, others) == (1, [])
    assert graph is not first
    assert graph.loss == first.loss  # the same random numbers
    assert len([*loss.fresh(keep_graphs=False).graphs()]) == 2
    assert next(ModuleLoss(module, batches, seed=1).graphs())[1].loss != first.loss
