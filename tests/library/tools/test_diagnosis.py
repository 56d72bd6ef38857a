"""Each illness made on purpose, named by the verdict; and healthy networks, of which it names none."""

import json
from dataclasses import dataclass
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import jbn
import jbn.linen
import jbn.nnx
from jbn import Moments, inspection

pytestmark = pytest.mark.usefixtures("standard_promotion")
NAN = np.float32(np.nan)


@cache
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(x))
    return (x[order] / 16).astype(np.float32), y[order].astype(np.int32)


def test_batches(change=lambda x: x, size=64, count=5):
    x, y = digits()
    x = np.array(change(x[1400:]), np.float32)
    return [(x[i * size :][:size], y[1400:][i * size :][:size]) for i in range(count)]


test_batches.__test__ = False


@dataclass(frozen=True)
class Norm:
    """Makes the norms of a network; equal by value, so that networks are."""

    kind: type = nn.BatchNorm
    options: tuple = (("momentum", 0.9),)

    def __call__(self, *args, **kwargs):
        return self.kind(*args, **dict(self.options) | kwargs)


class MLP(nn.Module):
    norm: Norm = Norm()
    widths: tuple = (16, 16, 16)
    after: bool = False

    @nn.compact
    def __call__(self, x, train):
        for width in self.widths:
            norm = self.norm(use_running_average=not train)
            x = nn.Dense(width)(x)
            x = norm(nn.relu(x)) if self.after else nn.relu(norm(x))
        return nn.Dense(10)(x)


class NNXMLP(nnx.Module):
    def __init__(self, norm):
        rngs, widths = nnx.Rngs(0), (64, 16, 16)
        self.linears = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, widths[1:])])
        self.norms = nnx.List([norm(width, rngs=rngs) for width in widths[1:]])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        for linear, norm in zip(self.linears, self.norms):
            x = nnx.relu(norm(linear(x)))
        return self.head(x)


def loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def apply(model, variables, batch):
    return model.apply(variables, batch[0], False)


apply_of = cache(lambda model: partial(apply, model))
OPTIMIZER = optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9)


@partial(jax.jit, static_argnums=(0, 1))
def step(model, train, variables, opt_state, batch):
    def f(params):
        logits, updated = model.apply(
            variables | {"params": params}, batch[0], train, mutable=["batch_stats"]
        )
        return loss(logits, batch), updated

    grads, updated = jax.grad(f, has_aux=True)(variables["params"])
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return variables | {"params": optax.apply_updates(variables["params"], updates)} | updated, opt_state


def training_batches(steps, size, change=lambda x: x):
    (x, y), draw = digits(), np.random.RandomState(0)
    for _ in range(steps):
        rows = draw.randint(0, 1400, size)
        yield np.float32(change(x[rows])), y[rows]


@cache
def trained(model, steps=100, size=64, *, train=True, keep=True, change=None, rate=0.1):
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), digits()[0][:1], False)
    opt_state = OPTIMIZER.init(variables["params"])
    opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
    for batch in training_batches(steps, size, change or (lambda x: x)):
        new, opt_state = step(model, train, variables, opt_state, batch)
        variables = new if keep else variables | {"params": new["params"]}
    return jax.tree.map(np.asarray, variables)


def diagnose(model, variables, batches=None, *, loss=loss):
    batches = test_batches() if batches is None else batches
    return jbn.linen.diagnose(apply_of(model), variables, batches, loss=loss)


def kinds(diagnosis):
    text = str(diagnosis)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert all(f.what in " ".join(text.split()) for f in diagnosis.findings)
    json.dumps(diagnosis.as_dict(), allow_nan=False)
    return [finding.kind for finding in diagnosis.findings]


def changed(variables, path, value, at=...):
    """Return a copy of variables with some numbers changed."""
    variables = jax.tree.map(np.array, variables)
    leaf = variables
    for key in path.split("/"):
        leaf = leaf[key]
    leaf[at] = value
    return variables


HEALTHY = MLP()


@pytest.mark.slow
def test_healthy_network_has_nothing_however_few_the_data():
    variables = trained(HEALTHY)
    for count in (5, 1):
        found = diagnose(HEALTHY, variables, test_batches(count=count))
        assert kinds(found) == [], found
        assert kinds(diagnose(HEALTHY, variables, test_batches(count=count), loss=None)) == []
    means = found.losses.means()
    assert means["running"] < 0.5 < means["mismatched"]
    assert "Nothing is wrong" in str(found)


