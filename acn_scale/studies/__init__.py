"""The figures and tables of the paper, each as one command."""

from acn_scale.studies import depth, early_exit, low_data
from acn_scale.studies.study import Study

STUDIES: dict[str, Study] = {**depth.STUDIES, **early_exit.STUDIES, **low_data.STUDIES}
