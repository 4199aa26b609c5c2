import dataclasses

import pytest
from bounds import spread

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.clip_index import Clip, assign_splits, dumps, loads, order_clips
from keysync_jax.data_pipeline.shard_plan import plan_shards

HALVES = {"train": 0.5, "test": 0.5}


def people(count, per=4, start=0):
    return [Clip(f"p{i:04d}_{k}", 50, speaker=f"p{i:04d}", source="s") for i in range(start, start + count) for k in range(per)]


def test_no_speaker_is_in_two_splits_and_shares_are_met():
    fractions = {"train": 0.8, "validation": 0.1, "test": 0.1}
    clips = assign_splits(people(1000), fractions, seed=3)
    by_speaker = {}
    for clip in clips:
        by_speaker.setdefault(clip.speaker, set()).add(clip.split)
    assert all(len(s) == 1 for s in by_speaker.values())
    counts = {s: sum(v == {s} for v in by_speaker.values()) for s in ("train", "validation", "test")}
    assert counts["train"] == pytest.approx(800, abs=1000 * spread((0.8 * 0.2) ** 0.5, 1000))
    assert counts["validation"] == pytest.approx(100, abs=1000 * spread((0.1 * 0.9) ** 0.5, 1000))
    assert [c.split for c in clips] != [c.split for c in assign_splits(people(1000), fractions, seed=4)]


def test_adding_videos_moves_nobody():
    before = assign_splits(people(50), HALVES)
    after = assign_splits(people(80), HALVES)
    assert after[: len(before)] == before


def test_given_splits_hold_for_the_whole_speaker_and_beat_the_hash():
    clips = people(40)
    clips = [dataclasses.replace(c, split="test") if c.id.endswith("_2") else c for c in clips]
    assert {c.split for c in assign_splits(clips, {"train": 1.0})} == {"test"}
    existing = [dataclasses.replace(c, split="validation") for c in people(2)]
    later = assign_splits([Clip("new", 30, speaker="p0001", source="s")], HALVES, existing=existing)
    assert later[0].split == "validation"


def test_what_is_learnt_about_a_clip_does_not_move_it():
    """Speakers that a manifest names only later, or no more: the clips stay, and so does whoever else is that speaker."""
    clips = [Clip(f"v{i}", 20, video=f"{i}.mp4") for i in range(40)]
    before = assign_splits(clips, HALVES)
    assert {c.split for c in before} == {"train", "test"}
    named = [dataclasses.replace(c, speaker=f"p{i}") for i, c in enumerate(clips)]
    assert [c.split for c in assign_splits(named, HALVES, existing=before)] == [c.split for c in before]
    known = assign_splits(named, HALVES, existing=before)
    more = assign_splits([Clip(f"w{i}", 20, video=f"new{i}.mp4", speaker=f"p{i}") for i in range(40)], HALVES, existing=known)
    assert [c.split for c in more] == [c.split for c in before]
    assert [c.split for c in assign_splits(clips, HALVES, existing=known)] == [c.split for c in before]
    two = [dataclasses.replace(c, speaker="Ann") for c in clips]
    with pytest.raises(KeySyncError, match="speaker 'Ann' .* is in two splits"):
        assign_splits(two, HALVES, existing=before)


@pytest.mark.parametrize("name", ["tr/ain", "../x", "a b", "träin"])
def test_a_split_that_is_no_part_of_a_file_name_is_refused(name):
    with pytest.raises(KeySyncError, match="clip 'a': split .* must be letters"):
        Clip("a", 9, split=name)


def test_a_speaker_given_two_splits_is_refused_by_name():
    clips = [Clip("a", 9, split="train", speaker="Ann", source="s"), Clip("b", 9, split="test", speaker="Ann", source="s")]
    with pytest.raises(KeySyncError, match="speaker 'Ann' of source 's' is in two splits: 'train' .clip 'a'. and 'test' .clip 'b'."):
        assign_splits(clips)
    with pytest.raises(KeySyncError, match="'Ann'"):
        order_clips(clips)