@pytest.mark.slow
def test_data_that_are_scaled_or_shifted_are_named_with_their_factor():
    variables = trained(HEALTHY)
    for change, said in (
        (lambda x: 2 * x, "about 2 times as large as in training:"),
        (lambda x: x / 2, "about 1/2 times as large as in training:"),
        (lambda x: 16 * x, "about 16 times as large as in training:"),
        (lambda x: x / 255, "about 1/2"),
        (lambda x: x + 1, "are shifted by a constant from those of training"),
        (lambda x: 3 * x - 1, "about 3 times as large as in training, and shifted by a constant"),
        (lambda x: x[:, np.random.RandomState(0).permutation(64)], "The data are "),
    ):
        for with_loss in (loss, None):
            found = diagnose(HEALTHY, variables, test_batches(change), loss=with_loss)
            assert kinds(found) == ["other data"], (said, str(found))
            assert found.findings[0].layers == ("BatchNorm_0",)
            assert said in found.findings[0].what, found


def test_first_layer_with_values_that_are_not_finite_is_named_and_where_they_are():
    variables, layer = trained(HEALTHY), ("BatchNorm_1",)
    for path, at, layers, said in (
        ("params/Dense_1/kernel", (2, 5), layer, "feature 5"),
        ("params/BatchNorm_1/scale", 4, layer, "Scale or bias of BatchNorm_1"),
        ("params/BatchNorm_1/bias", 4, layer, "Scale or bias of BatchNorm_1"),
        ("batch_stats/BatchNorm_1/mean", 4, layer, "The running statistics of BatchNorm_1"),
        ("batch_stats/BatchNorm_1/var", 4, layer, "The running statistics of BatchNorm_1"),
        ("params/Dense_3/kernel", (1, 2), (), "though all that the batch norms get"),
    ):
        found = diagnose(HEALTHY, changed(variables, path, NAN, at))
        assert kinds(found) == ["not finite"], found
        assert found.findings[0].layers == layers and said in found.findings[0].what
    negative = diagnose(HEALTHY, changed(variables, "batch_stats/BatchNorm_1/var", -1, 4))
    assert "negative variance" in negative.findings[0].what
    batches = test_batches()
    batches[2][0][3, 4] = NAN
    found = diagnose(HEALTHY, variables, batches)
    assert kinds(found) == ["not finite"] and "The data hold NaN" in found.findings[0].what


def test_dead_features_are_named_and_several_illnesses_are_listed_worst_first():
    dead = changed(trained(HEALTHY), "params/Dense_1/kernel", 0, (slice(None), [3, 7]))
    dead = changed(dead, "params/Dense_1/bias", 0, [3, 7])
    found = diagnose(HEALTHY, dead)
    assert kinds(found) == ["constant"] and "features 3, 7 of BatchNorm_1" in found.findings[0].what
    small = changed(dead, "params/BatchNorm_2/scale", 0, 1)
    untouched = changed(changed(small, "batch_stats/BatchNorm_2/mean", 0), "batch_stats/BatchNorm_2/var", 1)
    found = diagnose(HEALTHY, untouched, test_batches(lambda x: 2 * x))
    assert kinds(found) == ["never updated", "other data", "constant", "scale near 0"]
    assert [finding.layers for finding in found.findings] == [
        ("BatchNorm_2",), ("BatchNorm_0",), ("BatchNorm_1",), ("BatchNorm_2",)
    ]  # fmt: skip


@pytest.mark.slow
def test_statistics_that_were_never_updated_are_told_from_frozen_ones_by_the_loss():
    dropped = trained(HEALTHY, keep=False)
    found = diagnose(HEALTHY, dropped)
    assert kinds(found) == ["never updated"] and "all 3 layers" in found.findings[0].what
    frozen = trained(HEALTHY, train=False)
    found = diagnose(HEALTHY, frozen)
    assert kinds(found) == ["frozen"] and "do not" not in found.findings[0].what
    partial = changed(trained(HEALTHY), "batch_stats/BatchNorm_1/mean", 0)
    partial = changed(partial, "batch_stats/BatchNorm_1/var", 1)
    found = diagnose(HEALTHY, partial)
    assert kinds(found) == ["never updated"] and found.findings[0].layers == ("BatchNorm_1",)
    # With the statistics of other data, with which it was trained on.
    elsewhere = changed(trained(HEALTHY), "batch_stats/BatchNorm_0/mean", 1.5)
    elsewhere = changed(elsewhere, "batch_stats/BatchNorm_0/var", 9)
    opt_state = OPTIMIZER.init(elsewhere["params"])
    for batch in training_batches(100, 64):
        elsewhere, opt_state = step(HEALTHY, False, elsewhere, opt_state, batch)
    assert kinds(diagnose(HEALTHY, elsewhere)) == ["frozen"]


