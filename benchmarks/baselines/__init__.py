"""Published methods that comparisons alone need; importing this package registers them with `lightning_compress`.

The strategies "balf" and "alds", and the kinds of the latter, "split2_svd" and "split4_svd", come through
`register_strategy` and `register_kind`. A folder that was saved with such a kind is loaded once this package is
imported.
"""

from benchmarks.baselines.alds import operator_norm_errors, search_alds
from benchmarks.baselines.balf import inputs_alone, search_balf
from benchmarks.baselines.split_svd import SplitSvd

__all__ = ["SplitSvd", "inputs_alone", "operator_norm_errors", "search_alds", "search_balf"]
