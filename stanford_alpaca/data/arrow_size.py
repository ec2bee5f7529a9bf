"""How large the batches of an Arrow file become, before they are unpacked.

Buffers of a batch may be compressed. Each then begins with the number of bytes that it becomes. The
metadata of a message is a flatbuffer, of which a few fields are read here: see Message.fbs of the
Arrow format and "Internals" of the FlatBuffers documentation.
"""

import struct
from collections.abc import Iterator

import pyarrow as pa

# places of fields in their tables
HEADER, BUFFERS, COMPRESSION, DATA = 2, 2, 3, 1
DICTIONARY, RECORDS = "dictionary", "record batch"  # types of messages


def unpacked_sizes(source: pa.NativeFile) -> Iterator[int]:
    """Yields the bytes that each message of a stream becomes, 0 for one that is not compressed.

    Raises:
        pa.ArrowInvalid: a message is broken.
    """
    for message in pa.ipc.MessageReader.open_stream(source):
        try:
            yield _size(message)
        except (struct.error, IndexError) as error:
            raise pa.ArrowInvalid(f"a message has no valid metadata ({error})") from None


def _size(message: pa.ipc.Message) -> int:
    if message.type not in (DICTIONARY, RECORDS) or message.body is None:
        return 0
    about, body = message.metadata.to_pybytes(), memoryview(message.body)
    batch = _field(about, _at(about, 0), HEADER)
    if message.type == DICTIONARY:
        batch = batch and _field(about, _at(about, batch), DATA)
    if not batch or not _field(about, _at(about, batch), COMPRESSION):
        return 0
    buffers = _field(about, _at(about, batch), BUFFERS)
    if not buffers:
        return 0
    first = _at(about, buffers) + 4
    (count,) = struct.unpack_from("<I", about, first - 4)
    places = (struct.unpack_from("<qq", about, first + 16 * i) for i in range(count))
    # -1 says that the buffer is not compressed, and lies in the file as it is
    return sum(
        max(0, struct.unpack_from("<q", body, start)[0]) for start, length in places if length > 0
    )


def _at(data: bytes, place: int) -> int:
    """Follows the offset that stands at a place."""
    return place + int(struct.unpack_from("<I", data, place)[0])


def _field(data: bytes, table: int, number: int) -> int:
    """Returns the place of a table's field, 0 if it is absent."""
    names = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, names)
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", data, names + 4 + 2 * number)
    return table + int(offset) if offset else 0
