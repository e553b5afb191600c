"""The index of entities against a dict: texts of any bytes and length, known or new, whatever came before."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.keys import KeyIndex

ALIKE = [b"", b"a", b"user 1", b"user 10", b"user 1\0", *(b"x" * length for length in (7, 8, 9, 16, 23, 24, 25, 40))]
ALIKE += [b"x" * 39 + b"y", b"x" * 23 + b"y", b"y" + b"x" * 23]
TEXTS = st.lists(st.binary(max_size=40) | st.sampled_from(ALIKE), max_size=60)


def spans(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The texts with other bytes between them, and where each lies."""
    ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    buffer = np.frombuffer(b"".join(text + b"|" for text in texts), dtype=np.uint8)
    return buffer, np.stack([ends - 1 - lengths, ends - 1], axis=1).reshape(-1, 2)


@settings(deadline=None)
@given(rounds=st.lists(TEXTS, min_size=1, max_size=4), unwanted=st.sets(st.integers(0, 59)), asked=TEXTS)
def test_ids_rise_in_the_order_of_first_sight(rounds, unwanted, asked):
    index, known = KeyIndex(), {}
    for texts in rounds:
        wanted = np.array([row not in unwanted for row in range(len(texts))], dtype=np.bool_)
        ids = index.ids(*spans(texts), wanted).tolist()
        expected = [
            known.setdefault(text, len(known)) if want else -1 for text, want in zip(texts, wanted, strict=True)
        ]
        assert ids == expected
    assert len(index) == len(known)
    found = index.find(*spans(asked), np.ones(len(asked), dtype=np.bool_)).tolist()
    assert found == [known.get(text, -1) for text in asked]
    copied = KeyIndex()
    copied.extend(*index.state())
    kept = copied.kept(np.arange(len(known))[::2])
    texts = list(known)
    assert copied.find(*spans(texts), np.ones(len(texts), dtype=np.bool_)).tolist() == list(range(len(texts)))
    assert kept.find(*spans(texts), np.ones(len(texts), dtype=np.bool_)).tolist() == [
        row // 2 if row % 2 == 0 else -1 for row in range(len(texts))
    ]


def test_many_texts_are_found_after_the_table_has_grown():
    texts = [f"entity {number}".encode() for number in range(50_000)]
    index = KeyIndex()
    for start in range(0, len(texts), 7_000):
        part = texts[start : start + 7_000]
        index.ids(*spans(part), np.ones(len(part), dtype=np.bool_))
    assert index.find(*spans(texts), np.ones(len(texts), dtype=np.bool_)).tolist() == list(range(len(texts)))
    ids = np.array([49_999, 0, 7_000])
    assert index.entities(ids, "string").equals(pa.array(["entity 49999", "entity 0", "entity 7000"]))
