"""The figures and tables of the paper, each as one command."""

from acn_scale.studies import connectivity, depth, gradients, noise
from acn_scale.studies.study import Study

STUDIES: dict[str, Study] = {**depth.STUDIES, **connectivity.STUDIES, **gradients.STUDIES, **noise.STUDIES}
