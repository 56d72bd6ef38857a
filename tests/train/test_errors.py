import errno
import os

import pytest

from train.errors import RunFailed, UserError, explain, explained


def test_full_disks_and_files_that_are_not_to_be_written_are_explained_with_what_helps():
    cases = {
        "make room": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "allow access to it": (errno.EACCES, errno.EPERM, errno.EROFS),
        "mend that": (errno.EIO, errno.ENOTDIR),
    }
    for remedy, numbers in cases.items():
        for number in numbers:
            said = explain(OSError(number, os.strerror(number), "/a/file"))
            assert said == (
                f"{os.strerror(number)}: '/a/file'. What was saved before is kept; {remedy}, and start again "
                "to go on from there."
            )
    # TensorStore has texts of its own, which say of a full disk that a resource is exhausted.
    text = f"RESOURCE_EXHAUSTED: Failed to write: {os.strerror(errno.ENOSPC)} [type.google.com]\nat c.cc:1"
    assert explain(ValueError(text)).startswith(
        "No space left on device. What was saved before is kept; make"
    )


def test_memory_that_is_not_there_is_explained_with_what_helps():
    text = "RESOURCE_EXHAUSTED: Out of memory allocating 5368709120 bytes."
    assert explain(RuntimeError(text)).startswith("out of memory (5.00 GiB more). Try a smaller batch_size")
    for error in (MemoryError(), RuntimeError("Out of memory"), ValueError("RESOURCE_EXHAUSTED: hm")):
        assert explain(error).startswith("out of memory. Try a smaller batch_size"), error


def test_nothing_else_is_explained():
    for error in (
        *(ValueError("shapes (2,) and (3,) do not match"), KeyError("scale"), ZeroDivisionError()),
        *(RuntimeError(f"{name}: closed") for name in ("Gloo", "NCCL", "coordination service", "heartbeat")),
    ):
        assert explain(error) is None, error
        with pytest.raises(type(error)) as raised, explained():
            raise error
        assert raised.value is error


def test_explanation_becomes_a_failed_run_and_sentences_stay_as_they_are():
    with pytest.raises(RunFailed, match="No space left on device: 'f'. What was saved"), explained():
        raise OSError(errno.ENOSPC, "No space left on device", "f")
    for error in (UserError("a key"), RunFailed("out of memory, and said already")):
        with pytest.raises(type(error)) as raised, explained():
            raise error
        assert raised.value is error
