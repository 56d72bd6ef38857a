import dataclasses
import json
from pathlib import Path

import pytest

from train import config, parsing
from train.config import Config, Data
from train.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"

JOB = """
epochs = 3
seed = 7
[data]
validation = 0.2
[model]
name = "cnn"
widths = [8, 16]
[optimizer]
learning_rate = 1e-2
"""


def write(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def job(tmp_path):
    return write(tmp_path / "job.toml", JOB)


def test_file_sets_keys_and_the_rest_are_the_defaults(job):
    loaded = parsing.load(job, [])
    assert loaded == Config(
        run_dir="runs/job",
        epochs=3.0,
        seed=7,
        data=Data(validation=0.2),
        model=config.Model(name="cnn", widths=(8, 16)),
        optimizer=config.Optimizer(learning_rate=0.01),
    )


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_flags_override_the_file_with_hyphens_or_underscores(job, flag):
    loaded = parsing.load(job, [flag, "32", "--model.widths", "4", "--data.path", "/a b"])
    assert (loaded.batch_size, loaded.model.widths, loaded.data.path, loaded.seed) == (32, (4,), "/a b", 7)


@pytest.mark.parametrize(
    "overrides, length", [([], (None, 3)), (["--steps", "9"], (9, None)), (["--epochs", "9"], (None, 9))]
)
def test_steps_and_epochs_replace_each_other(job, overrides, length):
    loaded = parsing.load(job, overrides)
    assert (loaded.steps, loaded.epochs) == length


def test_base_inherits_every_key_but_the_run_directory(job):
    child = write(job.with_name("child.toml"), 'base = "job.toml"\nsteps = 5\n[model]\nnorm = "none"\n')
    loaded, base = parsing.load(child, []), parsing.load(job, [])
    assert (loaded.run_dir, loaded.steps, loaded.epochs) == ("runs/child", 5, None)
    assert loaded.model == dataclasses.replace(base.model, norm="none")
    assert (loaded.data, loaded.optimizer, loaded.seed) == (base.data, base.optimizer, base.seed)


@pytest.mark.parametrize(
    "text, named",
    [
        ("epochs = 3\nepocs = 4", "--epochs"),
        ("epochs = 3\n[model]\nwidth = [4]", "--model.widths"),
        ("epochs = 3\n[optimiser]\nlearning_rate = 1.0", "--optimizer.learning-rate"),
        ('epochs = "long"', "--epochs"),
        ("epochs = 3\nbatch_size = 1.5", "--batch-size"),
        ('epochs = 3\n[model]\nnorm = "bath"', "--model.norm"),
        ("epochs = 3\nseed = true", "--seed"),
    ],
)
def test_mistake_in_a_file_exits_2_and_names_the_key_and_the_file(tmp_path, capsys, text, named):
    path = write(tmp_path / "typo.toml", text)
    with pytest.raises(SystemExit) as exit:
        parsing.load(path, [])
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert named in printed.out + printed.err
    assert f"The mistake is in the file {path}." in printed.err


@pytest.mark.parametrize(
    "flags, named",
    [(["--epocs", "4"], "--epochs"), (["--seed", "x"], "--seed"), (["--data.name", "digit"], "digits")],
)
def test_mistake_in_a_flag_exits_2_and_names_the_key(job, capsys, flags, named):
    with pytest.raises(SystemExit) as exit:
        parsing.load(job, flags)
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert named in printed.out + printed.err and "in the file" not in printed.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "3", "--epochs", "4"], "steps = 3 and epochs = 4.0; wanted one"),
        (["--steps", "0"], "steps = 0; wanted a number > 0"),
        (["--epochs", "inf"], "epochs = inf; wanted a number > 0"),
        (["--batch-size", "0"], "batch_size = 0; wanted 1 or more"),
        (["--eval-every", "-1"], "eval_every = -1"),
        (["--seed", "-1"], "seed = -1"),
        (["--data.validation", "1"], r"data.validation = 1.0; wanted a fraction in \[0, 1\)"),
        (["--model.widths", "8", "0"], r"model.widths = \(8, 0\); wanted widths >= 1"),
        (["--optimizer.learning-rate", "nan"], "optimizer.learning_rate = nan"),
        (
            ["--optimizer.milestones", "0.7", "0.2"],
            r"milestones = \(0.7, 0.2\); wanted fractions in \(0, 1\), gr",
        ),
        (["--optimizer.average", "1"], "optimizer.average = 1.0"),
        (["--optimizer.label-smoothing", "-0.1"], "optimizer.label_smoothing = -0.1"),
        (["--optimizer.clip-norm", "-1"], "optimizer.clip_norm = -1"),
        (["--data.shift", "-1"], "data.shift = -1; wanted 0 or more"),
        *(
            (
                ["--data.feature-scales", *numbers],
                "data.feature_scales = .*; wanted two numbers > 0, the lower one first, or none",
            )
            for numbers in (["2"], ["1", "2", "3"], ["0", "1"], ["-1", "1"], ["2", "1"], ["1", "inf"])
            + (["1", "nan"], ["nan", "1"])
        ),
        (["--model.kernel-std", "-0.1"], "model.kernel_std = -0.1; wanted 0 or more"),
        (["--model.kernel-std", "inf"], "model.kernel_std = inf; wanted 0 or more"),
        (["--model.kernel-std", "nan"], "model.kernel_std = nan; wanted 0 or more"),
        (["--optimizer.base-batch-size", "-1"], "optimizer.base_batch_size = -1; wanted 0 or more"),
        *(
            (
                ["--model.norm", norm, "--model.norm-inputs", "True"],
                f"model.norm_inputs = true and model.norm = '{norm}'; wanted one that normalizes each "
                "feature by itself: 'batch', 'ghost' or 'flax'",
            )
            for norm in ("none", "layer", "group")
        ),
        (["--optimizer.accumulate", "5"], "batch_size = 128 and optimizer.accumulate = 5; .* 125, say"),
        (
            ["--optimizer.accumulate", "2", "--model.norm", "flax"],
            "norm = 'flax', whose running statistics cannot",
        ),
        (["--early-stopping", "3", "--data.validation", "0"], "early_stopping = 3 and data.validation = 0"),
        (
            ["--num-processes", "2"],
            "coordinator = None, num_processes = 2, process_id = None; wanted all three",
        ),
        (
            ["--coordinator", "host:1", "--num-processes", "2", "--process-id", "2"],
            "process_id = 2; wanted a number from 0 to 1",
        ),
        (
            ["--coordinator", "host:1", "--num-processes", "2", "--process-id", "1", "--devices", "1"],
            "devices = 1 and num_processes = 2; wanted one of the two",
        ),
        (["--coordinator", "host"], "coordinator = 'host'; wanted HOST:PORT"),
    ],
)
def test_values_that_make_no_sense_are_named(job, flags, message):
    with pytest.raises(UserError, match=message):
        parsing.load(job, flags)


