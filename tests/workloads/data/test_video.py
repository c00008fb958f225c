import io
import json
import tarfile

import av
import numpy as np
import pytest

from workloads.data.records import MediaError
from workloads.data.video import Video, frames_at, motion_vectors, probe

FORMATS = [
    ("mp4", "libx264", 2),
    ("mp4", "mpeg4", 0),
    ("avi", "mpeg4", 2),
    ("avi", "libx264", 2),
    ("matroska", "libx264", 0),
    ("mpegts", "libx264", 2),
]


@pytest.fixture(scope="module")
def encode_video():
    """`encode_video(60)`: 64 x 48, frame i is grey of level 4 * i % 256 with a square that moves 2 px a frame."""

    def encode(frames, container="mp4", codec="libx264", b_frames=2, gop=12, pts=None, size=(64, 48), **options):
        file = io.BytesIO()
        with av.open(file, "w", format=container, options=options) as out:
            stream = out.add_stream(codec, rate=25, options={"sc_threshold": "0"})
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            context = stream.codec_context
            context.gop_size, context.max_b_frames, context.thread_count = gop, b_frames, 1
            for i in range(frames):
                pixels = np.full((size[1], size[0], 3), 4 * i % 256, np.uint8)
                x = 2 * i % 40
                pixels[16:32, x : x + 16] = [255, 0, 0]
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = i if pts is None else pts[i]
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return file.getvalue()

    return encode


def all_frames(data):
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(("container", "codec", "b_frames"), FORMATS)
def test_frames_are_those_of_a_full_decode(encode_video, container, codec, b_frames):
    data = encode_video(60, container, codec, b_frames)
    reference, info = all_frames(data), probe(data)
    assert (info.frames, info.width, info.height) == (60, 64, 48)
    assert info.fps == pytest.approx(25) and info.duration_s == pytest.approx(2.4)
    assert np.allclose(info.times_s, np.arange(60) / 25, atol=1e-3)
    indices = [59, 3, 3, 0, 58, 30, 31]
    assert np.array_equal(frames_at(data, indices), reference[indices])
    assert frames_at(data, []).shape == (0, 48, 64, 3)


def test_a_clip_near_the_end_decodes_about_a_group_of_pictures(encode_video):
    data = encode_video(600, gop=30)
    with Video(data) as video:
        assert video.info.keyframes.tolist() == list(range(0, 600, 30))
        frames = video.frames(range(590, 600))
        assert 10 <= video.decoded <= 30
        before = video.decoded
        again = video.frames([0, 595])
        assert video.decoded - before <= 4 + 30  # frame 0 comes out after the decoder's delay
    assert np.array_equal(frames, all_frames(data)[590:]) and np.array_equal(again[1], frames[5])


def test_neighbouring_wanted_frames_are_decoded_in_one_go(encode_video):
    with Video(encode_video(48, b_frames=0, gop=24)) as video:
        video.frames([1, 5, 9, 23])
        assert video.decoded <= 24 + 1


def test_a_container_without_times_is_decoded_from_its_beginning(encode_video):
    """H.264 with B-frames in AVI: FFmpeg's time stamps number the packets there."""
    data = encode_video(60, "avi", "libx264", 2)
    with Video(data) as video:
        assert video.info.keyframes.tolist() == [0]
        assert np.array_equal(video.frames([57])[0], all_frames(data)[57]) and video.decoded >= 57


def test_a_varying_frame_rate_is_numbered_in_the_order_of_presentation(encode_video):
    pts = np.cumsum([0] + [1, 1, 10] * 10).tolist()
    data = encode_video(31, pts=pts)
    info = probe(data)
    assert info.frames == 31 and np.allclose(info.times_s, np.array(pts) / 25, atol=1e-3)
    assert info.duration_s > info.times_s[-1] and info.fps == pytest.approx(31 / info.duration_s)
    assert np.array_equal(frames_at(data, [4, 30]), all_frames(data)[[4, 30]])


