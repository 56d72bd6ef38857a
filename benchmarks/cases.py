"""What is measured of a single layer: shapes, modes and options, in sections that are a table each."""

from typing import NamedTuple


class Case(NamedTuple):
    section: str
    shape: tuple[int, ...]  # (N, H, W, C) or (N, C)
    mode: str = "forward+backward"  # or "forward", "inference"
    dtype: str = "float32"
    mask: bool = False  # one Boolean for each example, a tenth of them False
    relu: bool = False  # apply ReLU to what the layer returns
    devices: int = 1  # which share statistics, and a part of the batch each
    mean: float = 0.5  # of the samples, whose standard deviation is 1
    channels_first: bool = False  # x is transposed to (N, C, H, W)


# Of ResNet-50 with 32 images of 224 x 224 and of perceptrons; by these the layers are compared.
SHAPES = [(32, 56, 56, 64), (32, 28, 28, 128), (32, 14, 14, 256), (32, 7, 7, 512), (8192, 512)]
# The other layers of ResNet-50, and batches that are small, usual and large for a perceptron.
FURTHER = [
    (32, 112, 112, 64),
    (32, 56, 56, 256),
    (32, 28, 28, 512),
    (32, 14, 14, 1024),
    (32, 7, 7, 2048),
    (4, 14, 14, 256),
    (128, 256),
    (1024, 1024),
    (65536, 256),
]


def all_cases() -> list[Case]:
    """Returns every case, section by section."""
    few = [SHAPES[0], SHAPES[2], SHAPES[4]]
    return [
        *(Case("Training: forward and backward, float32", shape) for shape in SHAPES),
        *(Case("The same, further shapes", shape) for shape in FURTHER),
        *(Case("Forward in training, float32", shape, mode="forward") for shape in SHAPES),
        *(Case("Inference, float32", shape, mode="inference") for shape in SHAPES),
        *(Case("Training, bfloat16", shape, dtype="bfloat16") for shape in SHAPES),
        *(Case("Training, channels first", shape, channels_first=True) for shape in SHAPES[:4]),
        *(Case("Training with ReLU after it", shape, relu=True) for shape in few),
        *(Case("Training with a mask", shape, mask=True) for shape in few),
        *(Case("Training, statistics of 4 devices", shape, devices=4) for shape in few),
        *(Case("Training, mean of 10 standard deviations", shape, mean=10.0) for shape in few),
    ]


def quick_cases() -> list[Case]:
    """Returns one small case for each section, by which a test sees that all of it runs."""
    sections = {case.section: case for case in all_cases()}
    return [case._replace(shape=(8, 3, 3, 4)) for case in sections.values()]
