"""Encoded video -> the frames that are asked for, or a MediaError; a long file is never decoded as a whole.

Frames are numbered in the order in which they are shown, also where the frame rate varies: `times_s` says when.
Packets are listed once, without decoding. Decoding starts at the keyframe before each run of wanted frames and ends
with the last of them; a decoder with its own threads would run ahead, so it has one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.codec.context import Flags2
from av.video.codeccontext import VideoCodecContext
from numpy.typing import NDArray

from workloads.data.decode import MAX_PIXELS
from workloads.data.records import MediaError

MAX_FRAMES = 2_000_000  # 18 hours at 30 frames/s
MAX_WANTED_BYTES = 1 << 31  # of the different frames of one call
# No playlists: they name other files and addresses, which would then be opened.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,gif,h264,hevc"
MOTION_COLUMNS = ("src_x", "src_y", "dst_x", "dst_y", "w", "h", "source")
BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"free", b"skip", b"wide", b"styp", b"sidx", b"uuid", b"udta")
FAULTS = (av.FFmpegError, ValueError, LookupError, ArithmeticError)  # what PyAV raises on damaged data
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


@dataclass(frozen=True)
class VideoInfo:
    """What a file says before anything is decoded.

    Attributes:
        frames: how many are shown.
        fps: frames a second, on average.
        duration_s: from the first frame to the end of the last.
        width, height: in pixels, as stored; a rotation that the file notes is not applied.
        times_s: float64 [frames], when each is shown, rising from 0.
        keyframes: int64 [K], frames at which decoding can start. Frame 0 alone where the container does not say when
            its frames are shown (H.264 with B-frames in AVI): such a file is decoded from its beginning.
    """

    frames: int
    fps: float
    duration_s: float
    width: int
    height: int
    times_s: NDArray[np.float64]
    keyframes: NDArray[np.int64]


def probe(data: bytes) -> VideoInfo:
    """Frames, times and keyframes of an encoded video, without decoding; errors as of `Video`."""
    with Video(data) as video:
        return video.info


def frames_at(data: bytes, indices: Sequence[int]) -> NDArray[np.uint8]:
    """The frames of these numbers, uint8 [T, H, W, 3]; see `Video.frames`."""
    with Video(data) as video:
        return video.frames(indices)


def motion_vectors(data: bytes, indices: Sequence[int]) -> list[NDArray[np.int32]]:
    """The motion vectors that these frames were encoded with; see `Video.motion_vectors`."""
    with Video(data, motion=True) as video:
        return video.motion_vectors(indices)


class Video:
    """An encoded video whose packets are listed; a context, used by one thread.

    Attributes:
        info: see `VideoInfo`.
        decoded: packets that went through the decoder so far, wanted or not.
    """

    def __init__(self, data: bytes, *, motion: bool = False) -> None:
        """Lists the packets of the first video stream.

        Args:
            data: a file: mp4, mov, mkv, webm, avi, mpeg, ogg, flv, wmv, gif or a bare H.264 or HEVC stream.
            motion: whether `motion_vectors` will be asked for.

        Raises:
            MediaError: no video, a damaged one, or one of too many pixels or frames.
        """
        self.decoded, self._motion = 0, motion
        if (wanted := _declared_bytes(data)) > len(data):
            raise MediaError(f"got {len(data)} bytes of a video, expected at least {wanted}; copy it again")
        limits = {"max_pixels": str(MAX_PIXELS)}
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "", **limits}
        try:
            self._container = av.open(io.BytesIO(data), "r", options=options, metadata_errors="replace")
        except FAULTS as error:
            start = bytes(data[:12])
            raise MediaError(f"got {len(data)} bytes that start with {start!r} ({error}), expected a video") from error
        try:
            with _damage():
                self._list(limits)
        except MediaError:
            self._container.close()
            raise

    def _list(self, limits: dict[str, str]) -> None:
        if not self._container.streams.video:
            raise MediaError(f"got a file of format {self._container.format.name} without video, expected one")
        self._stream = self._container.streams.video[0]
        codec: Any = self._stream.codec_context
        if codec is None:
            raise MediaError("got a video of a codec that FFmpeg does not know, expected another; encode it again")
        self._codec: VideoCodecContext = codec
        self._codec.options, self._codec.thread_count = limits, 1
        if self._motion:
            self._codec.flags2 |= Flags2.export_mvs
        self._packets = list(self._demux())
        self._number = self._order()
        self.info, self._starts = self._describe()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _demux(self) -> Iterator[av.Packet[Any]]:
        count = 0
        for packet in self._container.demux(self._stream):
            if not packet.size:  # marks the end
                continue
            if packet.is_corrupt:
                raise MediaError(f"got a video that breaks off at frame {count}, expected a whole one; copy it again")
            if (count := count + 1) > MAX_FRAMES:
                raise MediaError(f"got more than {MAX_FRAMES} frames, expected at most so many; cut the video")
            yield packet

    def _order(self) -> dict[int, int] | None:
        """Time stamp -> number of the frame. None: the stamps say nothing, frames are counted as they are decoded."""
        stamps = [packet.pts for packet in self._packets if not packet.is_discard]
        known = sorted({stamp for stamp in stamps if stamp is not None})
        # FFmpeg fills in what AVI lacks. With B-frames rising stamps then number the packets, not the frames.
        made_up = self._container.format.name == "avi" and self._codec.has_b_frames and known == stamps
        return None if made_up or len(known) != len(stamps) else {stamp: number for number, stamp in enumerate(known)}

    def _describe(self) -> tuple[VideoInfo, list[int]]:
        """Also the packet of each keyframe."""
        width, height = self._codec.width, self._codec.height
        if not 0 < width * height <= MAX_PIXELS:  # 0: refused by FFmpeg itself
            raise MediaError(f"got frames of {width} x {height} pixels, expected 1 to {MAX_PIXELS} pixels")
        frames = sum(not packet.is_discard for packet in self._packets)
        if not frames:
            raise MediaError("got a video without frames, expected at least one")
        rate = float(self._stream.average_rate or 25)
        if self._number is None:
            times_s, starts = np.arange(frames) / rate, {0: 0}
        else:
            stamps = np.array(list(self._number))
            times_s = (stamps - stamps[0]) * float(self._stream.time_base or 1)
            keys = [place for place, packet in enumerate(self._packets) if packet.is_keyframe]
            numbers = [self._number.get(self._packets[place].pts or 0) for place in keys]
            # Decoding can always start with the first packet, whatever it is said to be.
            starts = {0: 0} | {n: place for n, place in zip(numbers, keys, strict=True) if n is not None and n > 0}
        # The last frame is shown as long as the others are on average.
        duration_s = float(times_s[-1]) * frames / (frames - 1) if frames > 1 else 1 / rate
        fps = frames / duration_s if duration_s > 0 else rate
        keyframes = np.array(sorted(starts), dtype=np.int64)
        info = VideoInfo(frames, fps, duration_s, width, height, times_s, keyframes)
        return info, [starts[number] for number in sorted(starts)]

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Decodes frames.

        Args:
            indices: T numbers of frames, in any order, also repeated.

        Returns:
            uint8 [T, H, W, 3], RGB.

        Raises:
            MediaError: a frame is damaged or missing, or the frames together take more than 2 GiB.
        """
        width, height = self.info.width, self.info.height
        if len(indices) * width * height * 3 > MAX_WANTED_BYTES:
            size = f"{len(indices)} frames of {width} x {height}"
            raise MediaError(f"got {size} to decode, expected at most {MAX_WANTED_BYTES} bytes; ask for fewer")
        result = np.empty((len(indices), height, width, 3), dtype=np.uint8)
        with _damage():
            for index, frame in self._decode(indices):
                pixels = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
                result[[place for place, wanted in enumerate(indices) if wanted == index]] = pixels
        return result

    def motion_vectors(self, indices: Sequence[int]) -> list[NDArray[np.int32]]:
        """Decodes the motion vectors of frames: where the encoder copied each block from.

        Args:
            indices: numbers of frames, in any order, also repeated.

        Returns:
            For each a table int32 [N, 7]: x and y of the block's centre where it comes from, x and y where it is put,
            its width and height, all in pixels, and `source`: below 0 from an earlier frame, above from a later one.
            Empty for keyframes, and for codecs of which FFmpeg tells no vectors (it does for H.264 and MPEG-1 to 4).

        Raises:
            MediaError: a frame is damaged or missing.
        """
        assert self._motion, "open it with motion=True: the decoder must know before its first frame"
        tables = {}
        with _damage():
            for index, frame in self._decode(indices):
                vectors = frame.side_data.get("MOTION_VECTORS")
                table = None if vectors is None else vectors.to_ndarray()
                columns = [] if table is None else [table[name] for name in MOTION_COLUMNS]
                tables[index] = np.array(columns, dtype=np.int32).reshape(len(MOTION_COLUMNS), -1).T
        return [tables[index] for index in indices]

    def _decode(self, indices: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Each different wanted frame once, rising."""
        assert not len(indices) or 0 <= min(indices) <= max(indices) < self.info.frames, "no such frame"
        fed, shown = -1, self._shown(0)
        for index in sorted({int(index) for index in indices}):
            start = self._starts[np.searchsorted(self.info.keyframes, index, side="right") - 1]
            if start > fed:
                shown = self._shown(start)
            for number, fed, frame in shown:  # noqa: B007
                if number >= index:
                    break
            else:
                raise MediaError(f"got a video that ends before frame {index} of {self.info.frames}; copy it again")
            if number != index or frame.is_corrupt:
                raise MediaError(f"got a video whose frame {index} is damaged, expected a whole one; copy it again")
            yield index, frame

    def _shown(self, start: int) -> Iterator[tuple[int, int, av.VideoFrame]]:
        """Frames from the keyframe in packet `start` on: number, last packet that the decoder has seen, frame."""
        self._codec.flush_buffers()
        count = 0
        for place in range(start, len(self._packets) + 1):
            ended = place == len(self._packets)
            self.decoded += not ended
            for frame in self._codec.decode(None if ended else self._packets[place]):
                stamp = -1 if frame.pts is None else frame.pts
                yield count if self._number is None else self._number.get(stamp, -1), place, frame
                count += 1


def _declared_bytes(data: bytes) -> int:
    """How long a file says that it is, 0 where it does not: FFmpeg takes a file that breaks off for a shorter one."""
    if data[4:8] == b"ftyp":
        place = 0
        while data[place + 4 : place + 8] in BOXES:
            size = int.from_bytes(data[place : place + 4], "big")
            if size == 1:
                size = int.from_bytes(data[place + 8 : place + 16], "big")
            if size < 8:  # 0: as long as the file
                break
            place += size
        return place
    if data[:4] == b"RIFF":
        return 8 + int.from_bytes(data[4:8], "little")
    if data[:4] == EBML:
        segment = _element_end(data, 4)
        if data[segment : segment + 4] == SEGMENT:
            return _element_end(data, segment + 4)
    return 0


def _element_end(data: bytes, place: int) -> int:
    """End of a Matroska element whose size, of 1 to 8 bytes, stands at `place`; 0 where it is left open."""
    first = data[place] if place < len(data) else 0
    length = 9 - first.bit_length()  # as many as there are leading zeros, and one
    size = int.from_bytes(data[place : place + length], "big") & ((1 << 7 * length) - 1)
    return 0 if size == (1 << 7 * length) - 1 else place + length + size


@contextmanager
def _damage() -> Iterator[None]:
    """What FFmpeg complains about is an error of the data."""
    try:
        yield
    except MediaError:
        raise
    except FAULTS as error:
        raise MediaError(f"got a damaged video ({error}), expected a whole one; copy it again") from error
