"""The figures and tables of the paper, each as one command."""

from acn_scale.studies import continual, depth
from acn_scale.studies.study import Study

STUDIES: dict[str, Study] = {**depth.STUDIES, **continual.STUDIES}
