"""Fails where a test was skipped that this machine could have run: `skipped.py JUNIT.xml [JUNIT.xml ...]`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import xml.etree.ElementTree as ET

# Daemons lie where not every PATH goes.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"])
_NEW_PYTHON = "/usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null"
# What a machine may lack, as the tests name it, and whether this one lacks it.
LACKING = {
    "needs CUDA": shutil.which("nvidia-smi") is None,
    "needs Slurm": any(shutil.which(name, path=_PATH) is None for name in ("munged", "slurmctld", "slurmd", "sbatch")),
    "needs a Python that other users can run": os.getuid() == 0 and os.system(_NEW_PYTHON) != 0,
    "needs flash-attn": importlib.util.find_spec("flash_attn") is None,
}


def main(reports: list[str]) -> int:
    """Print every skipped test; 1 where one had no right to be."""
    wrong = ran = 0
    for case in (case for report in reports for case in ET.parse(report).iter("testcase")):
        skipped = case.find("skipped")
        if skipped is None:
            ran += 1
            continue
        reason = skipped.get("message", "")
        allowed = any(words in reason and lacking for words, lacking in LACKING.items())
        wrong += not allowed
        what = "skipped" if allowed else "SKIPPED WITHOUT RIGHT"
        print(f"{what}: {case.get('classname')}.{case.get('name')}: {reason}")
    print(f"{ran} tests ran, {wrong} were skipped that could have run here")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
