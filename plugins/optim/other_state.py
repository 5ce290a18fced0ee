"""The state of one optimizer, given to another."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer


def refuse_other_state(optimizer: Optimizer, state_dict: dict[str, Any], optional: Sequence[str] = ()) -> None:
    """Refuses a state without the settings that ``optimizer`` steps by.

    Args:
        optimizer: that is to load it.
        state_dict: as ``load_state_dict`` gets it.
        optional: settings that a group may lack.

    Raises:
        ValueError: naming what is not there.
    """
    needed = set(optimizer.defaults) - {"differentiable", *optional}  # torch adds the former when a state is loaded
    for group in state_dict["param_groups"]:
        lacking = [f"`{name}`" for name in optimizer.defaults if name in needed and name not in group]
        if lacking:
            raise ValueError(
                f"`state_dict` is of another optimizer than {optimizer}, as a group has no {', '.join(lacking)}: load "
                "the model's weights alone, and begin with a fresh optimizer"
            )
