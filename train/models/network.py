"""A network as pure functions, whichever of Flax's APIs it is written in."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import jbn
import jbn.linen
import jbn.nnx
from jbn.inspection import Diagnosis
from train.models.norms import Domain, Layer, Norm

BatchLoss = Callable[[jax.Array, Any], jax.Array]  # (logits, batch) -> the mean loss


class Variables(NamedTuple):
    """Nested dicts of arrays; the innermost keys are Flax's names: kernel, scale, bias, mean, var, count."""

    params: Any
    batch_stats: Any  # running statistics; {} without batch normalization


class Network(Protocol):
    """A network as pure functions. It hashes by what it computes, so that it can be a static argument."""

    @property
    def activation(self) -> Layer:
        """The activation of its hidden layers."""
        ...

    @property
    def head(self) -> str:
        """The key of the last layer's parameters; all other parameters are the body's."""
        ...

    def init(self, key: jax.Array, inputs: jax.Array) -> Variables:
        """Draw new parameters; of the inputs, float32 (n, ...), only the shape matters."""
        ...

    def apply(
        self, variables: Variables, inputs: jax.Array, *, train: bool, domain: Domain = None
    ) -> tuple[jax.Array, Any]:
        """Return float32 logits (n, classes) and the new running statistics: in inference, those given.

        Inputs are of the first domain, unless it is said. Where all share their statistics it plays no role.
        """
        ...

    def activation_inputs(
        self, variables: Variables, inputs: jax.Array, *, train: bool, domain: Domain = None
    ) -> list[jax.Array]:
        """Return the input of each activation, in order: (n, ..., width) each."""
        ...

    def fold(self, variables: Variables, inputs: jax.Array) -> tuple["Network", Variables]:
        """Fold each batch norm into the layer before it: the network that is left, for inference alone.

        A norm of the inputs stays. Of the inputs only the shape matters.
        """
        ...

    def diagnose(
        self, variables: Variables, batches: Iterable[tuple[Any, Any, Any]], loss: BatchLoss
    ) -> Diagnosis:
        """Compare running statistics with batches of inputs, labels and domains: `jbn.linen.diagnose`."""
        ...


@dataclass(frozen=True)
class LinenNetwork:
    """A `Network` of a Linen module."""

    module: nn.Module

    @property
    def activation(self) -> Layer:
        return self.module.activation

    @property
    def head(self) -> str:
        return self.module.head

    def init(self, key: jax.Array, inputs: jax.Array) -> Variables:
        variables = self.module.init(key, inputs, train=False, domain=self.module.norm.domain(None))
        return Variables(variables["params"], variables.get("batch_stats", {}))

    def apply(self, variables, inputs, *, train, domain=None):
        domain = self.module.norm.domain(domain)
        apply: Any = partial(self.module.apply, variables._asdict(), inputs, train=train, domain=domain)
        if not train:
            return apply(), variables.batch_stats
        logits, updated = apply(mutable=["batch_stats"])
        return logits, updated.get("batch_stats", {})

    def activation_inputs(self, variables, inputs, *, train, domain=None):
        recorder = _Recorder(self.activation)
        watched = LinenNetwork(self.module.clone(activation=recorder))
        watched.apply(variables, inputs, train=train, domain=domain)
        return recorder.inputs

    def fold(self, variables: Variables, inputs: jax.Array) -> tuple[Network, Variables]:
        apply = partial(self.module.apply, train=False)
        pairs = jbn.linen.find_pairs(apply, variables._asdict(), inputs)
        folded = jax.jit(partial(jbn.linen.fold, pairs=pairs))(variables._asdict())
        module = self.module.clone(norm=replace(self.module.norm, folded=True))
        return LinenNetwork(module), Variables(folded["params"], folded.get("batch_stats", {}))

    def diagnose(self, variables, batches, loss):
        def apply(variables: Any, batch: Any) -> Any:
            domain = self.module.norm.domain(batch[2])
            return self.module.apply(variables, batch[0], train=False, domain=domain)

        return jbn.linen.diagnose(apply, variables._asdict(), batches, loss=loss)


@dataclass(frozen=True)
class NNXNetwork:
    """A `Network` of an NNX module, which each call makes anew and puts the variables into."""

    module: Callable[..., nnx.Module]
    options: tuple[tuple[str, Any], ...]  # what makes it, besides `rngs`; pairs, because a dict has no hash

    @property
    def activation(self) -> Layer:
        return dict(self.options)["activation"]

    @property
    def head(self) -> str:
        return "head"  # as each NNX module here calls it

    def init(self, key: jax.Array, inputs: jax.Array) -> Variables:
        return _variables(self._make(key))

    def apply(self, variables, inputs, *, train, domain=None):
        module = self._with(variables)
        if not train:
            module.eval()
        return module(inputs, domain=self._norm.domain(domain)), _variables(module).batch_stats

    def activation_inputs(self, variables, inputs, *, train, domain=None):
        recorder = _Recorder(self.activation)
        watched = NNXNetwork(self.module, (*self.options, ("activation", recorder)))
        watched.apply(variables, inputs, train=train, domain=domain)
        return recorder.inputs

    def fold(self, variables: Variables, inputs: jax.Array) -> tuple[Network, Variables]:
        norm = replace(self._norm, folded=True)
        return NNXNetwork(self.module, (*self.options, ("norm", norm))), _fold(variables)

    def diagnose(self, variables, batches, loss):
        call: Any = lambda module, batch: module(batch[0], domain=self._norm.domain(batch[2]))
        return jbn.nnx.diagnose(self._with(variables), batches, call=call, loss=loss)

    @property
    def _norm(self) -> Norm:
        return dict(self.options)["norm"]

    def _with(self, variables: Variables) -> Any:
        module = nnx.eval_shape(partial(self._make, 0))
        for values in variables:
            nnx.update(module, values)
        return module

    def _make(self, seed: int | jax.Array) -> nnx.Module:
        return self.module(**dict(self.options), rngs=nnx.Rngs(seed))


class _Recorder:
    """An activation that records what it was called with."""

    def __init__(self, activation: Layer):
        self.activation, self.inputs = activation, []

    def __call__(self, x: jax.Array) -> jax.Array:
        self.inputs.append(x)
        return self.activation(x)


def _fold(variables: Variables) -> Variables:
    """Fold each "norm" into the "linear" layer beside it, as each NNX module here calls them."""
    params, batch_stats = map(flatten_dict, variables)

    def take_norm(flat: Any, path: tuple, kind: Any) -> Any:
        taken = {key[-1]: flat.pop(key) for key in list(flat) if key[:-1] == (*path, "norm")}
        return kind(**{name: taken[name] for name in kind._fields if name in taken})

    for path in [key[:-2] for key in params if key[-2:] == ("norm", "scale")]:
        kernel, bias = ((*path, "linear", name) for name in ("kernel", "bias"))
        of_norm = take_norm(params, path, jbn.Params), take_norm(batch_stats, path, jbn.Moments)
        params[kernel], params[bias] = jbn.fold(params[kernel], params.get(bias), *of_norm)
    return Variables(unflatten_dict(params), unflatten_dict(batch_stats))


def _variables(module: nnx.Module) -> Variables:
    return Variables(*(nnx.to_pure_dict(nnx.state(module, kind)) for kind in (nnx.Param, nnx.BatchStat)))
