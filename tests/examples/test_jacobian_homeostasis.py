"""The example's promises, in a few of its epochs."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def test_two_trainings_a_table_a_figure_and_their_records(
    example: ModuleType, tmp_path: Path, printed: Callable[[], str]
) -> None:
    plain, kept = example.main(epochs=4, folder=tmp_path)

    assert [plain.name, kept.name] == ["EP", "EP, homeostasis"]
    assert kept.values["val/acc"][-1] > 0.5  # a guess is right in a tenth
    assert kept.steps["val/acc"] == [29, 58, 87, 116]
    assert kept.last_third("homeostasis/alignment") > 0.8 > plain.last_third("homeostasis/alignment")
    assert kept.values["homeostasis/loss"][-1] < 0.2 * plain.values["homeostasis/loss"][-1]

    out = printed()
    for run in (plain, kept):
        assert f"{run.values['val/acc'][-1]:.3f}" in out
    store = tmp_path / "runs" / "jacobian_homeostasis"
    assert (store / "jacobian_homeostasis.png").read_bytes().startswith(b"\x89PNG")
    records = list((store / "wandb").glob("offline-run-*"))
    assert len(records) == 2
    assert all(list(record.glob("files/media/images/homeostasis/training_*.png")) for record in records)
