"""Warn of a config that runs on more devices than it was made for."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_warn


def warn_of_open_devices(world_size: int, batch_size: int | None) -> None:
    """Warn that a config which does not say on how many devices it runs has found several.

    A step sees as many times the images, and an epoch has as many times fewer steps: what is silent under one device
    is another training under eight.

    Args:
        world_size: processes of the run.
        batch_size: images of a batch of one of them, where that is known.
    """
    if world_size == 1:
        return
    images = "" if batch_size is None else f" ({world_size} x {batch_size} = {world_size * batch_size})"
    rank_zero_warn(
        f"trainer.devices is auto, and {world_size} devices were found: a step sees {world_size} times the images of "
        f"one process{images}, and an epoch has {world_size} times fewer steps. A learning rate, warm-up or number of "
        f"steps for one device is for another training. Set trainer.devices: 1, or divide the batch size by "
        f"{world_size}; say devices: {world_size} where it is meant so."
    )
