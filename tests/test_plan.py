"""What a plan says of a run is what the run then takes: its arithmetic, its memory, its pace."""

import ctypes
import gc
import math
import os
import re
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from test_pretrain import run

from acn_scale import distributed, pretrain
from acn_scale.config import Config
from acn_scale.depth import as_trained, batch_of, step_flops
from acn_scale.engine import build_engine, train_step
from acn_scale.hardware import DEVICES, Device, peak_rate
from acn_scale.memory import memory, parameters
from acn_scale.models import build_model
from acn_scale.plan import Cluster, bucket_for, largest_micro_batch, pace, plan, shards_per_node, traffic
from acn_scale.runs import read_metrics, run_folder

VIT = {"name": "vit", "num_heads": 4, "image_size": 32, "patch_size": 4, "num_classes": 10, "connectivity": "acn"}
BERT = {"name": "bert", "num_heads": 4, "vocab_size": 8192, "max_tokens": 64, "connectivity": "acn"}
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX = -3, -1, -8  # of malloc.h


def config(model: dict[str, Any], ranks: int = 1, micro: int = 1, accumulated: int = 1, **train: Any) -> Config:
    kind = "text" if model["name"] == "bert" else "images"
    train = {"length": "10step", "clip_norm": 1.0, "micro_batch_size": micro} | train
    train["global_batch_size"] = micro * accumulated * ranks
    return Config.model_validate(
        {"run": {"name": "x"}, "model": model, "data": {"kind": kind, "train": "x", "eval": "x"}, "optim": {"lr": 1e-3}}
        | {"train": train}
    )


def test_flops_of_a_vit() -> None:
    """Two for each multiply-add of the linear maps and of attention, twice as many again backward; not for the input,
    whose gradient nobody needs. The last block's are, but for q, k and v, of the class token alone."""
    cfg = config(VIT | {"depth": 3, "dim": 64})
    tokens, dim = 65, 64
    qkv, others = 2 * 3 * dim * dim, 2 * (dim * dim + 2 * 4 * dim * dim) + 2 * 2 * tokens * dim  # of a token
    blocks = 3 * tokens * qkv + (2 * tokens + 1) * others
    patches, head = 2 * 64 * (3 * 4 * 4) * dim, 2 * dim * 10
    assert step_flops(cfg.model, 0.0) == pytest.approx(3 * (blocks + head) + 2 * patches, rel=1e-4)
    assert step_flops(cfg.model.model_copy(update={"recompute": True}), 0.0) == step_flops(cfg.model, 0.0)


def test_a_step_is_of_sequences_as_long_as_those_of_the_data() -> None:
    """And not as long as the model could take: a BERT for 512 tokens sees at most 128 of GLUE's by default."""
    cfg = config(BERT | {"depth": 3, "dim": 64})
    short = as_trained(cfg, {"tokens": 16})
    assert short.model == cfg.model.model_copy(update={"max_tokens": 16})
    assert step_flops(short.model, 0.15) < step_flops(cfg.model, 0.15) / 4
    assert as_trained(cfg, {}) == cfg
    values = cfg.model_dump(mode="json") | {"data": {"kind": "sentences", "train": "x", "eval": "x", "tokenizer": "x"}}
    values["model"] |= {"num_classes": 2}
    for given, tokens in ((None, 64), (32, 32)):
        sentences = Config.model_validate(values | {"data": values["data"] | {"max_tokens": given}})
        assert as_trained(sentences, {}).model.max_tokens == tokens


