"""Batches: complete, deterministic, the same for any number of hosts, exact after a resume."""

import dataclasses
import json
import pickle

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from fabricate import make_record, write_dataset
from test_sources import damage_pixels

from rg_jax.data import mixture, pipeline
from rg_jax.data.pipeline import DataConfig, eval_batches, eval_samples, train_iterator
from rg_jax.data.sources import open_source
from rg_jax.data.tasks import COUNTER_NAMES, TASK_NAMES, drafts, get_task
from rg_jax.errors import UserError
from rg_jax.grounding.format import OURS
from rg_jax.grounding.spans import parse

CONFIG = DataConfig(image_size=16, text_len=200, threads=0)
TASKS = {"report": 1.0, "vqa": 1.0, "detect": 1.0}
KEYS = {"image", "text", "mask_ar", "mask_loss", "mask_input", "task", "counts"}


@pytest.fixture(scope="module")
def make(train, pictures, tokenizer):
    """An iterator over a mixture of both sets; every setting can be replaced."""

    def make(config=CONFIG, batch_size=8, seed=5, sources=None, **options):
        if sources is None:
            sources = [
                {"source": train, "tasks": TASKS, "weight": 3.0},
                {"source": pictures, "tasks": {"slake": 1.0, "detect_vqa": 1.0}, "weight": 1.0},
            ]
        return train_iterator(sources, tokenizer, OURS, config, batch_size, seed, **options)

    return make


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(a, b):
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one.keys() == two.keys() == KEYS
        for key in KEYS:
            np.testing.assert_array_equal(one[key], two[key], err_msg=key)


def joined(*parts):
    """Host by host, batch by batch: the batches of all hosts side by side."""
    return [{k: np.concatenate([b[k] for b in row]) for k in KEYS} for row in zip(*parts)]  # noqa: B905


def test_shapes_and_contents(make, tokenizer):
    for batch in take(make(), 6):
        shapes = {k: (v.shape, v.dtype) for k, v in batch.items()}
        rows = ((8, 200), np.int32)
        assert shapes == {
            "image": ((8, 16, 16, 3), np.float32),
            "text": rows,
            "mask_ar": rows,
            "mask_loss": rows,
            "mask_input": ((8, 200), bool),
            "task": ((8,), np.int32),
            "counts": ((8, len(COUNTER_NAMES)), np.int32),
        }
        assert np.abs(batch["image"]).max() <= 1
        for i in range(8):
            text, valid = batch["text"][i], batch["mask_input"][i]
            target = batch["mask_loss"][i].astype(bool)
            assert text[0] == 2 and not valid[valid.sum() :].any()
            assert (text[~valid] == 0).all() and (target <= valid).all()
            assert text[target][-1] == 1 and (text == 1).sum() == 1
            assert (batch["mask_ar"][i] == batch["mask_loss"][i]).all()
            task = get_task(TASK_NAMES[batch["task"][i]])
            parsed = parse(tokenizer.decode(text[target]), OURS)
            assert not parsed.malformed
            assert parsed.entities or task.name != "detect"
            assert not parsed.entities or task.name not in ("report", "vqa")


@pytest.mark.parametrize("weight", [1.0, 1e-5])
def test_batches_of_one(make, train, pictures, weight):
    """The first samples are those of larger batches, also where a source is rare."""
    sources = [
        {"source": train, "tasks": TASKS, "weight": 1.0},
        {"source": pictures, "tasks": {"slake": 1.0, "detect_vqa": 1.0}, "weight": weight},
    ]
    ones = take(make(batch_size=1, sources=sources), 4)
    same(
        [{k: np.concatenate([b[k] for b in ones]) for k in KEYS}],
        take(make(batch_size=4, sources=sources), 1),
    )


def test_deterministic_and_seeded(make):
    first = take(make(), 5)
    same(first, take(make(), 5))
    same(first, take(make(dataclasses.replace(CONFIG, threads=3, prefetch=4)), 5))
    other = take(make(seed=6), 5)
    assert any((a["text"] != b["text"]).any() for a, b in zip(first, other, strict=True))


