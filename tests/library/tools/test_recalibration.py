"""Recalibration gives each layer the moments of all its inputs, in both APIs: in float64, by NumPy."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen
import jbn.nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.RandomState(0)
X = RNG.normal(2, 3, (50, 4)).astype("float32") * [1, 0.1, 10, 1] + [0, 0, 100, -1]
X = X.astype("float32")
KERNELS = RNG.normal(size=(3, 4, 4)).astype("float32") / 2
WEIGHTS = RNG.gamma(1, size=(50, 1)).astype("float32")
PARTS = np.split(np.arange(50), [20, 40])  # 20, 20 and 10 rows
TENS = np.split(np.arange(50), 5)


def depth(kernels):
    return range(len(kernels))


class LinenNet(nn.Module):
    """Batch norms of any class between matrix products; one may be called twice."""

    norm: type = nn.BatchNorm
    order: tuple[int, ...] = (0, 1, 2)

    @nn.compact
    def __call__(self, batch, train=False):
        x = batch["x"]
        norms = [self.norm(use_running_average=not train, name=f"norm{i}") for i in depth(KERNELS)]
        for i in self.order:
            x = jnp.tanh(norms[i](x @ KERNELS[i], mask=batch.get("mask")))
        return x


class NNXNet(nnx.Module):
    def __init__(self, norm=nnx.BatchNorm, order=(0, 1, 2), rngs=None):
        self.order = order
        for i in depth(KERNELS):
            setattr(self, f"norm{i}", norm(4, rngs=rngs or nnx.Rngs(0)))

    def __call__(self, batch):
        x = batch["x"]
        for i in self.order:
            x = jnp.tanh(getattr(self, f"norm{i}")(x @ KERNELS[i], mask=batch.get("mask")))
        return x


class Linen:
    flax, ours = nn.BatchNorm, jbn.linen.BatchNorm

    def __init__(self, norm=nn.BatchNorm, x=X[:2], **options):
        self.apply = LinenNet(norm, **options).apply
        self.variables = jax.jit(LinenNet(norm).init)(jax.random.key(0), {"x": x})

    def recalibrate(self, batches, **options):
        variables = jbn.linen.recalibrate(self.apply, self.variables, batches, **options)
        return variables["batch_stats"]


class NNX:
    flax, ours = nnx.BatchNorm, jbn.nnx.BatchNorm

    def __init__(self, norm=nnx.BatchNorm, x=X[:2], **options):
        self.model = NNXNet(norm, **options)

    def recalibrate(self, batches, **options):
        model = nnx.clone(self.model)
        jbn.nnx.recalibrate(model, batches, **options)
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


both = pytest.mark.parametrize("api", [Linen, NNX])


def batches_of(x=X, mask=None, parts=PARTS):
    return [{"x": x[rows]} | ({} if mask is None else {"mask": mask[rows]}) for rows in parts]


def reference(batches, sweeps=1, order=(0, 1, 2)):
    """Goes through all batches for each sweep, with weights, in float64."""
    found = None
    for _ in range(sweeps):
        seen = {i: ([], []) for i in order}
        for batch in batches:
            x = batch["x"].astype(np.complex128 if np.iscomplexobj(batch["x"]) else np.float64)
            weights = np.broadcast_to(batch.get("mask", np.ones((1, 1))), x.shape).astype(float)
            for i in order:
                x = x @ KERNELS[i].astype(float)
                mean, var = moments([x], [weights]) if found is None else found[i]
                seen[i][0].append(x), seen[i][1].append(weights)
                x = np.tanh((x - mean) / np.sqrt(var + 1e-5))
        found = {i: moments(*each) for i, each in seen.items()}
    return found


def moments(xs, weights):
    x, w = np.concatenate(xs), np.concatenate(weights)
    total = np.maximum(w.sum(0), 1e-300)
    mean = (w * x).sum(0) / total
    return mean, (w * abs(x - mean) ** 2).sum(0) / total


def assert_moments(stats, expected):
    for i, (mean, var) in expected.items():
        assert_allclose(stats[f"norm{i}"]["mean"], mean, rtol=1e-5, atol=1e-5 * np.sqrt(var).max())
        assert_allclose(stats[f"norm{i}"]["var"], var, rtol=1e-5)


@pytest.mark.parametrize("api", [Linen, pytest.param(NNX, marks=pytest.mark.slow)])
def test_statistics_are_those_of_all_batches_together(api):
    """The first sweep normalizes with each batch's own moments; uneven batches, masks, weights."""
    net = api()
    none_in_one = WEIGHTS * (np.arange(50)[:, None] >= 20)
    for mask in None, RNG.rand(50, 1) < 0.6, WEIGHTS, none_in_one:
        batches = batches_of(mask=mask)
        assert_moments(net.recalibrate(batches), reference(batches))
    empty = batches_of(parts=[*PARTS, PARTS[0][:0]])
    assert_moments(net.recalibrate(iter(empty)), reference(batches_of()))


