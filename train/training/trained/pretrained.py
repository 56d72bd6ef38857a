"""What a job starts from in place of random weights: the best checkpoint of a run, or PyTorch's weights."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.lib.npyio import NpzFile
from safetensors.numpy import load_file

import jbn.linen
from train import models
from train.config import Model
from train.data import Labels
from train.data.formats.arrays import member
from train.data.formats.reading import reading
from train.errors import UserError, shortened
from train.models import Variables, torchvision
from train.training.trained.evaluation import load_best

EXPECTED = "a run directory, or a .safetensors or .npz file of PyTorch's names"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")  # of DataParallel, torch.compile and others
MAX_BYTES = 2**32  # of a file, unpacked: 40 times a ResNet-50's, and less than would exhaust most memories


def start_from(
    path: Path, model: Model, initial: Variables, *, head: str, labels: Labels | None = None
) -> tuple[Variables, tuple[str, ...]]:
    """Return the variables that a job starts from, and what the user has to know of them, in sentences.

    A last layer for another number of classes stays as it is in `initial`; `head` is its key. One for as many
    classes is taken, and it is said if these are not the job's `labels`, in their order.

    Raises:
      UserError: there are none, or they are those of another network.
    """
    found, known = _of_run(path) if path.is_dir() else (_of_file(path, model, initial, head), None)
    notes = ()
    here, there = initial.params[head], found.params.get(head)
    classes = there["kernel"].shape[-1] if there else 0
    if classes != here["kernel"].shape[-1]:
        found = found._replace(params=found.params | {head: here})
        notes = (f"the head starts anew: {classes or 'no'} classes there, {here['kernel'].shape[-1]} here",)
    elif known and labels and (others := _other_classes(known, labels)):
        notes = (f"warning: the head is of other classes: {_few(others)}",)
    ours, theirs = _shapes(initial), _shapes(found)
    differing = [
        f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
        for name in sorted(ours | theirs)
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise UserError(
            f"init_from: expected a run with the same model and input shape, got '{path}', which holds the "
            f"parameters of another network: {_few(differing)}."
        )
    return found, notes


def _other_classes(there: Labels, here: Labels) -> list[str]:
    pairs = [(there.name(i), here.name(i)) for i in range(len(here.counts))]
    return [f"{theirs} there is {ours} here" for theirs, ours in pairs if theirs != ours]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path[1:], simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _few(faults: list[str]) -> str:
    """Join faults, but not the hundreds of another architecture."""
    return shortened(faults, most=20, separator="; ")


def _of_run(path: Path) -> tuple[Variables, Labels]:
    if not (path / "config.json").exists():
        raise UserError(f"init_from: expected {EXPECTED}, got '{path}', which has no config.json.")
    best = load_best(path)
    return jax.device_get(best.trained.variables), best.data.labels


def _of_file(path: Path, model: Model, initial: Variables, head: str) -> Variables:
    """Load torchvision's weights, with as many classes as they have, or without a head."""
    if not path.is_file():
        reason = "is no file" if path.exists() else "does not exist"
        raise UserError(f"init_from: expected {EXPECTED}, got '{path}', which {reason}.")
    if model.name not in torchvision.NAMED:
        raise UserError(
            f"init_from: expected model.name = {' or '.join(map(repr, torchvision.NAMED))} with a file of "
            f"PyTorch's weights, got '{model.name}', which starts from a run directory only."
        )
    if not models.NORMS[model.norm].over_batch:
        norms = [repr(name) for name, kind in models.NORMS.items() if kind.over_batch]
        raise UserError(
            f"init_from: expected model.norm = {' or '.join(norms)} with a file of PyTorch's weights, got "
            f"'{model.norm}'."
        )
    state, names = _read(path), torchvision.torchvision_names(initial.params)
    if not state.keys() & {f"{name}.weight" for name in names.values()}:
        got = ", ".join(sorted(state)[:3]) or "no arrays"
        raise UserError(
            f"init_from: expected torchvision's names in '{path}', such as conv1.weight, got {got}."
        )
    params = {name: layer for name, layer in initial.params.items() if name != head}
    if any(key.startswith(f"{names[head]}.") for key in state):
        here = initial.params[head]
        classes = state.get(f"{names[head]}.bias", here["bias"]).size
        params[head] = {
            name: jax.ShapeDtypeStruct((*leaf.shape[:-1], classes), leaf.dtype) for name, leaf in here.items()
        }
    else:
        del names[head]
    try:
        return jbn.linen.load_torch(initial._replace(params=params), state, names)
    except ValueError as error:
        faults = _few(str(error).splitlines())
        raise UserError(f"init_from: '{path}' does not fit model.name = '{model.name}': {faults}.") from None


def _read(path: Path) -> Mapping[str, np.ndarray]:
    """Read all arrays of a file, without a prefix that all names have. Nothing is unpickled."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(
            f"init_from: expected {EXPECTED}, got '{path}', a pickle, which may run any program and is never "
            "opened. Convert it in Python: import torch, safetensors.torch; safetensors.torch.save_file("
            f"torch.load('{path}', weights_only=True), '{path.with_suffix('.safetensors')}')"
        )
    if suffix not in (".safetensors", ".npz"):
        raise UserError(f"init_from: expected {EXPECTED}, got '{path}'.")
    with reading(path, f"a {suffix} file of arrays, of at most {MAX_BYTES / 2**30:g} GiB"):
        state = _safetensors(path) if suffix == ".safetensors" else _npz(path)
        if not all(map(str.isprintable, state)):  # errors print them
            raise ValueError("a name in it is not printable")
    while prefix := next(
        (prefix for prefix in PREFIXES if state and all(key.startswith(prefix) for key in state)), ""
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    _check_size(path.stat().st_size)
    return load_file(path)


def _npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as unread:
        _check_size(sum(info.file_size for info in unread.infolist()))
    with path.open("rb") as file, NpzFile(file) as archive:
        return {key: member(archive, key) for key in archive}


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"it holds {size:,} bytes")
