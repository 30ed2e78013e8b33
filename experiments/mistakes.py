"""What is wrong with the words of a command, and what was probably meant."""

from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

Compose = Callable[[Sequence[str]], DictConfig]


def mistake_in(words: Sequence[str], conf: Path, compose: Compose) -> str | None:
    """One sentence about the first word that cannot be; None: each of them can.

    Args:
        words: overrides, as on a command line.
        conf: folder whose folders are the groups.
        compose: makes a configuration of choices of groups alone.
    """
    for word in words:
        if word.startswith("-"):
            continue
        if "=" not in word.removeprefix("~"):
            return f"{word}: write key=value, as in seed=1"
    choices = [word for word in words if (conf / _key(word)).is_dir()]
    for choice in choices:
        sentence = _wrong_choice(choice, conf)
        if sentence is not None:
            return sentence
    keys = _keys(compose(choices))
    for word in words:
        key = _key(word)
        is_plain = key == word.partition("=")[0] and not key.startswith(("-", "hydra."))
        if is_plain and word not in choices and key not in keys:
            return _unknown_key(key, keys)
    named = {_key(word) for word in words}
    if "epochs" in keys and not named & {"experiment", "run"}:
        return f"no recipe is chosen: add experiment=<{'|'.join(options(conf, 'experiment'))}>"
    return None


def options(conf: Path, group: str) -> list[str]:
    """What may be chosen of a group."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _wrong_choice(choice: str, conf: Path) -> str | None:
    group, _, name = choice.lstrip("+~").partition("=")
    known = options(conf, group)
    if name in known:
        return None
    noun = "recipe" if group == "experiment" else group
    nearest = get_close_matches(name, known, n=1)
    meant = f"did you mean {nearest[0]}? " if nearest else ""
    return f"{group}={name}: there is no such {noun}; {meant}choose from {', '.join(known)}"


def _keys(config: DictConfig) -> list[str]:
    """All keys, dotted; those of a dictionary of free names end at it."""
    keys = []
    for name in map(str, config):
        keys.append(name)
        if not OmegaConf.is_missing(config, name) and not OmegaConf.is_interpolation(config, name):
            part = config._get_node(name)
            if isinstance(part, DictConfig) and not part._is_none():
                keys += [f"{name}.{key}" for key in _keys(part)]
    return keys


def _unknown_key(key: str, keys: Collection[str]) -> str:
    path, _, last = key.rpartition(".")
    same_end = [known for known in keys if known.rpartition(".")[2] == last]
    nearest = same_end or get_close_matches(key, keys, n=1, cutoff=0.75)
    if nearest:
        return f"{key}: there is no such key; did you mean {' or '.join(nearest)}?"
    siblings = [known for known in keys if known.rpartition(".")[0] == path]
    return f"{key}: there is no such key; there are {', '.join(siblings)}"