@both
def test_nothing_is_lost_in_many_small_batches_with_a_large_mean(api):
    x = (1e4 + RNG.normal(size=(2000, 4))).astype("float32")
    norm = nn.BatchNorm(use_running_average=True)
    if api is Linen:
        variables = jax.jit(norm.init)(jax.random.key(0), x[:2])
        stats = jbn.linen.recalibrate(norm.apply, variables, np.split(x, 1000))["batch_stats"]
    else:
        model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        jbn.nnx.recalibrate(model, np.split(x, 1000))
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert_allclose(stats["mean"], x.mean(0, dtype=float), rtol=1e-7)
    assert_allclose(stats["var"], x.var(0, dtype=float), rtol=1e-5)


@pytest.mark.slow
@both
def test_as_many_sweeps_as_layers_are_independent_of_the_batch_size(api):
    net, whole = api(), reference([{"x": X}])
    for parts in PARTS, TENS:
        batches = batches_of(parts=parts)
        assert_moments(net.recalibrate(batches, sweeps=3), whole)
        assert_moments(net.recalibrate(batches, sweeps=2), reference(batches, sweeps=2))
    one = net.recalibrate(batches)
    assert np.abs(one["norm2"]["var"] / whole[2][1] - 1).max() > 0.01


@pytest.mark.slow
@both
def test_layer_that_is_called_twice_has_the_inputs_of_both_calls(api):
    """And one that is not called, as an auxiliary head in evaluation, keeps its statistics."""
    order = (0, 1, 0)
    stats = api(order=order).recalibrate(batches_of())
    assert_moments(stats, reference(batches_of(), order=order))
    assert_array_equal(stats["norm2"]["mean"], np.zeros(4))


@pytest.mark.slow
@both
def test_layers_of_ours_count_what_their_rule_averages_by(api):
    """And are measured whatever they do in training: ghost batches, a frozen layer."""
    batches = batches_of(parts=TENS)
    expected = reference(batches)
    rules = {jbn.pooled(): 50, jbn.cumulative(): 5, jbn.ema(0.9, debias=True): 1, jbn.ema(0.9): 7}
    for rule, count in rules.items():
        start = 7 * (rule == jbn.ema(0.9))
        norm = partial(api.ours, update=rule, virtual_batch_size=5, frozen=True, initial_count=start)
        stats = api(norm).recalibrate(batches)
        assert_moments(stats, expected)
        if rule == jbn.cumulative():
            assert_array_equal(api(norm).recalibrate(batches, sweeps=2)["norm0"]["count"], np.full(4, 5))
        assert_array_equal(stats["norm0"]["count"], np.full(4, count, "float32"))


@pytest.mark.slow
@both
def test_what_is_not_finite_or_has_no_samples_keeps_its_statistics(api):
    net = api()
    x = X.copy()
    x[:10] = np.nan
    assert_moments(net.recalibrate(batches_of(x, parts=TENS)), reference(batches_of(parts=TENS[1:])))
    per_feature = np.broadcast_to(np.arange(4) < 2, X.shape)
    x[:10] = 1e25  # finite, but so far from the others that the variance is not
    assert_moments(
        net.recalibrate(batches_of(x, parts=TENS[::-1])), reference(batches_of(parts=TENS[1:]), order=(0,))
    )
    stats = net.recalibrate(batches_of(mask=per_feature, parts=TENS))
    assert_array_equal(stats["norm0"]["var"][2:], [1, 1])
    assert_moments({"norm0": jax.tree.map(lambda leaf: leaf[:2], stats["norm0"])}, FIRST_TWO)


