"""The device that a tool works on."""


def find_device(wish: str | None, accelerator=None):
    """The device that is asked for, or this process's own.

    Raises:
        ValueError: it is not there, or there are several processes.
    """
    import torch

    from meanflow.files import first_line

    if wish and accelerator and accelerator.num_processes > 1:
        raise ValueError(f"device {wish} is for one process: accelerate launch gives each its own")
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = wish or (accelerator.device if accelerator else best)
    try:
        torch.zeros(1, device=device).item()  # which "meta" has not
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} is not there: {first_line(error)}") from None
    return device
