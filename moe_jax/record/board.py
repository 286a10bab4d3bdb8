"""Writes TensorBoard's event files on the caller's thread.

tensorboardX's own writer passes events to a thread through a queue of ten.  A full disk ends that
thread, and a clock that is set back makes it sleep: a later `add_scalar` then blocks forever.
"""

import pathlib
import re
import socket
import struct
import textwrap
import time
from collections.abc import Callable, Iterable

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar
from tensorboardX.summary import text as as_text

from moe_jax.files.lines import GrowingFile
from moe_jax.record.heat_map import Picture

_VERSION = "brain.Event:2"
_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\..*")


class Board:
    """One event file of a run.

    Args:
      folder: folder of the file, created if it is missing.
      names: names of the run's existing event files.
      purge_step: TensorBoard hides earlier files' events from this step on; None: hides none.
      say: as in `GrowingFile`.

    Raises:
      OSError: the file cannot be opened.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        names: Iterable[str],
        purge_step: int | None,
        say: Callable[[str], None],
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = GrowingFile(folder / _next_name(names), say)
        self._write(Event(file_version=_VERSION))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=purge_step, file_version=_VERSION))
            self._write(Event(step=purge_step, session_log=start))

    def add(self, step: int, scalars: Iterable[tuple[str, float]]) -> None:
        """Append one event with the (tag, number) pairs of a step."""
        event = Event(step=step)
        for tag, number in scalars:
            event.summary.value.extend(scalar(tag, number).value)
        self._write(event)

    def text(self, step: int, tag: str, text: str) -> None:
        """Append a text, which TensorBoard shows verbatim."""
        event = Event(step=step)
        # TensorBoard renders Markdown: lines indented by four spaces are code.
        event.summary.value.extend(
            as_text(tag, textwrap.indent(text, "    ", lambda line: True)).value
        )
        event.summary.value[0].tag = tag  # without the suffix that tensorboardX adds
        self._write(event)

    def image(self, step: int, tag: str, picture: Picture, description: str) -> None:
        """Append a picture; TensorBoard shows `description`, in Markdown, with it."""
        event = Event(step=step)
        value = event.summary.value.add(tag=tag)
        value.metadata.summary_description = description
        value.image.width, value.image.height = picture.width, picture.height
        value.image.colorspace = 3  # RGB
        value.image.encoded_image_string = picture.png
        self._write(event)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.append(_record(event.SerializeToString()))


def _next_name(names: Iterable[str]) -> str:
    """A name that sorts after all of `names`, because TensorBoard orders files by name.

    The clock's second alone does not ensure that: the clock may be set back, and a run may rewind
    within a second.
    """
    seconds = [int(match[1]) for match in map(_NAME.fullmatch, names) if match]
    now = max([int(time.time()), *(second + 1 for second in seconds)])
    return f"events.out.tfevents.{now:010d}.{socket.gethostname()}"


def _record(data: bytes) -> bytes:
    """`data` framed as TFRecord: length, its checksum, data, its checksum."""
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return b"".join((length, next(checksums), data, next(checksums)))
