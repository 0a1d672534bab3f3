"""The processes of a run: torchrun starts several, without it there is one."""
import os

import torch
import torch.distributed as dist


def ranks() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def agree(flag: bool = False) -> bool:
    """Waits for all processes; True on all of them where any says so. They meet over gloo: no GPU needed."""
    if ranks()[1] == 1:
        return flag
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    said = torch.tensor(int(flag))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)
