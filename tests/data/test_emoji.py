from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from finetune_bn.data import EmojiData, emoji
from finetune_bn.data.emoji import VENDORS, emoji_index
from finetune_bn.errors import BadData

SMALL = ["arrow", "zodiac", "drink", "game"]


def test_the_index_has_1852_emoji_in_9_categories_and_97_subcategories() -> None:
    index = emoji_index()
    assert len(index) == len({entry.codepoints for entry in index}) == len({entry.name for entry in index}) == 1852
    assert len({entry.category for entry in index}) == 9
    assert len({entry.subcategory for entry in index}) == 97


def test_every_image_of_the_archive_is_there_and_can_be_decoded() -> None:
    data = EmojiData()
    source = data.contents.source
    assert len(source) == 3 * 1852
    step = range(0, len(source), 10)
    source.load(step)
    images = torch.stack([torch.tensor(list(source.read(index).resize((2, 2)).tobytes())) for index in step])
    # drawings on white: no image is blank, and they differ
    assert (images.float().std(dim=1) > 0).float().mean() > 0.99
    assert len({tuple(image.tolist()) for image in images}) > 0.95 * len(step)


def test_no_emoji_is_in_two_splits_whichever_the_vendor() -> None:
    data = EmojiData()
    splits = {split: set(data.identities(split)) for split in ("train", "val", "test")}
    assert not splits["train"] & splits["val"]
    assert not splits["train"] & splits["test"]
    assert not splits["val"] & splits["test"]
    assert len(splits["train"] | splits["val"] | splits["test"]) == 1852
    for split, codepoints in splits.items():
        images = data.image_set(split)
        assert len(images) == 3 * len(codepoints)
        found = {name.split("/")[1].removesuffix(".webp") for name in images.names}
        assert found == codepoints


def test_the_split_does_not_depend_on_vendors_target_or_other_categories() -> None:
    test = EmojiData(categories=["Flags"], target="subcategory").identities("test")
    assert len(test) == 51
    assert test == EmojiData(categories=["Flags"], vendors=["noto"], target="identity").identities("test")
    assert set(test) < set(EmojiData().identities("test"))
    assert test != EmojiData(categories=["Flags"], target="identity", seed=1).identities("test")


def test_labels_are_those_of_the_index_and_classes_keep_their_shares() -> None:
    data = EmojiData(train_size=600)
    category = {entry.codepoints: entry.category for entry in emoji_index()}
    images = data.image_set("train")
    assert len(images) == 600
    for name, label in zip(images.names, images.labels.tolist(), strict=True):
        assert data.class_names[label] == category[name.split("/")[1].removesuffix(".webp")]
    shares = Counter(category.values())
    for label, count in enumerate(torch.bincount(images.labels, minlength=9).tolist()):
        assert abs(count - 600 * shares[data.class_names[label]] / 1852) < 5
    assert all(abs(count - 200) < 10 for count in Counter(images.domains).values())


@pytest.mark.parametrize(("target", "classes"), [("category", 3), ("subcategory", 4), ("identity", 78), ("vendor", 3)])
def test_each_target_numbers_its_classes_over_all_emoji_in_use(target: str, classes: int) -> None:
    data = EmojiData(target=target, subcategories=SMALL)  # type: ignore[arg-type]
    assert data.num_classes == len(set(data.class_names)) == classes
    seen = {split: set(data.image_set(split).labels.tolist()) for split in ("train", "val", "test")}
    assert set().union(*seen.values()) == set(range(classes))
    # retrieval of unseen identities: no test label is trained on
    assert seen["train"].isdisjoint(seen["test"]) == (target == "identity")


def test_identity_labels_are_shared_by_the_vendors() -> None:
    images = EmojiData(target="identity", subcategories=SMALL).image_set("test")
    label_of: dict[str, set[int]] = {}
    for name, label in zip(images.names, images.labels.tolist(), strict=True):
        label_of.setdefault(name.split("/")[1], set()).add(label)
    assert all(len(labels) == 1 for labels in label_of.values())
    assert len(label_of) == len(set(images.labels.tolist()))


def test_training_on_one_vendor_and_testing_on_the_others() -> None:
    data = EmojiData(train_vendors=["noto"], vendors=["fluent", "twemoji"], subcategories=SMALL)
    assert data.domains == ["fluent", "twemoji"]
    assert set(data.image_set("train").domains) == {"noto"}
    for loaders in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert [set(loader.dataset.domains) for loader in loaders] == [{"fluent"}, {"twemoji"}]  # type: ignore[attr-defined]


def test_setup_decodes_only_what_the_stage_needs() -> None:
    data = EmojiData(subcategories=SMALL)
    data.setup("test")
    loaded = [index for index, done in enumerate(data.contents.source._loaded) if done]  # type: ignore[attr-defined]
    assert loaded == data.split("test")


def test_the_attributes_a_task_needs_are_known_before_setup() -> None:
    data = EmojiData()
    assert data.num_classes == 9
    assert data.class_names[0] == "Activities"
    assert data.domains == list(VENDORS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "colour"}, "target: got 'colour'; allowed: category, subcategory, identity, vendor"),
        ({"vendors": ["nototo"]}, "vendors: got 'nototo'; allowed: noto, twemoji, fluent.*Did you mean 'noto'"),
        ({"vendors": []}, r"vendors: got \[\]"),
        ({"train_vendors": ["apple"]}, "train_vendors: got 'apple'"),
        ({"train_vendors": []}, r"train_vendors: got \[\]"),
        ({"categories": ["flags"]}, "categories: got 'flags'; allowed: Activities, .*Did you mean 'Flags'"),
        ({"subcategories": ["arrows"]}, "subcategories: got 'arrows'.*Did you mean 'arrow'"),
        ({"categories": ["Flags"], "subcategories": ["arrow"]}, "subcategories of the chosen categories: country-flag"),
    ],
)
def test_an_unknown_name_is_one_error_that_lists_what_there_is(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BadData, match=message):
        EmojiData(**arguments)  # type: ignore[arg-type]


def test_one_class_and_shares_that_come_out_empty_are_refused() -> None:
    with pytest.raises(BadData, match=r"classes: got .*two classes or more"):
        _ = EmojiData(categories=["Flags"]).num_classes
    with pytest.raises(BadData, match=r"val_fraction: got 0.01; allowed: 0, or a share that gives some image"):
        EmojiData(subcategories=["arrow", "zodiac"], target="subcategory", val_fraction=0.01).setup("fit")


def test_the_archive_is_read_also_where_the_package_lies_in_a_zip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As importlib.resources gives it for a wheel that was never unpacked: something to read that has no path."""
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(str(emoji.resources.files("finetune_bn.data") / "emoji64.zip"), "finetune_bn/data/emoji64.zip")
    packed = zipfile.Path(wheel, "finetune_bn/data/")
    monkeypatch.setattr(emoji.resources, "files", lambda package: packed)
    data = EmojiData(subcategories=SMALL)
    data.setup("test")
    assert len(data.image_set("test")) == 48


def test_the_notice_of_the_drawings_lies_beside_them() -> None:
    notice = (emoji.resources.files("finetune_bn.data") / "emoji64_NOTICE.md").read_text()
    assert all(vendor in notice for vendor in VENDORS)
    assert "CC-BY 4.0" in notice
