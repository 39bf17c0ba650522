"""Any folder with one sub-folder of images per class, with or without ready splits and domains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from finetune_bn.data.base import NAMES_SHOWN, Contents, ImageDataModule
from finetune_bn.data.checks import choice, choices
from finetune_bn.data.images import ImageSource
from finetune_bn.data.walk import Walk, check_name, subfolders, visible
from finetune_bn.errors import BadData, complaint

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
ONE_DOMAIN = "all"


class Entry(NamedTuple):
    """One image file."""

    path: Path
    class_name: str
    domain: str


class FileImages(ImageSource):
    """Image files, read anew each time.

    Args:
        entries: the files with what is known of them.
        number: class number by class name.
    """

    def __init__(self, entries: list[Entry], number: dict[str, int]) -> None:
        self.paths = [entry.path for entry in entries]
        self.labels = [number[entry.class_name] for entry in entries]
        self.domains = [entry.domain for entry in entries]

    def open(self, index: int) -> Image.Image:
        """Return image `index`, decoded."""
        with Image.open(self.paths[index]) as image:
            image.load()
            return image

    def name(self, index: int) -> str:
        """Return the path of image `index`."""
        return str(self.paths[index])


class ImageFolderData(ImageDataModule):
    """Images in folders, one per class; the folder's name is the class.

    Two layouts are understood. With ready splits: `root/train/<class>/*.jpg` and the same under `val` (or `valid`,
    `validation`) and `test`; without `val` a part of `train` becomes the validation set, without `test` there is no
    test set. Without splits: `root/<class>/*.jpg`, cut into train, val and test by the seed, class by class.
    Sub-folders of a class count as part of it; hidden files are not looked at; files that are no images by their
    suffix are left alone, counted and listed. Links are followed, but each folder is looked at once; a folder that is
    reached as two classes or splits is refused.

    Attributes:
        ignored: the files and folders left alone because they are neither an image nor a split.

    Args:
        root: The folder.
        domains_from: Where the domain of an image (camera, site, style, ...) is from, for one evaluation per domain.
            subfolder: there is a folder per domain above the classes, `<domain>/<class>/*.jpg`. null: no domains.
        train_domains: Train on these domains only. Default: all.
    """

    def __init__(
        self,
        root: str,
        *,
        domains_from: Literal["subfolder"] | None = None,
        train_domains: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise BadData(complaint("root", root, "an existing folder with one sub-folder of images per class"))
        if domains_from is not None:
            choice("domains_from", domains_from, ["subfolder"], "Or leave it out for no domains.")
        if train_domains is not None and domains_from is None:
            raise BadData(complaint("train_domains", train_domains, "nothing without domains_from: subfolder"))
        self.domains_from = domains_from
        self.train_domains = train_domains
        self.ignored: list[str] = []

    def _scan(self) -> Contents:
        self.ignored = []
        folders = self._split_folders()
        walk = Walk(self.root)
        entries = {split: self._read(folder, split, walk) for split, folder in folders.items()}
        self.ignored += walk.left_out
        if self.ignored:
            shown = ", ".join(self.ignored[:NAMES_SHOWN]) + (", ..." if len(self.ignored) > NAMES_SHOWN else "")
            rank_zero_warn(f"{len(self.ignored)} files or folders are not images or splits and left alone: {shown}")
        class_names = self._common_classes(entries)

        everything = [entry for members in entries.values() for entry in members]
        number = {name: label for label, name in enumerate(class_names)}
        source = FileImages(everything, number)
        keys = [entry.path.relative_to(self.root).as_posix() for entry in everything]
        splits = self._splits_of(entries, keys)
        return Contents(source, class_names, self._domains_of(splits, source), splits, keys)

    def _split_folders(self) -> dict[str, Path]:
        """Return the folder of each ready split, or `{"": root}` if the folder has none."""
        found: dict[str, Path] = {}
        for split, names in SPLIT_FOLDERS.items():
            # a folder of that name without sub-folders is a class that happens to be called so
            present = [self.root / name for name in names if subfolders(self.root / name)]
            if len(present) > 1:
                given = [folder.name for folder in present]
                raise BadData(complaint(f"root ({self.root})", given, f"one of them, as the {split} split"))
            if present:
                found[split] = present[0]
        if found and "train" not in found:
            given = [folder.name for folder in found.values()]
            remedy = "Add train/, or move the classes out of these folders to have them split by the seed."
            raise BadData(complaint(f"root ({self.root})", given, "a train folder beside them", remedy))
        if not found:
            return {"": self.root}
        others = [path for path in visible(self.root) if path not in found.values()]
        self.ignored += [str(path) for path in others]
        return found

    def _read(self, folder: Path, split: str, walk: Walk) -> list[Entry]:
        if self.domains_from is None:
            return self._read_classes(folder, ONE_DOMAIN, split, walk)
        domains = subfolders(folder)
        if not domains:
            remedy = "Leave domains_from out if the classes lie directly in it."
            raise BadData(complaint(f"root ({folder})", [], "one sub-folder per domain, with the classes", remedy))
        self.ignored += [str(path) for path in visible(folder) if not path.is_dir()]
        return [entry for domain in domains for entry in self._read_classes(domain, domain.name, split, walk)]

    def _read_classes(self, folder: Path, domain: str, split: str, walk: Walk) -> list[Entry]:
        classes = subfolders(folder)
        if not classes:
            raise BadData(complaint(f"root ({folder})", [], "one sub-folder of images per class"))
        self.ignored += [str(path) for path in visible(folder) if not path.is_dir()]
        entries: list[Entry] = []
        empty: list[str] = []
        for path in classes:
            check_name(path)
            parts = (split, domain if self.domains_from else "", f"class {path.name}")
            files = walk.files(path, " ".join(part for part in parts if part))
            images = [file for file in files if file.suffix.lower() in SUFFIXES]
            self.ignored += [str(file) for file in files if file.suffix.lower() not in SUFFIXES]
            entries += [Entry(image, path.name, domain) for image in images]
            if not images:
                empty.append(str(path))
        if empty:
            remedy = "Remove the folder or add images to it."
            raise BadData(
                complaint("class folder without images", empty, f"at least one of *{' *'.join(SUFFIXES)}", remedy)
            )
        return entries

    def _common_classes(self, entries: dict[str, list[Entry]]) -> list[str]:
        """Return the sorted class names; every split and domain must have the same ones."""
        groups: dict[str, set[str]] = {}
        for split, members in entries.items():
            for entry in members:
                place = "/".join(part for part in (split, entry.domain if self.domains_from else "") if part)
                groups.setdefault(place or "root", set()).add(entry.class_name)
        (first, expected), *others = groups.items()
        for place, names in others:
            if names != expected:
                given = f"missing in {place}: {sorted(expected - names)}; only in {place}: {sorted(names - expected)}"
                remedy = "A class is its folder's name, letter by letter; rename, add or remove folders."
                raise BadData(complaint("classes", given, f"the same class folders in {first} and {place}", remedy))
        return sorted(expected)

    def _splits_of(self, entries: dict[str, list[Entry]], keys: list[str]) -> dict[str, list[int]]:
        everything = [entry for members in entries.values() for entry in members]
        strata = [(entry.domain, entry.class_name) for entry in everything]
        if "" in entries:
            splits = self._cut(keys, strata, self.val_fraction, self.test_fraction)
        else:
            splits, start = {"train": [], "val": [], "test": []}, 0
            for split, members in entries.items():
                splits[split] = list(range(start, start + len(members)))
                start += len(members)
            if not splits["val"]:
                # train comes first, so that positions in the cut are image numbers
                count = len(splits["train"])
                splits = {**splits, **_without_test(self._cut(keys[:count], strata[:count], self.val_fraction, 0.0))}
        if self.domains_from is not None:
            domains = sorted({everything[index].domain for index in splits["train"]})
            wanted = choices("train_domains", self.train_domains, domains)
            splits["train"] = [index for index in splits["train"] if everything[index].domain in wanted]
        return splits

    def _domains_of(self, splits: dict[str, list[int]], source: FileImages) -> list[str]:
        """Return the domains that are evaluated; val and test must have the same ones."""
        found = {
            split: sorted({source.domains[index] for index in splits[split]})
            for split in ("val", "test", "train")
            if splits[split]
        }
        if "val" in found and "test" in found and found["val"] != found["test"]:
            remedy = "Give both the same domain folders, so that each domain has a loader in both."
            raise BadData(complaint("domains of val and test", (found["val"], found["test"]), "the same ones", remedy))
        return next(iter(found.values()))


def _without_test(splits: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: splits[name] for name in ("train", "val")}
