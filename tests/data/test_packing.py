"""Rows of tokens: layout, masks, and the length budget."""

import pickle

import numpy as np
import pytest
from fabricate import make_record

from rg_jax.data import packing
from rg_jax.data.packing import Packer, pack
from rg_jax.data.tasks import COUNTER_NAMES, TASK_NAMES, Sample, drafts, make_sample
from rg_jax.data.tokenizer import Tokenizer, train_tokenizer
from rg_jax.errors import UserError
from rg_jax.grounding.format import OURS, PUBLISHED_DETECTION, GroundingFormat
from rg_jax.grounding.spans import parse


def counters(row):
    return {n: c for n, c in zip(COUNTER_NAMES, row.counts, strict=True) if c}


def test_the_layout_of_a_row(tokenizer):
    packer = Packer(tokenizer, OURS, 40)
    sample = Sample("a", "a", "report", "en", "\n\nCaption this image: ", "Yes.", "Yes.")
    row = packer.row(sample)
    arrays = pack([row, row], 40, 0)
    text = arrays["text"][0]
    prefix = [2, *tokenizer.encode("\n\nCaption this image: \n")]
    target = [*tokenizer.encode("Yes."), 1]
    n, m = len(prefix), len(prefix) + len(target)
    assert text.tolist() == prefix + target + [0] * (40 - m)
    for name, first in (("mask_ar", n), ("mask_loss", n), ("mask_input", 0)):
        expected = [first <= i < m for i in range(40)]
        assert arrays[name][1].tolist() == expected, name
    assert [arrays[n].dtype for n in ("text", "mask_ar", "mask_loss", "mask_input")] == [
        np.int32, np.int32, np.int32, bool,
    ]  # fmt: skip


def test_separator_modes(tokenizer):
    joined, apart = (Packer(tokenizer, OURS, 40, mode) for mode in packing.SEPARATOR_MODES)
    # Both an empty context's two line breaks and the last one with a blank before it.
    assert joined.prefix("\n\n").tolist() == [2, *tokenizer.encode("\n\n\n")]
    one, two = tokenizer.encode("\n"), tokenizer.encode("\n\n")
    assert apart.prefix("\n").tolist() == [2, *one, *one]
    assert joined.prefix("\n").tolist() == [2, *two] != apart.prefix("\n").tolist()
    with pytest.raises(UserError, match="'glued' is not one of joined, apart"):
        Packer(tokenizer, OURS, 40, "glued")


def samples(count=60):
    """Samples of every task, with long and short contexts, of random records."""
    rng = np.random.default_rng(1)
    for index in range(count):
        record = make_record(index, words=int(rng.integers(1, 40)))
        for text in record["texts"].values():
            text["clinical_information"] = "Fever and pain. " * int(rng.integers(0, 12))
        for task in TASK_NAMES:
            for language in ("en", "de"):
                for draft in range(len(drafts(record, task, language, OURS)[0])):
                    yield make_sample(record, task, language, None, OURS, index=draft)


