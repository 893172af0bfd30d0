import torch
from torch import nn

from stepbatch.engine.device_memory import bytes_away

CPU, META = torch.device("cpu"), torch.device("meta")


def test_what_does_not_stay_on_the_device_is_counted() -> None:
    module = nn.ModuleDict({"stays": nn.Linear(8, 8, device=META), "comes": nn.Linear(4, 5, dtype=torch.bfloat16)})
    assert bytes_away(module, META) == 2 * (4 * 5 + 5)
    assert bytes_away(module["comes"], CPU) == 0
