"""Time on a device of your own: a phone over adb, a board over ssh, anything that can run a module and a clock.

    python examples/06_own_device.py

The search asks for the seconds of layers and models one after the other. A real device would export `module`, copy the
file there, run it and parse what it prints; this one pretends that every layer it starts costs 20 µs, and that it does
a billion multiply-accumulates per second.
"""

import torch
from torch import nn

from lightning_compress import Budget, LatencyTable, search_ranks
from lightning_compress.cli.demo.models import VGG


class Phone:
    name = "my phone, July build"  # in the plan, and what its times are kept by: change it when the device changes

    def seconds(self, module: nn.Module, example: tuple) -> float:
        """Returns the seconds of one call `module(*example)`."""
        spent = 0.0

        def count(layer: nn.Module, _: tuple, output: torch.Tensor) -> None:
            nonlocal spent
            spent += 20e-6 + 1e-9 * layer.weight.numel() * output[0, 0].numel()

        layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        handles = [layer.register_forward_hook(count) for layer in layers]
        module(*example)
        for handle in handles:
            handle.remove()
        return spent


def main() -> None:
    torch.manual_seed(0)
    net = VGG()
    settings = {"example_input": (1, 1, 28, 28), "objective": "weight"}  # untrained weights: nothing else to go by
    plan = search_ranks(net, Budget(latency=0.4), target=Phone(), **settings)
    print(plan)
    LatencyTable.of_plan(plan).save("phone.json")  # for a machine without the phone, target="phone.json" there
    again = search_ranks(net, Budget(latency=0.4), target="phone.json", **settings)
    print("the same plan from the table:", again.layers == plan.layers)


if __name__ == "__main__":
    main()
