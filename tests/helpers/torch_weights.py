"""torchvision's ResNets as what their files hold: names, shapes, and random weights. NumPy alone."""

import zlib

import numpy as np

# Blocks in each stage, kernel sizes in a block, and how many times its width a block puts out.
ARCHITECTURES = {
    "resnet18": ((2, 2, 2, 2), (3, 3), 1),
    "resnet50": ((3, 4, 6, 3), (1, 3, 1), 4),
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