def test_caching_changes_nothing(make, kept, train):
    def of(source, config):
        return make(config, sources=[{"source": source, "tasks": TASKS, "weight": None}])

    for config in (CONFIG, dataclasses.replace(CONFIG, augment=True)):
        same(take(of(train, config), 8), take(of(kept, config), 8))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_make_the_global_batch(make, hosts):
    config = dataclasses.replace(CONFIG, augment=True)
    whole = take(make(config), 7)
    parts = [take(make(config, process_index=p, process_count=hosts), 7) for p in range(hosts)]
    assert parts[0][0]["text"].shape[0] == 8 // hosts
    same(joined(*parts), whole)


def record_order(source, batch_size, seed, batches, weight=1.0):
    """Rows of the source in the order in which a mixture takes them, seen through its parts."""
    parts = mixture.open_parts([{"source": source, "tasks": TASKS, "weight": weight}], CONFIG, OURS)
    order = mixture.Order(0, parts[0].rows, seed)
    return [order(i)[1] for i in range(batch_size * batches)]


def test_every_epoch_has_every_record_once_in_its_own_order(train):
    order = record_order(train, 1, 5, 3 * len(train))
    epochs = [order[i : i + len(train)] for i in range(0, len(order), len(train))]
    assert all(sorted(epoch) == list(range(len(train))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(len(train)))
    assert order != record_order(train, 1, 6, 3 * len(train))
    # An order is a function of the number alone, however one gets there.
    place = mixture.Order(0, np.arange(len(train)), 5)
    assert [place(i)[1] for i in reversed(range(len(order)))] == order[::-1]


def test_mixture_weights(make, kept, data_dir):
    sources = [
        {"source": kept, "tasks": TASKS, "weight": 3.0},
        {
            "source": open_source("pictures", "train", data_dir, cache=True),
            "tasks": {"slake": 1.0, "detect_vqa": 1.0},
            "weight": 1.0,
        },
    ]
    tasks = np.concatenate([b["task"] for b in take(make(sources=sources), 60)])
    names = np.array(TASK_NAMES)[tasks]
    assert np.isin(names, ["slake", "detect_vqa"]).mean() == pytest.approx(0.25, abs=0.01)
    # All records of made_up are grounded in both languages: the paper's rule.
    assert (names == "detect").mean() == pytest.approx(0.75, abs=0.01)
    assert (names == "slake").mean() == pytest.approx(0.125, abs=0.05)
    free = dataclasses.replace(CONFIG, grounded_first=False)
    tasks = np.concatenate([b["task"] for b in take(make(free, sources=sources), 60)])
    names = np.array(TASK_NAMES)[tasks]
    for name in TASKS:
        assert (names == name).mean() == pytest.approx(0.25, abs=0.05)


def test_sources_without_weight_count_by_their_records(train, pictures):
    entries = [{"source": s, "tasks": {"vqa": 1.0}} for s in (train, pictures)]
    assert [p.weight for p in mixture.open_parts(entries, CONFIG, OURS)] == [37.0, 11.0]
    assert pipeline.count_usable(entries, CONFIG, OURS) == 48


def test_a_source_of_few_images_and_many_questions_counts_by_questions(train, pictures):
    """As the paper appends SLAKE: 4,919 questions are no 450 samples."""
    tasks = {"slake": 1.0, "report": 0.0}
    entries = [{"source": s, "tasks": tasks, "count": "questions"} for s in (train, pictures)]
    asked = [
        sum(len(drafts(s[row], "slake", language, OURS)[0]) for language in ("en", "de"))
        for s in (train, pictures)
        for row in range(len(s))
    ]
    asked = [sum(asked[: len(train)]), sum(asked[len(train) :])]
    assert asked[1] > len(pictures)
    assert [p.weight for p in mixture.open_parts(entries, CONFIG, OURS)] == asked
    assert pipeline.count_usable(entries, CONFIG, OURS) == sum(asked)
    weighted = [{**entry, "weight": 2.0} for entry in entries]
    assert [p.weight for p in mixture.open_parts(weighted, CONFIG, OURS)] == [2.0, 2.0]
    with pytest.raises(
        UserError, match="count 'images' is not one of records, captions, questions"
    ):
        mixture.open_parts([{**entries[0], "count": "images"}], CONFIG, OURS)


def test_slices_with_one_caption_take_turns(tmp_path, tokenizer):
    """A sample is a caption: each comes once in an epoch, with a slice that is drawn anew."""
    made = [make_record(i) for i in range(9)]
    for i in (4, 5, 6, 7):  # five slices of one caption, four of their own
        made[i] = {**made[3], "id": f"twin-{i}"}
    write_dataset(tmp_path, {"train": made}, name="twins")
    source = open_source("twins", "train", tmp_path)
    entry = {"source": source, "tasks": {"report": 1.0}, "count": "captions"}
    (part,) = mixture.open_parts([entry], CONFIG, OURS)
    assert pipeline.count_usable([entry], CONFIG, OURS) == part.size == part.weight == 5
    order = mixture.Order(0, part.rows, 1, part.starts)
    captions, shown = [], []
    for number in range(5 * 60):
        record = source[order(number)[1]]
        captions.append(record["texts"]["en"]["caption"])
        shown += [record["id"]] if captions[-1] == made[3]["texts"]["en"]["caption"] else []
    epochs = [captions[i : i + 5] for i in range(0, len(captions), 5)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    counts = [shown.count(name) for name in dict.fromkeys(shown)]
    assert len(counts) == 5 and min(counts) > 3 and sum(counts) == 60
    again = mixture.Order(0, part.rows, 1, part.starts)
    assert [again(n)[1] for n in (299, 3, 77)] == [order(n)[1] for n in (299, 3, 77)]
    batch = next(train_iterator([entry], tokenizer, OURS, CONFIG, 8, 0))
    assert batch["text"].shape == (8, CONFIG.text_len)


def test_records_without_a_task_are_left_out_and_logged(data_dir, caplog):
    mixed = open_source("made_up", "mixed", data_dir)
    with caplog.at_level("INFO"):
        count = pipeline.count_usable([{"source": mixed, "tasks": TASKS}], CONFIG, OURS)
    assert count == 4 and "4 records used, 3 have none" in caplog.text


@pytest.mark.parametrize("point", [0, 1, 7])
def test_resume_is_exact(make, point):
    config = dataclasses.replace(CONFIG, augment=True, threads=2, prefetch=3)
    whole = take(make(config), point + 4)
    first = make(config)
    take(first, point)
    state = json.loads(json.dumps(first.get_state()))
    take(first, 2)
    same(take(first, 2), whole[point + 2 :])
    second = make(config)
    next(second)
    second.set_state(state)
    assert second.get_state() == state
    same(take(second, 4), whole[point:])
    first.set_state(state)
    same(take(first, 1), whole[point : point + 1])


def test_a_state_fits_any_number_of_hosts(make):
    whole = take(make(), 6)
    alone = make()
    take(alone, 3)
    halves = [make(process_index=p, process_count=2) for p in range(2)]
    for half in halves:
        half.set_state(alone.get_state())
    same(joined(*[take(half, 3) for half in halves]), whole[3:])


def test_grain_checkpoints(make, tmp_path):
    whole = take(make(), 6)
    iterator = make()
    take(iterator, 4)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        restored = make()
        args = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored))
        manager.restore(4, args=args)
    same(take(restored, 2), whole[4:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 16}, "batch_size 8, now it is 16"),
        ({"seed": 6}, "seed 5, now it is 6"),
        ({"sources": ...}, "sources .*made_up"),
    ],
)
def test_a_state_of_another_order_is_refused(make, train, change, message):
    state = make().get_state()
    if "sources" in change:
        change = {"sources": [{"source": train, "tasks": TASKS}]}
    with pytest.raises(UserError, match=message):
        make(**change).set_state(state)