def test_clips_of_one_video_stay_together_when_the_speaker_is_unknown():
    clips = [Clip(f"{v}_{k}", 20, video=f"{v}.mp4") for v in range(60) for k in range(3)]
    splits = {}
    for clip in assign_splits(clips, HALVES):
        splits.setdefault(clip.video, set()).add(clip.split)
    assert all(len(s) == 1 for s in splits.values()) and {"train"} in splits.values() and {"test"} in splits.values()


def test_fractions_must_sum_to_one():
    with pytest.raises(KeySyncError, match="sum to 1"):
        assign_splits(people(1), {"train": 0.9})


def test_order_and_text_round_trip():
    clips = [
        Clip("b", 30, split="train", speaker="\u2028odd", scores={"quality": 0.5}, extra={"box": [1, 2]}),
        Clip("a", 20, split="train", batch=1), Clip("c", 10, split="train"), Clip("z", 5, split="test", consent="yes", licence="CC0"),
    ]  # fmt: skip
    ordered = order_clips(clips)
    assert [(c.id, c.first_record) for c in ordered] == [("z", 0), ("b", 0), ("c", 30), ("a", 40)]
    assert loads(dumps(ordered), "x") == ordered
    assert dumps(ordered) == dumps(order_clips(clips[::-1]))
    latin = order_clips([Clip("a", 1, split="train", video=b"caf\xe9.mp4".decode(errors="surrogateescape"))])
    assert loads(dumps(latin).encode().decode(), "x") == latin  # a file name that is not UTF-8
    with pytest.raises(KeySyncError, match="occurs twice"):
        order_clips([*clips, clips[0]])
    with pytest.raises(KeySyncError, match="cannot be written"):
        dumps([Clip("a", 1, scores={"quality": float("nan")})])


@pytest.mark.parametrize(
    "old, new",
    [('": ""}\n', '": "'), ('"num_frames": 30', '"frames": 30'), ('record": 40', 'record": 41'), ('frames": 40', 'frames": "40"')],
)
def test_damaged_index_is_refused(old, new):
    text = dumps(order_clips([Clip("a", 40, split="train"), Clip("b", 30, split="train")]))
    with pytest.raises(KeySyncError, match="clips.jsonl"):
        loads(text.replace(old, new), "clips.jsonl")
    assert old in text


def covered(shards, split):
    return [(p.clip, f) for s in shards if s.split == split for p in s.pieces for f in range(p.start, p.stop)]


def test_plan_covers_every_frame_once_in_storage_order():
    clips = order_clips(Clip(f"c{i:03d}", 10 + (37 * i) % 90, split="train" if i % 3 else "test") for i in range(100))
    shards = plan_shards(clips, 300)
    for split in ("train", "test"):
        assert covered(shards, split) == [(c.id, f) for c in clips if c.split == split for f in range(c.num_frames)]
        mine = [s for s in shards if s.split == split]
        assert [s.index for s in mine] == list(range(len(mine)))
        assert [s.first_record for s in mine] == [sum(t.num_records for t in mine[:i]) for i in range(len(mine))]
        assert all(150 <= s.num_records <= 375 for s in mine)


def test_cuts_fall_between_clips_when_these_are_short_and_inside_long_ones():
    short = plan_shards(order_clips(Clip(f"c{i:03d}", 20, split="train") for i in range(100)), 500)
    assert len(short) == 4 and all(p.start == 0 and p.stop == 20 for s in short for p in s.pieces)
    long = plan_shards(order_clips([Clip("a", 1700, split="train")]), 500)
    assert [s.num_records for s in long] == [425] * 4 and [s.pieces[0].start for s in long] == [0, 425, 850, 1275]


def test_a_later_batch_leaves_earlier_shards_alone():
    first = [Clip(f"m{i}", 60, split="train") for i in range(10)]
    later = [Clip(f"a{i}", 45, split="train", batch=1) for i in range(7)]  # ids that sort before the earlier ones
    before = plan_shards(order_clips(first), 200)
    after = plan_shards(order_clips([*first, *later]), 200)
    assert after[: len(before)] == before and after[len(before)].first_record == 600
    assert [c for c, _ in covered(after, "train")][600] == "a0"
