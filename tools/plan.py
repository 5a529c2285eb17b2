"""What a run will take before it is paid for: memory for each ZeRO stage, the largest micro batch, arithmetic, traffic,
the size of a bucket of gradients, days and GPU hours, for the GPUs at hand and from 1 to 4,096 of them.

    python tools/plan.py --config configs/vit/ac_vit_b16.toml --nodes 4 --gpus-per-node 8 --gpu h100-80gb
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, load_config, positive, positive_number, share
from acn_scale.hardware import DEVICES


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, required=True, help="TOML file of the run, or a run's config.json")
    add("overrides", nargs="*", metavar="key.sub=value", help="keys of the config to change")
    add("--nodes", type=positive, default=1, help="machines (default: 1)")
    add("--gpus-per-node", type=positive, default=8, help="GPUs of each (default: 8)")
    add("--gpu", choices=DEVICES, default="h100-80gb", help="(default: h100-80gb)")
    add("--mfu", type=share, default=0.3, help="share of the peak rate to reach (default: 0.3; docs/speed.md)")
    add("--link", type=positive_number, default=25.0, metavar="GB/S", help="what each GPU sends in a second, in 1e9 "
        "bytes (default: 25)")  # fmt: skip
    add("--latency", type=positive_number, default=20.0, metavar="US", help="until the first byte of a message "
        "arrives, in 1e-6 seconds (default: 20)")  # fmt: skip
    add("--price", type=positive_number, default=0.0, help="of an hour of one GPU: adds the cost")
    add("--samples", type=positive, help="of an epoch, where the shards are not made yet")
    return parser.parse_intermixed_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.plan import Cluster, plan

    cfg = load_config(args.config, args.overrides)
    device = DEVICES[args.gpu]
    link, latency = args.link * 1e9, args.latency * 1e-6
    cluster = Cluster(args.nodes, args.gpus_per_node, device, args.mfu, link, latency, args.price)
    print(plan(cfg, cluster, args.samples))


if __name__ == "__main__":
    exit_on_user_error(main)
