"""What is wrong, in one line: of a config, of a checkpoint, of the machine."""

from __future__ import annotations

import difflib
import errno
import inspect
import re
import sys

import lightning.pytorch as pl
from jsonargparse import ArgumentError
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.cli.trainer import Trainer
from finetune_bn.conversion.policies import Policy
from finetune_bn.errors import FinetuneBNError, complaint

# What is wrong with the machine and not with the program.
_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
    *(errno.EISDIR, errno.ENAMETOOLONG, errno.EIO),
}


def for_the_user(error: BaseException) -> str | None:
    """Return in one line what the user can mend; None for a fault of the program, which keeps its traceback.

    Args:
        error: what the command raised.
    """
    if isinstance(error, ArgumentError):
        return f"{readable(str(error))} See `finetune-bn fit --help` and `finetune-bn configs`."
    cause: BaseException | None = error
    while cause is not None:  # jsonargparse wraps what a constructor raises; an error of ours is meant for the user
        if isinstance(cause, (FinetuneBNError, MisconfigurationException)):
            return str(cause)
        if isinstance(cause, FileNotFoundError) and str(cause).startswith("Checkpoint file not found: "):
            path = str(cause).partition(": ")[2]
            return complaint("ckpt_path", path, "a checkpoint that Lightning saved", "Nothing is there.")
        if isinstance(cause, OSError) and cause.errno in _MACHINE:
            return _of_the_machine(cause)
        cause = cause.__cause__
    text = " ".join(str(error).split())
    if isinstance(error, ValueError) and text.startswith("Expected more than 1 value per channel"):
        size = text.partition("torch.Size")[2]
        remedy = "Set data.drop_last or a larger data.batch_size, or freeze the layers: --batch_norm.policy Freeze."
        allowed = "more than one value for each channel, where live BatchNorm layers are trained"
        return complaint("data.batch_size", f"an input of size {size}", allowed, remedy)
    if isinstance(error, RuntimeError) and text.startswith("Error(s) in loading state_dict for"):
        return complaint(
            "ckpt_path", "weights of another network", "those of the model as it is configured", text[:300]
        )
    if isinstance(error, RuntimeError) and "PytorchStreamWriter failed writing" in text:
        return "a file could not be written: is the disk full? Free some space, or set trainer.default_root_dir."
    return None


def _of_the_machine(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    remedy = "Free some space, or write" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "Write"
    return f"{error.strerror}{where}. {remedy} elsewhere (trainer.default_root_dir, output)."


# What jsonargparse says of the mistakes that people make, in the midst of its account of every type that it tried.
_MISTAKE = re.compile(
    r"class_path '(?P<owner>[\w.]+)':\s+Option '(?P<option>[\w.]+)' is not accepted"
    r"|dot import path string: (?P<name>\S+)"
    r"|module '[\w.]+' has no attribute '(?P<missing>\w+)'"
    r"|does not correspond to a subclass of (?P<base>\w+)"
    r"|(?P<fact>No module named '[\w.]+')"
    r"|Expected an? (?P<type>.+)\. Got value: (?P<value>.*)"
    r"|does not accept option '(?P<key>[\w.]+)'"
    r"|unrecognized arguments: --(?P<argument>[\w.]+)"
)
_SECTIONS = {
    "model": pl.LightningModule,
    "data": pl.LightningDataModule,
    "batch_norm": Policy,
    "trainer": pl.Callback,
}


def readable(message: str) -> str:
    """Return what is wrong with a config as one line, out of jsonargparse's account of every type that it tried.

    Args:
        message: the text of its error.
    """
    found = _MISTAKE.search(message)
    part = found.groupdict() if found else {}
    given = re.search(r"Given value: (.*)", message)  # the first one is the innermost
    ahead = message[: found.start() if found else given.start() if given else len(message)]
    where = ".".join(re.findall(r'Parser key "([^"]*)":', ahead))
    if part.get("option"):
        name = str(part["owner"]).rpartition(".")[2]
        option = str(part["option"])
        return f"{where}: {name} has no {option!r}. {_closest(option, _arguments(str(part['owner'])))}"
    if part.get("key") or part.get("argument"):
        key = str(part["key"] or part["argument"])
        return f"There is no {key!r}. {_closest(key, _keys())}".strip()
    if part.get("fact"):
        return f"{where}: {part['fact']}."
    if part.get("value") is not None:
        return complaint(where, part["value"], _in_words(str(part["type"])))
    missing = part.get("name") or part.get("missing")
    if missing or part.get("base"):
        base = _SECTIONS.get(where.partition(".")[0], object)
        allowed = f"the name of a {part.get('base') or base.__name__} or the import path of one"
        return complaint(where, missing or (given and given[1]), allowed, _closest(missing or "", _subclasses(base)))
    types = [kind for kind in re.findall(r"Expected an? (.+)", ahead) if "NoneType" not in kind and "path" not in kind]
    if given and where and types:
        return complaint(where, given[1], ", ".join(_in_words(kind) for kind in types))
    return re.sub(r'Parser key "([^"]*)":', r"\1:", " ".join(message.split()))


def _closest(name: str, known: set[str]) -> str:
    """Return what was probably meant, or what there is, where that is not too much to read."""
    first = name.partition(".")[0]
    close = difflib.get_close_matches(name, known, n=2) or difflib.get_close_matches(first, known, n=1)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"There are: {', '.join(sorted(known))}." if 0 < len(known) <= 40 else ""


def _arguments(class_path: str) -> set[str]:
    """Return the arguments of a class, those that it passes on to its parents included."""
    module, _, name = class_path.rpartition(".")
    found = {"init_args"}
    for cls in inspect.getmro(getattr(sys.modules.get(module), name, object)):
        found |= set(inspect.signature(cls).parameters) - {"self", "args", "kwargs"}
    return found


def _keys() -> set[str]:
    """Return the keys of a config, as far as they do not depend on a class that is chosen in it."""
    top = {*_SECTIONS, "seed_everything", "test_after_fit", "ckpt_path", "optimizer", "lr_scheduler"}
    groups = {"trainer": Trainer, "batch_norm": BatchNormConversion}
    return top | {f"{name}.{key}" for name, cls in groups.items() for key in inspect.signature(cls).parameters}


def _subclasses(base: type) -> set[str]:
    """Return the names of the classes that a config can name without a path."""
    found: set[str] = set()
    classes: list[type] = [] if base is object else base.__subclasses__()
    for cls in classes:
        named = not inspect.isabstract(cls) and not cls.__name__.startswith("_")
        found |= _subclasses(cls) | ({cls.__name__} if named else set())
    return found


def _in_words(kind: str) -> str:
    return re.sub(r"<class '([\w.]+)'>", r"\1", re.sub(r"typing\.Literal\[(.*)\]", r"\1", kind))