EARLY = {"bucket_size": 1_000_000, "overlap_comm": True}
WORDS = {"depth": 2, "dim": 256, "vocab_size": 30522}  # whose weights are three quarters of all
CASES = {
    1: [
        config(VIT | {"depth": 6, "dim": 256}, micro=32),
        config(VIT | {"depth": 4, "dim": 384, "recompute": True}, micro=24, zero_stage=2),
        config(BERT | {"depth": 4, "dim": 384}, micro=8, zero_stage=1),
    ],
    2: [
        config(BERT | {"depth": 3, "dim": 384}, ranks=2, micro=12, bucket_size=2_000_000),
        config(VIT | {"depth": 4, "dim": 384}, ranks=2, micro=8, accumulated=2, bucket_size=2_000_000),
        config(VIT | {"depth": 4, "dim": 384}, ranks=2, micro=8, zero_stage=2, **EARLY),
        config(BERT | {"depth": 3, "dim": 384}, ranks=2, micro=12, zero_stage=1, **EARLY),
        config(BERT | WORDS, ranks=2, micro=2, accumulated=2),
        config(BERT | WORDS, ranks=2, micro=2, zero_stage=1, **EARLY),
        config(BERT | WORDS, ranks=2, micro=2, zero_stage=2, bucket_size=1_000_000),
        config(BERT | {"depth": 3, "dim": 384}, ranks=2, micro=12, accumulated=2, zero_stage=1),
        config(VIT | {"depth": 4, "dim": 384}, ranks=2, micro=8, accumulated=2, zero_stage=2),
        config(VIT | {"depth": 4, "dim": 384, "recompute": True}, ranks=2, micro=12, zero_stage=3),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_is_that_of_real_steps(ranks: int) -> None:
    """Within a tenth of the most that processes hold of real engines."""
    processes = Ranks(ranks)
    try:
        found = processes(peaks, ranks)
    finally:
        processes.close()
    for number, cfg in enumerate(CASES[ranks]):
        setting = {"stage": cfg.train.zero_stage, "recompute": cfg.model.recompute}
        expected = memory(cfg, gpus=ranks, micro_batch_size=cfg.train.micro_batch_size, **setting)
        for peak in found:
            assert expected.total == pytest.approx(peak[number], rel=0.1), cfg


def peaks(ranks: int) -> list[int]:
    """Bytes that this process holds at most in steps of each case, beyond what it held before."""
    os.environ["MALLOC_ARENA_MAX"] = "1"  # or the engine would have the allocator keep what is freed
    for option, value in ((M_MMAP_THRESHOLD, 65536), (M_TRIM_THRESHOLD, 0), (M_ARENA_MAX, 1)):
        assert ctypes.CDLL(None).mallopt(option, value)  # the allocator keeps nothing for itself
    found = []
    for cfg in CASES[ranks]:
        steps_of(cfg.model_copy(update={"model": cfg.model.model_copy(update={"depth": 1})}), ranks)  # loads what stays
        gc.collect()
        before = held("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        steps_of(cfg, ranks)
        found.append(held("VmHWM") - before)
    return found


def steps_of(cfg: Config, ranks: int) -> None:
    engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), ranks)
    batches = repeat(batch_of(cfg.model, cfg.train.micro_batch_size, 0.15))
    for _ in range(2):
        train_step(engine, batches, 1e-3)


def held(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def test_dropout_keeps_no_weights_of_attention() -> None:
    """On a GPU. What it takes elsewhere is a byte for each number that it is drawn for."""
    setting = {"stage": 0, "gpus": 1, "micro_batch_size": 16, "recompute": False}
    shape = BERT | {"depth": 4, "dim": 64, "num_heads": 4, "max_tokens": 512}
    without, with_it = (memory(config(shape | {"dropout": p}), **setting).activations for p in (0.0, 0.1))
    one_block_of_weights = 16 * 4 * 512 * 512 * 4
    assert 0 < with_it - without < one_block_of_weights


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    cfg, device = config(VIT | {"depth": 6, "dim": 384}), DEVICES["v100-16gb"]
    setting = {"stage": 2, "gpus": 8, "recompute": False}
    largest = largest_micro_batch(cfg, device=device, **setting)
    room = 0.9 * 16e9
    assert memory(cfg, micro_batch_size=largest, **setting).total <= room
    assert memory(cfg, micro_batch_size=largest + 1, **setting).total > room
    again = largest_micro_batch(cfg, device=device, **(setting | {"recompute": True}))
    assert again > 2 * largest


def test_traffic() -> None:
    """Rajbhandari et al. 2020: twice the weights, three times with ZeRO-3, of which a ring keeps a share at home."""
    cfg = config(VIT | {"depth": 2, "dim": 32})
    size = 4 * parameters(cfg.model)
    assert [traffic(cfg, stage=stage, gpus=4, micro_steps=1) / size for stage in range(4)] == [1.5, 1.5, 1.5, 2.25]
    assert [traffic(cfg, stage=stage, gpus=4, micro_steps=3) / size for stage in range(4)] == [1.5, 1.5, 3.0, 6.75]
    assert traffic(cfg, stage=1, gpus=1, micro_steps=1) == 0


def test_pace() -> None:
    """Without traffic twice the GPUs halve the step; a slow link makes itself felt, and more so with more of them."""
    cfg = config(VIT | {"depth": 2, "dim": 192}, micro=4096, zero_stage=2)
    device = DEVICES["a100-80gb"]
    fast, slow = (Cluster(1, 8, device, 0.5, link, 0.0, 0.0) for link in (1e30, 1e9))
    alone = pace(cfg, fast, 1).step_seconds
    assert alone == pytest.approx(4096 * step_flops(cfg.model, 0.0) / (0.5 * 19.5e12))
    assert pace(cfg, fast, 64).step_seconds == pytest.approx(alone / 64)
    efficiency = [alone / gpus / pace(cfg, slow, gpus).step_seconds for gpus in (1, 8, 64, 512, 4096)]
    assert efficiency[0] == 1
    assert efficiency == sorted(efficiency, reverse=True)
    assert efficiency[-1] < 0.1
    last = pace(cfg, slow, 4096)
    assert last.step_seconds == pytest.approx(alone / 4096 + last.sent / 1e9)


@pytest.mark.parametrize(
    ("stage", "early", "seen"),
    [(0, False, 1 / 8), (1, False, 1.0), (1, True, 9 / 16), (2, False, 1.0), (2, True, 9 / 16), (3, False, 0.0)],
)
def test_sums_while_others_are_computed_take_no_time(stage: int, early: bool, seen: float) -> None:
    """But for the last bucket, an eighth; and weights that ZeRO-1 and 2 share out are half of the traffic."""
    link, model = 1e11, VIT | {"depth": 12, "dim": 192}
    cfg = config(model, micro=4096, zero_stage=stage, overlap_comm=early)
    cluster = Cluster(1, 8, DEVICES["a100-80gb"], 0.5, link, 0.0, 0.0)
    compute, at = pace(cfg, cluster, 1).step_seconds / 8, pace(cfg, cluster, 8)
    assert 0 < at.sent / link < 2 / 3 * compute
    assert at.step_seconds == pytest.approx(compute + seen * at.sent / link, rel=1e-3)


def test_words_are_the_last_bucket_by_themselves() -> None:
    """Their gradient comes last, and is whole at once."""
    link = 1e11
    cfg = config(BERT | WORDS, micro=4096)
    cluster = Cluster(1, 8, DEVICES["a100-80gb"], 0.5, link, 0.0, 0.0)
    compute, at = pace(cfg, cluster, 1).step_seconds / 8, pace(cfg, cluster, 8)
    share = (at.step_seconds - compute) * link / at.sent
    assert share == pytest.approx(30522 * 256 / parameters(cfg.model), rel=0.01)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_zero_2_only_the_last_backward_pass_hides_sums(stage: int) -> None:
    link, device = 1e3, Device("small", 0.1, {"fp32": 1e12})
    train = {"zero_stage": stage, "overlap_comm": True, "bucket_size": 1}
    cfg, cluster = (
        config(VIT | {"depth": 2, "dim": 192}, micro=4096, **train),
        Cluster(1, 8, device, 0.5, link, 0.0, 0.0),
    )
    micro_steps = math.ceil(512 / largest_micro_batch(cfg, stage=stage, gpus=8, recompute=False, device=device))
    compute, at = pace(cfg, cluster, 1).step_seconds / 8, pace(cfg, cluster, 8)
    hidden = compute + at.sent / link - at.step_seconds
    assert micro_steps > 1
    assert hidden == pytest.approx(2 / 3 * compute / (micro_steps if stage < 2 else 1), rel=1e-3)


def test_a_bucket_is_so_large_that_latency_is_a_small_share() -> None:
    """A twentieth of the time in which a ring sums it; more GPUs deal it to smaller messages. It holds no more
    gradients than there are, and no more than an eighth where they are summed while others are computed."""
    cfg, device = config(VIT | {"depth": 8, "dim": 384}, precision="bf16"), DEVICES["a100-80gb"]
    for gpus, link, latency in ((4, 1e9, 1e-6), (8, 1e9, 1e-5), (8, 4e9, 1e-6)):
        size = bucket_for(cfg, Cluster(1, gpus, device, 0.5, link, latency, 0.0))
        moving = 2 * size / gpus / link  # bf16: two bytes each
        assert latency / (latency + moving) == pytest.approx(0.05, rel=1e-3)
    assert bucket_for(cfg, Cluster(64, 8, device, 0.5, 25e9, 2e-5, 0.0)) == math.ceil(parameters(cfg.model) / 8)
    cfg = config(VIT | {"depth": 8, "dim": 384}, precision="bf16", zero_stage=1)
    assert bucket_for(cfg, Cluster(64, 8, device, 0.5, 25e9, 2e-5, 0.0)) == parameters(cfg.model)


def test_shards_of_a_node(vit: Callable[..., Config]) -> None:
    cfg = vit(data={"streams": 16})
    device = DEVICES["a100-80gb"]
    assert shards_per_node(cfg, 100, Cluster(4, 4, device, 0.5, 1e9, 0.0, 0.0)) == 25
    assert shards_per_node(cfg, 100, Cluster(3, 4, device, 0.5, 1e9, 0.0, 0.0)) == 100


def test_the_page(vit: Callable[..., Config]) -> None:
    cfg = vit(train={"global_batch_size": 512})
    text = plan(cfg, Cluster(2, 4, DEVICES["h100-80gb"], 0.4, 25e9, 2e-5, 2.0))
    lines = text.splitlines()
    assert "20 steps of 512 samples" in lines[0]
    assert sum(line.startswith("ZeRO-") for line in lines) == 8
    assert "ZeRO-0 (this config)" in text
    gpus = [line.split()[0] for line in lines if re.match(r"[\d,]+ ", line)]
    assert gpus[:10] == ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512"]
    assert "512 samples cannot be dealt to 1,024, 2,048, 4,096 GPUs" in text
    eighth = math.ceil(parameters(cfg.model) / 8)
    assert f"train.bucket_size={eighth} (this config: 25000000)" in text
    assert lines[-1] == "28 of 28 shards are read by each node in an epoch"


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("TPU", None),
    ],
)
def test_peak_rates(monkeypatch: pytest.MonkeyPatch, name: str, rate: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_rate(torch.device("cuda", 0), "bf16") == rate
    assert peak_rate(torch.device("cpu"), "bf16") is None


def test_mfu_is_the_share_of_the_peak(one_rank: Callable, vit: Callable[..., Config]) -> None:
    cfg = vit()
    one_rank(run_at_a_peak_of, cfg, 1e9)
    lines = [line for line in read_metrics(run_folder(cfg)) if "train/lr" in line]
    expected = [line["speed/samples_per_second"] * step_flops(cfg.model, 0.0) / 1e9 for line in lines]
    assert [line["speed/mfu"] for line in lines] == pytest.approx(expected)


def run_at_a_peak_of(cfg: Config, rate: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "peak_rate", lambda device, precision: rate)
        run(cfg)
