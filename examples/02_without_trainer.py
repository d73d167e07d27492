"""Compression of any nn.Module without Lightning: search, look at the plan, swap, save, load.

python examples/02_without_trainer.py
"""

import tempfile

import torch
from torch import nn

from lightning_compress import Budget, apply_plan_, compress_, load_compressed, save_compressed, search_ranks
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.cli.demo.models import VGG


def main() -> nn.Module:
    """Returns the compressed network."""
    torch.manual_seed(0)
    net = VGG().eval()  # load your own weights here
    image = torch.randn(1, 1, 28, 28)

    # In one call.
    plan = compress_(net, Budget(params=0.3, macs=0.4), example_input=image)
    print(plan)

    # Or in two: a plan can be looked at, kept as JSON, and applied to any copy of the network. The statistics are
    # what errors are measured in; without them the factors would be fitted to the weights alone.
    other = VGG().eval()
    statistics = gather_statistics(other, (1, 1, 28, 28))  # a shape is enough
    plan = search_ranks(
        other,
        Budget(ratio="4x"),
        example_input=(1, 1, 28, 28),
        statistics=statistics,
        kinds=["svd", "tucker2"],
        exclude="features.0.*",  # the stem stays as it is
        overrides={"classifier.0": {"min_rank": 8}},
    )
    apply_plan_(other, plan, statistics=statistics)

    # safetensors and JSON, no pickle; loading starts from the dense architecture.
    with tempfile.TemporaryDirectory() as folder:
        save_compressed(net, folder)
        again = VGG().eval()
        load_compressed(again, folder)
    with torch.no_grad():
        print("loaded model gives the same output:", torch.equal(net(image), again(image)))
    return net


if __name__ == "__main__":
    main()
