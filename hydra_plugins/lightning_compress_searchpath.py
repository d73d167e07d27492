"""Makes the groups of `conf/` usable from any Hydra application, as in `compression=params_20`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LightningCompressSearchPath(SearchPathPlugin):
    """Appends the folder, so that an application's own groups of the same name come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds `conf/` to the end of the search path."""
        spec = importlib.util.find_spec("lightning_compress")
        if spec is None or spec.origin is None:
            return
        package = Path(spec.origin).parent
        folder = package / "conf" if (package / "conf").is_dir() else package.parent / "conf"
        search_path.append(provider="lightning_compress", path=f"file://{folder}")