@pytest.mark.slow
def test_one_value_per_feature_is_named():
    found = diagnose(HEALTHY, trained(HEALTHY), test_batches(size=1, count=3))
    assert kinds(found) == ["one value"] and len(found.findings[0].layers) == 3


@pytest.mark.slow
def test_healthy_network_has_nothing_whatever_the_sizes_of_batches():
    few, many = ((32, 1),), ((8, 40), (32, 1), (2, 100))
    for model, steps, of_training, sizes in (
        (HEALTHY, 300, 8, many),
        (HEALTHY, 200, 256, many),  # which compiles nothing more
        (MLP(after=True), 300, 64, few),
    ):
        variables = trained(model, steps, of_training)
        for size, count in sizes:
            found = diagnose(model, variables, test_batches(size=size, count=count))
            assert set(kinds(found)) <= ({"constant"} if model.after else set()), (
                of_training,
                size,
                str(found),
            )


@pytest.mark.slow
def test_momentum_that_is_too_slow_or_too_noisy_is_named_for_both_layers():
    for kind in (nn.BatchNorm, jbn.linen.BatchNorm):
        slow = MLP(Norm(kind, (("momentum", 0.999),)))
        variables = trained(slow, 50)
        found = diagnose(slow, variables)
        assert kinds(found) == ["lag"] and "95 %" in found.findings[0].what.replace("96", "95")
        assert len(found.findings[0].layers) == 3 and "debias" in found.findings[0].remedy
        assert kinds(diagnose(slow, variables, test_batches(lambda x: 2 * x))) == ["lag", "other data"]
    for model in (HEALTHY, MLP(after=True)):
        noisy = trained(model, 300, 2, rate=0.01)
        for size in (2, 64):
            found = diagnose(model, noisy, test_batches(size=size, count=320 // size))
            assert "noise" in kinds(found) and "constant" not in kinds(found)[:1], found


@pytest.mark.slow
def test_frozen_option_and_counts_tell_without_a_loss():
    frozen = MLP(Norm(jbn.linen.BatchNorm, (("frozen", True),)))
    assert kinds(diagnose(frozen, trained(frozen), loss=None)) == ["frozen"]
    on_other_data = trained(HEALTHY, change=lambda x: 3 * x + 1)
    found = diagnose(frozen, on_other_data, loss=None)
    assert kinds(found)[0] == "frozen" and "not those of the data" in found.findings[0].what
    debiased = MLP(Norm(jbn.linen.BatchNorm, (("update", jbn.ema(0.9, debias=True)),)), widths=(8, 64))
    assert kinds(diagnose(debiased, trained(debiased))) == []
    assert kinds(diagnose(debiased, trained(debiased, keep=False))) == ["never updated"]


@pytest.mark.slow
def test_nnx_models_are_diagnosed_likewise_and_stay_as_they_are():
    for kind in (nnx.BatchNorm, jbn.nnx.BatchNorm):
        for momentum, steps, expected in ((0.9, 100, []), (0.999, 50, ["lag"])):
            model = NNXMLP(Norm(kind, (("momentum", momentum),)))
            optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)

            @nnx.jit
            def step(model, optimizer, batch):
                optimizer.update(model, nnx.grad(lambda model: loss(model(batch[0]), batch))(model))

            for batch in training_batches(steps, 64):
                step(model, optimizer, batch)
            before = jax.tree.map(np.asarray, nnx.state(model))
            call = lambda model, batch: model(batch[0])
            found = jbn.nnx.diagnose(model, test_batches(), call=call, loss=loss)
            assert kinds(found) == expected, found
            assert [layer.name for layer in found.layers] == ["norms/0", "norms/1"]
            if not expected:
                found = jbn.nnx.diagnose(model, test_batches(lambda x: x / 4), call=call, loss=loss)
                assert kinds(found) == ["other data"]
                model.norms[1].scale[...] = model.norms[1].scale[...].at[3].set(np.nan)
                found = jbn.nnx.diagnose(model, test_batches(), call=call, loss=loss)
                assert kinds(found) == ["not finite"] and found.findings[0].layers == ("norms/1",)
            else:
                assert jax.tree.all(jax.tree.map(np.array_equal, before, nnx.state(model)))


def test_numbers_are_those_of_the_formula_and_of_all_examples():
    variables = trained(HEALTHY)
    batches = test_batches()
    found = diagnose(HEALTHY, variables, batches)
    x = np.concatenate([x for x, _ in batches]).astype(np.float64)
    dense, stats = variables["params"]["Dense_0"], variables["batch_stats"]["BatchNorm_0"]
    inputs = x @ dense["kernel"] + dense["bias"]
    v, v_r = inputs.var(0) + 1e-5, stats["var"] + 1e-5
    kl = 0.5 * (v_r / v + (stats["mean"] - inputs.mean(0)) ** 2 / v - 1 - np.log(v_r / v))
    np.testing.assert_allclose(found.layers[0].divergence, kl, rtol=1e-3, atol=1e-6)
    assert found.layers[0].kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.layers[0].worst(1) == [int(kl.argmax())] and found.examples == 320
    expected = np.mean([loss(apply(HEALTHY, variables, batch), batch) for batch in batches])
    assert found.losses.means()["running"] == pytest.approx(expected, rel=1e-5)


def test_same_apply_compiles_nothing_again_and_batches_are_gone_through_twice_at_most():
    class Batches:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(test_batches())

    variables, batches = trained(HEALTHY), Batches()
    diagnose(HEALTHY, variables, batches)
    assert batches.passes <= 3  # one of them asks whether they can be gone through again
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    )
    diagnose(HEALTHY, variables)
    assert compiled == []
    with pytest.raises(ValueError, match="batches is a generator, which can be gone through once"):
        diagnose(HEALTHY, variables, (batch for batch in test_batches()))
    assert kinds(diagnose(HEALTHY, variables, (batch for batch in test_batches()), loss=None)) == []
    with pytest.raises(ValueError, match="batches is empty"):
        diagnose(HEALTHY, variables, [])


