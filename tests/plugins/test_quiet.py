from typing import Any

import pytest
import torch
import torch._dynamo.testing
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score, MulticlassPrecision

from fulgurite.plugins.quiet import quiet

CLASSES = 3


class Busy(LightningModule):
    """Changes with each step all that a step may change; its ``log`` records."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES)  # tensor states
        self.auroc = MulticlassAUROC(CLASSES)  # list states
        shared = [MulticlassPrecision(CLASSES), MulticlassF1Score(CLASSES)]
        self.collection = MetricCollection(shared, compute_groups=True)
        self.loss = MeanMetric()
        self.outputs: list[Tensor] = []
        self.history: dict[str, list[float]] = {"loss": []}
        self.steps = 0
        self.logged: list[str] = []

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.logged.append(name)

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.logged.extend(dictionary)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.head(self.net(batch[0]))
        loss = cross_entropy(logits, batch[1])
        for metric in (self.accuracy, self.collection):
            metric(logits, batch[1])
        self.auroc.update(logits, batch[1])
        self.loss.update(loss)
        self.outputs.append(loss)
        self.history["loss"].append(loss.item())
        self.steps += 1
        self.log("loss", loss)
        self.log_dict({"accuracy": self.accuracy})
        return loss

    def trace(self) -> dict[str, Any]:
        """All that a step may change."""
        trace: dict[str, Any] = {f"buffer {name}": value.clone() for name, value in self.named_buffers()}
        for name, part in self.named_modules():
            trace[f"training {name}"] = part.training
            if isinstance(part, Metric):
                trace[f"state {name}"] = part._copy_state_dict()
                trace[f"count {name}"] = (part.update_count, part._computed, part._forward_cache, part._is_synced)
        groups = {key: list(names) for key, names in self.collection.compute_groups.items()}
        lists = (list(self.logged), list(self.outputs), list(self.history["loss"]))
        return trace | {"groups": groups, "lists": lists, "steps": self.steps}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator), torch.randint(CLASSES, (6,), generator=generator)


def plain(value: Any) -> Any:
    """The same with tensors as numbers, which compare by ``==`` to the last bit."""
    match value:
        case Tensor():
            return value.tolist()
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    return value


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert plain(first) == plain(second)


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_steps_leave_no_trace(batch: tuple[Tensor, Tensor], evaluate: bool, steps_before: int) -> None:
    module = Busy()
    for step in range(steps_before):
        module.training_step(batch, step)
    before = module.trace()
    with quiet(module, evaluate):
        for step in range(3):
            module.training_step(batch, step)
        if not evaluate:  # else this test could not fail
            assert module.steps == steps_before + 3
            assert not torch.equal(module.net[1].running_mean, before["buffer net.1.running_mean"])
    assert_same(module.trace(), before)


def test_what_follows_is_as_if_nothing_had_been(batch: tuple[Tensor, Tensor]) -> None:
    traces = []
    for inner_steps in (0, 2):
        torch.manual_seed(3)
        module = Busy()
        for step in range(3):
            with quiet(module, evaluate=True):
                for _ in range(inner_steps):
                    module.training_step(batch, step)
            torch.manual_seed(step)  # of dropout
            module.training_step(batch, step)
        computed = {name: metric.compute() for name, metric in module.collection.items()}
        traces.append(module.trace() | computed | {"auroc": module.auroc.compute(), "loss": module.loss.compute()})
    assert_same(*traces)
    assert traces[0]["count accuracy"][0] == 3


def test_each_submodule_gets_its_own_mode_back() -> None:
    module = Busy()
    module.net[1].eval()  # frozen
    with quiet(module):
        assert module.training
        assert not module.net[1].training
    with quiet(module, evaluate=True):
        assert not any(part.training for part in module.modules())
        module.train()
    assert [part.training for part in module.net] == [True, False, True]


def test_frozen_batch_norm_stays_frozen(batch: tuple[Tensor, Tensor]) -> None:
    module = Busy()
    module.net[1].eval()
    before = module.net[1].running_mean.clone()
    with quiet(module, evaluate=True):
        module.training_step(batch, 0)
    module.training_step(batch, 0)
    torch.testing.assert_close(module.net[1].running_mean, before, rtol=0, atol=0)


def test_uses_nest_and_errors_restore(batch: tuple[Tensor, Tensor]) -> None:
    module = Busy()
    before = module.trace()

    def fails() -> None:
        with quiet(module), quiet(module, evaluate=True):
            module.training_step(batch, 0)
            raise RuntimeError("of the step")

    with quiet(module):
        with quiet(module, evaluate=True):
            module.training_step(batch, 0)
        assert module.training
        module.log("nothing")
    assert_same(module.trace(), before)
    with pytest.raises(RuntimeError, match="of the step"):
        fails()
    assert_same(module.trace(), before)
    module.log("again")
    assert module.logged == ["again"]


def test_logs_unless_muted() -> None:
    names: list[str] = []

    class Logging(LightningModule):
        def log(self, name: str, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
            names.append(name)

    module = Logging()
    module.child = Logging()
    with quiet(module):
        module.log("root")
        module.child.log("child")
    assert names == []
    with quiet(module, mute=False):
        module.log("root")
        module.child.log("child")
    assert names == ["root", "child"]


def test_weights_gradients_and_generators_are_shared(batch: tuple[Tensor, Tensor]) -> None:
    module, again = Busy(), Busy()
    again.load_state_dict(module.state_dict())
    again.training_step(batch, 0)
    after = torch.manual_seed(5) and again.training_step(batch, 0) and torch.rand(())
    torch.manual_seed(5)
    with quiet(module):
        module.training_step(batch, 0).backward()
        with torch.no_grad():
            module.head.bias.add_(1.0)
    assert torch.rand(()) == after
    assert module.net[0].weight.grad is not None
    torch.testing.assert_close(module.head.bias - 1.0, again.head.bias)


def test_buffers_keep_their_storage_and_a_graph_that_saved_them() -> None:
    norm = nn.BatchNorm1d(2).eval()
    inputs = torch.randn(4, 2, requires_grad=True)
    outputs = norm(inputs)
    pointer = norm.running_mean.data_ptr()
    with quiet(norm):
        norm.train()
        norm(inputs.detach())
    assert norm.running_mean.data_ptr() == pointer
    outputs.sum().backward()  # raises where the running statistics were written to


def test_metrics_of_a_collection_share_states_within() -> None:
    first, second = CatMetric(), MeanMetric()
    second.mean_value = first_state = torch.tensor(2.0)
    first.extra = first_state
    with quiet(nn.ModuleList([first, second])):
        second.mean_value += 1
        assert first.extra is second.mean_value
    assert first.extra is second.mean_value is first_state
    assert first_state == 2


def test_weights_and_kept_batches_are_not_copied() -> None:
    metric = CatMetric()
    metric.weight = nn.Parameter(torch.ones(2))
    metric.update(torch.ones(3))
    weight, batch = metric.weight, metric.value[0]
    with quiet(metric):
        assert metric.weight is weight
        assert metric.value[0] is batch  # an epoch's outputs a step would be quadratic


def test_gradients_flow_within_even_under_inference_mode() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    with torch.inference_mode(), quiet(module), torch.inference_mode(False), torch.enable_grad():
        inputs = torch.ones(3, 2, requires_grad=True)
        (gradient,) = torch.autograd.grad(module(inputs).sum(), inputs)
    assert gradient.shape == inputs.shape


def test_a_compiled_module_is_not_compiled_again() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    compiled = torch.compile(module, backend=counter)
    before = module[1].running_mean.clone()
    for _ in range(3):
        with quiet(compiled):
            compiled(torch.ones(3, 2))
    torch.testing.assert_close(module[1].running_mean, before, rtol=0, atol=0)
    compiled(torch.ones(3, 2))
    assert not torch.equal(module[1].running_mean, before)
    assert counter.frame_count == 1
