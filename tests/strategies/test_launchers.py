"""Processes that somebody else starts: the recipes of docs/scale.md, as Lightning reads them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import KubeflowEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import Strategy

import fulgurite.strategies  # noqa: F401  # registers the names

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
import lightning.pytorch as L
import fulgurite.strategies
from tests.suites.models import Regressor

trainer = L.Trainer(accelerator="cpu", num_nodes=2, devices=2, strategy="streaming_diloco", max_steps=101,
                    max_epochs=-1, limit_val_batches=0, logger=False, enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=False)
trainer.fit(Regressor())
strategy = trainer.strategy
print(f"RANK {trainer.global_rank} OF {trainer.world_size}: {type(strategy.cluster_environment).__name__},"
      f" worker {strategy.worker} of {strategy.num_workers}, sent {strategy.stats['diloco/bytes_sent']:.0f}")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_torchrun_on_two_machines_by_flags_and_by_variables(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    port = str(free_port())
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    flags = ["--nnodes=2", "--node-rank=0", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    # What Kubeflow's Trainer sets in a pod, in place of the flags.
    pod = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "2"}
    pod |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    nodes = []
    try:
        for rank, (arguments, variables) in enumerate([(flags, {}), ([], pod)]):
            command = [sys.executable, "-m", "torch.distributed.run", *arguments, str(script)]
            log = (tmp_path / f"{rank}.log").open("w")
            nodes.append(subprocess.Popen(command, env=environ | variables, stdout=log, stderr=log))
        codes = [node.wait(timeout=900) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert codes == [0, 0], "\n".join(logs)
    for rank in range(4):  # a node of two devices is a worker, which shares the outer traffic out among them
        (line,) = [line for line in logs[rank // 2].splitlines() if line.startswith(f"RANK {rank} OF 4: ")]
        environment, worker, sent = line.partition(": ")[2].split(", ")
        assert (environment, worker) == ("TorchElasticEnvironment", f"worker {rank // 2} of 2")
        assert int(sent.removeprefix("sent ")) > 0


# What `srun` sets in the second task of the second of two nodes, with --ntasks-per-node=2.
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NAME": "train",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# What a PyTorchJob sets in its fourth pod.
POD = {"MASTER_ADDR": "fit-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "3"}
# What torchrun sets in the second process of the second of two nodes.
TORCHRUN = {
    "MASTER_ADDR": "10.8.0.1",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
}


def started(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], **options: object) -> Strategy:
    """The strategy of a Trainer under these variables, told its ranks as in a fit; nothing is connected."""
    for name in {*SLURM, *POD, *TORCHRUN}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(accelerator="cpu", strategy="streaming_diloco", logger=False, barebones=True, **options)
    trainer.strategy.set_world_ranks()
    return trainer.strategy


def assert_last_of_four(strategy: Strategy, environment: type, address: str, port: int) -> None:
    cluster = strategy.cluster_environment
    assert type(cluster) is environment
    assert cluster.creates_processes_externally
    assert (cluster.main_address, cluster.main_port) == (address, port)
    assert (strategy.global_rank, strategy.world_size) == (3, 4)


def test_slurm_is_found_and_gives_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = started(monkeypatch, SLURM, num_nodes=2, devices=2)
    assert_last_of_four(strategy, SLURMEnvironment, "gpu07", 15000 + 3456)
    assert (strategy.node_rank, strategy.local_rank) == (1, 1)
    assert (strategy.worker, strategy.num_workers) == (1, 2)


def test_slurm_refuses_other_numbers_than_those_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for others, hint in ({"num_nodes": 4, "devices": 2}, "num_nodes=2"), ({"num_nodes": 2, "devices": 1}, "devices=2"):
        strategy = started(monkeypatch, SLURM, **others)
        with pytest.raises(ValueError, match=f"HINT: Set `{hint}`"):
            strategy.launcher.launch(lambda: None)
    del (variables := dict(SLURM))["SLURM_NTASKS_PER_NODE"]
    with pytest.raises(RuntimeError, match="--ntasks-per-node"):
        started(monkeypatch, variables, num_nodes=2, devices=2)


def test_kubeflow_is_one_process_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = started(monkeypatch, POD, num_nodes=4, devices=1, plugins=KubeflowEnvironment())
    assert_last_of_four(strategy, KubeflowEnvironment, "fit-master-0", 23456)
    assert (strategy.node_rank, strategy.local_rank) == (3, 0)
    assert (strategy.worker, strategy.num_workers) == (3, 4)


def test_torchrun_comes_before_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = started(monkeypatch, SLURM | TORCHRUN, num_nodes=2, devices=2)
    assert_last_of_four(strategy, TorchElasticEnvironment, "10.8.0.1", 29500)
    assert (strategy.worker, strategy.num_workers) == (1, 2)
