"""The runs that each study is made of: configs that hold, twins that differ in one thing, and what they start from."""

from itertools import product
from pathlib import Path

import pytest
from made import write_folder
from networks import bert, mixer, network
from studied import config_of, setting
from test_launch import sweep

from acn_scale.cli import load_config
from acn_scale.config import Config
from acn_scale.convert.export import write_export
from acn_scale.data.tokenizer import TOKENIZER_NAME
from acn_scale.durations import Horizon
from acn_scale.runs import run_folder
from acn_scale.studies import STUDIES, depth, pruning, training_cost, training_ways
from acn_scale.studies.study import CONFIGS, Runs, Setting

MORE_THAN_TWINS = {"connectivity", "gradients", "continual", "training-cost"}


def test_a_sweep_trains_what_the_study_would(tmp_path: Path) -> None:
    """As the README has it for clusters."""
    here = setting(tmp_path, 1, scale="paper")
    (trial, _) = STUDIES["depth-vit"].trials(here)
    (seed,) = sweep.combinations([], [1])
    values = [*seed, f"run.dir={here.folder}", f"run.name=acn/{sweep.run_name(seed)}"]
    assert load_config(CONFIGS / "vit/ac_vit_b16.toml", values) == trial.config_of(1, here, [])


@pytest.mark.parametrize("name", sorted(MORE_THAN_TWINS - {"continual"}))
def test_a_study_ends_where_a_twin_is_lost(tmp_path: Path, name: str) -> None:
    """And not where another variant is."""
    needed = [trial.name for trial in STUDIES[name].trials(setting(tmp_path, 0)) if trial.needed]
    twins = ["acn", "residual"]
    assert sorted(needed) == (
        [f"{task}-residual" for task in ("bert", "mixer", "vit")] if name == "training-cost" else twins
    )


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_every_trial_is_a_run(tmp_path: Path, name: str, scale: str) -> None:
    """With a config that holds and a folder of its own; one that starts from another's run comes after a known one."""
    here = setting(tmp_path, 0, scale=scale)
    trials = {trial.name: trial for trial in STUDIES[name].trials(here)}
    assert len(trials) == len(STUDIES[name].trials(here))
    # A recipe takes its model from the run it starts from, which is not there.
    configs = [config_of(trial, here) for trial in trials.values() if not (trial.after and scale == "paper")]
    assert len({str(run_folder(cfg)) for cfg in configs}) == len(configs)
    assert {trial.after for trial in trials.values()} <= trials.keys() | {None}


def started(name: str, here: Setting) -> dict[str, Config]:
    """The trials of a study at the paper's scale that start from others' runs, of which there are small ones, and of
    the shards only what tells their classes. The shards' folder is relative."""
    for data, classes in {**dict.fromkeys(("glue/sst2", "glue/qnli", "glue/qqp"), 2), "cifar10": 10}.items():
        info = {"classes": [str(number) for number in range(classes)]}
        write_folder(Path("data") / data / "train", [[{"txt": ""}]], info)
    found = {}
    for trial in STUDIES[name].trials(here):
        if trial.after:
            source = here.folder / trial.after / "seed=0"
            if not source.exists():
                source.mkdir(parents=True)
                write_export(
                    network(mixer()) if name == "transfer" else network(bert(), {TOKENIZER_NAME: b"pieces"}),
                    source,
                    "fp32",
                )
            found[trial.name] = config_of(trial, here)
    return found


@pytest.mark.parametrize("name", ["pruning", "transfer", "depth-bert"])
def test_a_trial_takes_the_model_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for cfg in started(name, setting(tmp_path, 0, scale="paper")).values():
        expected = mixer() if name == "transfer" else bert()
        classes = 10 if name == "transfer" else 2
        assert cfg.model == expected.model_copy(update={"num_classes": classes, "dropout": 0.0})