def test_worker_processes(make, data_dir, monkeypatch):
    """Same batches, exact resume, and a damaged record's message comes through."""
    config = dataclasses.replace(CONFIG, augment=True, threads=1)
    whole = take(make(config), 6)
    iterator = make(config, workers=2)
    same(take(iterator, 3), whole[:3])
    state = iterator.get_state()
    iterator.close()
    resumed = make(config, workers=1)
    resumed.set_state(state)
    same(take(resumed, 2), whole[3:5])
    resumed.close()


def test_a_closed_iterator_says_so(make):
    iterator = make()
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize("threads", [0, 1])
def test_a_damaged_record_is_named(data_dir, tokenizer, monkeypatch, threads):
    source = open_source("made_up", "train", data_dir)
    damage_pixels(monkeypatch, source, "rec0_0007")
    config = dataclasses.replace(CONFIG, threads=threads)
    iterator = train_iterator([{"source": source, "tasks": TASKS}], tokenizer, OURS, config, 4, 0)
    with pytest.raises(UserError, match="rec0_0007 of data set made_up, split train"):
        take(iterator, 12)
    iterator.close()


def test_a_damaged_record_is_named_by_workers_too(tmp_path, tokenizer):
    write_dataset(tmp_path, {"train": [make_record(i) for i in range(6)]}, name="spoilt")
    source = open_source("spoilt", "train", tmp_path)
    source.scan(CONFIG.languages, OURS)
    file = next(source.directory.glob("*array_record*"))
    file.write_bytes(file.read_bytes()[:200])
    iterator = train_iterator(
        [{"source": source, "tasks": TASKS}], tokenizer, OURS, CONFIG, 4, 0, workers=1
    )
    with pytest.raises(UserError, match="spoilt.*python -m tfds_builders spoilt"):
        next(iterator)
    iterator.close()


