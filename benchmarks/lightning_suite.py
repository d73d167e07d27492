"""Lightning's own tests with `Compress` in every Trainer: what passes without it and does not with it, and why.

python -m benchmarks.lightning_suite CHECKOUT [--folders callbacks checkpointing …] [--workers 2]

The tests of the checkout (`git clone https://github.com/Lightning-AI/pytorch-lightning`) run against the
Lightning that is installed, which should be of about its version, once as they are and once with the plugin
`benchmarks.lightning_plugin`. Tests that then differ do so for one of the reasons in `EXPECTED`, which are told apart
by what the failure says; what fits none of them is printed and makes the command fail.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, publish

FOLDERS = ("callbacks", "checkpointing", "trainer", "loops", "core", "models", "tuner")
"""Of `tests/tests_pytorch`."""

EXPECTED: Mapping[str, str] = {
    "a module that cannot be made smaller": r"holds no layer that can be factorised|no plan keeps params",
    "a strategy or callback that is refused": r"UnsupportedError",
    "a compressed checkpoint is loaded into the plain class": r"load it with load_compressed_checkpoint",
    "names, classes or sizes of what is trained": (
        r"KeyError: 'layer\.weight'|weight\.grad is not None|\['layer\.0\.red|layer\.0\.reduce\.weight|"
        r"'FactorisedLayer' == 'Linear'|_check_model_state_dict|The size of tensor a \(66\) must match"
    ),
    "the loader is called before the search, and the model runs in it": (
        r"At index \d+ diff: (\{'name': 'train_dataloader'\}|call\.train_dataloader\(\)) != "
    ),
    "a list of callbacks, of hooks' arguments or of what loggers are told": (
        r"callback\.Compress object|compress/pa|At index 5 diff: \{'name': 'on_load_checkpoint'"
    ),
    "other values are learned": r"failed to get expected .* test_loss|DID NOT RAISE MisconfigurationException",
    "a clock of so many ticks": r"StopIteration|Expected train/time",
}
"""Reasons of tests that cannot pass beside a callback that changes the structure, and what such a failure says."""


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of Lightning")
    parser.add_argument("--folders", nargs="+", default=list(FOLDERS), choices=FOLDERS)
    parser.add_argument("--workers", type=int, default=2, help="processes that share out the tests")
    options = parser.parse_args()
    rows, unexpected = [], {}
    for folder in options.folders:
        plain = outcomes(options.checkout, folder, options.workers, plugin=None)
        ours = outcomes(options.checkout, folder, options.workers, plugin="benchmarks.lightning_plugin")
        passed = [name for name, why in plain.items() if why is None]
        differing = {name: why for name in passed if (why := ours.get(name, "was not run")) is not None}
        counts = dict.fromkeys(EXPECTED, 0)
        for name, why in differing.items():
            reason = next((reason for reason, words in EXPECTED.items() if re.search(words, why)), None)
            if reason is None:
                unexpected[name] = why
            else:
                counts[reason] += 1
        row: dict[str, Any] = {"folder": folder, "pass without": len(passed), "and with": len(passed) - len(differing)}
        rows.append({**row, **counts, "for another reason": len(differing) - sum(counts.values())})
    publish("lightning_suite", "Lightning's own tests with Compress in every Trainer", rows)
    for name, why in unexpected.items():
        print(f"\n{name}\n    {why.strip()[-1500:]}")
    sys.exit(bool(unexpected))


def outcomes(checkout: Path, folder: str, workers: int, plugin: str | None) -> dict[str, str | None]:
    """Returns what the tests of a folder that were run say: None where they passed, else the failure."""
    tests = checkout.resolve() / "tests"
    command = [sys.executable, "-m", "pytest", f"tests_pytorch/{folder}", "-q", "-n", str(workers)]
    command += ["-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore", *(["-p", plugin] if plugin else [])]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        subprocess.run(
            [*command, f"--junitxml={report}", f"--basetemp={scratch}/tests"],
            cwd=tests,
            env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{tests}", "LIGHTNING_COMPRESS_CACHE": f"{scratch}/cache"},
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return _read(ET.parse(report).iter("testcase"))


def _read(cases: Any) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for case in cases:
        failures: Sequence[ET.Element] = [child for child in case if child.tag in {"failure", "error"}]
        if not any(child.tag == "skipped" for child in case):
            text = "\n".join(f"{child.get('message') or ''}\n{child.text or ''}" for child in failures)
            found[f"{case.get('classname')}::{case.get('name')}"] = text if failures else None
    return found


if __name__ == "__main__":
    main()
