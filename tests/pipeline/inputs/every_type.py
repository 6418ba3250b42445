"""A column of each type that Arrow writes to Parquet."""

from __future__ import annotations

import datetime
import decimal

import pyarrow as pa

LONG = "longer than a view keeps beside its length"
DECIMAL = decimal.Decimal("1.50")


def _named(storage: pa.Array, kind: pa.DataType) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, storage)


EVERY_TYPE: dict[str, pa.Array] = {
    f"t_{name}": pa.array([value, None], kind)
    for name, kind, value in (
        *((str(kind), kind, 1) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
        *((str(kind), kind, 1) for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
        *((str(kind), kind, 1.5) for kind in (pa.float16(), pa.float32(), pa.float64())),
        ("bool", pa.bool_(), True),
        ("null", pa.null(), None),
        *((str(kind), kind, LONG) for kind in (pa.string(), pa.large_string(), pa.string_view())),
        *(
            (str(kind), kind, LONG.encode())
            for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(len(LONG)))
        ),
        *((str(kind), kind, datetime.date(2026, 1, 2)) for kind in (pa.date32(), pa.date64())),
        *((f"timestamp_{unit}", pa.timestamp(unit), 10**9) for unit in ("s", "ms", "us", "ns")),
        ("timestamp_zone", pa.timestamp("us", "Europe/Rome"), 1),
        ("timestamp_offset", pa.timestamp("us", "+02:00"), 1),
        *((f"time_{unit}", pa.time32(unit), 5) for unit in ("s", "ms")),
        *((f"time_{unit}", pa.time64(unit), 5000) for unit in ("us", "ns")),
        *((f"duration_{unit}", pa.duration(unit), 5000) for unit in ("s", "ms", "us", "ns")),
        ("decimal32", pa.decimal32(5, 2), DECIMAL),
        ("decimal64", pa.decimal64(15, 2), DECIMAL),
        ("decimal128", pa.decimal128(38, 2), DECIMAL),
        ("decimal256", pa.decimal256(20, 2), DECIMAL),
        ("decimal256_long", pa.decimal256(76, 2), DECIMAL),
        *(
            (f"list_{i}", kind, [LONG])
            for i, kind in enumerate(
                (
                    pa.list_(pa.string()),
                    pa.large_list(pa.string()),
                    pa.list_view(pa.string()),
                    pa.large_list_view(pa.string_view()),
                    pa.list_(pa.string_view()),
                    pa.list_(pa.string(), 1),
                )
            )
        ),
        ("list_of_nothing", pa.list_(pa.null()), [None]),
        ("struct", pa.struct({"a": pa.int8(), "b": pa.string_view()}), {"a": 1, "b": LONG}),
        ("struct_of_nothing", pa.struct({"a": pa.null()}), {"a": None}),
        ("map", pa.map_(pa.string(), pa.int8()), [("k", 1)]),
        ("map_of_views", pa.map_(pa.string_view(), pa.binary_view()), [(LONG, b"x")]),
        ("dictionary", pa.dictionary(pa.int8(), pa.string()), "a"),
        ("dictionary_of_bytes", pa.dictionary(pa.int32(), pa.binary()), b"a"),
    )
} | {
    "t_list_of_dictionary": pa.array([["a"], None]).cast(
        pa.list_(pa.dictionary(pa.int32(), pa.string()))
    ),
    "t_uuid": _named(pa.array([b"u" * 16, None], pa.binary(16)), pa.uuid()),
    "t_json": _named(pa.array(['{"a":1}', None]), pa.json_()),
    "t_bool8": _named(pa.array([1, None], pa.int8()), pa.bool8()),
    "t_tensor": _named(
        pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
        pa.fixed_shape_tensor(pa.float32(), [2]),
    ),
}
"""A value and a null, by the name of the column."""
