"""Which jobs `compare` and `sweep` have, by one grammar: `--key A,B` and `--seeds N`."""

import re
from pathlib import Path

import pytest

from tests.helpers.command import ROOT
from train.__main__ import main
from train.errors import UserError
from train.studies.plan import named, plan

DIGITS, BASELINE, OTHER = (
    ROOT / f"configs/{name}.toml" for name in ("digits_mlp", "raw_inputs", "raw_inputs_bn")
)
RATE = "optimizer.learning_rate"


def planned(words, *, paths=(DIGITS,), seeds=1):
    return plan(paths, words if isinstance(words, list) else words.split(), out=Path("out"), seeds=seeds)


def folders(jobs):
    return [Path(job.config.run_dir).name for job in jobs]


def test_every_combination_is_a_job_in_a_folder_of_its_own():
    pairs = [(norm, rate) for norm in ("none", "batch") for rate in (0.1, 1.0)]
    for words in (
        "--model.norm none,batch --optimizer.learning-rate 0.1,1",
        "--model.norm=none,batch --optimizer.learning_rate=0.1,1",
        "--model.norm none, batch --optimizer.learning-rate= 0.1, 1e0",
    ):
        jobs = planned(words + " --batch-size 64")
        assert [job.values for job in jobs] == [{"model.norm": norm, RATE: rate} for norm, rate in pairs], (
            words
        )
        assert [(job.config.model.norm, job.config.optimizer.learning_rate) for job in jobs] == pairs
        assert folders(jobs) == [f"model.norm={norm},{RATE}={rate}" for norm, rate in pairs]
        assert jobs[3].name == "norm = batch, learning rate = 1" and jobs[3].config.batch_size == 64


def test_names_and_folders_are_as_different_as_what_they_stand_for(tmp_path):
    spaced = tmp_path / "a b.toml"
    spaced.write_text(DIGITS.read_text())
    jobs = planned("--data.path v1,v1.0,v/1", paths=(DIGITS, spaced))
    assert [job.name for job in jobs[:3]] == [f"digits_mlp, path = {p}" for p in ("v1", "v1.0", "v/1")]
    assert folders(jobs)[2:4] == ["digits_mlp,data.path=v_1", "a b,data.path=v1"]
    weighted = planned("--model.class-weights ,balanced")
    assert [job.name for job in weighted] == ["class weights = none", "class weights = balanced"]


def test_configs_are_named_after_their_files_and_flags_go_to_all_of_them():
    jobs = planned("--seed 3 --steps 7", paths=(BASELINE, OTHER))
    names = ["raw_inputs", "raw_inputs_bn"]
    assert [job.name for job in jobs] == folders(jobs) == names
    assert [(job.config.seed, job.config.steps, job.config.epochs) for job in jobs] == [(3, 7, None)] * 2
    jobs = planned("--seed 7", paths=(BASELINE, OTHER), seeds=2)  # the first keeps its folder
    assert [job.config.seed for job in jobs] == [7, 8, 7, 8] and {job.name for job in jobs} == set(names)
    assert folders(jobs) == ["raw_inputs", "raw_inputs,seed=8", "raw_inputs_bn", "raw_inputs_bn,seed=8"]
    jobs = planned("--model.norm none,layer", paths=(BASELINE, OTHER))
    assert [(job.name, folder) for job, folder in zip(jobs, folders(jobs))][1:3] == [
        ("raw_inputs, norm = layer", "raw_inputs,model.norm=layer"),
        ("raw_inputs_bn, norm = none", "raw_inputs_bn,model.norm=none"),
    ]


def test_jobs_that_differ_in_their_seed_alone_come_one_after_the_other_under_one_name():
    jobs = planned("--seed 0,1 --model.norm none,batch")
    pairs = [(norm, seed) for norm in ("none", "batch") for seed in (0, 1)]
    assert [(job.name, job.config.seed) for job in jobs] == [(f"norm = {norm}", seed) for norm, seed in pairs]
    assert folders(jobs) == [f"seed={seed},model.norm={norm}" for norm, seed in pairs]


def test_values_may_be_lists_or_hold_spaces_and_slashes():
    jobs = planned("--model.widths 64,64 32 --optimizer.milestones 0.2 0.4")
    assert [job.values for job in jobs] == [{"model.widths": (64,)}, {"model.widths": (64, 32)}]
    assert folders(jobs) == ["model.widths=64", "model.widths=64-32"] and jobs[1].name == "widths = 64 32"
    assert {job.config.optimizer.milestones for job in jobs} == {(0.2, 0.4)}
    job, _ = planned(["--data.path", "/my data/a,/my data/b"])
    assert job.config.data.path == "/my data/a" and folders([job]) == ["data.path=_my-data_a"]
    named_values = {"model.name": "cnn", "optimizer.name": "lars", "seed": 1, RATE: 1e-5}
    assert named(named_values, without=RATE) == "model = cnn, optimizer = lars"


def test_plan_that_is_not_valid_says_why():
    for words, options, message in (
        ("0,1", {}, "'0,1' follows no key; expected --key A,B"),
        ("--seed 0 --seed 1", {}, "--seed is given twice; give it once, with its values: --seed A,B"),
        ("--optimizer.learning_rate 1,1.0", {}, f"two jobs would be 'out/{RATE}=1.0'"),
        ("", {"paths": (BASELINE, BASELINE)}, "two jobs would be 'out/raw_inputs'"),
        ("--run-dir a", {}, "--run_dir does not go with several jobs; give --out"),
        ("--seed 0,1", {"seeds": 2}, "expected either --seeds or several values of --seed, got both"),
        (f"--seed {2**32 - 1}", {"seeds": 2}, "seed: expected"),
        ("--batch-size 1,0", {}, "batch_size: expected"),
        ("", {"paths": (BASELINE, Path("absent.toml"))}, "absent.toml does not exist"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            planned(words, **options)


def test_jobs_of_different_losses_are_refused(refusal):
    words = ["--model.loss", "cross_entropy,squared_error"]
    assert refusal(plan, [DIGITS], words, out=Path("out"), seeds=1) == (
        "model.loss: expected the same in all jobs of a study, which compares them by one metric, got "
        "cross_entropy and squared_error."
    )


def test_command_that_is_not_valid_exits_2_and_leaves_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for words, message in (
        ("compare", "two configs or more, the baseline first, got none before the first --key.\n"),
        ("sweep --seed 0,1", "sweep: expected one config, got none before the first --key.\n"),
        (f"compare {DIGITS} runs/digits", "expected two configs or more"),
        (f"sweep {DIGITS} {OTHER} --seed 0,1", "sweep: expected one config, got"),
        (f"sweep {DIGITS} --seeds 0", "--seeds: expected 1 to 10000, got 0"),
        (f"sweep {DIGITS} --out", "--out"),
        (f"sweep {DIGITS} --model.norm none", "sweep: expected several values of a key, as in"),
        ("compare digits_mlp raw_inputs --seeds 2", "did you mean ../"),
        (f"sweep {DIGITS} --sed 0,1", "--seed"),
        (f"compare {BASELINE} {OTHER} --optimizer.lerning-rate 1,2", "--optimizer.learning-rate"),
        (f"sweep {DIGITS} --model.norm batch,bach", "batch"),
        (f"sweep {DIGITS} --seeds 2 --num-processes 1 --out file/x", "Not a directory"),
    ):
        try:
            code = main(words.split())
        except SystemExit as exit:  # how tyro ends
            code = exit.code
        assert code == 2 and message in capsys.readouterr().err, words
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