def test_berts_are_fine_tuned_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both twins on each task of table 6, from what was pretrained."""
    monkeypatch.chdir(tmp_path)
    here = setting(tmp_path, 0, scale="paper")
    tuned = started("depth-bert", here)
    assert tuned.keys() == depth.PUBLISHED["depth-bert"].keys() - {"acn"}
    for name, cfg in tuned.items():
        twin, _, task = name.partition("-")
        assert cfg.train.init_from == f"{here.folder}/{twin}/seed=0"
        assert (cfg.data.train, cfg.data.eval) == (f"data/glue/{task}/train", f"data/glue/{task}/eval")
        assert (cfg.train.length, cfg.optim.lr) == ("6ep", 2e-5)


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_movement_comes_to_each_sparsity_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str) -> None:
    """Trained with it for as long as with the others: at the paper's scale, an epoch of SST-2."""
    monkeypatch.chdir(tmp_path)
    here = setting(tmp_path, 0, scale=scale)
    if scale == "paper":
        configs = started("pruning", here)
    else:
        configs = {trial.name: config_of(trial, here) for trial in STUDIES["pruning"].trials(here)}
    for twin, share in product(("acn", "residual"), (0.2, 0.4)):
        cfg = configs[pruning.moved(twin, share)]
        assert cfg.prune.share == share
        horizon = Horizon.of(cfg.train.length, 67_349, cfg.train.global_batch_size)
        every = horizon.count(cfg.prune.every)
        evaluated = [step for step in range(1, horizon.steps + 1) if step % horizon.count(cfg.eval.every) == 0]
        assert evaluated[-1] == horizon.steps
        # An evaluation after so many updates; before the last of them so many prunings were due.
        assert [(step - 1) // every for step in evaluated] == [*range(pruning.TIMES + 1)]
        assert scale == "laptop" or every == horizon.count("1ep")


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_a_bert_takes_the_leading_ways(tmp_path: Path, scale: str) -> None:
    """Or two of three tasks would be two of two; at the paper's scale, all that its LayerNorms take."""
    here = setting(tmp_path, 0, scale=scale)
    names = [trial.name for trial in STUDIES["training-cost"].trials(here)]
    ways = {task: {name.partition("-")[2] for name in names if name.startswith(task)} for task in training_ways.TASKS}
    assert ways["vit"] == ways["mixer"] == training_ways.WAYS.keys() and ways["bert"] >= {"acn_longer", "identity"}
    assert scale == "laptop" or ways["vit"] - ways["bert"] == {"h_acn"}
    (said,) = [line for line in training_cost.differences(here) if "a BERT does not try" in line]
    left_out = said.partition("a BERT does not try ")[2].partition(".")[0].split(", ")
    assert ways["bert"].isdisjoint(left_out) and {"h_acn"} <= {*left_out} < ways["vit"]


def test_longer_is_longer(tmp_path: Path) -> None:
    """Than its plain twin, whatever the unit of the config's length is."""
    for scale in ("laptop", "paper"):
        here = setting(tmp_path, 0, scale=scale)
        trials = {trial.name: trial for trial in STUDIES["training-cost"].trials(here)}
        for task in training_ways.TASKS:
            steps = [
                Horizon.of(config_of(trials[f"{task}-{way}"], here).train.length, 1000, 10).steps
                for way in ("acn", "acn_longer")
            ]
            assert steps[1] == 1.5 * steps[0]


def test_a_short_warmup_is_half_of_the_usual_one(tmp_path: Path) -> None:
    """Whatever its unit is."""
    for scale in ("laptop", "paper"):
        here = setting(tmp_path, 0, scale=scale)
        trials = {trial.name: trial for trial in STUDIES["training-cost"].trials(here)}
        for task in ("vit", "mixer"):
            steps = [
                Horizon(50_000, 64, 100_000).count(config_of(trials[f"{task}-{way}"], here).optim.warmup)
                for way in ("acn", "short_warmup")
            ]
            assert 0 < 2 * steps[1] == pytest.approx(steps[0], abs=1)


@pytest.mark.parametrize("way", training_ways.RULES)
def test_a_way_that_changes_the_updates_has_a_twin_of_its_own(tmp_path: Path, way: str) -> None:
    here = setting(tmp_path, 0)
    trials = {trial.name: trial for trial in STUDIES["training-cost"].trials(here)}
    for task in ("vit", "mixer"):
        names = (way, training_ways.OWN_TWINS[way], "acn")
        acn, twin, plain = (config_of(trials[f"{task}-{name}"], here) for name in names)
        assert (acn.model.connectivity, twin.model.connectivity) == ("acn", "residual")
        assert (acn.train, acn.optim) == (twin.train, twin.optim) != (plain.train, plain.optim)


@pytest.mark.parametrize("name", sorted(STUDIES.keys() - MORE_THAN_TWINS))
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_twins_differ_in_one_thing(tmp_path: Path, name: str, scale: str) -> None:
    """At laptop scale in the connectivity alone; the paper trains its ACNs longer."""
    here = setting(tmp_path, 0, scale=scale)
    trials = STUDIES[name].trials(here)
    # A recipe takes its model from the run it starts from, so that such twins differ as those do.
    configs = {trial.name: config_of(trial, here) for trial in trials if not (trial.after and scale == "paper")}
    for trial, cfg in configs.items():
        twin = configs[trial.replace("acn", "residual")]
        assert twin.model.connectivity == "residual"
        changed = {"connectivity": "residual"}
        assert cfg.model.model_copy(update=changed) == twin.model
        if scale == "laptop":
            start = cfg.train.init_from and cfg.train.init_from.replace("acn", "residual")
            train = cfg.train.model_copy(update={"init_from": start})
            assert (cfg.data, cfg.optim, train, cfg.early_exit) == (twin.data, twin.optim, twin.train, twin.early_exit)


def test_what_a_depth_study_is_of(tmp_path: Path) -> None:
    """At the paper's scale as published."""
    here = setting(tmp_path, 0, scale="paper")
    for name, said in {
        "depth-vit": "12 blocks of width 768, train.length = 700ep of the ACN and 300ep of its twin.",
        "depth-bert": "12 blocks of width 768, train.length = 2ep of the ACN and 1ep of its twin.",
        "depth-mixer": "16 blocks of width 128, train.length = 420ep of the ACN and 300ep of its twin.",
    }.items():
        trials = [trial for trial in STUDIES[name].trials(here) if not trial.after]
        runs = {trial.name: Runs([config_of(trial, here)]) for trial in trials}
        assert depth.trained(runs) == f"Here: {said}"


@pytest.mark.parametrize("name", ["depth-mixer", "early-exit", "transfer", "continual"])
def test_published_mixers_have_the_authors_block(tmp_path: Path, name: str) -> None:
    here = setting(tmp_path, 0, scale="paper")
    for trial in STUDIES[name].trials(here):
        if not trial.after:  # or it has the model that it starts from
            model = config_of(trial, here).model
            assert (model.wrapper, model.pool, model.init) == (True, "cls", "torch")