def test_the_budget_cuts_no_span_and_keeps_eos(tokenizer):
    rng = np.random.default_rng(0)
    seen = dict.fromkeys(("fits", "context_cut", "target_cut", "entities_dropped_by_cut"), 0)
    for number, sample in enumerate(samples()):
        text_len = int(rng.integers(34, 160))
        row = Packer(tokenizer, OURS, text_len).row(sample)
        found = counters(row)
        assert len(row.prefix) + len(row.target) <= text_len
        assert row.prefix[0] == 2 and row.target[-1] == 1 and 1 not in row.target[:-1]

        target = tokenizer.decode(row.target)
        parsed = parse(target, OURS)
        assert not parsed.malformed
        assert sample.text.startswith(parsed.text)
        rest = sample.text[len(parsed.text) :]
        assert not rest or not parsed.text or rest[0].isspace()  # whole words only
        mentions = [(e.start, e.end, e.class_id) for e in sample.entities]
        kept = [(e.start, e.end, e.class_id) for e in parsed.entities]
        if sample.marks == "masks":  # these marks say no class
            mentions = [(start, end, 0) for start, end, _ in mentions]
        assert kept == mentions[: len(kept)]
        assert found.get("entities_dropped_by_cut", 0) == len(mentions) - len(kept)
        assert ("target_cut" in found) == (parsed.text != sample.text)

        prefix = tokenizer.decode(row.prefix)
        tail = sample.prefix[1 + len(sample.context) :] + "\n"
        assert prefix.startswith("\n") and prefix.endswith(tail)
        context = prefix[1 : len(prefix) - len(tail)]
        assert sample.context.startswith(context)
        assert ("context_cut" in found) == (context != sample.context)
        if "context_cut" in found:
            rest = sample.context[len(context) :]
            assert rest[0].isspace() or not context
        if "target_cut" in found:
            # The target is touched only when the prefix is down to half, or cannot shrink.
            assert len(row.prefix) <= max(text_len // 2, len(tokenizer.encode("\n" + tail)) + 1)
        for name in found or ["fits"]:
            seen[name] += 1
        if number % 7 == 0:  # the cut takes what fits: one word more would not
            assert not found or len(row.prefix) + len(row.target) > text_len // 3
    assert min(seen.values()) > 20, seen


def test_a_context_is_cut_no_further_than_needed(tokenizer):
    record = make_record(1, words=3)
    record["texts"]["en"]["clinical_information"] = "pain " * 60
    sample = make_sample(record, "report", "en", None, OURS)
    row = Packer(tokenizer, OURS, 120).row(sample)
    assert counters(row) == {"context_cut": 1}
    word = len(tokenizer.encode(" pain"))
    assert 120 - 2 * word <= len(row.prefix) + len(row.target) <= 120


def test_what_is_cut_may_have_no_blanks(tokenizer):
    text = "这是一张腹部图像" * 10
    sample = Sample("a", "a", "vqa", "zh", "\n?\n答案： ", text, text, context="?")
    row = Packer(tokenizer, OURS, 90).row(sample)
    kept = tokenizer.decode(row.target)
    assert counters(row)["target_cut"] and text.startswith(kept) and 0 < len(kept) < len(text)


def test_a_budget_below_the_prompt_is_refused(tokenizer):
    sample = make_sample(make_record(0), "detect", "en", None, OURS)
    with pytest.raises(UserError, match=r"text_len 4 is too small.*detect.*rec0_0000.*takes \d+"):
        Packer(tokenizer, OURS, 4).row(sample)
    with pytest.raises(UserError, match="too small"):
        Packer(tokenizer, OURS, 100).prompt(sample, 4)


def test_prompts_are_cut_like_prefixes(tokenizer):
    record = make_record(1)
    record["texts"]["en"]["clinical_information"] = "pain " * 60
    sample = make_sample(record, "report", "en", None, OURS)
    row = Packer(tokenizer, OURS, 200).prompt(sample, 48)
    assert len(row.prefix) <= 48 and len(row.target) == 0 and counters(row) == {"context_cut": 1}
    assert tokenizer.decode(row.prefix).endswith("\nCaption this image: \n")


def test_tokenizer_and_format_must_agree(tokenizer, tmp_path):
    with pytest.raises(UserError, match="extra tokens"):
        Packer(tokenizer, PUBLISHED_DETECTION, 40)
    train_tokenizer(["text"], tmp_path / "small.model", 1000, num_loc=64, num_seg=128)
    small = Tokenizer.load(tmp_path / "small.model", OURS.extra_tokens)
    with pytest.raises(UserError, match="512 bins.*64 loc pieces"):
        Packer(small, OURS, 40)
    Packer(small, GroundingFormat(bins=64), 40)


def test_a_packer_travels(tokenizer):
    sample = make_sample(make_record(0), "detect", "en", None, OURS)
    packer = Packer(tokenizer, OURS, 100)
    copy = pickle.loads(pickle.dumps(packer))
    assert (copy.row(sample).prefix == packer.row(sample).prefix).all()