@pytest.mark.parametrize(
    "flags",
    [
        *(["--model.norm-inputs", "True", "--model.norm", norm] for norm in ("batch", "ghost", "flax")),
        *(["--model.norm", norm] for norm in ("none", "layer", "group")),
        ["--data.feature-scales", "0.5", "0.5"],
        ["--model.kernel-std", "0"],
        ["--optimizer.base-batch-size", "0"],
    ],
    ids=" ".join,
)
def test_values_at_the_edge_of_what_makes_sense_are_taken(job, flags):
    parsing.load(job, flags)


@pytest.mark.parametrize(
    "base, message", [("job.toml", "inherits from itself"), ("no.toml", "does not exist")]
)
def test_base_that_leads_nowhere_is_named(tmp_path, base, message):
    path = write(tmp_path / "job.toml", f'base = "{base}"')
    with pytest.raises(UserError, match=f"{base} {message}"):
        parsing.load(path, [])


@pytest.mark.parametrize("text, message", [(None, "does not exist"), ("epochs = ", "cannot be read as TOML")])
def test_files_that_cannot_be_read_are_named(tmp_path, text, message):
    path = tmp_path / "job.toml"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=f"job.toml {message}"):
        parsing.load(path, [])


def test_new_keys_are_read_from_files_and_flags(job):
    text = JOB.replace("[data]", "inspect = true\n[data]\nfeature_scales = [0.01, 100]")
    text = text.replace("[model]", "[model]\nkernel_std = 0.01\nnorm_debias = false\nnorm_inputs = true")
    write(job, text + "base_batch_size = 64\n")
    loaded = parsing.load(job, [])
    assert loaded.inspect is True and loaded.data.feature_scales == (0.01, 100.0)
    assert (loaded.model.kernel_std, loaded.model.norm_debias, loaded.model.norm_inputs) == (
        0.01,
        False,
        True,
    )
    assert loaded.optimizer.base_batch_size == 64
    flags = ["--inspect", "False", "--data.feature-scales", "1", "2", "--model.norm-debias", "True"]
    again = parsing.load(job, flags)
    assert again.inspect is False and again.data.feature_scales == (1.0, 2.0) and again.model.norm_debias


@pytest.mark.parametrize(
    "flags", [[], ["--data.feature-scales", "0.01", "100", "--optimizer.milestones", "--inspect", "True"]]
)
def test_config_survives_json(job, flags):
    loaded = parsing.load(job, flags)
    assert parsing.from_dict(json.loads(json.dumps(dataclasses.asdict(loaded)))) == loaded


def test_config_of_a_run_that_knew_fewer_keys_has_the_usual_values(job):
    loaded = parsing.load(job, [])
    values = json.loads(json.dumps(dataclasses.asdict(loaded)))
    del values["inspect"], values["data"]["feature_scales"], values["optimizer"]["base_batch_size"]
    for key in ("kernel_std", "norm_inputs", "norm_debias"):
        del values["model"][key]
    assert parsing.from_dict(values) == loaded


def test_differences_name_the_keys_and_both_values(job):
    a, b = parsing.load(job, []), parsing.load(job, ["--seed", "8", "--model.norm", "none", "--run-dir", "x"])
    assert parsing.differences(a, b, ignore=["run_dir"]) == [
        "model.norm = 'batch', now 'none'",
        "seed = 7, now 8",
    ]


@pytest.mark.parametrize("length, steps", [(["--steps", "9"], 9), (["--epochs", "1.55"], 16)])
def test_total_steps_follow_from_either_length(job, length, steps):
    assert config.total_steps(parsing.load(job, length), steps_per_epoch=10) == steps


@pytest.mark.parametrize("length", [["--steps", "3000000000"], ["--epochs", "1e9"]])
def test_more_steps_than_are_counted_are_refused(job, length):
    with pytest.raises(UserError, match="wanted fewer than 2"):
        config.total_steps(parsing.load(job, length), steps_per_epoch=10)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_config_in_the_project_loads_and_says_what_it_is(path):
    assert parsing.load(path, []).run_dir == f"runs/{path.stem}"
    assert path.read_text().startswith("# ")
