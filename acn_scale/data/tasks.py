"""The tasks of GLUE (Wang et al. 2019, arXiv 1804.07461): what their files look like, labels and metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field

ENTAILMENT = ("entailment", "not_entailment")
MNLI_LABELS = ("entailment", "neutral", "contradiction")
SPLITS = {"train": "train.tsv", "eval": "dev.tsv", "test": "test.tsv"}


@dataclass(frozen=True)
class Task:
    """`labels` in the order of the classes; empty where a number is to be predicted. The first metric counts;
    a task of test sets alone has none.
    """

    folder: str  # in the official layout; also the name of the file that the GLUE server takes
    texts: tuple[str, ...]  # columns
    label: str  # column
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    splits: Mapping[str, str] = field(default_factory=lambda: SPLITS)  # our name of each: its file
    server: Mapping[str, str] = field(default_factory=dict)  # split: file for the server, where it is another
    columns: tuple[str, ...] = ()  # of train and dev, where these have no header

    @property
    def range(self) -> tuple[float, float]:
        """Of the number to be predicted."""
        return 0.0, 5.0


TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", ("0", "1"), ("matthews", "accuracy"),
                 columns=("source", "label", "mark", "sentence")),
    "sst2": Task("SST-2", ("sentence",), "label", ("0", "1")),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("f1", "accuracy")),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), ("spearman", "pearson")),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), ("f1", "accuracy")),
    "mnli": Task("MNLI", ("sentence1", "sentence2"), "gold_label", MNLI_LABELS,
                 splits={"train": "train.tsv", "eval": "dev_matched.tsv", "eval_mismatched": "dev_mismatched.tsv",
                         "test": "test_matched.tsv", "test_mismatched": "test_mismatched.tsv"},
                 server={"test": "MNLI-m", "test_mismatched": "MNLI-mm"}),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT),
    "wnli": Task("WNLI", ("sentence1", "sentence2"), "label", ("0", "1")),
    # The diagnostic set: what was trained on MNLI answers it.
    "ax": Task("diagnostic", ("sentence1", "sentence2"), "label", MNLI_LABELS, (),
               splits={"test": "diagnostic.tsv"}, server={"test": "AX"}),
}  # fmt: skip
