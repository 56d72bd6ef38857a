"""What a network has to know of the data that it was trained on, as data.json of a run holds it."""

import math
from typing import Any, NamedTuple, Self

import numpy as np

from train.data.dataset import Dataset, Labels, Preprocessing


class Description(NamedTuple):
    """The kind of the examples, their labels and preprocessing, and whose fingerprint they have."""

    shape: tuple[int, ...]  # of one example
    dtype: str
    labels: Labels
    columns: tuple[str, ...]  # names of the features of a table
    preprocessing: Preprocessing
    fingerprint: str

    @property
    def inputs(self) -> str:
        """What the network takes, in words."""
        names = f": {', '.join(self.columns)}" if self.columns else ""
        of = "images" if len(self.shape) == 3 else "rows"
        scale = ", from 0 to 255" if self.dtype == "uint8" else ", in units of the training data"
        return f"{of} of dtype {self.dtype} and shape (n, {', '.join(map(str, self.shape))}){scale}{names}"

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """Describe data."""
        return cls(
            dataset.example_shape,
            str(dataset.train.inputs.dtype),
            dataset.labels,
            dataset.columns,
            dataset.preprocessing,
            dataset.fingerprint,
        )

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Return what `to_json` has made an object of.

        Raises:
          AttributeError, KeyError, OverflowError, TypeError, ValueError: the object describes no data.
        """
        preprocessing = {
            name: np.asarray(value, np.float32) for name, value in values["preprocessing"].items()
        }
        described = cls(
            shape=tuple(map(int, values["shape"])),
            dtype=str(values["dtype"]),
            labels=_labels(values),
            columns=tuple(map(str, values.get("columns", ()))),
            preprocessing=Preprocessing(**preprocessing),
            fingerprint=values["fingerprint"],
        )
        if not isinstance(described.fingerprint, str):
            raise ValueError("its fingerprint is no text")
        mean, std = (np.broadcast_to(value, described.shape) for value in described.preprocessing)
        if not (np.isfinite([mean, std]).all() and (std > 0).all()):
            raise ValueError("no data have its preprocessing")
        if described.dtype not in ("uint8", "float32") or 0 in (described.shape or [0]):
            raise ValueError("no data have its shape or its dtype")
        return described

    def to_json(self) -> dict[str, Any]:
        """Return an object for JSON."""
        return {
            "inputs": self.inputs,
            **self._asdict(),
            "labels": self.labels._asdict(),
            "preprocessing": {name: value.tolist() for name, value in self.preprocessing._asdict().items()},
        }


def _labels(values: dict[str, Any]) -> Labels:
    if "labels" not in values:  # as earlier versions wrote it
        if not 0 < (classes := int(values["classes"])) < 2**24:
            raise ValueError(f"no data have {classes} classes")
        return Labels(counts=(1,) * classes)
    given = values["labels"]
    labels = Labels(
        counts=tuple(map(int, given["counts"])),
        names=tuple(map(str, given["names"])),
        mean=float(given["mean"]),
        std=float(given["std"]),
    )
    known = len(labels.names) in (0, len(labels.counts)) and all(0 <= n < 2**63 for n in labels.counts)
    if not (known and math.isfinite(labels.mean) and 0 <= labels.std < math.inf):
        raise ValueError("no data have its labels")
    return labels
