"""The example's promises, in a few of its rounds."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np


def test_three_trainings_a_table_a_figure_and_their_records(
    example: ModuleType, tmp_path: Path, printed: Callable[[], str]
) -> None:
    runs = example.main(rounds=4, validate_every=2, folder=tmp_path)

    assert [run.name for run in runs] == ["FedAvg", "FAL", "FAL with FedSpeed"]
    for run in runs:
        assert run.rounds["fed/drift"] == [1, 2, 3, 4]
        assert run.rounds["fal/robust_acc"] == run.rounds["fal/clean_acc"] == [2, 4]
        pairs = zip(run.values["fal/robust_acc"], run.values["fal/clean_acc"], strict=True)
        assert all(0 < robust < clean for robust, clean in pairs)
        assert run.values["fal/clean_acc"][-1] > 0.2  # a guess is right in a tenth
        assert min(run.values["fed/drift"]) > 0
    clean, fal, fedspeed = runs
    assert "fal/attack_gain" not in clean.values
    assert min(fal.values["fal/attack_gain"]) > 0
    assert "fedspeed/dual_residual" not in fal.values
    assert min(fedspeed.values["fedspeed/dual_residual"]) > 0

    out = printed()
    for run in runs:
        (row,) = (row for row in out.splitlines() if row.startswith(f" {run.name}  ") and "━" not in row)
        assert f" {run.values['fal/robust_acc'][-1]:.3f} " in row

    store = tmp_path / "runs" / "federated_adversarial"
    assert (store / "federated_adversarial.png").read_bytes().startswith(b"\x89PNG")
    records = sorted((store / "wandb").glob("offline-run-*"))
    assert len(records) == 3
    for record, run, name in zip(records, runs, ("fedavg", "fal", "fal_with_fedspeed"), strict=True):
        assert list(record.glob("files/media/images/federated/rounds_*.png"))
        assert list((store / name / "version_0" / "figures" / "federated").glob("rounds_*.png"))
        with (store / name / "version_0" / "metrics.csv").open() as file:
            drift = [float(row["fed/drift"]) for row in csv.DictReader(file) if row["fed/drift"]]
        assert drift == run.values["fed/drift"]


def test_the_histogram_shows_all_clients(example: ModuleType) -> None:
    counts = np.arange(30).reshape(3, 10)
    run = example.Run("FAL", {"fal/robust_acc": [1]}, {"fal/robust_acc": [0.5]})
    figure = example.draw([run], counts)
    (image,) = (image for axes in figure.axes for image in axes.get_images() if image.get_array().shape == (3, 10))
    np.testing.assert_array_equal(image.get_array(), counts)
