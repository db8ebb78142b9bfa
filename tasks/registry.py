"""All evaluation tasks by lower-case name; the only module that imports them all."""

from tasks.finetuning.base import FinetuningTask
from tasks.rucola import RuCoLA
from tasks.russian_superglue.danetqa import DaNetQA
from tasks.russian_superglue.lidirus import LiDiRus
from tasks.russian_superglue.muserc import MuSeRC
from tasks.russian_superglue.parus import PARus
from tasks.russian_superglue.rcb import RCB
from tasks.russian_superglue.rucos import RuCoS
from tasks.russian_superglue.russe import RUSSE
from tasks.russian_superglue.rwsd import RWSD
from tasks.russian_superglue.terra import TERRa

TASKS: dict[str, FinetuningTask] = {
    task.name.lower(): task
    for task in (LiDiRus(), RCB(), PARus(), MuSeRC(), TERRa(), RUSSE(), RWSD(), DaNetQA(), RuCoS(), RuCoLA())
}


def get_task(name: str) -> FinetuningTask:
    """The task of that name, in any case."""
    if name.lower() not in TASKS:
        known = ", ".join(task.name for task in TASKS.values())
        raise ValueError(f"unknown task {name!r}, expected one of {known} (in any case)")
    return TASKS[name.lower()]


def tasks_with_data(data_dir) -> list[FinetuningTask]:
    """The tasks whose folder is in data_dir."""
    return [task for task in TASKS.values() if task.has_local_data(data_dir)]
