"""Pretrain a model: deepspeed acn_scale/pretrain.py --config FILE.toml [key.sub=value ...]"""

import contextlib
import logging
import math
import sys

import numpy as np
import torch
from tqdm import tqdm

from acn_scale import checkpoint, distributed
from acn_scale.cli import config_from_args, exit_on_user_error
from acn_scale.config import Config
from acn_scale.data import build_evaluation, build_stream
from acn_scale.depth import cutoff, depth_figure, evaluate, tokens_per_sample
from acn_scale.durations import Duration, Horizon
from acn_scale.engine import build_engine, train_step
from acn_scale.log import Metrics, Window, setup_logging
from acn_scale.models import build_model
from acn_scale.optim import learning_rate
from acn_scale.runs import check_run_folder, open_run_folder

log = logging.getLogger("acn_scale.pretrain")


def main() -> None:
    cfg = config_from_args(sys.argv[1:], program="acn_scale/pretrain.py")
    check_run_folder(cfg)
    with distributed.process_group() as device:
        train(cfg, device)


def train(cfg: Config, device: torch.device) -> None:
    """The whole run, from its newest checkpoint where there is one. Call it on every rank."""
    rank, world_size = distributed.rank(), distributed.world_size()
    with distributed.together():
        stream = build_stream(cfg, rank, world_size, distributed.union, device)
        evaluation = build_evaluation(cfg, rank, world_size, distributed.union)
    horizon = Horizon.of(cfg.train.length, stream.samples.num_samples, cfg.train.global_batch_size)
    torch.manual_seed(cfg.run.seed)  # the same initial weights on every rank
    model = build_model(cfg.model)
    folder = open_run_folder(cfg)
    setup_logging(folder, rank)
    log.info("%s", describe(cfg, model, horizon, world_size))
    engine = build_engine(model, cfg, device, world_size)
    step = checkpoint.resume(engine, stream, folder)

    def due(every: Duration, at: int) -> bool:
        return at % max(1, horizon.count(every)) == 0 or at == horizon.steps

    window = Window(cfg.train.global_batch_size, tokens_per_sample(cfg.model), device)
    skipped_in_a_row = 0
    with (
        Metrics(folder, step=step, rank=rank) as metrics,
        progress_bar(cfg, step, horizon) as progress,
        contextlib.closing(stream),
    ):
        while step < horizon.steps:
            torch.manual_seed(dropout_seed(cfg.run.seed, step, rank))
            lr = learning_rate(cfg.optim, horizon, step)
            step += 1
            result = train_step(engine, stream, lr, measure_gradients=due(cfg.train.log_every, step))
            window.add(result.loss, applied=result.applied, waited=result.waited)
            skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
            if skipped_in_a_row == cfg.train.max_skipped_steps:
                raise RuntimeError(f"step {step}: {skipped_in_a_row} updates in a row skipped for non-finite gradients")
            if due(cfg.train.log_every, step):
                bad = {"data/bad_samples": len(stream.bad.known)}
                log_training(metrics, progress, step, lr, window.read() | bad, result.gradient_norms)
            if due(cfg.eval.every, step):
                with window.paused():
                    log_evaluation(metrics, step, evaluate(engine.module, evaluation, device), cfg.eval.tolerance)
            if due(cfg.checkpoint.every, step):
                with window.paused():
                    metrics.flush()
                    checkpoint.save(engine, stream, folder, step, keep=cfg.checkpoint.keep)
            progress.update()
    log.info("finished at step %d; results in %s", step, folder)


def log_training(
    metrics: Metrics, progress: tqdm, step: int, lr: float, window: dict[str, float], norms: dict[str, float]
) -> None:
    """A line of training metrics. Raises RuntimeError, on all ranks, for a loss that is not a finite number."""
    loss = window.get("train/loss", math.nan)
    if not math.isfinite(loss) and window["train/skipped_steps"] == 0:
        raise RuntimeError(f"step {step}: the loss is {loss}")
    parts = {f"grad_norm/{part}": norm for part, norm in norms.items() if part != "all"}
    metrics.write(step, window | {"train/lr": lr, "train/grad_norm": norms["all"]} | parts)
    progress.set_postfix_str(f"loss {loss:.4f}, {window['speed/samples_per_second']:.0f} samples/s", refresh=False)


def log_evaluation(metrics: Metrics, step: int, scores: dict[str, list[float]], tolerance: float) -> None:
    """The scores at full depth, the accuracy at each depth, the cut-off, and the curve as a picture."""
    accuracy = scores["accuracy"]
    values = {f"eval/{name}": depths[-1] for name, depths in scores.items()}
    values |= {f"eval/depth_{depth:02d}/accuracy": value for depth, value in enumerate(accuracy)}
    values["depth/cutoff"] = cutoff(accuracy, tolerance)
    metrics.write(step, values)
    metrics.draw(step, "depth/curve", depth_figure({f"step {step}": accuracy}, tolerance))
    curve = " ".join(f"{100 * value:.1f}" for value in accuracy)
    loss, cut = values["eval/loss"], values["depth/cutoff"]
    log.info("step %d: loss %.4f, accuracy by depth %s, cut-off %d", step, loss, curve, cut)


def progress_bar(cfg: Config, step: int, horizon: Horizon) -> tqdm:
    """Step, loss, speed and time left, on rank 0; a terminal sees it move, a log file gets a line now and then."""
    interval = 0.5 if sys.stderr.isatty() else 20
    return tqdm(
        desc=cfg.run.name,
        total=horizon.steps,
        initial=step,
        unit="step",
        mininterval=interval,
        maxinterval=interval,
        disable=distributed.rank() != 0,
    )


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of torch's generator in one step, so that a resumed run draws what the unbroken one would have drawn."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def describe(cfg: Config, model: torch.nn.Module, horizon: Horizon, world_size: int) -> str:
    """The run in one line, with the arithmetic of its batches."""
    micro = cfg.micro_batch_size(world_size)
    accumulation = cfg.train.global_batch_size // (micro * world_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{cfg.run.name}: {cfg.model.name}, {cfg.model.connectivity}, {cfg.model.depth} blocks, "
        f"{parameters:,} parameters; "
        f"{horizon.steps} steps of {cfg.train.global_batch_size} samples "
        f"({micro} x {accumulation} accumulated x {world_size} ranks); "
        f"{horizon.samples_per_epoch} samples an epoch; {cfg.train.precision}, ZeRO-{cfg.train.zero_stage}"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
