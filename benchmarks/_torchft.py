"""One process of the comparison of outer steps with torchft; runs where torchft is installed.

A round is an outer step of each of the three fragments of the byte model, waited for at once, as without overlap.
torchft's includes what it asks its lighthouse for: who takes part, and whether to commit.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from _netns import sent_bytes
from torch import nn
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from fulgurite.plugins.comm import Exchange, OuterFragment, OuterSGD, partition_parameters

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from byte_lm import ByteLM

OUTER_LR, MOMENTUM = 0.7, 0.9
INNER_LR = 1e-3


class Contender(Protocol):
    model: ByteLM
    coordination_s: float
    payload_bytes: int

    def round(self) -> None:
        """Moves the local weights, then takes an outer step of each fragment."""


def model_and_inner(rank: int) -> tuple[ByteLM, torch.optim.Optimizer]:
    """Equal weights on both ranks; gradients that are fixed and differ."""
    torch.manual_seed(0)
    model = ByteLM()
    torch.manual_seed(1 + rank)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, torch.optim.SGD(model.parameters(), lr=INNER_LR)


class Ours:
    def __init__(self, rank: int, quantize: Any) -> None:
        self.model, self.inner = model_and_inner(rank)
        parameters = dict(self.model.named_parameters())
        exchange = Exchange(dist.new_group([0, 1]), quantize)
        self.fragments = [
            OuterFragment([parameters[name].detach() for name in names], exchange, OuterSGD(OUTER_LR, MOMENTUM))
            for names in partition_parameters(self.model)
        ]
        self.coordination_s = 0.0
        self.payload_bytes = 0

    def round(self) -> None:
        self.payload_bytes = 0
        for fragment in self.fragments:
            self.inner.step()
            flight = fragment.launch()
            flight.work.wait()
            value, velocity = fragment.preview(flight.land().mean)
            fragment.commit(value, velocity)
            fragment.mix(value, alpha=0)
            self.payload_bytes += flight.bytes_sent


class Torchft:
    def __init__(self, rank: int, port: int, use_bucketization: bool) -> None:
        self.model, self.inner = model_and_inner(rank)
        here, master = os.environ["HERE"], os.environ["MASTER_ADDR"]
        if rank == 0:
            self.lighthouse = LighthouseServer(bind=f"[::]:{port}", min_replicas=2, quorum_tick_ms=10)
        self.store = dist.TCPStore(here, 0, is_master=True, wait_for_workers=False)
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=timedelta(seconds=60)),
            load_state_dict=self.model.load_state_dict,
            state_dict=self.model.state_dict,
            min_replica_size=2,
            use_async_quorum=False,
            rank=0,
            world_size=1,
            store_addr=here,
            store_port=self.store.port,
            lighthouse_addr=f"http://{master}:{port}",
            replica_id=f"worker_{rank}",
            hostname=here,
            init_sync=False,
        )
        modules = fragments_of(self.model)
        outer = [torch.optim.SGD(m.parameters(), OUTER_LR, momentum=MOMENTUM, nesterov=True) for m in modules]
        self.diloco = DiLoCo(
            self.manager, modules, self.inner, outer, sync_every=len(modules), use_bucketization=use_bucketization
        )
        self.diloco.__enter__()
        self.coordination_s = 0.0
        self.payload_bytes = 4 * sum(parameter.numel() for parameter in self.model.parameters())
        self.gradients = [parameter.grad for parameter in self.model.parameters()]
        self._time_coordination()

    def _time_coordination(self) -> None:
        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                started = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    self.coordination_s += time.perf_counter() - started

            return wrapper

        for name in ("start_quorum", "should_commit"):
            setattr(self.manager, name, timed(getattr(self.manager, name)))

    def round(self) -> None:
        self.coordination_s = 0.0
        for _ in range(3):
            for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
                parameter.grad = gradient  # the outer step clears those of its fragment
            self.inner.step()  # its hook takes the outer step


def fragments_of(model: ByteLM) -> list[nn.Module]:
    """The fragments that ``partition_parameters`` makes, as torchft wants them: modules."""
    rest = nn.ModuleList([model.embedding, model.position, model.norm, model.head])
    return [rest, nn.ModuleList(list(model.blocks)[::2]), nn.ModuleList(list(model.blocks)[1::2])]


def measure(contender: Contender) -> dict[str, float]:
    dist.barrier()
    time.sleep(0.05)
    sent, started = sent_bytes(), time.perf_counter()
    contender.round()
    seconds = time.perf_counter() - started
    dist.barrier()
    time.sleep(0.05)
    return {
        "seconds": seconds,
        "coordination_s": contender.coordination_s,
        "wire_bytes": sent_bytes() - sent,
        "payload_bytes": contender.payload_bytes,
    }


def main() -> None:
    rank, rounds, ports, result = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    contenders: dict[str, Contender] = {
        "torchft": Torchft(rank, ports[0], use_bucketization=False),
        "torchft_bucketized": Torchft(rank, ports[1], use_bucketization=True),
        "ours_fp32": Ours(rank, "fp32"),
        "ours_e3m0": Ours(rank, "e3m0"),
    }
    for contender in contenders.values():
        contender.round()  # connects
    table: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            table[name].append(measure(contender))
    ours = flat(contenders["ours_fp32"])
    apart = {name: float((flat(contenders[name]) - ours).abs().max()) for name in contenders if "torchft" in name}
    result.write_text(json.dumps({"rounds": table, "max_difference_to_ours_fp32": apart}))
    dist.barrier()
    os._exit(0)  # torchft's servers have threads that would not end


def flat(contender: Contender) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in contender.model.parameters()])


if __name__ == "__main__":
    main()
