import pytest
from torch import nn

from fulgurite.callbacks.requirements import matching_parameters, patterns_of


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (None, ["embed.weight", "head.bias"]),
        ("head", ["embed.weight", "head.bias"]),
        ("*.bias", ["head.bias"]),
        ("head.weight", ["embed.weight"]),
        (["embed.*", "head.b*"], ["embed.weight", "head.bias"]),
        ("*", ["embed.weight", "head.bias"]),
    ],
    ids=str,
)
def test_patterns_name_parameters_and_modules(patterns: str | list[str] | None, names: list[str]) -> None:
    assert list(matching_parameters(Tied(), patterns_of(patterns), "params")) == names


@pytest.mark.parametrize("pattern", ["hea", "frozen", "head.weights", ""])
def test_a_pattern_without_a_match_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=f"`params`: .* matches .{pattern}.; there are embed.weight"):
        matching_parameters(Tied(), ["embed", pattern], "params")
