"""The example's promises, in a few of its epochs."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_true_labels_cohere_and_random_ones_do_not(
    example: ModuleType, tmp_path: Path, printed: Callable[[], str]
) -> None:
    runs = example.main(epochs=4, folder=tmp_path)
    true, random = (run["history"] for run in runs.values())
    assert [event["step"] for event in true] == [0, 10, 20, 30]
    assert all(event["m"] == 900 for event in true + random)
    assert true[0]["alpha_m"] > 4 * random[0]["alpha_m"]
    assert runs["true labels"]["accuracy"][-1] > 0.6 > runs["random labels"]["accuracy"][-1]

    printed()
    store = tmp_path / "runs" / "gradient_coherence"
    assert (store / "gradient_coherence.png").read_bytes().startswith(b"\x89PNG")
    records = list((store / "wandb").glob("offline-run-*"))
    assert len(records) == 2
    assert all(list(record.glob("files/media/images/coherence/layers_*.png")) for record in records)


@pytest.mark.slow
def test_random_labels_come_to_cohere(example: ModuleType, tmp_path: Path) -> None:
    """While the net learns them by heart (arXiv 2008.01217)."""
    for seed in (0, 1):
        history = example.main(epochs=100, seed=seed, folder=tmp_path)["random labels"]["history"]
        values = [event["alpha_m"] for event in history]
        assert max(values[20:]) > 5 * max(values[:10])
