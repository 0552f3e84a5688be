"""Forward of the twelve presets against timm's LowFormer and CPUBone, with every weight, statistic and gamma random.

    python benchmarks/parity.py                 # about a minute on one core; writes benchmarks/results/parity.json

Weights pass through a checkpoint in timm's layout and our loader; tests/test_parity.py does the same through the authors' layout and
holds that dropping any branch breaks it. Exit code 1 where a logit differs by more than 1e-5 of the largest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from lowsearch.model.blocks import randomise
from lowsearch.model.lowformer import build_model
from lowsearch.presets import PRESETS

RESULTS = Path(__file__).parent / "results" / "parity.json"
RESOLUTIONS_PX = (224, 256)
TOLERANCE = 1e-5


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Largest difference of a logit, relative to the largest logit, at each resolution."""
    extra: dict[str, Any] = {"local_mbconv_norm": "proj"} if name in ("cpubone_b0", "cpubone_b1", "cpubone_b2") else {}
    theirs = timm.create_model(f"{name}_bfrobust" if extra else name, **extra).eval()
    randomise(theirs, seed=0)
    path = folder / f"{name}.safetensors"
    save_file(theirs.state_dict(), path)
    ours = build_model(PRESETS[name], pretrained=path).eval()
    path.unlink()
    row: dict[str, Any] = {"name": name}
    for px in RESOLUTIONS_PX:
        x = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(px))
        with torch.no_grad():
            a, b = ours(x), theirs(x)
        row[f"relative_difference_{px}px"] = float((a - b).abs().max() / b.abs().max())
        # That the comparison is one of something: how far the logits of the two images are apart, on the same scale.
        row[f"relative_spread_{px}px"] = float((b[0] - b[1]).abs().max() / b.abs().max())
    return row


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in PRESETS:
            rows.append(compare(name, Path(folder)))
            print(f"{name:<14}" + "".join(f"{px} px {rows[-1][f'relative_difference_{px}px']:.1e}   " for px in RESOLUTIONS_PX))
    worst = max(float(row[f"relative_difference_{px}px"]) for row in rows for px in RESOLUTIONS_PX)
    spread = min(row[f"relative_spread_{px}px"] for row in rows for px in RESOLUTIONS_PX)
    print(f"two random images differ by {spread:.1e} at least")
    print(f"largest relative difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    RESULTS.parent.mkdir(exist_ok=True)
    context = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "timm": timm.__version__, "dtype": "float32"}
    RESULTS.write_text(json.dumps({"context": context, "tolerance": TOLERANCE, "presets": rows}, indent=1) + "\n")
    print(f"written to {RESULTS}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
