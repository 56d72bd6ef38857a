"""What is seen of layers and norms in a traced program, and whether a layer can absorb its norm."""

from dataclasses import dataclass, field
from typing import NamedTuple

from jbn.linen._folding.flow import Leaf, Output, Value, View


class UsedVariable(NamedTuple):
    """A variable as a call of a layer used it."""

    path: tuple[str, ...]
    leaf: Leaf | None  # of the model's variables; None if it was made from them
    stacked: int  # how many axes of the leaf were mapped or scanned over


@dataclass(eq=False)
class Site:
    """A layer or a norm, with what was seen of all its calls."""

    path: str
    refused: str | None  # why, as far as it can be said of each by itself
    variables: list[UsedVariable] = field(default_factory=list)
    axis: int = -1  # of a layer: the kernel's axis of outputs
    outputs: list[Output] = field(default_factory=list)  # of a layer
    epsilon: float = 0.0  # of a norm
    sources: list["Site | None"] = field(default_factory=list)  # of a norm: the layers before it
    _begun: list[tuple[Leaf, int]] = field(default_factory=list)  # in the call that is followed now

    def __str__(self) -> str:
        return f"'{self.path}'"

    def put_out(self, _: Value) -> Output:
        self.leave(None)
        self.outputs.append(Output(self))
        return self.outputs[-1]

    def take_in(self, value: Value) -> None:
        self.sources.append(value.layer if isinstance(value, Output) else None)
        if isinstance(value, Output):
            value.read_by(self)

    def use(self, path: tuple[str, ...], ndim: int, value: Value) -> None:
        leaf = value.leaf if isinstance(value, View) else None
        self.variables.append(UsedVariable(path, leaf, leaf.ndim - ndim if leaf else 0))
        if leaf:
            leaf.own_reads += 1  # by this mark
            self._begun.append((leaf, leaf.reads))

    def leave(self, _: Value) -> None:
        for leaf, reads in self._begun:
            leaf.own_reads += leaf.reads - reads
        self._begun.clear()


def refusal(norm: Site) -> str | None:
    """Say why the layer before a norm cannot absorb it; None if it can."""
    if norm.refused:
        return norm.refused
    if None in norm.sources:
        return "its input is not what a Dense, Conv or ConvTranspose puts out"
    layer, *others = dict.fromkeys(source for source in norm.sources if source)
    if others:
        return f"its input comes from several layers: {', '.join(map(str, [layer, *others]))}"
    if layer.refused:
        return layer.refused
    readers = [reader for output in layer.outputs for reader in output.readers]
    if others := dict.fromkeys(str(reader) for reader in readers if reader is not norm):
        return f"what {layer} puts out is also read by {', '.join(others)}"
    variables = layer.variables + norm.variables
    for path, leaf, _ in variables:
        name = "/".join(path)
        if leaf is None or leaf.path != path:
            return (
                f"'{name}' is not used as it stands in the variables, or they are stacked over another axis "
                "than the first, or `nn.jit` shares its module"
            )
        if leaf.reads != leaf.own_reads and path[0] == "params":  # `mutable` puts out statistics
            return f"'{name}' is read by more than its module"
    if len({variable.stacked for variable in variables}) > 1:
        return f"its variables and those of {layer} are not stacked over the same axes"
    return None
