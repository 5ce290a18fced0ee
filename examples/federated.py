"""Federated training from the command line: clients, attack and optimizer configured in YAML.

Two processes of one machine, which the script starts itself::

    python examples/federated.py fit --config examples/federated.yaml

Every argument is a flag: ``--trainer.strategy.init_args.clients_per_round 10``. A run that was cut short goes on with
``--ckpt_path runs/federated/version_0/checkpoints/last.ckpt``.
"""

from digits import Classifier, Digits
from lightning.pytorch.cli import LightningCLI


def main(args: list[str] | None = None) -> LightningCLI:
    """Runs the command in ``args``, or in the command line where there are none."""
    return LightningCLI(Classifier, Digits, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