def test_an_array_whose_rows_are_no_batches_and_a_loss_that_is_no_scalar_are_named():
    rows, norm = np.ones((8, 4)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="batches is a ndarray; expected a list of batches"):
        jbn.linen.diagnose(nn.BatchNorm(use_running_average=True).apply, {}, rows)
    with pytest.raises(TypeError, match="batches is a ndarray; expected a list of batches"):
        jbn.nnx.diagnose(norm, rows)
    with pytest.raises(ValueError, match=r"loss returned an array of shape \(8, 4\); expected \(\)"):
        jbn.nnx.diagnose(norm, [rows], loss=lambda outputs, batch: outputs)


@pytest.mark.slow
def test_table_of_a_deep_network_is_short_and_has_the_worst_layers_first():
    x = np.random.RandomState(0).randn(2, 64, 3).astype(np.float32)
    params, running = jbn.init(3)
    right = jbn.moments(x.reshape(-1, 3))
    records = {
        f"block_{i}/some/long/path/of/names/norm": inspection.layer_record(
            jnp.asarray(x), right._replace(mean=right.mean + (2.0 if i == 30 else 0.0))
        )
        for i in range(60)
    }
    text = str(inspection.diagnose(records))
    lines = text.splitlines()
    assert len(lines) < 30 and lines[3].startswith("block_30/")
    assert any(line.startswith("and 48 more layers, all with KL of ") for line in lines)
    with pytest.raises(ValueError, match="records is empty"):
        inspection.diagnose({})
    with pytest.raises(ValueError, match="inputs is empty"):
        inspection.layer_record([], right)


def test_what_few_examples_differ_by_by_chance_is_no_finding_and_the_same_in_many_is():
    draw = np.random.RandomState(0)
    right = Moments(*np.float32([[3] * 16, [4] * 16]), 9.0)
    records = {
        name: inspection.layer_record(jnp.float32(3 + 2 * draw.randn(1, 12, 16)), right) for name in "ab"
    }
    few, many = (inspection.diagnose(records, examples=count) for count in (12, 10_000))
    assert min(layer.typical_kl for layer in few.layers) > 0.05 and not few.findings
    assert [finding.kind for finding in many.findings] == ["other statistics"]


