"""Checks predictions of test images, and packs them as the dataset's test server takes them.

  python -m jaxuda.main --mode predict --checkpoint RUN/adapt --images 'ACDC/rgb_anon/*/test/*/*.png' --workdir OUT
  python -m jaxuda.submit acdc --predictions OUT/predictions --images 'ACDC/rgb_anon/*/test/*/*.png' --out acdc.zip

Servers: cityscapes (leftImg8bit/test), acdc, and darkzurich (rgb_anon/test/night). Predictions that are missing, or
that have the wrong size or ids, are named, and nothing is packed.
"""

from __future__ import annotations

import sys

from jaxuda.cli import Parser, guarded
from jaxuda.files import user_path


def run(argv: list[str] | None) -> None:
    """Parses, checks and packs."""
    parser = Parser("jaxuda.submit", __doc__)
    parser.add_argument("server", help="cityscapes, acdc or darkzurich")
    parser.add_argument("--predictions", required=True, type=user_path, help="the folder that --mode predict wrote")
    parser.add_argument("--images", required=True, help="the test images, as they were given to --mode predict")
    parser.add_argument("--out", required=True, type=user_path, help="the zip to write")
    args = parser.parse_args(argv)
    from jaxuda.data import servers  # here: --help must not wait for JAX
    from jaxuda.sweeps.predict import CITYSCAPES_IDS, ImageFiles

    folder = args.predictions if args.predictions.name == CITYSCAPES_IDS else args.predictions / CITYSCAPES_IDS
    images = ImageFiles(args.images)
    warnings = servers.pack(args.server, folder, images.names(), args.out)
    print(f"{len(images)} predictions in {args.out}")
    for text in warnings:
        print(f"warning: {text}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code, as jaxuda.main does."""
    return guarded(lambda: run(argv), interrupted="run the same command again")


if __name__ == "__main__":
    sys.exit(main())
