import io
import tarfile

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from workloads.data.keys import uniform
from workloads.data.records import MediaError
from workloads.data.transforms import image
from workloads.data.transforms.video import ClipView, execute, sample
from workloads.data.video import VideoInfo, frames_at

SHARED = {"size": 16, "crop_scale": (0.3, 1.0), "flip": 0.5}


@pytest.fixture(scope="module")
def videos():
    """Three clips of 10, 24 and 40 frames; frame i is of grey level 6 * i, its left half darker."""

    def encode(frames):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as out:
            stream = out.add_stream("libx264", rate=10, options={"crf": "1"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.codec_context.thread_count = 1
            for i in range(frames):
                pixels = np.full((48, 64, 3), 6 * i, np.uint8)
                pixels[:, :32] //= 2
                out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            out.mux(stream.encode())
        return file.getvalue()

    return [encode(frames) for frames in (10, 24, 40)]


def info(frames, fps=10.0, times_s=None):
    times_s = np.arange(frames) / fps if times_s is None else np.asarray(times_s, float)
    return VideoInfo(frames, fps, frames / fps, 64, 48, times_s, np.zeros(1, np.int64))


def drawn(view, video, keys=300):
    return torch.stack([sample(view, video, torch.tensor([key]), "v") for key in range(keys)])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([{}, {"stride": 3}, {"sampling": "segments"}, {"sampling": "seconds", "seconds": 1.7}]),
    st.integers(1, 50),
    st.integers(1, 20),
    st.booleans(),
    st.integers(0, 2**60),
)
def test_every_sample_lies_in_the_video_and_rises(how, frames, clip, random_time, key):
    view = ClipView(frames=clip, size=8, random_time=random_time, **how)
    indices = sample(view, info(frames), torch.tensor([key]))
    assert indices.shape == (clip,) and indices.dtype == torch.int64
    assert indices.min() >= 0 and indices.max() < frames and (indices.diff() >= 0).all()


def test_strides_begin_everywhere_and_clamp_where_the_video_is_short():
    view = ClipView(frames=4, stride=3, size=8)
    indices = drawn(view, info(12))
    assert (indices.diff(dim=1) == 3).all() and set(indices[:, 0].tolist()) == {0, 1, 2}
    assert sample(view, info(8), torch.tensor([1])).tolist() == [0, 3, 6, 7]
    middle = view.model_copy(update={"random_time": False})
    assert sample(middle, info(12), torch.tensor([1])).tolist() == [1, 4, 7, 10]


def test_segments_give_one_frame_each():
    view = ClipView(frames=5, sampling="segments", size=8)
    indices = drawn(view, info(20))
    assert torch.equal(indices // 4, torch.arange(5).expand(300, 5))
    assert all(set((indices[:, t] % 4).tolist()) == {0, 1, 2, 3} for t in range(5))
    assert len({tuple(row) for row in (indices % 4).tolist()}) > 100  # each segment draws for itself
    middle = view.model_copy(update={"random_time": False})
    assert sample(middle, info(20), torch.tensor([7])).tolist() == [2, 6, 10, 14, 18]
    assert sample(middle, info(3), torch.tensor([7])).tolist() == [0, 0, 1, 2, 2]


def test_seconds_follow_the_clock_where_the_frame_rate_varies():
    view = ClipView(frames=4, sampling="seconds", seconds=4, size=8, random_time=False)
    times = [0, 0.1, 0.2, 0.3, 2.0, 3.0]
    assert sample(view, info(6, 1.5, times), torch.tensor([0])).tolist() == [3, 3, 4, 5]
    starts = drawn(view.model_copy(update={"random_time": True}), info(100))[:, 0]
    assert starts.min() >= 5 and starts.max() <= 65 and len(starts.unique()) > 40  # the first is 0.5 s in


def test_a_clip_is_the_frames_through_one_cut(videos):
    view = ClipView(frames=6, stride=2, **SHARED)
    keys = torch.tensor([3, 1, 4])
    clips, geometry = execute(view, videos, keys, "v")
    assert clips.shape == (3, 3, 6, 16, 16) and clips.dtype == torch.uint8
    assert geometry.frame.crop.shape == (3, 4) and torch.allclose(geometry.times_s * 10, geometry.indices.double())
    for i, data in enumerate(videos):
        frames = frames_at(data, geometry.indices[i].tolist())
        for t in range(6):
            alone, cut = image.execute(view.frame, [frames[t]], keys[i : i + 1], "v")
            assert torch.equal(clips[i, :, t], alone[0]) and torch.equal(cut.crop[0], geometry.frame.crop[i])
            assert bool(cut.flip[0]) == bool(geometry.frame.flip[i])


@pytest.mark.parametrize("sampling", [{"stride": 2}, {"sampling": "segments"}, {"sampling": "seconds", "seconds": 1}])
def test_a_clip_does_not_depend_on_its_batch(videos, sampling):
    view, keys = ClipView(frames=4, **SHARED, **sampling), torch.tensor([9, 8, 7])
    together, geometry = execute(view, videos, keys, "v")
    for i, data in enumerate(videos):
        alone, one = execute(view, [data], keys[i : i + 1], "v")
        assert torch.equal(alone[0], together[i]) and torch.equal(one.indices[0], geometry.indices[i])
    again, _ = execute(view, videos, keys, "v")
    other, shifted = execute(view, videos, keys, "w")
    assert torch.equal(again, together) and not torch.equal(other, together)
    assert not torch.equal(shifted.indices, geometry.indices)


def test_photometry_by_repeated_keys_is_the_same_in_all_frames_of_a_clip(videos):
    clips, _ = execute(ClipView(frames=4, size=8), videos, torch.arange(3))
    images, keys = clips.transpose(1, 2).flatten(0, 1), torch.arange(3).repeat_interleave(4)
    assert images.data_ptr() == clips.data_ptr() and images.is_contiguous()
    factor = uniform(keys, 1, "brightness").float()[:, :, None, None]
    jittered = images.clamp(min=1) * factor
    ratio = (jittered / images.clamp(min=1)).unflatten(0, (3, 4)).flatten(1)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio)) and len(ratio[:, 0].unique()) == 3
    assert images.shape == (12, 3, 8, 8) and torch.equal(images[4 + 2], clips[1, :, 2])


