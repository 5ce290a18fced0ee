"""Flower's nodes against the clients of a simulated federation."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flwr.app as flower
import flwr.serverapp as serverapp
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset
from typing_extensions import override

from fulgurite.plugins.federated import PGD
from fulgurite.plugins.optim import FedSpeed
from fulgurite.plugins.seeds import derived_seed
from fulgurite.strategies import FederatedAdversarialStrategy, FederatedStrategy
from fulgurite.strategies.flower import client_app, server_app
from tests.suites import models
from tests.suites.fits import assert_same
from tests.suites.models import MakeOptimizer, Normalised, Regressor, Scheduled, dataset, sgd

BATCH = 40  # a whole client: then the order of its samples does not matter
PARTS = [range(20), range(20, 60)]
CPU = {"accelerator": "cpu"}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
ROUNDS = 3


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tells this process who it is, as Flower tells the processes that it starts; early versions need no telling."""
    with suppress(ImportError):
        known = import_module("flwr.supercore.task_identity").TaskIdentity
        for name in ("_task_id", "_run_id", "_node_id"):
            monkeypatch.setattr(known, name, 1)


def fedspeed(parameters: Any) -> FedSpeed:
    return FedSpeed(parameters, lr=0.02, lam=0.5, server="active")


def makes(kind: type[Regressor] = Regressor, make_optimizer: MakeOptimizer = sgd) -> Callable[[], Regressor]:
    def module_fn() -> Regressor:
        torch.manual_seed(3)
        return kind(blocks=1, make_optimizer=make_optimizer)

    return module_fn


def rows() -> TensorDataset:
    return dataset(60, seed=0)


def loads(batch_size: int = BATCH, parts: Any = PARTS) -> Callable[[Any], Any]:
    def dataloader_fn(context: Any) -> Any:
        part = parts[context.node_config["partition-id"]]
        return DataLoader(Subset(rows(), part), batch_size, shuffle=True), DataLoader(Subset(rows(), part), 8)

    return dataloader_fn


def contexts(number: int) -> list[Any]:
    return [flower.Context(1, 100 + i, {"partition-id": i}, flower.RecordDict(), {}) for i in range(number)]


class LocalGrid(serverapp.Grid):
    """Delivers messages to nodes in this process, one after the other; an error is an answer, as on a real network."""

    def __init__(self, app: Any, number: int) -> None:
        self.app, self.contexts = app, contexts(number)

    @override
    def get_node_ids(self) -> Iterable[int]:
        return [context.node_id for context in self.contexts]

    @override
    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        return [self.deliver(message) for message in messages]

    def deliver(self, message: Any) -> Any:
        (context,) = (context for context in self.contexts if context.node_id == message.metadata.dst_node_id)
        try:
            return self.app(message, context)
        except Exception as error:
            return flower.Message(flower.Error(code=2, reason=str(error)), reply_to=message)

    create_message = push_messages = pull_messages = set_run = run = None  # no strategy needs them


def federate(
    folder: Path, module_fn: Callable[[], Regressor], app: Any, number: int = 2, strategy: Any = None
) -> dict[str, Tensor]:
    """The final weights of a run on Flower."""
    server = server_app(module_fn, ROUNDS, strategy, checkpoint=folder / "final.ckpt")
    server(LocalGrid(app, number), flower.Context(1, 0, {}, flower.RecordDict(), {}))
    return torch.load(folder / "final.ckpt", weights_only=True)["state_dict"]


def simulate(
    module: LightningModule, strategy: FederatedStrategy, batch_size: int = BATCH, rounds: int = ROUNDS
) -> dict[str, Tensor]:
    """The final weights of the same rounds in one fit."""
    trainer = Trainer(devices=1, max_epochs=rounds, strategy=strategy, limit_val_batches=0, **CPU, **QUIET)
    trainer.fit(module, DataLoader(rows(), batch_size, shuffle=True))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def message(kind: str = "train", module: Any = None, round: int | None = 1, **records: Any) -> Any:
    content = flower.RecordDict({"arrays": flower.ArrayRecord((module or makes()()).state_dict()), **records})
    if round is not None:
        content["config"] = flower.ConfigRecord({"server-round": round})
    return flower.Message(content, dst_node_id=100, message_type=kind)


# ---- the rounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_optimizer", [sgd, fedspeed])
def test_nodes_train_as_simulated_clients_do(make_optimizer: MakeOptimizer, tmp_path: Path) -> None:
    module_fn = makes(make_optimizer=make_optimizer)
    app = client_app(module_fn, loads(), CPU, strategy_kwargs={"local_steps": 3})
    simulated = simulate(module_fn(), FederatedStrategy(PARTS, local_steps=3))
    # Flower averages in float32, a simulation in float64: weights of order 1 and a mean of two a round.
    assert_same(federate(tmp_path, module_fn, app), simulated, tolerance=1e-6)


