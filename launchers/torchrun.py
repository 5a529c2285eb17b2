"""Start a tool as several processes here, as torchrun does, and end with the exit code of the one that failed first,
which is 2 for a user's mistake: python torchrun.py N TOOL [ARGUMENTS]
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> None:
    processes, *command = sys.argv[1:]
    try:
        torchrun(["--standalone", "--nproc-per-node", processes, *command])
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)


if __name__ == "__main__":
    main()
