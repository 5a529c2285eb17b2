"""Evaluate a classifier of images at every depth: top-1, top-5, each class, with noise, and its frozen readouts.

    python tools/evaluate_images.py runs/vit/ac_vit_b16 --noise paper
    torchrun --nproc-per-node 8 tools/evaluate_images.py timm:vit_base_patch16_224 --data imagenet/val --out results

Images are prepared as the source has it, for timm: and hf: as timm and Transformers do. Results go to eval/ in the
source's folder, or in --out: <data>.json, <data>+<noise>.json, <data>_<knn or probe>.json, predictions/, per_class/ and
throughput/; corruptions/, after which --corruptions goes on where it was stopped. The numbers are the same on any
number of ranks.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, not_negative, points, positive

ON = """pixels (default): on pixels in 0..1, clipped to that again. Noise is then a property of the image, the same for
networks of any normalisation, as in ImageNet-C. normalised: on the model's input, not clipped; sigma is then in units
of the normalisation's deviation, about a quarter as strong on ImageNet, and salt and pepper are 1 and -1. The paper
does not say which it has; that sigma 0.1 costs it 1 to 3 points speaks for the second"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="a run, a checkpoint, an export, timm:NAME_OR_FILE or hf:FOLDER")
    add("--data", metavar="DIR", help="shards with their index.json, or a folder for each class (default: the run's)")
    add("--train", metavar="DIR", help="the same with training images, for --knn and --probe (default: the run's)")
    add("--classes", type=Path, metavar="FILE", help="names the network's classes in their order, where class folders "
        "do not tell: a line each, or imagenet_class_index.json. Some folders may then lack")  # fmt: skip
    add("--noise", nargs="+", default=[], metavar="NAME", help="gaussian_SIGMA, salt_pepper_P, a corruption with its "
        "severity such as fog_3, or paper: the six of the paper's table 2")  # fmt: skip
    add("--noise-on", choices=("pixels", "normalised"), default="pixels", help=ON.replace("\n", " "))
    add("--corruptions", nargs="?", const=True, default=False, metavar="DIR", help="ImageNet-C's 15 corruptions at 5 "
        "severities and mCE: of the files in DIR, or made here (needs imagecorruptions-imaug)")  # fmt: skip
    add("--knn", action="store_true", help="20 nearest neighbours among training images, by readouts of every depth")
    add("--probe", action="store_true", help="a linear map trained anew on the readouts of every depth")
    add("--per-class", type=not_negative, default=100, metavar="N", help="training images of each class for these two; "
        "0: all (default: 100)")  # fmt: skip
    add("--tolerance", type=points, default=0.5, metavar="POINTS", help="what the cut-off may lose (default: 0.5)")
    add("--out", type=Path, metavar="FOLDER", help="for eval/ (default: the source's folder)")
    add("--batch-size", type=positive, metavar="N", help="images of a pass on a rank (default: the run's, or 256)")
    add("--workers", type=not_negative, metavar="N", help="loader processes of each rank (default: the run's, or none)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # a launcher's own
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale import distributed
    from acn_scale.data.classes import read_classes
    from acn_scale.data.image_noise import image_noises
    from acn_scale.downstream.image_evaluation import evaluate_images
    from acn_scale.downstream.image_sets import open_subject

    noises = image_noises(args.noise, on=args.noise_on)
    kinds = [kind for kind in ("knn", "probe") if getattr(args, kind)]
    with distributed.process_group() as device:
        with distributed.together():
            classes = read_classes(args.classes) if args.classes else None
            subject = open_subject(args.source, data=args.data, train=args.train, classes=classes, out=args.out,
                                   batch_size=args.batch_size, workers=args.workers)  # fmt: skip
        corruptions = Path(args.corruptions) if isinstance(args.corruptions, str) else args.corruptions
        text = evaluate_images(subject, device, noises=noises, corruptions=corruptions, kinds=kinds,
                               per_class=args.per_class, tolerance=args.tolerance)  # fmt: skip
    if text:
        print(text)


if __name__ == "__main__":
    exit_on_user_error(main)