def test_motion_vectors_say_how_far_blocks_moved(encode_video):
    data = encode_video(14, codec="mpeg4", b_frames=0, gop=12)
    key, *moved = motion_vectors(data, [0, 5, 6, 6])
    assert key.shape == (0, 7) and min(len(table) for table in moved) > 0
    assert np.array_equal(moved[1], moved[2]) and moved[0].dtype == np.int32
    shifts = moved[0][:, :2] - moved[0][:, 2:4]
    assert [-2, 0] in shifts.tolist()  # the square came from 2 px to the left
    assert set(moved[0][:, 6]) == {-1}
    assert any(1 in table[:, 6] for table in motion_vectors(encode_video(14), range(14)))  # B-frames look ahead


def audio_only():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def test_what_is_no_video_is_refused(tmp_path):
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/hostname\n"
    for data, why in [
        (b"", "0 bytes"),
        (b"\0" * 5000, "5000 bytes"),
        (playlist, "expected a video"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "expected a video"),
        (audio_only(), "without video"),
    ]:
        with pytest.raises(MediaError, match=why):
            probe(data)


@pytest.mark.parametrize(("container", "codec", "b_frames"), [row for row in FORMATS if row[0] != "mpegts"])
def test_no_truncated_file_passes_for_a_shorter_one(encode_video, container, codec, b_frames):
    data = encode_video(60, container, codec, b_frames)
    for length in (10, 100, 700, len(data) // 2, len(data) - 1):
        with pytest.raises(MediaError):
            probe(data[:length])


def test_fragments_may_be_missing_but_not_torn(encode_video):
    data = encode_video(60, codec="mpeg4", movflags="frag_keyframe+empty_moov")
    assert probe(data).frames == 60
    for length in (len(data) // 3, len(data) // 2, len(data) - 1):
        with pytest.raises(MediaError, match="expected at least"):
            probe(data[:length])


def test_a_truncated_file_with_its_index_in_front_is_refused(encode_video, tmp_path):
    whole = tmp_path / "whole.mp4"
    with (
        av.open(io.BytesIO(encode_video(60))) as source,
        av.open(str(whole), "w", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    data = whole.read_bytes()
    assert probe(data).frames == 60
    with pytest.raises(MediaError):
        probe(data[: len(data) * 3 // 4])


@pytest.mark.parametrize("container", ["mp4", "avi"])
def test_damage_is_an_error_or_a_picture(encode_video, container):
    data, rng = encode_video(24, container, gop=6), np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 20):
            damaged[place] = rng.integers(256)
        try:
            with Video(bytes(damaged)) as video:
                assert video.frames([video.info.frames - 1]).shape[0] == 1
        except MediaError as error:
            assert "expected" in str(error) or "copy it again" in str(error)


def test_too_many_pixels_and_frames_are_refused(encode_video, monkeypatch):
    data = encode_video(12)
    monkeypatch.setattr("workloads.data.video.MAX_WANTED_BYTES", 64 * 48 * 3 * 2)
    with pytest.raises(MediaError, match="3 frames of 64 x 48"):
        frames_at(data, [0, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr("workloads.data.video.MAX_FRAMES", 11)
        with pytest.raises(MediaError, match="more than 11 frames"):
            probe(data)
    monkeypatch.setattr("workloads.data.video.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(MediaError, match="1 to 3071 pixels"):
        probe(data)


def test_real_clips_have_the_frames_that_their_notes_say(data_folder):
    checked = 0
    for shard in sorted((data_folder / "video" / "weizmann4").glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in (name for name in members if name.endswith(".mp4")):
            info, notes = probe(members[name]), json.loads(members[name.replace(".mp4", ".json")])
            assert (info.frames, info.width, info.height) == (notes["frames"], 64, 64)
            assert info.fps == pytest.approx(notes["fps"])
            checked += 1
        last = frames_at(members[name], [info.frames - 1])[0]  # of the last clip of the shard
        assert np.array_equal(last, all_frames(members[name])[-1])
    assert checked == 60