def test_mistakes_in_a_mixture(make, train, data_dir):
    bare = open_source("made_up", "bare", data_dir)
    for sources, message in (
        ([], "no source"),
        ([{"source": train, "tasks": {"retort": 1.0}}], "'retort' is not one of"),
        ([{"source": train, "tasks": {"report": -1.0}}], "negative"),
        ([{"source": train, "tasks": {"report": 0.0}}], "no task has a weight"),
        ([{"source": train, "tasks": {}}], "no task has a weight"),
        ([{"source": train, "tasks": TASKS, "weight": 0}], "weight 0.0 must be above 0"),
        ([{"source": train, "tasks": TASKS, "wieght": 1}], "unknown field wieght"),
        ([{"source": bare, "tasks": TASKS}], "made_up/bare.*no record can be used for report"),
    ):
        with pytest.raises(UserError, match=message):
            make(sources=sources)
    with pytest.raises(UserError, match="batch_size 6 cannot be split evenly over 4"):
        make(batch_size=6, process_count=4)
    with pytest.raises(UserError, match=r"text_len 4 is too small: .*'report' in 'en' .* \d+ tok"):
        make(dataclasses.replace(CONFIG, text_len=4), sources=[{"source": train, "tasks": TASKS}])
    with pytest.raises(UserError, match="seed -1"):
        make(seed=-1)
    for field, value in (
        ("style", "vivid"),
        ("languages", ("fr",)),
        ("languages", ()),
        ("text_len", 0),
        ("augment", {"colour": 1}),
    ):
        with pytest.raises(UserError, match=f"config field {field}"):
            DataConfig(**{"image_size": 16, field: value})
    with pytest.raises(UserError, match="separator"):
        make(dataclasses.replace(CONFIG, separator="glued"))


def test_augment_setting():
    assert DataConfig(image_size=8).augment is None
    assert DataConfig(image_size=8, augment=True).augment.crop_min == 0.9
    config = DataConfig(image_size=8, augment={"shift": 5, "gamma": [0.5, 2]})
    assert config.augment.shift == 5 and config.augment.gamma == (0.5, 2.0)


def test_crops_never_falsify_an_answer(make, kept, tokenizer):
    """A grounded answer whose structure would be cut off is asked about the whole image."""
    config = dataclasses.replace(CONFIG, augment={"crop_min": 0.3})
    sources = [{"source": kept, "tasks": {"detect_vqa": 1.0, "detect": 1.0}}]
    config = dataclasses.replace(config, grounded_first=False)
    seen = dict.fromkeys(COUNTER_NAMES, 0)
    for batch in take(make(config, sources=sources), 20):
        for i in range(8):
            counts = dict(zip(COUNTER_NAMES, batch["counts"][i].tolist(), strict=True))
            text = tokenizer.decode(batch["text"][i][batch["mask_loss"][i] > 0])
            if TASK_NAMES[batch["task"][i]] == "detect_vqa":
                assert parse(text, OURS).entities and not counts["entities_dropped_by_crop"]
            if counts["detect_became_report"]:
                assert TASK_NAMES[batch["task"][i]] == "report" and "<p bbox" not in text
            seen = {k: seen[k] + counts[k] for k in seen}
    assert seen["crop_withdrawn"] > 5 and seen["entities_dropped_by_crop"] > 5


