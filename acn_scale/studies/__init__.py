"""The figures and tables of the paper, each as one command."""

from acn_scale.studies import (
    connectivity,
    continual,
    depth,
    early_exit,
    gradients,
    low_data,
    noise,
    pruning,
    training_cost,
    transfer,
)
from acn_scale.studies.study import Study

PARTS = (depth, connectivity, gradients, noise, continual, early_exit, low_data, transfer, pruning, training_cost)
STUDIES: dict[str, Study] = {name: study for part in PARTS for name, study in part.STUDIES.items()}
