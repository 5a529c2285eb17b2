"""Pretrain a model: deepspeed acn_scale/pretrain.py --config FILE.toml [key.sub=value ...]"""

import contextlib
import gc
import logging
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from acn_scale import checkpoint, curriculum, distributed, pruning
from acn_scale.cli import config_from_args, exit_on_user_error
from acn_scale.config import Config, SentenceDataConfig
from acn_scale.continual import TaskSequence
from acn_scale.convert.start import check_start, start_from
from acn_scale.data import build_evaluation, build_stream
from acn_scale.data.stream import Evaluation, Stream
from acn_scale.dead_blocks import DeadBlocks
from acn_scale.depth import as_trained, cutoff, depth_figure, evaluate, image_tokens, step_flops
from acn_scale.durations import Duration, Horizon
from acn_scale.ema import WeightAverage
from acn_scale.engine import Step, build_engine, train_step
from acn_scale.errors import RunFailed
from acn_scale.guard import Guard
from acn_scale.hardware import peak_rate
from acn_scale.log import Metrics, Window, describe, progress_bar, setup_logging
from acn_scale.models import build_model
from acn_scale.optim import freeze, learning_rate
from acn_scale.profiling import Profiler
from acn_scale.runs import append_bad_step, check_run_folder, open_run_folder, restarts
from acn_scale.saving import Checkpoints
from acn_scale.stopping import EXIT_STOPPED, StopSignals
from acn_scale.watchdog import Watchdog

log = logging.getLogger("acn_scale.pretrain")


def main() -> None:
    cfg = config_from_args(sys.argv[1:], program="acn_scale/pretrain.py")
    check_run_folder(cfg)
    with distributed.process_group() as device:
        finished = train(cfg, device)
    if not finished:
        sys.exit(EXIT_STOPPED)


