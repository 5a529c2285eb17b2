"""Fine-tune a network on a task: deepspeed acn_scale/finetune.py --config configs/glue/paper.toml
train.init_from=SOURCE data.train=SHARDS data.eval=SHARDS run.name=NAME [key.sub=value ...]

The model is that of the source, a run, a checkpoint, an export or hf:FOLDER, with a head for the task; single keys of
[model] can be given. After training, the task's metrics at every depth go to eval/ in the run's folder. Images
(configs/transfer/) are prepared with the source's mean and deviation; train.freeze trains the head alone.
"""

import sys

from acn_scale import distributed
from acn_scale.checkpoint import trained
from acn_scale.cli import config_from_args, exit_on_user_error
from acn_scale.config import SentenceDataConfig
from acn_scale.downstream.image_evaluation import evaluate_images
from acn_scale.downstream.image_sets import open_subject
from acn_scale.downstream.source import completed
from acn_scale.downstream.tasks import evaluate_task, is_evaluated
from acn_scale.errors import UserError
from acn_scale.pretrain import train
from acn_scale.runs import check_run_folder, run_folder
from acn_scale.stopping import EXIT_STOPPED
from acn_scale.watchdog import failures_noted


def main() -> None:
    cfg = config_from_args(sys.argv[1:], program="acn_scale/finetune.py", complete=completed)
    if cfg.data.kind == "text":
        raise UserError("data.kind = text: must be sentences or images; acn_scale/pretrain.py trains on text")
    check_run_folder(cfg)
    folder = run_folder(cfg)
    with distributed.process_group() as device:
        before = trained(cfg)
        finished = train(cfg, device)
        if finished and isinstance(cfg.data, SentenceDataConfig):
            # What it has measured once stays, where nothing has changed: a grid is submitted again for what it lacks.
            with failures_noted(folder):
                with distributed.together():
                    there = before and distributed.rank() == 0 and is_evaluated(folder)
                if not distributed.union([folder] if there else []):
                    evaluate_task(folder, device)
        elif finished:
            with failures_noted(folder):
                with distributed.together():
                    subject = open_subject(str(folder))
                evaluate_images(subject, device)
    if not finished:
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    exit_on_user_error(main)
