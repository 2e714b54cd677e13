"""Fuzz the readers of strangers' files, guided by coverage, for as long as is wanted.

Needs Linux and ``pip install atheris``. Not part of the tests, which do the same with hypothesis
for some seconds. What is found lies in the current folder as ``crash-...`` or ``timeout-...``; mend
it, and put it into ``corpus.py``. A folder keeps what was reached, for the next time.

    python tests/fuzz.py weights FOLDER -max_total_time=3600
    python tests/fuzz.py config crash-0123
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(include=["robustann.models", "robustann.config", "robustann.data"]):
    from robustann.config import resolve
    from robustann.data import load_data
    from robustann.errors import RobustannError
    from robustann.models.inspecting import inspect_file
    from robustann.models.io import read_sidecar
    from robustann.models.weights import parse_weights, read_checkpoint

import corpus

FOLDER = Path(tempfile.mkdtemp(prefix="robustann-fuzz-"))
CANARY = FOLDER / "canary"


def weights(content: bytes) -> None:
    """Model files: read as weights, read as a checkpoint, looked into."""
    for attempt in (parse_weights, read_checkpoint):
        _told(lambda attempt=attempt: attempt(content, "it"))
    path = FOLDER / "model"
    path.write_bytes(content)
    inspect_file(path)


def config(content: bytes) -> None:
    """Configurations in TOML."""
    path = FOLDER / "audit.toml"
    path.write_bytes(content)
    _told(lambda: resolve(path).request())


def sidecar(content: bytes) -> None:
    """The JSON beside weights."""
    (FOLDER / "model.json").write_bytes(content)
    _told(lambda: read_sidecar(FOLDER / "model.safetensors"))


def arrays(content: bytes) -> None:
    """NumPy archives."""
    path = FOLDER / "data.npz"
    path.write_bytes(content)
    _told(lambda: load_data(f"npz:{path}"))


def manifest(content: bytes) -> None:
    """CSV files that list images."""
    path = FOLDER / "data.csv"
    path.write_bytes(content)
    _told(lambda: load_data(f"csv:{path}"))


def _told(call: Callable[[], object]) -> None:
    with contextlib.suppress(RobustannError):
        call()
    assert not CANARY.exists(), "something ran"


def _seeds(target: str) -> dict[str, bytes]:
    """What to begin with."""
    import io

    import numpy as np

    if target == "weights":
        cases = {**corpus.running(FOLDER), **corpus.hostile(), **corpus.damaged()}
        found = {name: case.content for name, case in cases.items()} | corpus.good()
        found |= {"script": corpus.script(), "exported": corpus.exported(), "onnx": corpus.onnx()}
        return {name: content for name, content in found.items() if len(content) < 20_000}
    if target == "config":
        from robustann.config import TEMPLATE

        return {
            "template": TEMPLATE.encode(),
            # The template's own examples switched on.
            "all": "\n".join(
                line.removeprefix("# ") if "=" in line else line for line in TEMPLATE.splitlines()
            ).encode(),
        }
    if target == "sidecar":
        import robustann as ra
        from robustann.models import save_model

        net = ra.create_model("small-cnn", class_names=["a", "b"], shape=(1, 8, 8))
        save_model(net, FOLDER / "seed.safetensors")
        return {"sidecar": (FOLDER / "seed.json").read_bytes()}
    if target == "arrays":
        stream = io.BytesIO()
        labels = np.arange(40) % 2
        np.savez(stream, images=np.zeros((40, 1, 2, 2), np.uint8), labels=labels)
        return {"arrays": stream.getvalue()}
    return {"manifest": b"path,label,split\na.png,cat,train\nb/c.png,dog,test\n"}


def main() -> None:
    targets = {one.__name__: one for one in (weights, config, sidecar, arrays, manifest)}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(f"usage: python tests/fuzz.py {'|'.join(targets)} [options of libFuzzer]")
    name = sys.argv.pop(1)
    warnings.simplefilter("ignore")
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for number, content in enumerate(_seeds(name).values()):
        (seeds / str(number)).write_bytes(content)
    options = ["-timeout=30", "-rss_limit_mb=6000", "-max_len=20000"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:], str(seeds)], targets[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