def test_a_plain_view_needs_no_keys_and_a_drawing_one_does(videos):
    view = ClipView(frames=3, size=8, random_time=False)
    assert not view.draws and execute(view, videos)[0].shape == (3, 3, 3, 8, 8)
    with pytest.raises(AssertionError, match="keys"):
        execute(ClipView(frames=3, size=8), videos)


def test_a_damaged_video_is_a_typed_error(videos):
    with pytest.raises(MediaError):
        execute(ClipView(frames=3, size=8, random_time=False), [videos[0], videos[1][:-200]])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"sampling": "seconds"}, "number of seconds"),
        ({"seconds": 2}, "number of seconds"),
        ({"stride": 2, "sampling": "segments"}, "stride=2"),
        ({"crop_scale": (0, 1)}, "crop_scale"),
        ({"std": (0, 1, 1)}, "std"),
        ({"fames": 2}, "fames"),
    ],
)
def test_wrong_views_are_refused(wrong, why):
    with pytest.raises(ValidationError, match=why):
        ClipView(**{"frames": 2, "size": 8, **wrong})


def test_real_clips(data_folder):
    with tarfile.open(data_folder / "video" / "weizmann4" / "test-000000.tar") as tar:
        data = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".mp4")]
    view = ClipView(frames=8, sampling="segments", **SHARED)
    clips, geometry = execute(view, data, torch.arange(len(data)))
    assert clips.shape == (12, 3, 8, 16, 16) and clips.float().std(dim=2).mean() > 1  # people move
    assert geometry.frame.size.eq(64).all() and geometry.times_s.max() > 1
