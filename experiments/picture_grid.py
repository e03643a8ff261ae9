"""A sheet of target images beside their truth and the predictions of several stages.

    python experiments/picture_grid.py --config configs/minent.py:camvid --runs runs/minent-camvid-seed0 \
        --stages source_only,adapt,oracle --count 6 --out grid.png

Rows are images spread evenly over the target's validation split; columns are image, truth, then the stages.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxuda import files, methods, pipeline, use
from jaxuda.data import encoding
from jaxuda.data.labels import colourise
from jaxuda.main import parse
from jaxuda.sweeps.predict import predictions


def main() -> None:
    """Reads the command line and writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config:benchmark whose target is shown")
    parser.add_argument("--runs", required=True, type=Path, help="the work folder")
    parser.add_argument("--stages", default="source_only,adapt", help="comma-separated")
    parser.add_argument("--count", default=6, type=int, help="number of rows")
    parser.add_argument("--out", required=True, type=Path, help="PNG to write")
    args, overrides = parser.parse_known_args()
    config = parse(["picture_grid", f"--config={args.config}", *overrides]).config
    domains = pipeline.load_domains(config)
    space = domains.source.label_space
    chosen = np.linspace(0, len(domains.target_val) - 1, args.count).astype(int)
    records = [domains.target_val[i] for i in chosen]
    columns = [[r["image"] for r in records], [colourise(r["label"], space) for r in records]]
    for stage in args.stages.split(","):
        model, variables, trained = use.restore(str(args.runs / stage), space.num_classes)
        method = methods.load(trained.train)
        found = predictions(variables, records, model=model, method=method, config=trained)
        columns.append([colourise(ids, space) for _, ids in found])
    height, width = records[0]["image"].shape[:2]
    rows = [
        np.concatenate([cv2.resize(p, (width, height), interpolation=cv2.INTER_NEAREST) for p in row], 1)
        for row in zip(*columns, strict=True)
    ]
    files.write_bytes(args.out, encoding.encode_image(np.concatenate(rows)))
    print(f"{args.out}: image | truth | {' | '.join(args.stages.split(','))}")


if __name__ == "__main__":
    main()
