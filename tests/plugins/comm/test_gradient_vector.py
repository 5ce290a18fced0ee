from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from fulgurite.plugins.comm.gradient_vector import GradientVector


def whole(shape: Iterable[int], start: int) -> Tensor:
    shape = tuple(shape)
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def with_gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    gradients = [whole(parameter.shape, 1 + 3 * i).to(parameter.dtype) for i, parameter in enumerate(parameters)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return gradients


def parameters_of(*dtypes: torch.dtype) -> list[nn.Parameter]:
    shapes: list[tuple[int, ...]] = [(2, 3), (), (4,), (1, 2, 2)]
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes, strict=False)]


@pytest.mark.parametrize(
    ("dtypes", "dtype"),
    [
        ((torch.float32,) * 4, torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float64,) * 3, torch.float64),
        ((torch.bfloat16, torch.float64, torch.float32), torch.float64),
    ],
)
def test_gradients_come_back_as_they_were(dtypes: tuple[torch.dtype, ...], dtype: torch.dtype) -> None:
    parameters = parameters_of(*dtypes)
    gradients = with_gradients(parameters)
    layout = GradientVector(iter(parameters))
    assert layout.dtype == dtype
    assert layout.size == sum(parameter.numel() for parameter in parameters) + 1 + len(parameters)
    vector = torch.full((layout.size,), torch.nan, dtype=layout.dtype)
    layout.write(vector, loss=2.5, weight=0.25)
    layout.clear()
    assert all(parameter.grad is None for parameter in parameters)
    layout.read(vector)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        assert torch.equal(parameter.grad, gradient)
    loss = layout.loss(vector)
    assert (loss.shape, float(loss)) == ((), 2.5)
    vector.zero_()
    assert float(loss) == 2.5


def test_sums_of_vectors_are_sums_of_gradients() -> None:
    parameters = parameters_of(torch.float32, torch.float32)
    layout = GradientVector(parameters)
    total = torch.zeros(layout.size)
    for weight in (0.25, 0.75):
        with_gradients(parameters)
        vector = torch.empty(layout.size)
        layout.write(vector, loss=weight, weight=weight)
        total += vector
    gradients = with_gradients(parameters)
    layout.read(total)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)
    assert float(layout.loss(total)) == 1


def test_what_no_loss_reached_has_no_gradient() -> None:
    reached, zero, unreached, frozen = parameters = parameters_of(*[torch.float32] * 4)
    layout = GradientVector(parameters)
    reached.grad, zero.grad, frozen.grad = torch.ones(2, 3), torch.tensor(0.0), torch.ones(1, 2, 2)
    vector = torch.full((layout.size,), torch.nan)
    layout.write(vector, loss=1.0, weight=1e-3)  # of a small chunk
    assert bool(vector.isfinite().all())
    frozen.requires_grad_(False)
    layout.read(vector)
    assert torch.equal(reached.grad, torch.ones(2, 3))
    assert torch.equal(zero.grad, torch.tensor(0.0))
    assert unreached.grad is None
    assert frozen.grad is None


def test_an_empty_task_reaches_nothing() -> None:
    parameters = parameters_of(torch.float32, torch.float32)
    layout = GradientVector(parameters)
    vector = torch.full((layout.size,), torch.nan)
    layout.clear()
    layout.write(vector, loss=0.0, weight=0.0)
    assert not vector.any()
    with_gradients(parameters)
    layout.read(vector)
    assert all(parameter.grad is None for parameter in parameters)


def test_memory_formats_do_not_matter() -> None:
    image = whole((2, 3, 4, 5), 0).float()
    parameter = nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    parameter.grad = image.to(memory_format=torch.channels_last)
    layout = GradientVector([parameter])
    vector = torch.empty(layout.size)
    layout.write(vector, loss=0.0, weight=1.0)
    assert torch.equal(vector[: image.numel()], image.flatten())
    layout.read(vector)
    assert torch.equal(parameter.grad, image)


def test_scales_are_of_gradients_alone() -> None:
    parameters = parameters_of(torch.float16, torch.float32)
    gradients = with_gradients(parameters)
    layout = GradientVector(parameters)
    vector = torch.empty(layout.size)
    layout.write(vector, loss=3.0, weight=0.5, unscale=0.25)
    assert vector[:7].tolist() == [0.25 * float(value) for gradient in gradients for value in gradient.flatten()]
    assert vector[7:].tolist() == [3.0, 0.5, 0.5]
    layout.read(vector, scale=8.0)
    assert vector[7:].tolist() == [3.0, 0.5, 0.5]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


def test_unscaling_keeps_what_16_bits_cannot_hold() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    parameter.grad = torch.tensor([2.0**-10], dtype=torch.float16)
    layout = GradientVector([parameter])
    vector = torch.empty(layout.size)
    layout.write(vector, loss=0.0, weight=1.0, unscale=2.0**-20)
    assert float(vector[0]) == 2.0**-30


def test_a_longer_vector_is_zero_behind() -> None:
    """Modules of unlike size share the wire."""
    parameters = parameters_of(torch.float32)
    gradients = with_gradients(parameters)
    layout = GradientVector(parameters)
    vector = torch.full((layout.size + 5,), torch.nan)
    layout.write(vector, loss=1.0, weight=1.0)
    assert vector[layout.size :].tolist() == [0] * 5
    layout.read(vector)
    assert torch.equal(parameters[0].grad, gradients[0])


def test_sparse_gradients_are_sent_whole() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    (embedding(torch.tensor([1, 1, 3])) * torch.tensor([1.0, 2.0])).sum().backward()
    layout = GradientVector(embedding.parameters())
    vector = torch.empty(layout.size)
    layout.write(vector, loss=0.0, weight=1.0)
    layout.read(vector)
    assert embedding.weight.grad.tolist() == [[0, 0], [2, 4], [0, 0], [1, 2], [0, 0]]


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`parameters` must be real, got one of torch.complex64: .*view_as_real"):
        GradientVector([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