@pytest.mark.parametrize("attack", [None, PGD(eps=0.1, steps=2, clip=None)], ids=["clean", "adversarial"])
def test_a_lone_node_trains_as_a_lone_client_bit_for_bit(attack: PGD | None, tmp_path: Path) -> None:
    module_fn = makes(make_optimizer=fedspeed)
    app = client_app(module_fn, loads(4, [range(60)]), CPU, attack, {"seed": 7})
    alone = serverapp.strategy.FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    got = federate(tmp_path, module_fn, app, 1, alone)
    given = {"partition": [range(60)], "seed": derived_seed(7, "node", 0)}
    strategy = FederatedAdversarialStrategy(attack=attack, **given) if attack else FederatedStrategy(**given)
    assert_same(got, simulate(module_fn(), strategy, 4))


def test_nodes_and_rounds_have_orders_of_their_own() -> None:
    app = client_app(makes(), loads(4, [range(20), range(20)]), CPU)
    first, second = contexts(2)
    sent = [app(message(), first), app(message(), second), app(message(round=2), first), app(message(), first)]
    weights = [reply.content["arrays"].to_torch_state_dict()["head.weight"] for reply in sent]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[0], weights[3])


def test_a_reply_counts_samples_and_tells_what_the_module_logs() -> None:
    app = client_app(makes(make_optimizer=fedspeed), loads(), CPU)
    context = contexts(2)[1]
    metrics = app(message(), context).content["metrics"]
    assert metrics.keys() == {"num-examples", "train_loss", "fedspeed/dual_norm"}
    assert metrics["num-examples"] == 40
    assert list(context.state) == ["fulgurite"]


def test_a_node_without_federated_optimizer_keeps_nothing() -> None:
    (context,) = contexts(1)
    client_app(makes(), loads(), CPU)(message(), context)
    assert not context.state


def test_evaluates_the_servers_model() -> None:
    module = makes()()
    metrics = client_app(makes(), loads(), CPU)(message("evaluate", module), contexts(1)[0]).content["metrics"]
    inputs, targets = rows()[:20]
    with torch.no_grad():
        loss = torch.nn.functional.mse_loss(module(inputs), targets)
    assert metrics["num-examples"] == 20
    assert metrics["val_loss"] == pytest.approx(float(loss), rel=1e-6)


def test_averaged_counts_are_counts_again() -> None:
    module_fn = makes(Normalised)
    state = module_fn().state_dict() | {"norm.num_batches_tracked": torch.tensor(8.9999999, dtype=torch.float64)}
    sent = flower.ArrayRecord(state)
    reply = client_app(module_fn, loads(), CPU)(message(arrays=sent), contexts(1)[0])
    assert reply.content["arrays"]["norm.num_batches_tracked"].numpy() == 10


def test_a_module_without_validation_is_not_evaluated(tmp_path: Path) -> None:
    class Unvalidated(Regressor):
        validation_step = LightningModule.validation_step

    server = server_app(makes(Unvalidated), 1)
    grid = LocalGrid(client_app(makes(Unvalidated), loads(), CPU), 2)
    kinds = []
    deliver = grid.deliver
    grid.deliver = lambda sent: kinds.append(sent.metadata.message_type) or deliver(sent)  # type: ignore[method-assign]
    server(grid, flower.Context(1, 0, {}, flower.RecordDict(), {}))
    assert kinds == ["train", "train"]


def test_the_checkpoint_loads_as_any_other(tmp_path: Path) -> None:
    weights = federate(tmp_path, makes(), client_app(makes(), loads(), CPU))
    loaded = Regressor.load_from_checkpoint(tmp_path / "final.ckpt", blocks=1)
    assert_same(dict(loaded.state_dict()), weights)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["strategy", "devices", "max_epochs"])
def test_a_round_is_an_epoch_on_a_device(name: str) -> None:
    with pytest.raises(ValueError, match=f"`trainer_kwargs` has `{name}`"):
        client_app(makes(), loads(), {name: 1})


@pytest.mark.parametrize("name", ["partition", "server_optimizer", "clients_per_round", "attack"])
def test_a_node_does_not_choose_for_the_server(name: str) -> None:
    with pytest.raises(ValueError, match=f"`strategy_kwargs` has `{name}`"):
        client_app(makes(), loads(), strategy_kwargs={name: 1})


def test_settings_are_checked_before_a_message_comes() -> None:
    with pytest.raises(ValueError, match="`local_steps` must be at least 1"):
        client_app(makes(), loads(), strategy_kwargs={"local_steps": 0})


