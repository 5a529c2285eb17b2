"""A process of MosaicML streaming, in a Python of its own: at each line that comes in, it resumes and says how long it
took and the most memory that it has had.

mosaicml.py FOLDER SHARDS RECORDS BYTES BATCH SAMPLES: so many shards of so many records; from so many samples on. It
imports nothing of ours, since that library takes older packages than we do.
"""

import sys
import time
from pathlib import Path

MARK = "seconds until the first batch, MiB: "  # before what it says


def main() -> None:
    folder = Path(sys.argv[1])
    shards, records, size, batch, samples = map(int, sys.argv[2:])
    write(folder, shards, records, size)
    for _ in sys.stdin:
        seconds = resume(folder, batch, samples)
        print(f"{MARK}{seconds} {peak_memory()}", flush=True)


def peak_memory() -> float:
    """As in sides.py."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def write(folder: Path, shards: int, records: int, size: int) -> None:
    import numpy as np
    from streaming import MDSWriter

    content = np.random.default_rng(0).bytes(size)
    limit = records * (size + 64)
    with MDSWriter(columns={"bin": "bytes", "cls": "int"}, out=str(folder), size_limit=limit, hashes=["sha1"]) as out:
        for _ in range(shards * records):
            out.write({"bin": content, "cls": 0})


def resume(folder: Path, batch: int, samples: int) -> float:
    """Seconds from opening the data to the batch that comes after so many samples of the epoch."""
    import streaming

    start = time.perf_counter()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch, num_canonical_nodes=1)
    loader = streaming.StreamingDataLoader(dataset, batch_size=batch, num_workers=0, collate_fn=list)
    state = {"epoch": 0, "sample_in_epoch": samples, "num_canonical_nodes": 1, "shuffle_seed": dataset.shuffle_seed}
    loader.load_state_dict(state | {"initial_physical_nodes": 1})
    next(iter(loader))
    seconds = time.perf_counter() - start
    streaming.base.util.clean_stale_shared_memory()
    return seconds


if __name__ == "__main__":
    main()