def test_eval_samples_are_complete_and_in_order(kept, data_dir):
    train = kept
    tasks = {"report": 1.0, "detect": 1.0, "vqa": 1.0, "detect_vqa": 0.0}
    samples = eval_samples(train, tasks, ("en", "de"), OURS, CONFIG)
    assert len(samples) == 37 * 2 * (1 + 1 + 2)
    assert len({s.id for s in samples}) == len(samples)
    assert samples == eval_samples(train, ["report", "detect", "vqa"], ("en", "de"), OURS, CONFIG)
    assert [s.task for s in samples] == ["report"] * 74 + ["detect"] * 74 + ["vqa"] * 148
    detect = [s for s in samples if s.task == "detect"]
    assert all(s.entities and "Clinical" in s.prefix or "Klinische" in s.prefix for s in detect)
    some = eval_samples(train, tasks, ("en", "de"), OURS, CONFIG, limit=16)
    assert len(some) == 16 and [s for s in samples if s in some] == some
    assert len({(s.task, s.language, s.id[-1]) for s in some}) == 8
    assert eval_samples(train, tasks, ("en",), OURS, CONFIG, limit=10**6)
    bare = open_source("made_up", "bare", data_dir)
    with pytest.raises(UserError, match="made_up/bare.*report"):
        eval_samples(bare, ["report"], ("en",), OURS, CONFIG)
    with pytest.raises(UserError, match="limit 0"):
        eval_samples(train, tasks, ("en",), OURS, CONFIG, limit=0)


def test_eval_batches(kept, tokenizer):
    train = kept
    samples = eval_samples(train, ["report", "detect"], ("en",), OURS, CONFIG, limit=21)
    batches = list(eval_batches(samples, train, tokenizer, CONFIG, 8))
    assert len(batches) == 3 and len({b["text"].shape for b in batches}) == 1
    width = batches[0]["text"].shape[1]
    assert width % 16 == 0 and width < CONFIG.text_len
    index = np.concatenate([b["index"] for b in batches])
    assert index.tolist() == [*range(21), -1, -1, -1]
    packer_rows = 0
    for batch in batches:
        for i, number in enumerate(batch["index"]):
            sample = samples[number if number >= 0 else 0]
            ids = batch["text"][i][batch["mask_input"][i]]
            assert ids[0] == 2 and tokenizer.decode(ids) == sample.prefix + "\n"
            assert TASK_NAMES[batch["task"][i]] == sample.task
            expected = mixture.prepare_image(train[train.row_of(sample.record_id)], 16)[0]
            np.testing.assert_array_equal(batch["image"][i], expected)
            packer_rows += 1
    assert packer_rows == 24
    short = dataclasses.replace(CONFIG, prefix_len=40)
    cut = list(eval_batches(samples, train, tokenizer, short, 8))
    assert cut[0]["text"].shape == (8, 40)
    assert sum(b["counts"][:, COUNTER_NAMES.index("context_cut")].sum() for b in cut) > 0
    assert not list(eval_batches([], train, tokenizer, CONFIG, 8))


def test_eval_batches_with_targets_and_hosts(train, tokenizer):
    samples = eval_samples(train, ["detect"], ("en",), OURS, CONFIG, limit=11)
    whole = list(eval_batches(samples, train, tokenizer, CONFIG, 4, targets=True))
    halves = [
        list(
            eval_batches(
                samples, train, tokenizer, CONFIG, 4, OURS, process_index=p, process_count=2,
                targets=True,
            )
        )
        for p in range(2)
    ]  # fmt: skip
    for batch, *parts in zip(whole, *halves, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([p[key] for p in parts]))
        for i, number in enumerate(batch["index"]):
            ids = batch["text"][i][batch["mask_loss"][i] > 0]
            assert tokenizer.decode(ids) == samples[max(number, 0)].target and ids[-1] == 1
    with pytest.raises(UserError, match="batch_size 3"):
        next(eval_batches(samples, train, tokenizer, CONFIG, 3, process_count=2))


def test_what_a_worker_gets_travels_without_its_caches(train, tokenizer, make):
    parts = mixture.open_parts([{"source": train, "tasks": TASKS}], CONFIG, OURS)
    maker = mixture.Maker(parts, pipeline.Packer(tokenizer, OURS, 96), CONFIG, 0)
    side = CONFIG.image_size
    image, other = np.zeros((2, side, side, 3), np.float32)
    row, task, _ = maker(3, (0, 2), image)
    size = len(pickle.dumps(maker))
    copy = pickle.loads(pickle.dumps(maker))
    again = copy(3, (0, 2), other)
    assert image.any() and (other == image).all() and (again[0].prefix == row.prefix).all()
    assert again[1] == task and len(pickle.dumps(maker)) == size
