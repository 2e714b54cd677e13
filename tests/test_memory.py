"""Memory that does not grow with the data: audits of images that are made on demand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Prints the peak memory of an audit of so many images, in MiB, and what it found.
SCRIPT = '''
import resource, sys
import torch
import robustann as ra
from robustann.auditing import runner
from robustann.data import StreamSplit

count = int(sys.argv[1])
# What lies in memory between the passes may not be much.
runner._LARGEST_IN_MEMORY = 2**22
side = 224
labels = torch.zeros(count, dtype=torch.int64)


def read(index):
    return torch.full((3, side, side), (37 * index) % 200 + 20, dtype=torch.uint8)


class Far(torch.nn.Module):
    """Images stand, and every propagation is cheap."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([mean + 1, mean, -mean], 1)


found = ra.audit(
    Far(), StreamSplit(read, labels, (3, side, side)), ra.ThreatModel("linf", 2 / 255), "quick",
    budget=5, batch_size=16, trust=False, curve=False, explain=False,
    class_names=["a", "b", "c"],
)
assert found.n == count and found.robust_accuracy == 1.0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
'''


def peak(count: int) -> int:
    """In MiB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(count)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="units of memory differ")
def test_more_images_take_no_more_memory():
    few, many = peak(128), peak(448)
    # 320 images more take 184 MiB, each time that they are held.
    assert many - few < 90
