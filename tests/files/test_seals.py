"""A sealed object is returned only if it is unchanged."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from moe_jax.files.seals import sealed, unsealed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text().filter(lambda key: key != "sha256"), VALUES, max_size=4)


@hypothesis.given(OBJECTS, OBJECTS)
def test_only_what_was_written_comes_back(value, other):
    read = json.loads(json.dumps(sealed(value)))
    assert unsealed(read) == json.loads(json.dumps(value)) == unsealed(value)
    changed = json.loads(json.dumps(other)) | {"sha256": read["sha256"]}
    if json.dumps(changed, sort_keys=True) != json.dumps(read, sort_keys=True):
        with pytest.raises(ValueError, match="differs from what was written"):
            unsealed(changed)


@pytest.mark.parametrize("value", [None, 3, "text", [1], True])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(ValueError, match="not an object"):
        unsealed(value)
