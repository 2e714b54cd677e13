"""Memory that does not grow with the data: audits of images that are made on demand."""

from __future__ import annotations

import os
import platform
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


# Passes as of a network: prints whether memory is kept, and the pages faulted in by a later pass.
PASSES = """
import ctypes, resource
import torch
from robustann.memory import keep_freed

# PR_SET_THP_DISABLE: huge pages are few faults.
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
torch.set_num_threads(1)
kept = keep_freed()


def a_pass():
    made = [torch.ones(2**20 * size) for size in (3, 2, 1)]
    return [float(one[0]) for one in made]


for _ in range(3):
    a_pass()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    a_pass()
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
"""


def faults(**environment: str) -> tuple[str, int]:
    known = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", PASSES], env={**known, **environment},
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    kept, count = done.stdout.split()
    return kept, int(count)


CHOICES = {
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD",
    "GLIBC_TUNABLES",
}  # fmt: skip


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of its own")
def test_what_a_pass_frees_serves_the_next():
    # 24 MiB are 6,144 pages of 4 KiB, handed out anew in each pass where blocks are mapped.
    kept, few = faults()
    # The heap may still grow once.
    assert (kept, few < 600) == ("True", True)
    assert faults(MALLOC_MMAP_THRESHOLD_="65536")[1] > 1000


@pytest.mark.parametrize(
    "choice",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=131072"}],
)
def test_who_has_chosen_how_memory_is_kept_is_obeyed(choice):
    assert faults(**choice)[0] == "False"
