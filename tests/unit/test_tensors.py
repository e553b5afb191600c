"""Tensors of the Open Inference Protocol: round trips, an oracle, and every way to get them wrong."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from serving import tensors
from serving.errors import ServingError
from serving.tensors import Tensor

NUMERIC = [name for name in tensors.DTYPES if name != "BYTES"]


def described(tensor, **more):
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)} | more


@st.composite
def numeric_tensors(draw):
    datatype = draw(st.sampled_from(NUMERIC))
    shape = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
    finite = {"allow_nan": False, "allow_infinity": False} if datatype.startswith("FP") else {}
    elements = hnp.from_dtype(tensors.DTYPES[datatype], **finite)
    return Tensor("x", datatype, draw(hnp.arrays(tensors.DTYPES[datatype], shape, elements=elements)))


@given(numeric_tensors())
def test_numbers_survive_both_encodings(tensor):
    for back in (
        tensors.read(described(tensor), tensors.to_blob(tensor)),
        tensors.read(described(tensor, data=tensors.to_json(tensor)), None),
        tensors.read(described(tensor, data=tensor.data.tolist()), None),
    ):
        assert back.shape == tensor.shape
        np.testing.assert_array_equal(back.data, tensor.data)


@given(st.lists(st.text(max_size=8), max_size=5))
def test_bytes_survive_both_encodings_and_equal_tritonclient_s(texts):
    data = np.empty(len(texts), object)
    data[:] = [text.encode() for text in texts]
    tensor = Tensor("x", "BYTES", data)
    blob = tensors.to_blob(tensor)
    if texts:
        assert blob == serialize_byte_tensor(data).item()
        assert deserialize_bytes_tensor(blob).tolist() == data.tolist()
    assert tensors.read(described(tensor), blob).data.tolist() == data.tolist()
    assert tensors.read(described(tensor, data=texts), None).data.tolist() == data.tolist()


@pytest.mark.parametrize(
    ("declared", "blob", "message"),
    [
        ({"datatype": "FP64", "shape": [1], "data": [1]}, None, "no name"),
        ({"name": "x", "datatype": "FLOAT", "shape": [1], "data": [1]}, None, "datatype 'FLOAT'"),
        ({"name": "x", "datatype": "FP64", "shape": [-1], "data": [1]}, None, "shape"),
        ({"name": "x", "datatype": "FP64", "shape": 1, "data": [1]}, None, "shape"),
        ({"name": "x", "datatype": "FP64", "shape": [2], "data": [1]}, None, "1 elements"),
        ({"name": "x", "datatype": "FP64", "shape": [1]}, None, "neither data"),
        ({"name": "x", "datatype": "FP64", "shape": [1], "data": ["1"]}, None, "no FP64"),
        ({"name": "x", "datatype": "FP64", "shape": [1], "data": [None]}, None, "no FP64"),
        ({"name": "x", "datatype": "INT8", "shape": [1], "data": [1.5]}, None, "no INT8"),
        ({"name": "x", "datatype": "INT8", "shape": [1], "data": [300]}, None, "no INT8"),
        ({"name": "x", "datatype": "BOOL", "shape": [1], "data": [1]}, None, "no BOOL"),
        ({"name": "x", "datatype": "BYTES", "shape": [1], "data": [1]}, None, "no BYTES"),
        ({"name": "x", "datatype": "FP64", "shape": [1]}, b"1234", "4 bytes where 1 of FP64 take 8"),
        ({"name": "x", "datatype": "BYTES", "shape": [1]}, struct.pack("<I", 9) + b"abc", "do not fit"),
        ({"name": "x", "datatype": "BYTES", "shape": [1]}, b"ab", "do not fit"),
        ({"name": "x", "datatype": "BYTES", "shape": [1]}, struct.pack("<I", 0) * 2, "do not fit"),
        ({"name": "x", "datatype": "BYTES", "shape": [2]}, struct.pack("<I", 0), "1 elements"),
    ],
)
def test_what_is_wrong_is_named(declared, blob, message):
    with pytest.raises(ServingError, match=message) as refused:
        tensors.read(declared, blob)
    assert refused.value.status == 400


@given(st.binary(max_size=40), st.lists(st.integers(0, 4), max_size=3), st.sampled_from(list(tensors.DTYPES)))
def test_any_blob_gives_a_tensor_or_a_400(blob, shape, datatype):
    try:
        tensor = tensors.read({"name": "x", "datatype": datatype, "shape": shape}, blob)
    except ServingError as error:
        assert error.status == 400
    else:
        assert tensor.shape == tuple(shape)