def test_a_round_that_was_cut_off_is_not_sent() -> None:
    class Stops(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = True

    app = client_app(makes(), loads(4), {**CPU, "callbacks": [Stops()]})
    with pytest.raises(RuntimeError, match="ended before the round did"):
        app(message(), contexts(1)[0])


def test_refuses_to_run_no_round() -> None:
    with pytest.raises(ValueError, match="`num_rounds` must be at least 1"):
        server_app(makes(), 0)


def all_clients(parameters: Any) -> FedSpeed:
    return FedSpeed(parameters, lr=0.02)


@pytest.mark.parametrize(
    ("module_fn", "given", "error", "match"),
    [
        (makes(), {"round": None}, ValueError, "no `server-round`"),
        (makes(), {"more": flower.ArrayRecord()}, ValueError, "one ArrayRecord"),
        (makes(), {"module": Regressor(blocks=2)}, RuntimeError, "Unexpected key"),
        (makes(make_optimizer=all_clients), {}, ValueError, 'FedSpeed\\(server="active"\\)'),
        (makes(Scheduled), {}, MisconfigurationException, "scheduler"),
    ],
    ids=["round", "records", "weights", "server", "scheduler"],
)
def test_a_node_refuses(module_fn: Any, given: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        client_app(module_fn, loads(), CPU)(message(**given), contexts(1)[0])


def test_an_evaluation_needs_a_loader() -> None:
    app = client_app(makes(), lambda context: loads()(context)[0], CPU)
    app(message(), contexts(1)[0])
    with pytest.raises(MisconfigurationException, match=r"fraction_evaluate=0\.0"):
        app(message("evaluate"), contexts(1)[0])


def test_a_run_in_which_no_node_trains_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no node sent a trained model"):
        federate(tmp_path, makes(), client_app(makes(Scheduled), loads(), CPU))


def test_says_that_a_dual_variable_missed_rounds() -> None:
    app, (context,) = client_app(makes(make_optimizer=fedspeed), loads(), CPU), contexts(1)
    app(message(), context)
    with pytest.warns(UserWarning, match="sat out rounds 1 to 2"):
        app(message(round=4), context)


# ---- real processes --------------------------------------------------------------------------------------------------

PROJECT = """
[project]
name = "federation"
version = "1.0.0"
[tool.flwr.app]
publisher = "fulgurite"
[tool.flwr.app.components]
serverapp = "federation:server"
clientapp = "federation:client"
"""
FEDERATION = """
import torch
from flwr.serverapp.strategy import FedAvg
from models import Regressor, dataset
from torch.utils.data import DataLoader, Subset

from fulgurite.plugins.optim import FedSpeed
from fulgurite.strategies.flower import client_app, server_app

PARTS = [range(20), range(20, 60)]

def fedspeed(parameters):
    return FedSpeed(parameters, lr=0.02, lam=0.5, server="active")

def module_fn():
    torch.manual_seed(3)
    return Regressor(blocks=1, make_optimizer=fedspeed)

def dataloader_fn(context):
    part = Subset(dataset(60, seed=0), PARTS[context.node_config["partition-id"]])
    return DataLoader(part, batch_size=40)

client = client_app(module_fn, dataloader_fn, {"accelerator": "cpu"}, strategy_kwargs={"local_steps": 3})
server = server_app(module_fn, 2, FedAvg(fraction_evaluate=0.0), checkpoint="CHECKPOINT")
"""
BIN = Path(sys.executable).parent


def free_ports(number: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for held_socket in sockets:
            held_socket.bind(("127.0.0.1", 0))
        return [held_socket.getsockname()[1] for held_socket in sockets]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts Flower's commands, on loopback alone; whatever comes of them, none of them outlives the test."""
    settings = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }
    for name, value in {**settings, "FLWR_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(BIN), prepend=os.pathsep)  # where the commands look for each other

    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        with open(f"{command[0]}.log", "ab") as log:
            started.append(subprocess.Popen([BIN / command[0], *command[1:]], stdout=log, stderr=log))
        return started[-1]

    yield start
    marker = f"FLWR_HOME={tmp_path / 'home'}".encode()
    for entry in Path("/proc").glob("[0-9]*"):  # they start others, in sessions of their own
        with suppress(OSError):
            if entry.name != str(os.getpid()) and marker in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
    for process in started:
        process.wait(10)


def wait_for_port(port: int, deadline: float) -> None:
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
    pytest.fail(f"nobody listens on port {port}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes to end by /proc")
def test_a_federation_of_processes(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    if tuple(map(int, version("flwr").split(".")[:2])) < (1, 41):
        pytest.skip("the commands had other flags")
    deadline = time.monotonic() + 240
    link, *nodes = free_ports(3)
    app = tmp_path / "federation"
    app.mkdir()
    shutil.copy(models.__file__, app)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "federation.py").write_text(FEDERATION.replace("CHECKPOINT", str(tmp_path / "final.ckpt")))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n')

    start("flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(link))
    wait_for_port(link, deadline)
    for i, port in enumerate(nodes):
        config = ["--superlink", f"127.0.0.1:{link}", "--port", str(port), "--node-config", f"partition-id={i}"]
        start("flower-supernode", "--insecure", *config)
    start("flwr", "run", str(app), "here", "--stream").wait(max(0, deadline - time.monotonic()))

    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert (tmp_path / "final.ckpt").exists(), logs
    got = torch.load(tmp_path / "final.ckpt", weights_only=True)["state_dict"]
    simulated = simulate(makes(make_optimizer=fedspeed)(), FederatedStrategy(PARTS, local_steps=3), rounds=2)
    assert_same(got, simulated, tolerance=1e-6)