@pytest.mark.slow
def test_findings_name_few_layers_and_features_and_say_how_many_more_there_are():
    x, signs = jnp.float32(np.random.RandomState(0).randn(1, 64, 8)), np.float32([1, -1, 1, 1, -1, -1, 1, -1])
    off = Moments(2 * signs, np.ones(8, np.float32), 9.0)

    def said(x, running=off, layers=6):
        record = inspection.layer_record(x, jbn.moments(x[0]) if running is None else running)
        (finding,) = inspection.diagnose({str(i): record for i in range(layers)}, examples=64).findings
        return finding.what

    assert "of 0, 1, 2 and 3 more are not those of the data" in said(x)
    assert "comes out: all 8 features of 0; all 8 features of 1; " in said(0 * x)
    assert said(0 * x).endswith("all 8 features of 3; and in 2 more layers.")
    assert said(x * (jnp.arange(8) < 7), None, 1).endswith("comes out: feature 7 of 0.")
    assert said(x * (jnp.arange(8) > 5), None, 1).endswith("features 0, 1, 2, 3, 4 and 1 more of 0.")
    assert said(0 * x[..., :1], None, 1).endswith("its only feature of 0.")
    # No factor makes running variances of 0 those of the data.
    assert "of 0 are not those of the data" in said(x, off._replace(var=0 * signs), 1)
    initial = Moments(np.zeros(8, np.float32), np.ones(8, np.float32), 9.0)
    assert said(x, initial, 1).startswith("The running statistics of the only layer are still the initial")


@pytest.mark.slow
def test_what_looks_like_another_illness_in_one_layer_is_told_from_it_by_the_others():
    """From records alone, as networks other than the above have them."""
    draw = np.random.RandomState(0)
    x = jnp.asarray(draw.randn(5, 64, 16) * draw.uniform(0.4, 0.8, 16) + draw.randn(16), "float32")
    statistics = jbn.moments(x.reshape(-1, 16))
    rule = jbn.ema(0.9)

    def kinds_of(layers, losses=None):
        records = {
            str(i): inspection.layer_record(x, Moments(*running), update=rule)
            for i, (x, running) in enumerate(layers)
        }
        return [f.kind for f in inspection.diagnose(records, losses=losses, examples=320).findings]

    healthy = (x, statistics)
    noise = jnp.asarray(draw.randn(*x.shape) * 0.5, "float32")
    lagging = statistics._replace(mean=0.9 * statistics.mean, var=0.1 + 0.9 * statistics.var)
    # Divided by 255 twice: below epsilon, so that the second layer gets next to nothing as well.
    second = jnp.asarray(draw.randn(5, 64, 16), "float32")
    running = Moments(jnp.zeros(16), jnp.linspace(0.5, 0.6, 16))
    assert kinds_of([(x / 255, statistics), (0.1 * second, running)]) == ["other data"]
    # Of too small a variance, but without the noise of small batches.
    moved = statistics._replace(mean=statistics.mean + 0.1 * statistics.var**0.5)
    assert kinds_of([(x + noise, statistics), (x, moved)]) == ["other data"]
    # Nor are small batches at the diagnosis those of training.
    in_fours = x.reshape(80, 4, 16)
    assert kinds_of([(2 * in_fours, statistics), (in_fours, statistics)]) == ["other data"]
    # Were it lag, all layers would have it.
    narrow = (0.3 * x, Moments(0.27 * statistics.mean, 0.1 + 0.9 * 0.09 * statistics.var, 0))
    assert kinds_of([healthy, narrow]) == ["other statistics"]
    assert kinds_of([(x, lagging), narrow]) == ["lag"]
    # What is too small to say of itself is said where the loss suffers.
    signs = draw.choice([-1.0, 1.0], 16)
    off = statistics._replace(mean=statistics.mean + 0.33 * signs * statistics.var**0.5)
    suffering = inspection.Losses([0.5] * 5, [0.1] * 5, [0.1] * 5, [2.0] * 5, [64] * 5)
    assert kinds_of([(x, off), (x, off)]) == []
    assert kinds_of([(x, off), (x, off)], suffering) == ["other statistics"]
    # A network that stands other data was not trained with frozen statistics.
    as_good = inspection.Losses([0.1] * 5, [0.11] * 5, [0.11] * 5, [2.0] * 5, [64] * 5)
    assert kinds_of([(3 * x, statistics), healthy], as_good) == ["other data"]
    assert kinds_of([(3 * x, statistics), (3 * x, statistics)], as_good) == ["frozen"]


@pytest.mark.slow
def test_picture_is_drawn_and_says_what_to_install_where_matplotlib_is_missing(tmp_path, monkeypatch):
    found = diagnose(HEALTHY, changed(trained(HEALTHY), "batch_stats/BatchNorm_1/mean", NAN))
    assert [np.isnan(layer.kl) for layer in found.layers] == [False, True, False]
    found.save(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        found.save(tmp_path / "other.png")
