"""Streaming DiLoCo from the command line: a byte language model, configured in YAML.

Two processes of one machine, which the script starts itself::

    python examples/streaming_diloco.py fit --config examples/streaming_diloco.yaml

Two machines, where RANK is 0 on the one that HOST names, and 1 on the other::

    torchrun --nnodes 2 --node_rank RANK --nproc_per_node 1 --master_addr HOST --master_port 29500 \
        examples/streaming_diloco.py fit --config examples/streaming_diloco.yaml \
        --trainer.num_nodes 2 --trainer.devices 1

A SLURM job of two nodes::

    srun --nodes 2 --ntasks-per-node 1 python examples/streaming_diloco.py \
        fit --config examples/streaming_diloco.yaml --trainer.num_nodes 2 --trainer.devices 1

Every argument is a flag: ``--trainer.strategy.init_args.sync_every 50``, or ``--trainer.strategy ddp`` to compare.
A run that was cut short goes on with ``--ckpt_path runs/streaming_diloco/version_0/checkpoints/last.ckpt``.
"""

from byte_lm import ByteLM, PythonSource
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import fulgurite.strategies  # noqa: F401  makes the names known to Lightning


class ByteLMCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.context", "data.context")


def main(args: list[str] | None = None) -> LightningCLI:
    """Runs the command in ``args``, or in the command line where there are none."""
    return ByteLMCLI(ByteLM, PythonSource, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
