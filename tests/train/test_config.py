"""TOML files and flags become one job, and what is wrong with them is said in a sentence."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from train.config import Config, Data, Model, Optimizer, check, differences, flatten, load, parse, total_steps

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


@pytest.fixture
def write(tmp_path):
    """Write a file that is not there otherwise."""

    def write(text, name="job.toml"):
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


@pytest.fixture
def job(write):
    return write(JOB)


def changed(changes, base=Config("run", steps=100)):
    """Return a job with some values, by their dotted keys, in place of the usual ones."""
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            key, value = section, dataclasses.replace(getattr(base, section), **{name: value})
        base = dataclasses.replace(base, **{key: value})
    return base


def test_file_sets_keys_and_the_rest_are_the_defaults(job):
    assert load(job, []) == Config(
        run_dir="runs/job",
        epochs=3.0,
        seed=7,
        data=Data(validation=0.2),
        model=Model(name="cnn", widths=(8, 16)),
        optimizer=Optimizer(learning_rate=0.01),
    )


def test_flags_override_the_file_with_hyphens_or_underscores(job):
    for flag in ("--batch-size", "--batch_size"):
        loaded = load(job, [flag, "32", "--model.widths", "4", "--data.path", "/a b", "--inspect", "True"])
        assert (loaded.batch_size, loaded.model.widths, loaded.data.path) == (32, (4,), "/a b")
        assert loaded.inspect is True and loaded.seed == 7
    emptied = load(job, ["--optimizer.milestones", "--data.feature-scales", "1", "2"])
    assert (emptied.optimizer.milestones, emptied.data.feature_scales) == ((), (1.0, 2.0))


def test_steps_and_epochs_replace_each_other(job, write, refusal):
    for flags, length in ([], (None, 3)), (["--steps", "9"], (9, None)), (["--epochs", "9"], (None, 9)):
        loaded = load(job, flags)
        assert (loaded.steps, loaded.epochs) == length
    of_steps = write("base = 'job.toml'\nsteps = 5", "child.toml")
    assert (load(of_steps, []).steps, load(of_steps, []).epochs) == (5, None)
    assert (load(of_steps, ["--epochs", "2"]).steps, load(of_steps, ["--epochs", "2"]).epochs) == (None, 2)
    assert "got steps = 3, epochs = 4.0" in refusal(load, job, ["--steps", "3", "--epochs", "4"])


def test_base_inherits_every_key_but_the_run_directory(job, write):
    write('base = "job.toml"\nbatch_size = 5\n[model]\nnorm = "none"\n', "child.toml")
    grandchild = write('base = "child.toml"\n[optimizer]\nmomentum = 0\n', "grandchild.toml")
    loaded, base = load(grandchild, []), load(job, [])
    assert loaded == dataclasses.replace(
        base,
        run_dir="runs/grandchild",
        batch_size=5,
        model=dataclasses.replace(base.model, norm="none"),
        optimizer=dataclasses.replace(base.optimizer, momentum=0),
    )
    assert load(write("base = 'job.toml'\nrun_dir = 'mine'", "named.toml"), []).run_dir == "mine"


def test_list_with_commas_on_the_command_line_is_told_of_spaces(job, refusal):
    assert refusal(load, job, ["--model.widths", "3,4"]) == (
        "expected spaces between the numbers of a list, `3 4`, got '3,4'; commas, between several values of "
        "a key, are for `python -m train sweep`."
    )
    for word in ("--model.widths=3,4", "0.5,", "1e-3,2"):
        assert f"got '{word}'" in refusal(load, job, ["--optimizer.milestones", word])
    assert load(job, ["--data.path", "a,b"]).data.path == "a,b"


def test_config_that_does_not_exist_is_told_of_one_with_a_name_like_its_own(tmp_path, write, refusal):
    (tmp_path / "Mine_job.toml").touch()
    assert refusal(load, tmp_path / "min_job.toml", []).endswith("Mine_job.toml?")
    of_program = os.path.relpath(CONFIGS / "digits_mlp.toml")
    for name in ("digit_mlp.toml", "Digits_MLP.toml"):
        path = tmp_path / name
        assert refusal(load, path, []) == f"{path} does not exist; did you mean {of_program}?"
    assert of_program in refusal(load, write("base = 'digits_mlq.toml'"), [])


def test_base_that_leads_nowhere_is_named(write, refusal):
    path = write("base = 'job.toml'")
    assert refusal(load, path, []) == (
        f"{path} inherits from itself: expected a `base` that does not lead back here."
    )
    for base, reason in ("no.toml", "does not exist; `python -m"), (".", "cannot be read as TOML: "):
        assert reason in refusal(load, write(f"base = '{base}'"), [])
    # Mistakes are those of the file that has them, also if another one inherits from it.
    base = write("data = 3", "base.toml")
    inheriting = write("base = 'base.toml'\nsteps = 1\ndata.name = 'mnist'")
    assert refusal(load, inheriting, []) == f"{base}: data: expected a table, got 3."


def test_bases_that_lead_in_circles_or_into_pipes_end_in_a_sentence(write, tmp_path, refusal):
    (tmp_path / "again").symlink_to(".")
    assert "inherits from itself" in refusal(load, write("base = 'again/job.toml'"), [])
    (tmp_path / "other.toml").symlink_to("job.toml")
    assert "inherits from itself" in refusal(load, write("base = 'other.toml'"), [])
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zeros.toml").symlink_to("/dev/zero")
    for name in ("loop", "pipe", "zeros"):
        for path in (tmp_path / f"{name}.toml", write(f"base = '{name}.toml'")):
            assert f"{name}.toml cannot be read as TOML: " in refusal(load, path, []), name
    for number in range(101):
        write(f"base = '{number + 1}.toml'", f"{number}.toml")
    assert "is the base of more than 99 configs" in refusal(load, tmp_path / "0.toml", [])
    for base in (3, True, ["a"]):
        text = f"base = {json.dumps(base)}"
        assert f"base: expected a string, got {base}." in refusal(load, write(text), [])


def test_text_that_names_no_file_is_refused_wherever_it_stands(job, write, refusal):
    assert "a\0b.toml cannot be read as TOML: " in refusal(load, Path("a\0b.toml"), [])
    assert "cannot be read as TOML: " in refusal(load, write('base = "a\\u0000b"', "nul.toml"), [])
    for flag, key in (("--run-dir", "run_dir"), ("--data.path", "data.path"), ("--init-from", "init_from")):
        for text in ("a\0b", "l\udcfcft"):
            expected = f"{key}: expected text in UTF-8 without NUL characters, got {text!r}."
            assert refusal(load, job, [flag, text]) == expected
        assert refusal(load, job, [flag, ""]) == f"{key}: expected a value, got ''."


def test_file_sets_values_and_never_flags(write, refusal):
    for text in (
        "help = true",
        "'--help' = true",
        "model.widths = ['--seed', '3']",
        "model.widths = ['--help']",
    ):
        assert "is not a key" in (said := refusal(load, write(text), [])) or "expected an integer" in said
    loaded = load(write("steps = 1\ndata.path = '--help'\nrun_dir = '--seed=3'"), [])
    assert (loaded.data.path, loaded.run_dir, loaded.seed) == ("--help", "--seed=3", 0)


def test_files_that_cannot_be_read_are_named(write, tmp_path, refusal):
    assert refusal(load, tmp_path / "none.toml", []) == (
        f"{tmp_path}/none.toml does not exist; `python -m train list` shows the configs."
    )
    lists, long = "a = " + "[" * 5000, "# " + "long" * 2**14
    for content in ("epochs = ", "seed = 1\nseed = 1", b"\xff", "seed = " + "1" * 5000, lists, long):
        path = write(content)
        assert refusal(load, path, []).startswith(f"{path} cannot be read as TOML: "), content[:9]


def test_values_that_no_number_and_no_table_can_be_are_refused_in_a_line(write, refusal):
    for text in (
        "seed = 0x" + "1" * 5000,
        "data.path = " + "[" * 400 + "]" * 400,
        f"seed.{'.'.join('a' * 900)} = 1",
    ):
        sentence = refusal(load, write(text), [])
        assert ": expected a job, got values that cannot be one: " in sentence and len(sentence) < 400
    long = refusal(load, write("data.path = " + "1" * 4000), [])
    assert "data.path: expected a string, got 1111" in long and len(long) < 400


# What a file holds in place of what it should hold -> what is said of it.
MISTAKES = {
    "epocs = 4": "epocs is not a key; perhaps you meant epochs.",
    "batch-size = 4": "batch-size is not a key; perhaps you meant batch_size.",
    "[model]\nwidth = [4]": "model.width is not a key; perhaps you meant model.widths.",
    "[optimiser]\nname = 'sgd'": "optimiser is not a key; perhaps you meant optimizer.",
    "[optimizer]\nx = 1": "optimizer.x is not a key; expected one of name, learning_rate, base_batch_size, ",
    "'☃' = 1": "☃ is not a key; expected one of run_dir, data, model, ",
    "epochs = 'long'": "epochs: expected a number, got 'long'.",
    "steps = '5'": "steps: expected an integer, got '5'.",
    "batch_size = 1.5": "batch_size: expected an integer, got 1.5.",
    "seed = true": "seed: expected an integer, got True.",
    "seed = [1, 2]": "seed: expected an integer, got [1, 2].",
    "seed = 2020-01-01": "seed: expected an integer, got '2020-01-01'.",
    "inspect = 1": "inspect: expected true or false, got 1.",
    "data.validation = true": "data.validation: expected a number, got True.",
    "data.path = 3": "data.path: expected a string, got 3.",
    "data = 3": "data: expected a table, got 3.",
    "model.widths = 8": "model.widths: expected a list, got 8.",
    "model.widths = [8, 1.5]": "model.widths[1]: expected an integer, got 1.5.",
    "model.class_weights = 'balancd'": "model.class_weights: expected 'balanced' or a list, got 'balancd'.",
    "model.class_weights = 3": "model.class_weights: expected 'balanced' or a list, got 3.",
    "model.class_weights = [1, 'x']": "model.class_weights[1]: expected a number, got 'x'.",
    "optimizer.name = 'sdg'": "optimizer.name: expected 'sgd', 'adamw', 'lars' or 'lamb', got 'sdg'.",
}


def test_mistake_in_a_file_is_refused_in_a_sentence_that_names_the_file_and_the_key(write, refusal):
    for text, sentence in MISTAKES.items():
        path = write(text)
        assert refusal(load, path, []).startswith(f"{path}: {sentence}"), text


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--epocs", "4"], "--epochs"),
        (["--data.nam", "x"], "--data.name"),
        (["--seed", "x"], "--seed"),
        (["--data.name", "digit"], "digits"),
    ],
)
def test_mistake_in_a_flag_exits_2_and_names_the_key(job, capsys, flags, named):
    with pytest.raises(SystemExit) as exit:
        load(job, flags)
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert named in printed.out + printed.err


INF, NAN = math.inf, math.nan
# Key -> values that it takes, up to the edges of its range; values just outside, and what is said of them.
RANGES = {
    "seed": ([0, 2**32 - 1], {-1: ">= 0", 2**32: "< 4294967296"}),
    "steps": ([1, 2**31 - 1], {0: ">= 1", 2**31: "< 2147483648"}),
    "batch_size": ([1], {0: ">= 1"}),
    "eval_every": ([1], {0: ">= 1"}),
    "early_stopping": ([0, 1], {-1: ">= 0"}),
    "profile": ([0], {-1: ">= 0"}),
    "devices": ([1, None], {0: ">= 1"}),
    "num_processes": ([1, None], {0: ">= 1"}),
    "peer_timeout": ([1], {0: ">= 1"}),
    "data.image_size": ([0, 224], {-1: ">= 0"}),
    "data.test": ([0.001, 0.999], {0: "> 0", 1: "< 1", NAN: "< 1"}),
    "data.validation": ([0, 0.999], {-0.1: ">= 0", 1: "< 1", NAN: "< 1"}),
    "data.feature_scales": (
        [(), (1e-9, 1e9), (0.5, 0.5)],
        {(0, 1): "> 0", (-1, 1): "> 0", (1, INF): "finite", (NAN, 1): "finite", (1, 1e300): "<= 1e+38"},
    ),
    "data.crop": ([0], {-1: ">= 0"}),
    "data.shift": ([0], {-1: ">= 0"}),
    "data.device_gib": ([0], {-1: ">= 0", 1e300: "<= 1e+38", INF: "finite", NAN: "finite"}),
    "model.norm_momentum": ([0, 1], {-0.1: ">= 0", 1.1: "<= 1"}),
    "model.norm_r_max": ([1, 1e9], {0.9: ">= 1", INF: "finite", NAN: "finite"}),
    "model.norm_d_max": ([0, 1e9], {-0.1: ">= 0", INF: "finite", NAN: "finite"}),
    "model.norm_plain": ([0, 1], {-0.1: ">= 0", 1.1: "<= 1"}),
    "model.norm_ramp": ([0, 1], {-0.1: ">= 0", 1.1: "<= 1"}),
    "model.domains": ([1], {0: ">= 1"}),
    "model.virtual_batch_size": ([1], {0: ">= 1"}),
    "model.norm_groups": ([1], {0: ">= 1"}),
    "model.widths": ([(), (1, 1)], {(8, 0): ">= 1", (2**31,): "< 2147483648"}),
    "model.class_weights": (
        [(), (0, 1e9), "balanced"],
        {(1, -1): ">= 0", (1, INF): "finite", (NAN,): "finite"},
    ),
    "model.kernel_std": ([0, 1e9], {-0.1: ">= 0", INF: "finite", NAN: "finite"}),
    "optimizer.learning_rate": ([1e-9, 1e9], {0: "> 0", 1e300: "<= 1e+38", INF: "finite", NAN: "finite"}),
    "optimizer.base_batch_size": ([0], {-1: ">= 0"}),
    "optimizer.momentum": ([0, 0.99], {-0.1: ">= 0", 1: "< 1"}),
    "optimizer.weight_decay": ([0, 1e9], {-0.1: ">= 0", INF: "finite"}),
    "optimizer.warmup_steps": ([0], {-1: ">= 0", 2**31: "< 2147483648"}),
    "optimizer.milestones": ([(), (0.1, 0.9)], {(0, 0.5): "> 0", (0.5, 1): "< 1"}),
    "optimizer.milestone_factor": ([1e-9, 2], {0: "> 0", INF: "finite"}),
    "optimizer.clip_norm": ([0, 1e9], {-1: ">= 0", NAN: "finite"}),
    "optimizer.accumulate": ([1, 2], {0: ">= 1"}),
    "optimizer.average": ([0, 0.99], {-0.1: ">= 0", 1: "< 1"}),
    "optimizer.label_smoothing": ([0, 0.99], {-0.1: ">= 0", 1: "< 1"}),
    "optimizer.adversarial": ([0, 1e9], {-0.1: ">= 0", INF: "finite", NAN: "finite"}),
}


def test_every_number_has_a_range_and_is_refused_just_outside_of_it(refusal):
    usual = flatten(dataclasses.asdict(Config("run")))
    assert {key for key, value in usual.items() if type(value) in (int, float, tuple)} <= {
        *RANGES,
        "data.renderings",
    }
    for value, limit in {0: "> 0", -1: "> 0", INF: "finite", NAN: "finite"}.items():
        expected = "a finite number" if limit == "finite" else f"a number {limit}"
        assert refusal(check, changed({"steps": None, "epochs": value})).startswith(
            f"epochs: expected {expected}"
        )
    for key, (inside, outside) in RANGES.items():
        for value in inside:
            check(changed({key: value}))
        for value, limit in outside.items():
            expected = "a finite number" if limit == "finite" else f"a number {limit}"
            sentence = refusal(check, changed({key: value}))
            assert sentence.startswith(key) and f": expected {expected}, got " in sentence, (key, value)


CLUSTER = {"coordinator": "host:1", "num_processes": 2, "process_id": 1}
# Values, and what is said of them, with what stands between left out.
CONTRADICTIONS = [
    ({"steps": None}, "expected either steps or epochs, got steps = None, epochs = None."),
    ({"epochs": 4.0}, "expected either steps or epochs, got steps = 100, epochs = 4.0."),
    ({"data.feature_scales": (2,)}, "data.feature_scales: expected none, or ... the highest, got [2]."),
    ({"data.feature_scales": (1, 2, 3)}, "data.feature_scales: expected none, or ..., got [1, 2, 3]."),
    ({"data.feature_scales": (1e-300, 1)}, "expected numbers from 1e-30 to 1e38, got [1e-300, 1]."),
    ({"data.feature_scales": (2, 1)}, "data.feature_scales: expected none, or ..., got [2, 1]."),
    ({"optimizer.milestones": (0.7, 0.2)}, "milestones: expected increasing fractions, got [0.7, 0.2]."),
    ({"optimizer.milestones": (0.2, 0.2)}, "milestones: expected increasing fractions, got [0.2, 0.2]."),
    ({"optimizer.accumulate": 5}, "batch_size: expected a multiple of ... = 5, such as 125, got 128."),
    (
        {"early_stopping": 3, "data.validation": 0},
        "data.validation: expected a fraction > 0 with early_stopping = 3, which judges by it, got 0.",
    ),
    (
        {"model.loss": "squared_error", "model.class_weights": (1.0, 2.0)},
        "model.class_weights: expected none with model.loss = 'squared_error', ..., got [1.0, 2.0].",
    ),
    (
        {"model.loss": "squared_error", "optimizer.label_smoothing": 0.1},
        "optimizer.label_smoothing: expected none with model.loss = 'squared_error', ..., got 0.1.",
    ),
    ({"data.renderings": ("blur", "blur")}, "data.renderings: expected each once, got ['blur', 'blur']."),
    ({"model.domains": 2}, "model.domains: expected 1 with data.renderings = [], got 2."),
    (
        {"data.renderings": ("original", "blur"), "model.domains": 3},
        "model.domains: expected 1 or 2 with data.renderings = ['original', 'blur'], got 3.",
    ),
    (
        {"optimizer.adversarial": 0.1, "model.domains": 3},
        "model.domains: expected 1 or 2 with clean and adversarial examples, got 3.",
    ),
    (
        {"optimizer.adversarial": 0.1, "data.renderings": ("original", "blur")},
        "optimizer.adversarial: expected 0 with several data.renderings, ['original', 'blur'], got 0.1.",
    ),
    ({"model.affine_by_domain": True}, "expected false with model.domains = 1, got true."),
    ({"coordinator": "host"}, "coordinator: expected HOST:PORT, got 'host'."),
    ({"coordinator": "host:12x"}, "coordinator: expected HOST:PORT, got 'host:12x'."),
    (CLUSTER | {"coordinator": None}, "expected all of coordinator, ... or none of them, got None, 2 and 1."),
    (CLUSTER | {"num_processes": None}, "expected all of ..., got 'host:1', None and 1."),
    (CLUSTER | {"process_id": None}, "expected all of ..., got 'host:1', 2 and None."),
    ({"num_processes": 2}, "expected all of ..., got None, 2 and None."),
    (CLUSTER | {"process_id": 2}, "process_id: expected 0 to 1, got 2."),
    (CLUSTER | {"process_id": -1}, "process_id: expected 0 to 1, got -1."),
    (CLUSTER | {"devices": 1}, "devices: expected none with num_processes = 2, ..., got 1."),
]
AGREEMENTS = [
    *(CLUSTER, CLUSTER | {"process_id": 0}, {"num_processes": 1}, {"num_processes": 1, "devices": 1}),
    *({"model.loss": "squared_error"}, {"model.class_weights": "balanced", "optimizer.label_smoothing": 0.1}),
    *({"early_stopping": 3}, {"optimizer.accumulate": 4}, {"model.norm": "flax"}),
]


def test_values_that_contradict_each_other_are_named_with_what_would_do(refusal):
    for changes, sentence in CONTRADICTIONS:
        assert all(part in refusal(check, changed(changes)) for part in sentence.split("...")), changes
    for changes in AGREEMENTS:
        check(changed(changes))


def test_flags_are_checked_as_files_are(job, refusal):
    assert refusal(load, job, ["--batch-size", "0"]) == "batch_size: expected a number >= 1, got 0."
    assert "learning_rate: expected a finite number" in refusal(
        load, job, ["--optimizer.learning-rate", "nan"]
    )


def test_config_survives_json_lists_as_tuples_and_all_else_strictly():
    tuples = {"model.widths": (3, 4), "data.feature_scales": (0.5, 2.0), "optimizer.milestones": (0.1,)}
    tuples |= {"model.class_weights": (1.0, 2.0)}
    for config in changed({}), changed(tuples), changed({"epochs": 1.5, "steps": None, "data.path": "x"}):
        again = parse(json.loads(json.dumps(dataclasses.asdict(config))))
        assert again == config and hash(again) == hash(config)
    # A run that knew fewer keys has the usual values.
    assert parse({"run_dir": "run", "data": {"crop": 1}}) == Config("run", data=Data(crop=1))


def test_json_that_is_no_config_is_refused_in_a_sentence(refusal):
    assert refusal(parse, {}) == "run_dir: expected a value, got none."
    for values in [], 3, None, "text":
        assert refusal(parse, values) == f"expected a table, got {values!r}."


def test_differences_name_the_keys_and_both_values(job):
    a, b = load(job, []), load(job, ["--seed", "8", "--model.norm", "none", "--run-dir", "x"])
    assert differences(a, a) == []
    assert differences(a, b, ignore=["run_dir"]) == ["model.norm = 'batch', now 'none'", "seed = 7, now 8"]


def test_total_steps_follow_from_either_length(refusal):
    assert total_steps(changed({"steps": 9}), steps_per_epoch=10) == 9
    assert total_steps(changed({"steps": None, "epochs": 1.55}), steps_per_epoch=10) == 16
    too_long = changed({"steps": None, "epochs": 1e9})
    assert refusal(total_steps, too_long, 10) == "epochs: expected fewer than 2**31 steps, got 10000000000."


def test_every_config_in_the_project_loads_and_says_what_it_is():
    paths = sorted(CONFIGS.glob("*.toml"))
    assert len(paths) > 10
    for path in paths:
        assert load(path, []).run_dir == f"runs/{path.stem}"
        assert path.read_text().startswith("# "), path
