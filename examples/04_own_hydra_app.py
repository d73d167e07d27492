"""The compression groups in a Hydra application of your own.

    python examples/04_own_hydra_app.py
    python examples/04_own_hydra_app.py compression=macs_30 compression.kinds=[svd,tucker2]
    python examples/04_own_hydra_app.py -m compression.budget.params=0.5,0.3,0.2

Installing lightning_compress puts its `conf/` on Hydra's search path, so `compression=...`
works in any application; the node instantiates to the callback.
"""

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_compress import search_ranks
from lightning_compress.cli.demo.models import VGG

ConfigStore.instance().store("own_app", {"defaults": [{"compression": "params_20"}, "_self_"], "seed": 0})


@hydra.main(version_base="1.3", config_path=None, config_name="own_app")
def main(cfg: DictConfig) -> float:
    """Returns the loss of signal that the search predicts."""
    callback = instantiate(cfg.compression)  # give it to your Trainer; here only its budget and kinds are used
    torch.manual_seed(cfg.seed)
    settings = {"kinds": callback.settings.kinds, "objective": "weight"}  # untrained weights: nothing else to go by
    plan = search_ranks(VGG(), callback.budget, example_input=(1, 1, 28, 28), **settings)
    print(plan.summary())
    return plan.signal_loss


if __name__ == "__main__":
    main()
