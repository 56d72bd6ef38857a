"""Networks of PyTorch as what their files hold: names, shapes, and random weights. NumPy alone."""

import zlib

import numpy as np

# torchvision's ResNets: blocks in each stage, kernel sizes in a block, and how many times its width is out.
ARCHITECTURES = {
    "resnet18": ((2, 2, 2, 2), (3, 3), 1),
    "resnet50": ((3, 4, 6, 3), (1, 3, 1), 4),
}


# The networks in tests/data/torch_layers.py: the input's shape, channels last, and that of each array.
_NORM = ("weight", "bias", "running_mean", "running_var")
LAYERS = {
    "one": (
        (2, 10, 4),
        {"0.weight": (8, 4, 4), "0.bias": (8,)}
        | {f"1.{leaf}": (8,) for leaf in _NORM}
        | {"1.num_batches_tracked": (), "3.weight": (8, 2, 3), "4.weight": (8,), "4.bias": (8,)}
        | {"5.weight": (8, 8, 4), "5.bias": (8,), "6.running_mean": (8,), "6.running_var": (8,)}
        | {"6.num_batches_tracked": (), "8.weight": (8, 3, 3), "8.bias": (6,)}
        | {"10.weight": (120,), "10.bias": (120,), "11.weight": (3, 120), "11.bias": (3,)},
    ),
    "two": (
        (1, 3, 4, 4),
        {"0.weight": (4, 4, 3, 2), "0.bias": (4,), "1.weight": (4, 1, 3, 3), "1.bias": (4,)},
    ),
}


def shapes(name, *, widths=(64, 128, 256, 512), channels=3, classes=10):
    """Return the shape of each array of `torchvision.models.NAME(num_classes=classes).state_dict()`."""
    blocks, sizes, expansion = ARCHITECTURES[name]
    found = {}

    def add(convolution, norm, out, into, size):
        found[f"{convolution}.weight"] = (out, into, size, size)
        found.update({f"{norm}.{leaf}": (out,) for leaf in ("weight", "bias", "running_mean", "running_var")})
        found[f"{norm}.num_batches_tracked"] = ()

    add("conv1", "bn1", widths[0], channels, 7)
    into = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths), start=1):
        for block in range(count):
            at, features, out = f"layer{stage}.{block}", into, expansion * width
            for number, size in enumerate(sizes, start=1):
                filters = out if number == len(sizes) else width
                add(f"{at}.conv{number}", f"{at}.bn{number}", filters, features, size)
                features = filters
            if not block and (stage > 1 or into != out):
                add(f"{at}.downsample.0", f"{at}.downsample.1", out, into, 1)
            into = out
    return found | {"fc.weight": (classes, into), "fc.bias": (classes,)}


def weights(name, **options):
    """Draw each array by itself, from a seed that is its name: sizes are those of a trained network."""
    return {key: _draw(key, shape) for key, shape in shapes(name, **options).items()}


def layers(name):
    """Draw each array of one of `LAYERS`."""
    return {key: _draw(key, shape) for key, shape in LAYERS[name][1].items()}


def _draw(key, shape):
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.array(1000)
    if leaf == "running_var":
        values = rng.uniform(0.2, 2, shape)
    elif leaf == "weight" and len(shape) == 1:
        values = rng.uniform(0.2, 1, shape)
    elif leaf == "weight":
        values = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    else:
        values = rng.normal(0, 0.3, shape)
    return values.astype(np.float32)


def images(*shape):
    """Draw images as normalization leaves them: (n, h, w, channels)."""
    return np.random.RandomState(0).normal(0, 1, shape).astype(np.float32)
