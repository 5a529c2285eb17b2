"""The options that say which study is meant, and how it is run."""

import argparse
from pathlib import Path

from acn_scale.cli import positive
from acn_scale.studies import STUDIES
from acn_scale.studies.study import Setting


def parser_of(what: str) -> argparse.ArgumentParser:
    """With these options; `what` the program does stands above the list of studies."""
    names = "\n".join(f"  {name:<14}{study.what}" for name, study in STUDIES.items())
    parser = argparse.ArgumentParser(
        description=f"{what}\nstudies:\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", choices=STUDIES, metavar="STUDY", help="one of those above")
    add("--scale", choices=("laptop", "paper"), default="laptop", help="laptop: small networks and images, under 20 "
        "minutes on 2 cores. paper: the paper's configs and the shards that they name (default: laptop)")  # fmt: skip
    add("--seeds", type=positive, default=3, metavar="N", help="runs of each variant (default: 3)")
    add("--first-seed", type=int, default=0, metavar="SEED", help="of the first of them (default: 0)")
    add("--data", default="digits", help="images at laptop scale, as make_image_shards.py's --source, such as "
        "cifar:FOLDER, or folder:FOLDER with train/ and val/ in it (default: digits)")  # fmt: skip
    add("--out", type=Path, default=Path("runs/studies"), help="folder of all studies (default: runs/studies)")
    return parser


def setting_of(args: argparse.Namespace) -> Setting:
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    folder = args.out / f"{args.study}_{args.scale}"
    return Setting(scale=args.scale, seeds=seeds, data=args.data, folder=folder)