FIRST_TWO = {0: tuple(value[:2] for value in reference([{"x": X}], order=(0,))[0])}


@pytest.mark.slow
@both
def test_dtypes_of_the_inputs_and_of_the_statistics(api, x64):
    wide = X.astype("float64")
    for x, tolerance in ((wide, 1e-5), (jnp.asarray(X, "bfloat16"), 2e-2)):
        stats = api().recalibrate(batches_of(x, parts=TENS))
        assert stats["norm0"]["mean"].dtype == "float32"
        first = np.asarray(x, float) @ KERNELS[0]
        assert_allclose(stats["norm0"]["var"], first.var(0), rtol=tolerance)
    z = (X + 1j * X[::-1]).astype("complex64")
    net = api(partial(api.ours, param_dtype=jnp.complex64), x=z[:2])
    batches = batches_of(z, parts=TENS)
    assert_moments(net.recalibrate(batches), reference(batches, order=(0,)))


@pytest.mark.slow
@both
def test_batches_over_devices_and_statistics_stay_where_they_were(api):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=2 * (jax.sharding.AxisType.Auto,))
    sharded, of_features = NamedSharding(mesh, P("data")), NamedSharding(mesh, P("model"))
    batches = batches_of(parts=[np.arange(16), np.arange(16, 32)])
    expected = reference(batches)
    placed = jax.device_put(batches, sharded)
    net = api()
    assert_moments(net.recalibrate(placed), expected)
    if api is Linen:
        net.variables = jax.device_put(net.variables, of_features)
    else:
        nnx.update(net.model, jax.device_put(nnx.state(net.model), of_features))
    for given in placed, batches:
        stats = net.recalibrate(given)
        assert_moments(stats, expected)
        assert stats["norm0"]["mean"].sharding == of_features


@pytest.mark.slow
@both
def test_a_second_time_nothing_is_compiled(api):
    net = api()
    batches = batches_of(parts=TENS)
    net.recalibrate(batches)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr("jax._src.compiler.compile_or_get_cached", lambda *a, **k: compiled.append(a))
        net.recalibrate(batches)
    assert not compiled


@both
def test_mistakes_are_errors_before_any_work(api):
    net = api()
    for batches, options, error, expected in (
        ([], {}, ValueError, "batches is empty; expected at least one batch."),
        (X, {}, TypeError, r"batches is a ndarray; expected a list .* \[x\] for a single one"),
        ({"x": X}, {}, TypeError, "batches is a dict; expected a list of batches"),
        (batches_of(), {"sweeps": 0}, ValueError, "sweeps=0; expected a whole number, 1 or more"),
        (batches_of(), {"sweeps": 1.5}, ValueError, "sweeps=1.5; expected a whole number"),
        ((1 / 0 for _ in "a"), {"sweeps": 2}, ValueError, "batches is a generator, which can be gone"),
    ):
        with pytest.raises(error, match=expected):
            net.recalibrate(batches, **options)


def notes(error):
    return getattr(error.value, "__notes__", ())


@pytest.mark.slow
def test_examples_with_labels_need_a_call_that_takes_them_apart():
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    for tool in jbn.nnx.recalibrate, jbn.nnx.diagnose:
        with pytest.raises(Exception) as error:
            tool(model, [(X, X[:, 0])])
        assert any("a tuple; if it takes a part of it, say which by call=" in note for note in notes(error))
        tool(model, [(X, X[:, 0])], call=lambda model, batch: model(batch[0]))
        with pytest.raises(Exception) as error:
            tool(model, [X[:, :2]])
        assert not any("if it takes a part of it" in note for note in notes(error))
