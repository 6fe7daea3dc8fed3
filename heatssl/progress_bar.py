"""Bars over what takes long: on a terminal alone, once the work has taken two seconds, and gone when it is done."""

from collections.abc import Iterable
from typing import Any, TypeVar, overload

from tqdm import tqdm

Item = TypeVar("Item")


@overload
def progress_bar(items: Iterable[Item], *, name: str, shown: bool = True, **settings: Any) -> "tqdm[Item]": ...
@overload
def progress_bar(*, name: str, shown: bool = True, **settings: Any) -> "tqdm[Any]": ...


def progress_bar(items: Iterable[Any] | None = None, *, name: str, shown: bool = True, **settings: Any) -> "tqdm[Any]":
    """The items, or with ``total=`` a bar that the caller moves on by ``update``.

    Args:
        items: what is gone through.
        name: of the work, in front of the bar.
        shown: False: no bar, for all processes but the first and for functions that nobody asked for one.
        **settings: of tqdm, such as ``unit`` and ``total``.
    """
    return tqdm(items, desc=name, delay=2, leave=False, disable=None if shown else True, **settings)
