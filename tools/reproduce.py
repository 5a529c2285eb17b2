"""Reproduce a figure or table of the paper: its runs, then a table, a picture and what differs, in report/.

    python tools/reproduce.py depth-vit --seeds 3

The same command goes on where it was stopped; a run that is finished is never run again. A run takes one process: one
GPU, or one core. On a cluster, launchers/sweep.py trains them over more, into the same folder (see README).
"""

import argparse
from pathlib import Path

from acn_scale.cli import exit_on_user_error, positive


def main() -> None:
    from acn_scale.studies import STUDIES

    names = "\n".join(f"  {name:<14}{study.what}" for name, study in STUDIES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nstudies:\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter
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
    add("--workers", type=positive, help="runs at a time (default: one a GPU, or one a core where there is no GPU)")
    args = parser.parse_args()

    from acn_scale.studies.runner import reproduce, usual_workers
    from acn_scale.studies.study import Setting

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    folder = args.out / f"{args.study}_{args.scale}"
    setting = Setting(scale=args.scale, seeds=list(seeds), data=args.data, folder=folder)
    print(reproduce(args.study, STUDIES[args.study], setting, args.workers or usual_workers()))


if __name__ == "__main__":
    exit_on_user_error(main)
