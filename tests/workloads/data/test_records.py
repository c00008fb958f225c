import io
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from workloads.data.records import MediaError, array, boxes, captions, mask


def npy(values, **options):
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", ">i2", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_arrays_come_back_in_c_order_and_native(dtype, shape):
    values = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape), dtype)
    for stored in (values, np.array(values, order="F")):
        read = array(npy(stored))
        assert np.array_equal(read, values) and read.shape == shape
        assert read.dtype.isnative and read.flags.c_contiguous and read.flags.writeable


def with_shape(shape):
    return npy(np.zeros(4)).replace(b"(4,)", shape).replace(b" " * (len(shape) - 4) + b"\n", b"\n")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "npy"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "npy"),
        (pickle.dumps([1]), "npy"),
        (npy(np.zeros(4))[:-1], "31 bytes"),
        (npy(np.zeros(4)) + b"0", "33 bytes"),
        (npy(np.array([{}]), allow_pickle=True), "object"),
        (npy(np.array(["a"])), "<U1"),
        (npy(np.zeros(2, [("a", "f4")])), "expected numbers"),
        (with_shape(b"(999999999999,)"), "expected 7999999999992"),
        (with_shape(b"(-2, -2)"), "expected"),
        (npy(np.zeros(4)).replace(b"(4,)", b"(x,)"), "npy"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(data, why):
    with pytest.raises(MediaError, match=why):
        array(data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 130))
def test_damage_never_crashes(noise, place):
    data = npy(np.arange(6.0))
    damaged = data[:place] + noise + data[place + len(noise) :]
    for read in (array, boxes, captions, mask):
        try:
            read(damaged)
        except MediaError as error:
            assert "expected" in str(error) or "again" in str(error)


def test_captions_are_lines():
    assert captions("\ufeffEin Hund. \r\n\n a dog\u2028runs\n".encode()) == ["Ein Hund.", "a dog\u2028runs"]
    for data, why in [(b"\n ", "empty"), (b"\xff\xfe", "UTF-8"), (b"a" * (2 << 20), "at most")]:
        with pytest.raises(MediaError, match=why):
            captions(data)


def test_boxes_are_checked():
    found = boxes(b'{"boxes": [[1, 2, 3.5, 4]], "labels": [7], "width": 9, "height": 8, "source": {}}')
    assert (found.boxes, found.labels, found.width, found.height) == ([(1, 2, 3.5, 4)], [7], 9, 8)
    assert boxes(b'{"boxes": [], "labels": []}').boxes == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the file"),
        ('{"boxes": [[1, 2, 3, 4]]}', "labels"),
        ('{"boxes": [[1, 2, 3, 4]], "labels": []}', "1 boxes and 0 labels"),
        ('{"boxes": [[1, 2, 3]], "labels": [0]}', "boxes.0"),
        ('{"boxes": [[1, 2, 3, NaN]], "labels": [0]}', "boxes.0.3"),
        ('{"boxes": [[1, 2, 3, 1e999]], "labels": [0]}', "boxes.0.3"),
        ('{"boxes": [[3, 2, 1, 4]], "labels": [0]}', "x1 <= x2"),
        ('{"boxes": [[1, 2, 3, 4]], "labels": [-1]}', "labels.0"),
        ('{"boxes": [[1, 2, 3, 4]], "labels": ["cat"]}', "labels.0"),
        ("[" * 100_000, "the file"),
    ],
)
def test_wrong_boxes_say_what_is_wrong(text, why):
    with pytest.raises(MediaError, match=why):
        boxes(text.encode())


def test_masks_are_class_numbers(encoded):
    classes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(classes).convert("P")
    palette.putdata(classes.ravel().tolist())
    palette.putpalette([200, 10, 30] * 256)
    file = io.BytesIO()
    palette.save(file, "PNG")
    for data in (encoded(classes), file.getvalue(), encoded(classes.astype(np.uint16))):
        assert np.array_equal(mask(data), classes) and mask(data).dtype == np.int32
    deep = encoded(np.array([[0, 40_000]], np.uint16))
    assert mask(deep).tolist() == [[0, 40_000]]


def test_wrong_masks_are_refused(encoded):
    grey = encoded(np.zeros((20, 20), np.uint8))
    for data, why in [
        (encoded(np.zeros((2, 2, 3), np.uint8)), "mode RGB"),
        (encoded(np.zeros((2, 2), np.uint8), "JPEG"), "no whole PNG"),
        (grey[:-30], "no whole PNG"),
    ]:
        with pytest.raises(MediaError, match=why):
            mask(data)
    with pytest.raises(MediaError, match="at most 399"):
        mask(grey, max_pixels=399)


def test_real_captions_and_boxes(data_folder):
    counted = 0
    for folder, suffix, read in [("flickr8k", ".txt", captions), ("bccd", ".json", boxes)]:
        for shard in sorted((data_folder / folder).glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.name.endswith(suffix):
                        found = read(tar.extractfile(member).read())
                        counted += len(found) if suffix == ".txt" else len(found.boxes)
    assert counted == 180 * 5 + 4_886
