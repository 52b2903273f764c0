"""Prints the folder of CUDA's host headers (cuda_fp16.h): CUDA_HOME, Triton's wheel, PyPI, nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def candidates() -> Iterator[Path]:
    if cuda_home := os.environ.get("CUDA_HOME"):
        yield Path(cuda_home) / "include"
    for site in sys.path:
        yield Path(site) / "triton" / "backends" / "nvidia" / "include"
        yield from sorted(Path(site).glob("nvidia/cu*/include"))
    if nvcc := shutil.which("nvcc"):
        # A wrapper script knows better than its own place where the toolkit lies.
        told = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        if top := re.search(r"^#\$ TOP=(.+)$", told.stderr, re.MULTILINE):
            yield Path(top[1].strip()) / "include"


needed = ("cuda_fp16.h", "cuda_bf16.h", "driver_types.h", "vector_functions.h")
for folder in candidates():
    if all((folder / name).is_file() for name in needed):
        print(folder)
        break
else:
    sys.exit("No CUDA headers found: pip install triton, or point CUDA_HOME at a CUDA toolkit")