def train(cfg: Config, device: torch.device) -> bool:
    """The run, from its newest checkpoint where there is one, to its end: True, or until a signal asks it to stop:
    False, with a checkpoint. Call it on every rank.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    with distributed.together():
        if rank == 0 and checkpoint.trained(cfg):
            check_start(cfg)
        stream = build_stream(cfg, rank, world_size, distributed.union, device)
        evaluation = build_evaluation(cfg, rank, world_size, distributed.union)
        horizon = Horizon.of(cfg.train.length, stream.samples.num_samples, cfg.train.global_batch_size)
    with contextlib.ExitStack() as opened:
        with distributed.together():
            folder = opened.enter_context(open_run_folder(cfg, horizon.steps))
        setup_logging(folder, rank)
        signals = opened.enter_context(StopSignals())
        opened.enter_context(contextlib.closing(stream))
        # says at once what has failed
        watchdog = opened.enter_context(Watchdog(folder, rank, world_size, cfg.health.hang_timeout))
        return Trainer(cfg, device, folder, stream, evaluation, horizon, signals, watchdog).run()


class Trainer:
    """What a run consists of, and the loop over its steps."""

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        folder: Path,
        stream: Stream,
        evaluation: Evaluation,
        horizon: Horizon,
        signals: StopSignals,
        watchdog: Watchdog,
    ) -> None:
        self.cfg, self.device, self.folder, self.stream, self.evaluation = cfg, device, folder, stream, evaluation
        self.horizon, self.signals, self.watchdog = horizon, signals, watchdog
        self.rank = distributed.rank()
        self.engine = None
        self.depth = 0  # blocks of the network, once it is built
        keep_every = cfg.checkpoint.keep_every and max(1, horizon.count(cfg.checkpoint.keep_every))
        self.checkpoints = Checkpoints(folder, keep=cfg.checkpoint.keep, keep_every=keep_every, progress=watchdog.go_on)
        self.guard = Guard(cfg.health)
        self.dead_blocks = DeadBlocks(cfg.depth, cfg.eval.tolerance)
        self.stall = 0.0  # seconds that the last checkpoint held training up
        self.restarts = restarts(folder)
        # Model FLOPs utilization (Chowdhery et al. 2022, app. B): what recomputing adds does not count.
        self.peak_rate = peak_rate(device, cfg.train.precision)
        self.window = Window(device)

    def build(self, depth: int, *, fresh: bool) -> None:
        """The network, of so many blocks, in an engine; `fresh`: with the weights that the run starts from."""
        cfg = self.cfg.model_copy(update={"model": self.cfg.model.model_copy(update={"depth": depth})})
        torch.manual_seed(cfg.run.seed)  # the same initial weights on every rank
        model = build_model(cfg.model)
        if cfg.train.freeze:
            freeze(model)
        log.info("%s", describe(cfg, model, self.horizon, distributed.world_size()))
        if fresh and cfg.train.init_from:
            with distributed.together():
                classes = self.stream.samples.index.info.get("classes", [])
                start_from(model, cfg.train.init_from, classes, self.folder if self.rank == 0 else None)
        self.release()
        self.engine = build_engine(model, cfg, self.device, distributed.world_size())
        self.average = WeightAverage(self.engine, cfg.train.ema_decay) if cfg.train.ema_decay else None
        self.sequence = TaskSequence(self.engine, cfg, self.horizon) if cfg.continual.tasks > 1 else None
        mask_ratio, frozen = cfg.data.mask_ratio, cfg.train.freeze
        # Sentences are of any length: what a step of them costs is not known.
        known = self.peak_rate and not isinstance(cfg.data, SentenceDataConfig)
        shape = as_trained(cfg, self.stream.samples.index.info).model
        self.flops_per_sample = step_flops(shape, mask_ratio, frozen=frozen) if known else None
        self.depth = depth

    def release(self) -> None:
        """Let go of the engine before the next is built: two may be more than a device holds. At ZeRO-3 caches of
        DeepSpeed's keep it all the same.
        """
        if self.engine is not None:
            self.engine.destroy()
        self.engine = self.average = self.sequence = None
        gc.collect()  # an engine refers to itself

    def run(self) -> bool:
        """All steps that are left; False where a signal stopped it before the end."""
        step = self.load(self.checkpoints.newest())
        stop = False
        with (
            Metrics(self.folder, step=step, rank=self.rank) as self.metrics,
            progress_bar(self.cfg, step, self.horizon) as self.progress,
            contextlib.closing(self.checkpoints),
            Profiler(self.cfg.profile, self.folder, self.rank) as self.profiler,
        ):
            while step < self.horizon.steps and not stop:
                step += 1
                self.profiler.begin(step)
                result = self.take(step)
                self.profiler.end(step)
                stop = result.stop
                if result.fault and self.cfg.health.on_bad_step == "rollback":
                    start = self.roll_back(step)
                    if start < step:
                        step = start
                        continue
                if self.due(self.cfg.train.log_every, step):
                    self.log(step, result)
                with self.window.paused():
                    self.end_task(step)
                    keep = self.evaluate(step) if self.due(self.cfg.eval.every, step) else self.depth
                    if self.due(self.cfg.checkpoint.every, step) or stop or keep < self.depth:
                        self.save(step, keep)
                    if keep < self.depth:
                        self.cut(step, keep)
                self.progress.update()
            if not self.checkpoints.finish():
                raise RunFailed(f"step {step}: the last checkpoint could not be written; see {self.folder}/train.log")
        finished = step == self.horizon.steps
        if finished:
            log.info("finished at step %d; results in %s", step, self.folder)
        else:
            log.info("stopped at step %d, as a signal asked for, and saved; the same command goes on", step)
        return finished

    def due(self, every: Duration, step: int) -> bool:
        return step % max(1, self.horizon.count(every)) == 0 or step == self.horizon.steps

    def take(self, step: int) -> Step:
        """One optimizer step, judged by all ranks alike."""
        torch.manual_seed(dropout_seed(self.cfg.run.seed, step - 1, self.rank))
        curriculum.apply(self.cfg, self.engine.module, step - 1, self.horizon)
        self.watchdog.beat(step, "data")
        if step in self.guard.passed_over:
            self.stream.pass_over()
            self.window.passed_over()
            return Step(stop=distributed.sum_on_cpu([self.signals.received is not None])[0] > 0)
        waited, samples = self.stream.waited, self.stream.plan.size(step - 1)
        result = train_step(
            self.engine,
            self.stream,
            learning_rate(self.cfg.optim, self.horizon, step - 1),
            batch_size=samples,
            judge=self.guard.fault,
            stop=self.signals.received is not None,
            measure_gradients=self.due(self.cfg.train.log_every, step),
            phase=partial(self.enter, step),
            edit=partial(self.edit, step) if self.sequence or self.cfg.prune.share else None,
        )
        waited = self.stream.waited - waited
        if self.average and result.applied:
            self.average.update()
        if self.sequence and result.applied:
            self.sequence.method.after_update()
        self.window.add(
            result.loss,
            samples=samples,
            tokens=result.tokens or samples * image_tokens(self.cfg.model),
            applied=result.applied,
            waited=waited,
            own_seconds=waited + result.seconds,
        )
        if result.fault:
            self.note_bad(step, result)
        else:
            self.guard.good(result.loss, applied=result.applied)
        return result

    def edit(self, step: int) -> None:
        """What changes an update beside the loss, right before it is made."""
        if self.sequence:
            self.sequence.method.before_update()
        pruning.prune_by_movement(self.cfg.prune, self.horizon, self.engine, step - 1)

    def enter(self, step: int, phase: str) -> None:
        """Say where the step is, to who watches it."""
        self.watchdog.beat(step, phase)
        self.profiler.phase(phase)

    def note_bad(self, step: int, result: Step) -> None:
        """Log a bad step with the samples that may have caused it, and count it."""
        mine = (self.rank, result.own_loss, self.stream.samples_of(step - 1))
        parts = distributed.union([mine])
        suspects = [part for part in parts if not math.isfinite(part[1])] or parts
        ranks, samples = [rank for rank, *_ in suspects], [sample for *_, part in suspects for sample in part]
        if self.rank == 0:
            path = append_bad_step(
                self.folder, {"step": step, "fault": result.fault, "ranks": ranks, "samples": samples}
            )
            log.warning(
                "step %d: %s; the update is dropped. Samples %s%s, on rank %s; all in %s; "
                "to look at them: python tools/inspect_batch.py %s --step %d",
                step, result.fault, ", ".join(map(str, samples[:8])), ", ..." if len(samples) > 8 else "",
                ", ".join(map(str, ranks[:8])), path, self.folder, step,
            )  # fmt: skip
        self.guard.bad(step, result.fault)

    def roll_back(self, step: int) -> int:
        """Go back to the newest checkpoint, to pass over the batches up to this step's; return the step it is of."""
        self.watchdog.beat(step, "checkpoint")
        path = self.checkpoints.newest()
        if path is None:
            log.warning("step %d: no checkpoint to go back to yet; the update stays dropped", step)
            return step
        start = self.load(path, keep_bad_steps=True)
        self.guard.pass_over(step, start)
        log.warning("back at step %d; passed over from there: the batches of steps %s", start, self.guard.ahead(start))
        self.metrics.rewind(start)
        self.progress.n = start
        return start

    def load(self, path: Path | None, *, keep_bad_steps: bool = False) -> int:
        """Go on from a checkpoint, or from the beginning where there is none; return the step."""
        self.watchdog.beat(0, "reshape")  # which may take as long as it needs
        depth = checkpoint.read_state(path)["depth"] if path else self.cfg.model.depth
        if depth != self.depth:
            self.build(depth, fresh=path is None)
        if path is None:
            self.window.restart()  # building the network is no part of its first steps
            return 0
        state = checkpoint.load(self.engine, self.stream, path)
        if self.average:
            self.average.load(path)
        if self.sequence:
            self.sequence.load(path)
        self.guard.load_state_dict(state["guard"], keep_bad_steps=keep_bad_steps)
        self.window.load_state_dict(state["window"])
        self.dead_blocks.load_state_dict(state["dead_blocks"])
        log.info("resumed at step %d from %s", state["step"], path)
        return state["step"]

    def save(self, step: int, depth: int) -> None:
        """Begin a checkpoint, from which the run goes on with `depth` blocks."""
        self.watchdog.beat(step, "checkpoint")
        self.metrics.flush()
        state = {"guard": self.guard.state_dict(), "window": self.window.state_dict(), "depth": depth}
        state |= {"dead_blocks": self.dead_blocks.state_dict()}
        state |= {"short": curriculum.short_share(self.horizon.count(self.cfg.train.anneal), step - 1)}
        parts = (self.average.parts() if self.average else {}) | (self.sequence.parts() if self.sequence else {})
        self.stall = self.checkpoints.save(self.engine, self.stream, step, state, parts)

    def cut(self, step: int, depth: int) -> None:
        """Go on with the lowest `depth` blocks, as a start from the checkpoint of this step would."""
        if not self.checkpoints.finish():
            log.warning("step %d: without a checkpoint the blocks above %d are not cut off yet", step, depth)
            return
        log.info("step %d: the blocks above %d of %d have died and are cut off", step, depth, self.depth)
        self.load(self.checkpoints.path(step))

    def log(self, step: int, result: Step) -> None:
        """A line of training metrics."""
        values = self.window.read() | {"train/lr": learning_rate(self.cfg.optim, self.horizon, step - 1)}
        values |= {"data/bad_samples": len(self.stream.bad.known), "speed/checkpoint_stall": self.stall}
        values |= {"speed/restarts": self.restarts}
        if self.flops_per_sample:
            rate = values["speed/samples_per_second"] * self.flops_per_sample / distributed.world_size()
            values["speed/mfu"] = rate / self.peak_rate
        if result.gradient_norms is not None:
            norms = dict(result.gradient_norms)
            self.dead_blocks.note_gradients(norms)
            values |= {"train/grad_norm": norms.pop("all")}
            values |= {f"grad_norm/{part}": norm for part, norm in norms.items()}
        self.metrics.write(step, values)
        loss, speed = values.get("train/loss", math.nan), values["speed/samples_per_second"]
        self.progress.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} samples/s", refresh=False)

    def end_task(self, step: int) -> None:
        """Where the run learns tasks one after another and one ends here, note what it needs and how well it does."""
        watch = partial(self.watchdog.each, phase="evaluation")
        if self.sequence and (accuracy := self.sequence.finish(step, watch)):
            self.metrics.write(step, accuracy)

    def evaluate(self, step: int) -> int:
        """The scores at full depth, the accuracy at each depth, the cut-off, and the curve as a picture.

        Returns the number of blocks to go on with.
        """
        cuts = self.cfg.depth.cut_while_training
        batches = self.watchdog.each(self.evaluation, "evaluation")
        scores = evaluate(self.engine.module, batches, self.device, changes=cuts)
        change = scores.pop("change", [])
        tolerance = self.cfg.eval.tolerance
        accuracy = scores["accuracy"]
        values = {f"eval/{name}": depths[-1] for name, depths in scores.items()}
        values |= {f"eval/depth_{depth:02d}/accuracy": value for depth, value in enumerate(accuracy)}
        values |= {f"depth/change/block_{depth:02d}": value for depth, value in enumerate(change) if depth}
        values |= {"depth/cutoff": cutoff(accuracy, tolerance), "depth/blocks": self.depth}
        if self.cfg.prune.share:
            values |= {f"prune/{name}": share for name, share in pruning.sparsity(self.engine.module).items()}
        self.metrics.write(step, values)
        self.metrics.draw(step, "depth/curve", depth_figure({f"step {step}": accuracy}, tolerance))
        curve = " ".join(f"{100 * value:.1f}" for value in accuracy)
        loss, cut = values["eval/loss"], values["depth/cutoff"]
        log.info("step %d: loss %.4f, accuracy by depth %s, cut-off %d", step, loss, curve, cut)
        goes_on = step < self.horizon.steps
        return self.dead_blocks.depth_to_keep(accuracy, change) if cuts and goes_on else self.depth


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of torch's generator in one step, so that a resumed run draws what the unbroken one would have drawn."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


if __name__ == "__main__":
    exit_on_user_error(main)
